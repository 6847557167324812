"""Loops of `wkv7_native`, compiled by Numba.

All arrays are C-contiguous: (T, H, N), and states (B, H, N, N), [key, value]. Sequence i of B is made of the tokens
bounds[i] to bounds[i + 1] - 1 of T, and of the chunks from chunks[i] on. A piece of work is one head of one sequence.
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
def forward(first, last, size, bounds, chunks, r, d, k, v, a, b, S, y, u, starts):
    """`S` goes from the initial to the final state; `starts` (chunks, H, N, N) may have no chunks."""
    H = r.shape[1]
    for piece in range(first, last):
        i, h = piece // H, piece % H
        for t in range(bounds[i], bounds[i + 1]):
            n = t - bounds[i]
            if starts.shape[0] and n % CHUNK == 0:
                starts[chunks[i] + n // CHUNK, h] = S[i, h]
            weighted_rows(S[i, h], a[t, h], u[t, h], size)
            step(S[i, h], r[t, h], d[t, h], k[t, h], v[t, h], b[t, h], u[t, h], y[t, h], size)


@outer
def backward(first, last, size, bounds, chunks, r, d, k, v, a, b, u, starts, dy, G, dr, dd, dk, dv, da, db):
    """`G` goes from the gradient of the final to that of the initial state."""
    H, N = r.shape[1], len(size)
    states = np.empty((CHUNK + 1, N, N), r.dtype)
    du = np.empty(N, r.dtype)
    for piece in range(first, last):
        i, h = piece // H, piece % H
        for c in range(chunks[i + 1] - 1, chunks[i] - 1, -1):
            begin = bounds[i] + (c - chunks[i]) * CHUNK
            end = min(begin + CHUNK, bounds[i + 1])
            states[0] = starts[c, h]
            for t in range(begin, end):
                n = t - begin
                replay(states[n], d[t, h], k[t, h], v[t, h], b[t, h], u[t, h], states[n + 1], size)
            for t in range(end - 1, begin - 1, -1):
                n = t - begin
                step_back(
                    states[n], states[n + 1], G[i, h],
                    r[t, h], d[t, h], k[t, h], v[t, h], a[t, h], b[t, h], u[t, h], dy[t, h],
                    du, dr[t, h], dd[t, h], dk[t, h], dv[t, h], da[t, h], db[t, h], size,
                )  # fmt: skip
