"""Loops of `wkv7_native`, compiled by Numba.

All arrays are C-contiguous: (B, T, H, N), and states (B, H, N, N), [key, value]. A piece of work is one head of one
sequence.
"""

from __future__ import annotations

import numpy as np

from rookery.ops.jit import inner, outer

CHUNK = 16


@inner
def weighted_rows(S, a, out, size):
    """out = S^T a."""
    N = len(size)
    for j in range(N):
        out[j] = 0
    for i in range(0, N, 4):
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        for j in range(N):
            out[j] += a0 * S[i, j] + a1 * S[i + 1, j] + a2 * S[i + 2, j] + a3 * S[i + 3, j]


@inner
def step(S, r, d, k, v, b, u, y, size):
    """Advance the state by one token in place and read it: y = S^T r."""
    N = len(size)
    for j in range(N):
        y[j] = 0
    for i in range(N):
        di, bi, ki, ri = d[i], b[i], k[i], r[i]
        for j in range(N):
            s = S[i, j] * di + u[j] * bi + v[j] * ki
            S[i, j] = s
            y[j] += s * ri


@inner
def replay(S, d, k, v, b, u, after, size):
    """Like `step`, into another state and without reading it."""
    N = len(size)
    for i in range(N):
        di, bi, ki = d[i], b[i], k[i]
        for j in range(N):
            after[i, j] = S[i, j] * di + u[j] * bi + v[j] * ki


@inner
def step_back(before, after, G, r, d, k, v, a, b, u, dy, du, dr, dd, dk, dv, da, db, size):
    """Gradients of one token; G is the gradient of the state after it, then before it."""
    N = len(size)
    for j in range(N):
        du[j] = 0
        dv[j] = 0
    for i in range(N):
        ri, bi, ki = r[i], b[i], k[i]
        sum_r = sum_k = sum_b = sum_d = dy.dtype.type(0)
        for j in range(N):
            g = G[i, j] + ri * dy[j]
            G[i, j] = g
            sum_r += after[i, j] * dy[j]
            sum_k += g * v[j]
            sum_b += g * u[j]
            sum_d += g * before[i, j]
            du[j] += g * bi
            dv[j] += g * ki
        dr[i] = sum_r
        dk[i] = sum_k
        db[i] = sum_b
        dd[i] = sum_d
    for i in range(N):
        di, ai = d[i], a[i]
        sum_a = dy.dtype.type(0)
        for j in range(N):
            sum_a += before[i, j] * du[j]
            G[i, j] = G[i, j] * di + ai * du[j]
        da[i] = sum_a


@outer
def forward(first, last, size, r, d, k, v, a, b, S, y, u, starts):
    """`S` goes from the initial to the final state; `starts` (B, H, chunks, N, N) may have no chunks."""
    T, H = r.shape[1], r.shape[2]
    for piece in range(first, last):
        i, h = piece // H, piece % H
        for t in range(T):
            if starts.shape[2] and t % CHUNK == 0:
                starts[i, h, t // CHUNK] = S[i, h]
            weighted_rows(S[i, h], a[i, t, h], u[i, t, h], size)
            step(S[i, h], r[i, t, h], d[i, t, h], k[i, t, h], v[i, t, h], b[i, t, h], u[i, t, h], y[i, t, h], size)


@outer
def backward(first, last, size, r, d, k, v, a, b, u, starts, dy, G, dr, dd, dk, dv, da, db):
    """`G` goes from the gradient of the final to that of the initial state."""
    T, H, N = r.shape[1], r.shape[2], len(size)
    states = np.empty((CHUNK + 1, N, N), r.dtype)
    du = np.empty(N, r.dtype)
    for piece in range(first, last):
        i, h = piece // H, piece % H
        for c in range(starts.shape[2] - 1, -1, -1):
            begin, end = c * CHUNK, min((c + 1) * CHUNK, T)
            states[0] = starts[i, h, c]
            for t in range(begin, end):
                n = t - begin
                replay(states[n], d[i, t, h], k[i, t, h], v[i, t, h], b[i, t, h], u[i, t, h], states[n + 1], size)
            for t in range(end - 1, begin - 1, -1):
                n = t - begin
                step_back(
                    states[n], states[n + 1], G[i, h],
                    r[i, t, h], d[i, t, h], k[i, t, h], v[i, t, h], a[i, t, h], b[i, t, h], u[i, t, h], dy[i, t, h],
                    du, dr[i, t, h], dd[i, t, h], dk[i, t, h], dv[i, t, h], da[i, t, h], db[i, t, h], size,
                )  # fmt: skip
