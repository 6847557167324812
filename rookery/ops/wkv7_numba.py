"""Loops of `wkv7_native`, compiled by Numba.

Each loop writes one array beside the row it updates: with more, LLVM cannot prove that they do not overlap, gives up
vector registers, and the loop takes five times as long.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from numba import njit, prange

CHUNK = 16
# Sums may be reassociated and contracted (that is what lets them use vector registers); NaN and Inf stay what they are.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def build(N: int) -> SimpleNamespace:
    """Kernels for head size `N`. All arrays are C-contiguous; states are (B, H, N, N), [key, value]."""

    @njit(fastmath=FAST, cache=True)
    def weighted_rows(S, a, out):
        """out = S^T a."""
        for j in range(N):
            out[j] = 0
        for i in range(0, N, 4):
            a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
            for j in range(N):
                out[j] += a0 * S[i, j] + a1 * S[i + 1, j] + a2 * S[i + 2, j] + a3 * S[i + 3, j]

    @njit(fastmath=FAST, cache=True)
    def step(S, r, d, k, v, b, u, y):
        """Advance the state by one token in place and read it: y = S^T r."""
        for j in range(N):
            y[j] = 0
        for i in range(N):
            di, bi, ki, ri = d[i], b[i], k[i], r[i]
            for j in range(N):
                s = S[i, j] * di + u[j] * bi + v[j] * ki
                S[i, j] = s
                y[j] += s * ri

    @njit(fastmath=FAST, cache=True)
    def replay(S, d, k, v, b, u, out):
        """Like `step`, into another state and without reading it."""
        for i in range(N):
            di, bi, ki = d[i], b[i], k[i]
            for j in range(N):
                out[i, j] = S[i, j] * di + u[j] * bi + v[j] * ki

    @njit(fastmath=FAST, cache=True)
    def add_outer(G, r, dy):
        """G += r dy^T."""
        for i in range(N):
            ri = r[i]
            for j in range(N):
                G[i, j] += ri * dy[j]

    @njit(fastmath=FAST, cache=True)
    def key_gradients(before, after, G, v, u, dy, dr, dk, db, dd):
        """Sums over values: what reaches r, k, b and the decay."""
        for i in range(N):
            sum_r = sum_k = sum_b = sum_d = dy.dtype.type(0)
            for j in range(N):
                g = G[i, j]
                sum_r += after[i, j] * dy[j]
                sum_k += g * v[j]
                sum_b += g * u[j]
                sum_d += g * before[i, j]
            dr[i] = sum_r
            dk[i] = sum_k
            db[i] = sum_b
            dd[i] = sum_d

    @njit(fastmath=FAST, cache=True)
    def step_back(before, G, d, a, du, da):
        """Gradient of a, and G from after the token to before it."""
        for i in range(N):
            di, ai = d[i], a[i]
            sum_a = du.dtype.type(0)
            for j in range(N):
                sum_a += before[i, j] * du[j]
                G[i, j] = G[i, j] * di + ai * du[j]
            da[i] = sum_a

    @njit(fastmath=FAST, cache=True, parallel=True)
    def forward(r, d, k, v, a, b, S, y, u, starts):
        B, T, H, _ = r.shape
        keep = starts.shape[2] > 0
        for bh in prange(B * H):
            i, h = bh // H, bh % H
            for t in range(T):
                if keep and t % CHUNK == 0:
                    starts[i, h, t // CHUNK] = S[i, h]
                weighted_rows(S[i, h], a[i, t, h], u[i, t, h])
                step(S[i, h], r[i, t, h], d[i, t, h], k[i, t, h], v[i, t, h], b[i, t, h], u[i, t, h], y[i, t, h])

    @njit(fastmath=FAST, cache=True, parallel=True)
    def backward(r, d, k, v, a, b, u, starts, dy, G, dr, dd, dk, dv, da, db):
        B, T, H, _ = r.shape
        for bh in prange(B * H):
            i, h = bh // H, bh % H
            states = np.empty((CHUNK + 1, N, N), r.dtype)
            du = np.empty(N, r.dtype)
            for c in range(starts.shape[2] - 1, -1, -1):
                first, last = c * CHUNK, min((c + 1) * CHUNK, T)
                states[0] = starts[i, h, c]
                for t in range(first, last):
                    n = t - first
                    replay(states[n], d[i, t, h], k[i, t, h], v[i, t, h], b[i, t, h], u[i, t, h], states[n + 1])
                for t in range(last - 1, first - 1, -1):
                    n = t - first
                    add_outer(G[i, h], r[i, t, h], dy[i, t, h])
                    weighted_rows(G[i, h], k[i, t, h], dv[i, t, h])
                    weighted_rows(G[i, h], b[i, t, h], du)
                    key_gradients(
                        states[n], states[n + 1], G[i, h], v[i, t, h], u[i, t, h], dy[i, t, h],
                        dr[i, t, h], dk[i, t, h], db[i, t, h], dd[i, t, h],
                    )  # fmt: skip
                    step_back(states[n], G[i, h], d[i, t, h], a[i, t, h], du, da[i, t, h])

    return SimpleNamespace(forward=forward, backward=backward)
