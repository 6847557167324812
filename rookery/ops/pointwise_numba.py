"""Loops of `pointwise_native`, compiled by Numba.

Arrays of tokens are C-contiguous, in fp32 or bf16; what all tokens share, and its gradients, is fp32. A piece of
work is one of B sequences, in `token_shift` that of the tokens bounds[i] to bounds[i + 1] - 1 of T, or PIECE numbers.
"""

from __future__ import annotations

import numpy as np

from rookery.ops.jit import inner, outer
from rookery.ops.rows_numba import absolute, every, read, where_positive, write
from rookery.ops.simd import exp, fma

PIECE = 1 << 14
MANY, ONE = (None,) * 16, (None,)
"""Loops go over rows in vectors, then over the numbers that are left."""


@inner
def _whole(count):
    return count // len(MANY) * len(MANY)


@inner
def _lerp(n, x, previous, mix, out, j):
    value = read(n, x, j)
    write(n, out, j, fma(read(n, previous, j) - value, read(n, mix, j), value))


@inner
def _lerp_back(n, grad, x, previous, mix, here, earlier, dmix, j):
    """What one mix adds to the gradients of a token, of the one before, and of itself."""
    g = read(n, grad, j)
    of_previous = g * read(n, mix, j)
    write(n, here, j, read(n, here, j) + g - of_previous)
    write(n, earlier, j, read(n, earlier, j) + of_previous)
    write(n, dmix, j, fma(g, read(n, previous, j) - read(n, x, j), read(n, dmix, j)))


@outer
def token_shift(first, last, bounds, x, before, mixes, out):
    """x (T, C), before (B, C), mixes (M, C) -> out (M, T, C)."""
    C = x.shape[1]
    for i in range(first, last):
        for t in range(bounds[i], bounds[i + 1]):
            previous = x[t - 1] if t > bounds[i] else before[i]
            for m in range(len(mixes)):
                for j in range(0, _whole(C), len(MANY)):
                    _lerp(MANY, x[t], previous, mixes[m], out[m, t], j)
                for j in range(_whole(C), C):
                    _lerp(ONE, x[t], previous, mixes[m], out[m, t], j)


@outer
def token_shift_back(first, last, bounds, x, before, mixes, grads, dx, dbefore, dmixes):
    """grads: M arrays (T, C) -> dx, dbefore, and dmixes (B, M, C), which must come in as zeros."""
    C = x.shape[1]
    here, earlier = np.zeros(C, np.float32), np.zeros(C, np.float32)
    for i in range(first, last):
        here[:] = 0
        for t in range(bounds[i + 1] - 1, bounds[i] - 1, -1):
            previous = x[t - 1] if t > bounds[i] else before[i]
            earlier[:] = 0
            for m in range(len(mixes)):
                for j in range(0, _whole(C), len(MANY)):
                    _lerp_back(MANY, grads[m][t], x[t], previous, mixes[m], here, earlier, dmixes[i, m], j)
                for j in range(_whole(C), C):
                    _lerp_back(ONE, grads[m][t], x[t], previous, mixes[m], here, earlier, dmixes[i, m], j)
            _copy(here, dx[t])
            here, earlier = earlier, here
        _copy(here, dbefore[i])


@inner
def _copy(x, out):
    for j in range(0, _whole(len(x)), len(MANY)):
        write(MANY, out, j, read(MANY, x, j))
    for j in range(_whole(len(x)), len(x)):
        write(ONE, out, j, read(ONE, x, j))


@inner
def _positive(n, x, j):
    zero, value = every(n, np.float32(0)), read(n, x, j)
    return where_positive(zero - value, zero, value)  # NaN stays NaN


@inner
def _relu_square(n, x, y, j):
    positive = _positive(n, x, j)
    write(n, y, j, positive * positive)


@inner
def _relu_square_back(n, x, dy, dx, j):
    positive = _positive(n, x, j)
    write(n, dx, j, (positive + positive) * read(n, dy, j))


@outer
def relu_square(first, last, x, y):
    """Arrays of one dimension."""
    for piece in range(first, last):
        begin, end = piece * PIECE, min(len(x), (piece + 1) * PIECE)
        for j in range(begin, begin + _whole(end - begin), len(MANY)):
            _relu_square(MANY, x, y, j)
        for j in range(begin + _whole(end - begin), end):
            _relu_square(ONE, x, y, j)


@outer
def relu_square_back(first, last, x, dy, dx):
    """Arrays of one dimension."""
    for piece in range(first, last):
        begin, end = piece * PIECE, min(len(x), (piece + 1) * PIECE)
        for j in range(begin, begin + _whole(end - begin), len(MANY)):
            _relu_square_back(MANY, x, dy, dx, j)
        for j in range(begin + _whole(end - begin), end):
            _relu_square_back(ONE, x, dy, dx, j)


@inner
def _sigmoid(n, x):
    one, zero = every(n, np.float32(1)), every(n, np.float32(0))
    e = exp(zero - absolute(x))
    return where_positive(x, one, e) / (one + e)


@inner
def _gates7(n, w, a, biases, w_out, a_out, j):
    write(n, w_out, j, read(n, w, j) + read(n, biases[0], j))
    write(n, a_out, j, _sigmoid(n, read(n, a, j) + read(n, biases[1], j)))


@inner
def _value7(n, v, gate, v_first, v0, out, j):
    value, share = read(n, v, j), _sigmoid(n, read(n, gate, j) + read(n, v0, j))
    write(n, out, j, fma(share, read(n, v_first, j) - value, value))


@inner
def _gates7_back(n, a_out, dw_out, da_out, da, dbiases, j):
    one, rate = every(n, np.float32(1)), read(n, a_out, j)
    slope = read(n, da_out, j) * rate * (one - rate)
    write(n, da, j, slope)
    write(n, dbiases[0], j, read(n, dbiases[0], j) + read(n, dw_out, j))
    write(n, dbiases[1], j, read(n, dbiases[1], j) + slope)


@inner
def _value7_back(n, v, gate, v_first, v0, dv_out, dv, dgate, dv_first, dbias, j):
    one, share = every(n, np.float32(1)), _sigmoid(n, read(n, gate, j) + read(n, v0, j))
    g = read(n, dv_out, j)
    to_first = g * share
    to_gate = to_first * (one - share) * (read(n, v_first, j) - read(n, v, j))
    write(n, dv_first, j, to_first)
    write(n, dv, j, g - to_first)
    write(n, dgate, j, to_gate)
    write(n, dbias, j, read(n, dbias, j) + to_gate)


@outer
def gates7(first, last, w, a, biases, w_out, a_out):
    """The parts of w and a: arrays (B, T, C); biases (2, C)."""
    C = w.shape[2]
    for i in range(first, last):
        for t in range(w.shape[1]):
            for j in range(0, _whole(C), len(MANY)):
                _gates7(MANY, w[i, t], a[i, t], biases, w_out[i, t], a_out[i, t], j)
            for j in range(_whole(C), C):
                _gates7(ONE, w[i, t], a[i, t], biases, w_out[i, t], a_out[i, t], j)


@outer
def value7(first, last, v, gate, v_first, v0, out):
    """The part of v: arrays (B, T, C); v0 (C)."""
    C = v.shape[2]
    for i in range(first, last):
        for t in range(v.shape[1]):
            for j in range(0, _whole(C), len(MANY)):
                _value7(MANY, v[i, t], gate[i, t], v_first[i, t], v0, out[i, t], j)
            for j in range(_whole(C), C):
                _value7(ONE, v[i, t], gate[i, t], v_first[i, t], v0, out[i, t], j)


@outer
def gates7_back(first, last, a_out, dw_out, da_out, da, dbiases):
    """As `gates7`; dbiases (B, 2, C) are added to."""
    C = a_out.shape[2]
    for i in range(first, last):
        for t in range(a_out.shape[1]):
            for j in range(0, _whole(C), len(MANY)):
                _gates7_back(MANY, a_out[i, t], dw_out[i, t], da_out[i, t], da[i, t], dbiases[i], j)
            for j in range(_whole(C), C):
                _gates7_back(ONE, a_out[i, t], dw_out[i, t], da_out[i, t], da[i, t], dbiases[i], j)


@outer
def value7_back(first, last, v, gate, v_first, v0, dv_out, dv, dgate, dv_first, dbias):
    """As `value7`; dbias (B, C) is added to."""
    C = v.shape[2]
    for i in range(first, last):
        for t in range(v.shape[1]):
            x, y, z, g = v[i, t], gate[i, t], v_first[i, t], dv_out[i, t]
            for j in range(0, _whole(C), len(MANY)):
                _value7_back(MANY, x, y, z, v0, g, dv[i, t], dgate[i, t], dv_first[i, t], dbias[i], j)
            for j in range(_whole(C), C):
                _value7_back(ONE, x, y, z, v0, g, dv[i, t], dgate[i, t], dv_first[i, t], dbias[i], j)
