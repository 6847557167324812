"""Loops of `pointwise`, compiled by Numba.

Arrays are C-contiguous fp32. A piece of work is one of B sequences, sequence i being the tokens bounds[i] to
bounds[i + 1] - 1 of T, or PIECE numbers.
"""

from __future__ import annotations

import numpy as np

from rookery.ops.jit import inner, outer

PIECE = 1 << 14


@inner
def _lerp(x, previous, mix, out):
    for j in range(x.shape[0]):
        out[j] = x[j] + (previous[j] - x[j]) * mix[j]


@inner
def _lerp_back(grad, x, previous, mix, dx, dprevious, dmix):
    for j in range(x.shape[0]):
        g = grad[j]
        from_previous = g * mix[j]
        dx[j] += g - from_previous
        dprevious[j] += from_previous
        dmix[j] += g * (previous[j] - x[j])


@outer
def token_shift(first, last, bounds, x, before, mixes, out):
    """x (T, C), before (B, C), mixes (M, C) -> out (M, T, C)."""
    for i in range(first, last):
        for t in range(bounds[i], bounds[i + 1]):
            previous = x[t - 1] if t > bounds[i] else before[i]
            for m in range(mixes.shape[0]):
                _lerp(x[t], previous, mixes[m], out[m, t])


@outer
def token_shift_back(first, last, bounds, x, before, mixes, grads, dx, dbefore, dmixes):
    """grads: M arrays (T, C) -> dx, dbefore, and dmixes (B, M, C), which must come in as zeros."""
    for i in range(first, last):
        dx[bounds[i] : bounds[i + 1]] = 0
        dbefore[i] = 0
        for t in range(bounds[i], bounds[i + 1]):
            for m in range(mixes.shape[0]):
                if t > bounds[i]:
                    _lerp_back(grads[m][t], x[t], x[t - 1], mixes[m], dx[t], dx[t - 1], dmixes[i, m])
                else:
                    _lerp_back(grads[m][t], x[t], before[i], mixes[m], dx[t], dbefore[i], dmixes[i, m])


@inner
def _relu_square(x, y):
    for j in range(x.shape[0]):
        positive = max(x[j], np.float32(0))
        y[j] = positive * positive


@inner
def _relu_square_back(x, dy, dx):
    for j in range(x.shape[0]):
        dx[j] = np.float32(2) * max(x[j], np.float32(0)) * dy[j]


@outer
def relu_square(first, last, x, y):
    """Arrays of one dimension."""
    for piece in range(first, last):
        part = slice(piece * PIECE, (piece + 1) * PIECE)
        _relu_square(x[part], y[part])


@outer
def relu_square_back(first, last, x, dy, dx):
    """Arrays of one dimension."""
    for piece in range(first, last):
        part = slice(piece * PIECE, (piece + 1) * PIECE)
        _relu_square_back(x[part], dy[part], dx[part])
