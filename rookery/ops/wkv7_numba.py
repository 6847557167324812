"""Loops of `wkv7_native`, compiled by Numba."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from numba import njit, prange
from numba.core.compiler import Compiler

CHUNK = 16
# Sums may be reassociated and contracted (that is what lets them use vector registers); NaN and Inf stay what they are.
FAST = {"reassoc", "contract", "nsz", "arcp"}


class NoAlias(Compiler):
    """Compiles functions whose array arguments never overlap.

    Otherwise LLVM must check at run time, and where a loop has many arrays it gives up vector registers: step_back
    takes three times as long.
    """

    def define_pipelines(self):  # type: ignore[no-untyped-def]
        self.state.flags.noalias = True
        return super().define_pipelines()


def build(N: int) -> SimpleNamespace:
    """Kernels for head size `N`. All arrays are C-contiguous; states are (B, H, N, N), [key, value]."""

    @njit(fastmath=FAST, cache=True, pipeline_class=NoAlias)
    def weighted_rows(S, a, out):
        """out = S^T a."""
        for j in range(N):
            out[j] = 0
        for i in range(0, N, 4):
            a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
            for j in range(N):
                out[j] += a0 * S[i, j] + a1 * S[i + 1, j] + a2 * S[i + 2, j] + a3 * S[i + 3, j]

    @njit(fastmath=FAST, cache=True, pipeline_class=NoAlias)
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

    @njit(fastmath=FAST, cache=True, pipeline_class=NoAlias)
    def replay(S, d, k, v, b, u, out):
        """Like `step`, into another state and without reading it."""
        for i in range(N):
            di, bi, ki = d[i], b[i], k[i]
            for j in range(N):
                out[i, j] = S[i, j] * di + u[j] * bi + v[j] * ki

    @njit(fastmath=FAST, cache=True, pipeline_class=NoAlias)
    def step_back(before, after, G, r, d, k, v, a, b, u, dy, du, dr, dd, dk, dv, da, db):
        """Gradients of one token; G is the gradient of the state after it, then before it."""
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
                    step_back(
                        states[n], states[n + 1], G[i, h],
                        r[i, t, h], d[i, t, h], k[i, t, h], v[i, t, h], a[i, t, h], b[i, t, h], u[i, t, h], dy[i, t, h],
                        du, dr[i, t, h], dd[i, t, h], dk[i, t, h], dv[i, t, h], da[i, t, h], db[i, t, h],
                    )  # fmt: skip

    return SimpleNamespace(forward=forward, backward=backward)
