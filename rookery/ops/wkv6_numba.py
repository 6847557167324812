"""Loops of `wkv6_native`, compiled by Numba.

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
    def dot(x, y):
        total = x.dtype.type(0)
        for i in range(N):
            total += x[i] * y[i]
        return total

    @njit(fastmath=FAST, cache=True)
    def weighted_key(r, u, k):
        """What the token's own value counts: u . k . r."""
        total = r.dtype.type(0)
        for i in range(N):
            total += r[i] * u[i] * k[i]
        return total

    @njit(fastmath=FAST, cache=True)
    def weighted_rows(S, a, own, v, out):
        """out = S^T a + own v."""
        for j in range(N):
            out[j] = own * v[j]
        for i in range(0, N, 4):
            a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
            for j in range(N):
                out[j] += a0 * S[i, j] + a1 * S[i + 1, j] + a2 * S[i + 2, j] + a3 * S[i + 3, j]

    @njit(fastmath=FAST, cache=True)
    def step(S, d, k, v):
        """Advance a state by one token in place: S <- diag(d) S + k v^T. Reading it before, in a pass of its own, is
        faster than doing both in one."""
        for i in range(N):
            di, ki = d[i], k[i]
            for j in range(N):
                S[i, j] = S[i, j] * di + ki * v[j]

    @njit(fastmath=FAST, cache=True)
    def replay(S, d, k, v, out):
        """Like `step`, into another state."""
        for i in range(N):
            di, ki = d[i], k[i]
            for j in range(N):
                out[i, j] = S[i, j] * di + ki * v[j]

    @njit(fastmath=FAST, cache=True)
    def key_gradients(before, G, v, dy, dr, dk, dd):
        """Sums over values: what reaches r and k through the state, and the decay."""
        for i in range(N):
            sum_r = sum_k = sum_d = dy.dtype.type(0)
            for j in range(N):
                g = G[i, j]
                sum_r += before[i, j] * dy[j]
                sum_k += g * v[j]
                sum_d += g * before[i, j]
            dr[i] = sum_r
            dk[i] = sum_k
            dd[i] = sum_d

    @njit(fastmath=FAST, cache=True)
    def bonus_gradients(r, u, k, down, dr, dk, du):
        """What reaches r, k and u through the token's own value, `down` being v . dy."""
        for i in range(N):
            dr[i] += u[i] * k[i] * down
            dk[i] += u[i] * r[i] * down
            du[i] += r[i] * k[i] * down

    @njit(fastmath=FAST, cache=True, parallel=True)
    def forward(r, d, k, v, u, S, y, starts):
        B, T, H, _ = r.shape
        keep = starts.shape[2] > 0
        for bh in prange(B * H):
            i, h = bh // H, bh % H
            for t in range(T):
                if keep and t % CHUNK == 0:
                    starts[i, h, t // CHUNK] = S[i, h]
                own = weighted_key(r[i, t, h], u[h], k[i, t, h])
                weighted_rows(S[i, h], r[i, t, h], own, v[i, t, h], y[i, t, h])
                step(S[i, h], d[i, t, h], k[i, t, h], v[i, t, h])

    @njit(fastmath=FAST, cache=True, parallel=True)
    def backward(r, d, k, v, u, starts, dy, G, dr, dd, dk, dv, du):
        B, T, H, _ = r.shape
        for bh in prange(B * H):
            i, h = bh // H, bh % H
            states = np.empty((CHUNK, N, N), r.dtype)
            for c in range(starts.shape[2] - 1, -1, -1):
                first, last = c * CHUNK, min((c + 1) * CHUNK, T)
                states[0] = starts[i, h, c]
                for t in range(first, last - 1):
                    n = t - first
                    replay(states[n], d[i, t, h], k[i, t, h], v[i, t, h], states[n + 1])
                for t in range(last - 1, first - 1, -1):
                    own = weighted_key(r[i, t, h], u[h], k[i, t, h])
                    weighted_rows(G[i, h], k[i, t, h], own, dy[i, t, h], dv[i, t, h])
                    key_gradients(
                        states[t - first], G[i, h], v[i, t, h], dy[i, t, h], dr[i, t, h], dk[i, t, h], dd[i, t, h]
                    )
                    down = dot(v[i, t, h], dy[i, t, h])
                    bonus_gradients(r[i, t, h], u[h], k[i, t, h], down, dr[i, t, h], dk[i, t, h], du[i, h])
                    # The gradient of the state goes back as the state goes forward: G <- diag(d) G + r dy^T.
                    step(G[i, h], d[i, t, h], r[i, t, h], dy[i, t, h])

    return SimpleNamespace(forward=forward, backward=backward)
