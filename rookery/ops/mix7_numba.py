"""Loops of `mix7`, compiled by Numba: the recurrence of `wkv7_numba` with the steps of its head around it.

Arrays are C-contiguous fp32 and (T, H, N), but `parameters` (H, 5, N) and the states (B, H, N, N), [key, value].
Sequences, chunks and pieces of work are those of `wkv7_numba`.
"""

from __future__ import annotations

import numpy as np

from rookery.ops.jit import inner, outer
from rookery.ops.wkv7_native import LOG_DECAY_SCALE
from rookery.ops.wkv7_numba import CHUNK, replay, step, step_back, weighted_rows

SCALE = np.float32(LOG_DECAY_SCALE)
ONE = np.float32(1)  # an integer 1 would turn the arithmetic into double precision
K_K, K_A, R_K, LN_WEIGHT, LN_BIAS = range(5)


@inner
def prepare(k, a, p, removal, key, b, size):
    """removal = -kappa, key = the modified key, b = kappa * a. Returns 1 / |k * k_k|."""
    N = len(size)
    squares = np.float32(0)
    for j in range(N):
        x = k[j] * p[K_K, j]
        squares += x * x
    inverse = ONE / max(np.sqrt(squares), np.float32(1e-12))
    for j in range(N):
        kappa = k[j] * p[K_K, j] * inverse
        removal[j] = -kappa
        b[j] = kappa * a[j]
        key[j] = k[j] * (ONE + (a[j] - ONE) * p[K_A, j])
    return inverse


@inner
def prepare_back(k, a, p, inverse, dremoval, dkey, db, dk, da, dp, size):
    """Gradients of k and a, and what this token adds to those of the parameters."""
    N = len(size)
    along = np.float32(0)
    for j in range(N):
        along += k[j] * p[K_K, j] * inverse * (db[j] * a[j] - dremoval[j])
    for j in range(N):
        kappa = k[j] * p[K_K, j] * inverse
        dunit = (db[j] * a[j] - dremoval[j] - kappa * along) * inverse
        da[j] = db[j] * kappa + dkey[j] * k[j] * p[K_A, j]
        dk[j] = dkey[j] * (ONE + (a[j] - ONE) * p[K_A, j]) + dunit * p[K_K, j]
        dp[K_K, j] += dunit * k[j]
        dp[K_A, j] += dkey[j] * k[j] * (a[j] - ONE)


@inner
def finish(y, r, key, v, g, p, eps, out, size):
    """out = (group_norm(y) + bonus) * g."""
    N = len(size)
    total = squares = bonus = np.float32(0)
    for j in range(N):
        total += y[j]
        bonus += r[j] * key[j] * p[R_K, j]
    mean = total / np.float32(N)
    for j in range(N):
        squares += (y[j] - mean) * (y[j] - mean)
    scale = ONE / np.sqrt(squares / np.float32(N) + eps)
    for j in range(N):
        out[j] = ((y[j] - mean) * scale * p[LN_WEIGHT, j] + p[LN_BIAS, j] + bonus * v[j]) * g[j]


@inner
def finish_back(dout, y, r, key, v, g, p, eps, dy, dr, dkey, dv, dg, dp, size):
    N = len(size)
    total = squares = bonus = dbonus = np.float32(0)
    for j in range(N):
        total += y[j]
        bonus += r[j] * key[j] * p[R_K, j]
        dbonus += dout[j] * g[j] * v[j]
    mean = total / np.float32(N)
    for j in range(N):
        squares += (y[j] - mean) * (y[j] - mean)
    scale = ONE / np.sqrt(squares / np.float32(N) + eps)
    sum_h = sum_hy = np.float32(0)
    for j in range(N):
        h = dout[j] * g[j] * p[LN_WEIGHT, j]
        sum_h += h
        sum_hy += h * (y[j] - mean) * scale
    sum_h /= np.float32(N)
    sum_hy /= np.float32(N)
    for j in range(N):
        normal = (y[j] - mean) * scale
        dz = dout[j] * g[j]
        dy[j] = scale * (dz * p[LN_WEIGHT, j] - sum_h - normal * sum_hy)
        dg[j] = dout[j] * (normal * p[LN_WEIGHT, j] + p[LN_BIAS, j] + bonus * v[j])
        dv[j] = dz * bonus
        dr[j] = dbonus * key[j] * p[R_K, j]
        dkey[j] = dbonus * r[j] * p[R_K, j]
        dp[R_K, j] += dbonus * r[j] * key[j]
        dp[LN_WEIGHT, j] += dz * normal
        dp[LN_BIAS, j] += dz


@inner
def gather(slope, decay, ddecay, dr_state, dkey_state, dv_state, dw, dr, dkey, dv, size):
    """Add what came through the state, and carry the decay's gradient to its pre-activation;
    slope is the derivative of the sigmoid there."""
    N = len(size)
    for j in range(N):
        dw[j] = ddecay[j] * decay[j] * slope[j] * SCALE
        dr[j] += dr_state[j]
        dkey[j] += dkey_state[j]
        dv[j] += dv_state[j]


@outer
def forward(first, last, size, bounds, chunks, r, d, k, v, a, g, parameters, S, y, u, starts, out, eps64):
    H, N = r.shape[1], len(size)
    eps = np.float32(eps64)
    local = np.empty((3, N), np.float32)
    removal, key, b = local[0], local[1], local[2]
    for piece in range(first, last):
        i, h = piece // H, piece % H
        p = parameters[h]
        for t in range(bounds[i], bounds[i + 1]):
            n = t - bounds[i]
            if starts.shape[0] and n % CHUNK == 0:
                starts[chunks[i] + n // CHUNK, h] = S[i, h]
            prepare(k[t, h], a[t, h], p, removal, key, b, size)
            weighted_rows(S[i, h], removal, u[t, h], size)
            step(S[i, h], r[t, h], d[t, h], key, v[t, h], b, u[t, h], y[t, h], size)
            finish(y[t, h], r[t, h], key, v[t, h], g[t, h], p, eps, out[t, h], size)


@outer
def backward(
    first,
    last,
    size,
    bounds,
    chunks,
    r,
    d,
    k,
    v,
    a,
    g,
    slope,
    parameters,
    y,
    u,
    starts,
    dout,
    G,
    dr,
    dw,
    dk,
    dv,
    da,
    dg,
    dparameters,
    eps64,
):
    H, N = r.shape[1], len(size)
    eps = np.float32(eps64)
    states = np.empty((CHUNK + 1, N, N), np.float32)
    prepared = np.empty((CHUNK, 3, N), np.float32)
    inverses = np.empty(CHUNK, np.float32)
    local = np.empty((9, N), np.float32)
    dy, du, dkey, dr_state, dd = local[0], local[1], local[2], local[3], local[4]
    dkey_state, dv_state, dremoval, db = local[5], local[6], local[7], local[8]
    for piece in range(first, last):
        i, h = piece // H, piece % H
        p, dp = parameters[h], dparameters[i, h]
        for c in range(chunks[i + 1] - 1, chunks[i] - 1, -1):
            begin = bounds[i] + (c - chunks[i]) * CHUNK
            end = min(begin + CHUNK, bounds[i + 1])
            states[0] = starts[c, h]
            for t in range(begin, end):
                n = t - begin
                removal, key, b = prepared[n, 0], prepared[n, 1], prepared[n, 2]
                inverses[n] = prepare(k[t, h], a[t, h], p, removal, key, b, size)
                replay(states[n], d[t, h], key, v[t, h], b, u[t, h], states[n + 1], size)
            for t in range(end - 1, begin - 1, -1):
                n = t - begin
                removal, key, b = prepared[n, 0], prepared[n, 1], prepared[n, 2]
                finish_back(
                    dout[t, h], y[t, h], r[t, h], key, v[t, h], g[t, h], p, eps,
                    dy, dr[t, h], dkey, dv[t, h], dg[t, h], dp, size,
                )  # fmt: skip
                step_back(
                    states[n], states[n + 1], G[i, h],
                    r[t, h], d[t, h], key, v[t, h], removal, b, u[t, h], dy,
                    du, dr_state, dd, dkey_state, dv_state, dremoval, db, size,
                )  # fmt: skip
                gather(
                    slope[t, h], d[t, h], dd, dr_state, dkey_state, dv_state,
                    dw[t, h], dr[t, h], dkey, dv[t, h], size,
                )  # fmt: skip
                prepare_back(k[t, h], a[t, h], p, inverses[n], dremoval, dkey, db, dk[t, h], da[t, h], dp, size)
