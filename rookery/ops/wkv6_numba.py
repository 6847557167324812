"""Loops of `wkv6_native`, compiled by Numba.

All arrays are C-contiguous: (T, H, N), and states (B, H, N, N), [key, value]. Sequence i of B is made of the tokens
bounds[i] to bounds[i + 1] - 1 of T, and of the chunks from chunks[i] on. A piece of work is one head of one sequence.
"""

from __future__ import annotations

import numpy as np

from rookery.ops.jit import inner, outer

CHUNK = 16


@inner
def step(S, r, d, k, v, u, y, size):
    """Read the state, y = S^T r + v (u . k . r), then advance it by one token in place."""
    N = len(size)
    own = r.dtype.type(0)
    for i in range(N):
        own += r[i] * u[i] * k[i]
    for j in range(N):
        y[j] = own * v[j]
    for i in range(N):
        di, ki, ri = d[i], k[i], r[i]
        for j in range(N):
            s = S[i, j]
            y[j] += s * ri
            S[i, j] = s * di + v[j] * ki


@inner
def replay(S, d, k, v, after, size):
    """Like `step`, into another state and without reading it."""
    N = len(size)
    for i in range(N):
        di, ki = d[i], k[i]
        for j in range(N):
            after[i, j] = S[i, j] * di + v[j] * ki


@inner
def step_back(before, G, r, d, k, v, u, dy, dr, dd, dk, dv, du, size):
    """Gradients of one token, du being added to; G is the gradient of the state after it, then before it."""
    N = len(size)
    own = down = dy.dtype.type(0)
    for i in range(N):
        own += r[i] * u[i] * k[i]
        down += v[i] * dy[i]
    for j in range(N):
        dv[j] = own * dy[j]
    for i in range(N):
        di, ki, ri = d[i], k[i], r[i]
        sum_r = sum_k = sum_d = dy.dtype.type(0)
        for j in range(N):
            g = G[i, j]
            sum_r += before[i, j] * dy[j]
            sum_k += g * v[j]
            sum_d += g * before[i, j]
            dv[j] += g * ki
            G[i, j] = g * di + ri * dy[j]
        dr[i] = sum_r + u[i] * ki * down
        dk[i] = sum_k + u[i] * ri * down
        dd[i] = sum_d
        du[i] += ri * ki * down


@outer
def forward(first, last, size, bounds, chunks, r, d, k, v, u, S, y, starts):
    """`S` goes from the initial to the final state; `starts` (chunks, H, N, N) may have no chunks."""
    H = r.shape[1]
    for piece in range(first, last):
        i, h = piece // H, piece % H
        for t in range(bounds[i], bounds[i + 1]):
            n = t - bounds[i]
            if starts.shape[0] and n % CHUNK == 0:
                starts[chunks[i] + n // CHUNK, h] = S[i, h]
            step(S[i, h], r[t, h], d[t, h], k[t, h], v[t, h], u[h], y[t, h], size)


@outer
def backward(first, last, size, bounds, chunks, r, d, k, v, u, starts, dy, G, dr, dd, dk, dv, du):
    """`G` goes from the gradient of the final to that of the initial state; `du` (B, H, N) starts as zeros."""
    H, N = r.shape[1], len(size)
    states = np.empty((CHUNK, N, N), r.dtype)
    for piece in range(first, last):
        i, h = piece // H, piece % H
        for c in range(chunks[i + 1] - 1, chunks[i] - 1, -1):
            begin = bounds[i] + (c - chunks[i]) * CHUNK
            end = min(begin + CHUNK, bounds[i + 1])
            states[0] = starts[c, h]
            for t in range(begin, end - 1):
                n = t - begin
                replay(states[n], d[t, h], k[t, h], v[t, h], states[n + 1], size)
            for t in range(end - 1, begin - 1, -1):
                step_back(
                    states[t - begin], G[i, h], r[t, h], d[t, h], k[t, h], v[t, h], u[h], dy[t, h],
                    dr[t, h], dd[t, h], dk[t, h], dv[t, h], du[i, h], size,
                )  # fmt: skip
