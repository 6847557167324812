"""Loops of `pointwise_native`, compiled by Numba.

Arrays of tokens are C-contiguous, in fp32 or bf16; what all tokens share, and its gradients, is fp32. A piece of
work is one of B sequences, in `token_shift` that of the tokens bounds[i] to bounds[i + 1] - 1 of T, or PIECE numbers.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from rookery.ops.jit import inner, intrinsic, outer
from rookery.ops.rows_numba import absolute, every, read, where_positive, write
from rookery.ops.simd import exp, fma, from_bf16, of_llvm, pointer, prefetch, to_bf16

PIECE = 1 << 14
MANY, ONE = (None,) * 16, (None,)
"""Loops go over rows in vectors, then over the numbers that are left."""

FEW = (None,) * 4
"""Tokens that go back together."""

SOON = 16
"""Tokens that are called for ahead of their use: loops that go back through many arrays wait for memory else."""


def pieces(numbers: int) -> int:
    """Pieces of work of a loop over an array of one dimension."""
    return -(-numbers // PIECE)


@inner
def _whole(count):
    return count // len(MANY) * len(MANY)


@inner
def _lerp(n, x, previous, mix, out, j):
    value = read(n, x, j)
    write(n, out, j, fma(read(n, previous, j) - value, read(n, mix, j), value))


@intrinsic
def _shift_back(typing, lanes, tokens, like, x, previous, row, mixes, mix_row, grads, at, count, dx, carried, dmixes):
    """Channels of `static(tokens)` tokens backwards: their dx, and what they add to `carried` and to dmixes.

    Args:
        lanes: `static(n)`, the channels.
        like: an array of the dtype of x, dx and the gradients.
        x, previous, dx, mixes, dmixes, carried: addresses of the first token (before it; of the first mix) in these
            channels. `carried` is the gradient that the next token gives the last of these, and becomes what the first
            gives the one before it.
        row, mix_row: bytes from token to token, and from mix to mix.
        grads: address of the addresses of the gradients of the `count` outputs; `at`: bytes to the first token in them.
    """
    n, T, bf16 = len(lanes), len(tokens), like.dtype == types.uint16
    numbers = ir.VectorType(ir.FloatType(), n)

    def code(context, builder, signature, args):
        *_static, x, previous, row, mixes, mix_row, grads, at, count, dx, carried, dmixes = args
        word = ir.IntType(64)

        def exact(address):
            return builder.load(pointer(builder, address, numbers), align=4)

        def stored(address):
            if not bf16:
                return exact(address)
            bits = builder.load(pointer(builder, address, ir.VectorType(ir.IntType(16), n)), align=2)
            return from_bf16(builder, bits)

        rows = [builder.mul(row, word(t)) for t in range(T)]
        xs = [stored(previous), *(stored(builder.add(x, offset)) for offset in rows)]
        steps = [builder.fsub(earlier, here) for earlier, here in pairwise(xs)]
        zero = ir.Constant(numbers, [0.0] * n)
        sums = [cgutils.alloca_once_value(builder, zero) for _before in range(T)]
        sums.append(cgutils.alloca_once_value(builder, exact(carried)))  # of the token before each, and of the last
        with cgutils.for_range(builder, count, intp=word) as loop:
            grad = builder.load(pointer(builder, builder.add(grads, builder.mul(loop.index, word(8))), word))
            grad = builder.add(grad, at)
            offset = builder.mul(loop.index, mix_row)
            mix, place = exact(builder.add(mixes, offset)), builder.add(dmixes, offset)
            dmix = exact(place)
            for t in range(T):
                here = builder.add(grad, rows[t])
                prefetch(builder, builder.sub(here, builder.mul(row, word(SOON))))
                g = stored(here)
                of_previous = builder.fmul(g, mix)
                for total, part in ((sums[t + 1], builder.fsub(g, of_previous)), (sums[t], of_previous)):
                    builder.store(builder.fadd(builder.load(total), part), total)
                dmix = of_llvm(builder, "fmuladd", g, steps[t], dmix)
            builder.store(dmix, pointer(builder, place, numbers), align=4)
        for t in range(T):
            value, place = builder.load(sums[t + 1]), builder.add(dx, rows[t])
            if bf16:
                bits = to_bf16(builder, value)
                builder.store(bits, pointer(builder, place, bits.type), align=2)
            else:
                builder.store(value, pointer(builder, place, numbers), align=4)
        builder.store(builder.load(sums[0]), pointer(builder, carried, numbers), align=4)
        return context.get_dummy_value()

    return types.void(lanes, tokens, like, *(types.int64,) * 11), code


@inner
def shift(begin, end, x, before, mixes, out):
    """`token_shift` of one sequence, `before` (C) being the row before it."""
    C = x.shape[1]
    for t in range(begin, end):
        previous = x[t - 1] if t > begin else before
        for m in range(len(mixes)):
            for j in range(0, _whole(C), len(MANY)):
                _lerp(MANY, x[t], previous, mixes[m], out[m, t], j)
            for j in range(_whole(C), C):
                _lerp(ONE, x[t], previous, mixes[m], out[m, t], j)


@outer
def token_shift(first, last, bounds, x, before, mixes, out):
    """x (T, C), before (B, C), mixes (M, C) -> out (M, T, C)."""
    for i in range(first, last):
        shift(bounds[i], bounds[i + 1], x, before[i], mixes, out)


@inner
def _tokens_back(tokens, C, size, x, here, previous, row, mixes, grads, at, count, dx, carried, dmixes):
    """`_shift_back` of all channels; addresses are those of the first."""
    for j in range(0, _whole(C), len(MANY)):
        _shift_back(MANY, tokens, x, here + size * j, previous + size * j, row, mixes + 4 * j, 4 * C, grads,
                    at + size * j, count, dx + size * j, carried + 4 * j, dmixes + 4 * j)  # fmt: skip
    for j in range(_whole(C), C):
        _shift_back(ONE, tokens, x, here + size * j, previous + size * j, row, mixes + 4 * j, 4 * C, grads,
                    at + size * j, count, dx + size * j, carried + 4 * j, dmixes + 4 * j)  # fmt: skip


@inner
def shift_back(begin, end, x, before, mixes, grads, dx, carried, dmixes):
    """`token_shift_back` of one sequence. `carried` (C), fp32, comes in as zeros and becomes the gradient of `before`;
    dmixes (M, C) are added to."""
    C, size, count = np.int64(x.shape[1]), np.int64(x.itemsize), np.int64(len(mixes))
    row = C * size
    x_at, before_at, dx_at = np.int64(x.ctypes.data), np.int64(before.ctypes.data), np.int64(dx.ctypes.data)
    mixes_at, grads_at = np.int64(mixes.ctypes.data), np.int64(grads.ctypes.data)
    carried_at, dmixes_at = np.int64(carried.ctypes.data), np.int64(dmixes.ctypes.data)
    t = end
    while t > begin:
        few = t - begin >= len(FEW)
        t -= len(FEW) if few else 1
        at = t * row
        previous = x_at + at - row if t > begin else before_at
        if few:
            _tokens_back(FEW, C, size, x, x_at + at, previous, row, mixes_at, grads_at, at, count, dx_at + at,
                         carried_at, dmixes_at)  # fmt: skip
        else:
            _tokens_back(ONE, C, size, x, x_at + at, previous, row, mixes_at, grads_at, at, count, dx_at + at,
                         carried_at, dmixes_at)  # fmt: skip


@outer
def token_shift_back(first, last, bounds, x, before, mixes, grads, dx, dbefore, dmixes):
    """grads: addresses of M arrays (T, C) -> dx, dbefore, and dmixes (B, M, C), which must come in as zeros."""
    carried = np.zeros(x.shape[1], np.float32)
    for i in range(first, last):
        carried[:] = 0
        shift_back(bounds[i], bounds[i + 1], x, before[i], mixes, grads, dx, carried, dmixes[i])
        copy_row(carried, dbefore[i])


@inner
def copy_row(x, out):
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


@inner
def square(begin, end, x, y):
    """`relu_square` of the numbers from `begin` to `end`."""
    for j in range(begin, begin + _whole(end - begin), len(MANY)):
        _relu_square(MANY, x, y, j)
    for j in range(begin + _whole(end - begin), end):
        _relu_square(ONE, x, y, j)


@inner
def square_back(begin, end, x, dy, dx):
    """`relu_square_back` of the numbers from `begin` to `end`."""
    for j in range(begin, begin + _whole(end - begin), len(MANY)):
        _relu_square_back(MANY, x, dy, dx, j)
    for j in range(begin + _whole(end - begin), end):
        _relu_square_back(ONE, x, dy, dx, j)


@outer
def relu_square(first, last, x, y):
    """Arrays of one dimension."""
    for piece in range(first, last):
        square(piece * PIECE, min(len(x), (piece + 1) * PIECE), x, y)


@outer
def relu_square_back(first, last, x, dy, dx):
    """Arrays of one dimension."""
    for piece in range(first, last):
        square_back(piece * PIECE, min(len(x), (piece + 1) * PIECE), x, dy, dx)


@inner
def _sigmoid(n, x):
    one, zero = every(n, np.float32(1)), every(n, np.float32(0))
    e = exp(zero - absolute(x))
    return where_positive(x, one, e) / (one + e)


@inner
def _tanh(n, x):
    one, zero, size = every(n, np.float32(1)), every(n, np.float32(0)), absolute(x)
    e = exp(zero - size - size)
    large = (one - e) / (one + e)
    # Near 0, where that is the difference of numbers that are almost alike: Cephes' tanhf.
    square = x * x
    series = every(n, np.float32(-5.70498872745e-3))
    for coefficient in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        series = fma(series, square, every(n, np.float32(coefficient)))
    small = fma(x * square, series, x)
    return where_positive(size - every(n, np.float32(0.625)), where_positive(x, large, zero - large), small)


@inner
def _put_tanh(n, x, j):
    write(n, x, j, _tanh(n, read(n, x, j)))


@inner
def _put_sigmoid(n, x, j):
    write(n, x, j, _sigmoid(n, read(n, x, j)))


@inner
def _tanh_back(n, y, dy, j):
    value = read(n, y, j)
    write(n, dy, j, read(n, dy, j) * (every(n, np.float32(1)) - value * value))


@inner
def _sigmoid_back(n, y, dy, j):
    value = read(n, y, j)
    write(n, dy, j, read(n, dy, j) * value * (every(n, np.float32(1)) - value))


@inner
def tanh_of(begin, end, x):
    """`tanh` of the numbers from `begin` to `end`; so are the next three."""
    for j in range(begin, begin + _whole(end - begin), len(MANY)):
        _put_tanh(MANY, x, j)
    for j in range(begin + _whole(end - begin), end):
        _put_tanh(ONE, x, j)


@inner
def sigmoid_of(begin, end, x):
    for j in range(begin, begin + _whole(end - begin), len(MANY)):
        _put_sigmoid(MANY, x, j)
    for j in range(begin + _whole(end - begin), end):
        _put_sigmoid(ONE, x, j)


@inner
def tanh_back_of(begin, end, y, dy):
    for j in range(begin, begin + _whole(end - begin), len(MANY)):
        _tanh_back(MANY, y, dy, j)
    for j in range(begin + _whole(end - begin), end):
        _tanh_back(ONE, y, dy, j)


@inner
def sigmoid_back_of(begin, end, y, dy):
    for j in range(begin, begin + _whole(end - begin), len(MANY)):
        _sigmoid_back(MANY, y, dy, j)
    for j in range(begin + _whole(end - begin), end):
        _sigmoid_back(ONE, y, dy, j)


@outer
def tanh(first, last, x):
    """In place, of an array of one dimension; so are the next three."""
    for piece in range(first, last):
        tanh_of(piece * PIECE, min(len(x), (piece + 1) * PIECE), x)


@outer
def sigmoid(first, last, x):
    for piece in range(first, last):
        sigmoid_of(piece * PIECE, min(len(x), (piece + 1) * PIECE), x)


@outer
def tanh_back(first, last, y, dy):
    """y: the results; dy becomes the gradient of what they came from."""
    for piece in range(first, last):
        tanh_back_of(piece * PIECE, min(len(y), (piece + 1) * PIECE), y, dy)


@outer
def sigmoid_back(first, last, y, dy):
    for piece in range(first, last):
        sigmoid_back_of(piece * PIECE, min(len(y), (piece + 1) * PIECE), y, dy)


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


@inner
def gates7_of(w, a, biases, w_out, a_out):
    """`gates7` of one sequence; so are the next three of theirs."""
    C = w.shape[1]
    for t in range(len(w)):
        for j in range(0, _whole(C), len(MANY)):
            _gates7(MANY, w[t], a[t], biases, w_out[t], a_out[t], j)
        for j in range(_whole(C), C):
            _gates7(ONE, w[t], a[t], biases, w_out[t], a_out[t], j)


@inner
def value7_of(v, gate, v_first, v0, out):
    C = v.shape[1]
    for t in range(len(v)):
        for j in range(0, _whole(C), len(MANY)):
            _value7(MANY, v[t], gate[t], v_first[t], v0, out[t], j)
        for j in range(_whole(C), C):
            _value7(ONE, v[t], gate[t], v_first[t], v0, out[t], j)


@inner
def gates7_back_of(a_out, dw_out, da_out, da, dbiases):
    C = a_out.shape[1]
    for t in range(len(a_out)):
        for j in range(0, _whole(C), len(MANY)):
            _gates7_back(MANY, a_out[t], dw_out[t], da_out[t], da[t], dbiases, j)
        for j in range(_whole(C), C):
            _gates7_back(ONE, a_out[t], dw_out[t], da_out[t], da[t], dbiases, j)


@inner
def value7_back_of(v, gate, v_first, v0, dv_out, dv, dgate, dv_first, dbias):
    C = v.shape[1]
    for t in range(len(v)):
        x, y, z, g = v[t], gate[t], v_first[t], dv_out[t]
        for j in range(0, _whole(C), len(MANY)):
            _value7_back(MANY, x, y, z, v0, g, dv[t], dgate[t], dv_first[t], dbias, j)
        for j in range(_whole(C), C):
            _value7_back(ONE, x, y, z, v0, g, dv[t], dgate[t], dv_first[t], dbias, j)


@outer
def gates7(first, last, w, a, biases, w_out, a_out):
    """The parts of w and a: arrays (B, T, C); biases (2, C)."""
    for i in range(first, last):
        gates7_of(w[i], a[i], biases, w_out[i], a_out[i])


@outer
def value7(first, last, v, gate, v_first, v0, out):
    """The part of v: arrays (B, T, C); v0 (C)."""
    for i in range(first, last):
        value7_of(v[i], gate[i], v_first[i], v0, out[i])


@outer
def gates7_back(first, last, a_out, dw_out, da_out, da, dbiases):
    """As `gates7`; dbiases (B, 2, C) are added to."""
    for i in range(first, last):
        gates7_back_of(a_out[i], dw_out[i], da_out[i], da[i], dbiases[i])


@outer
def value7_back(first, last, v, gate, v_first, v0, dv_out, dv, dgate, dv_first, dbias):
    """As `value7`; dbias (B, C) is added to."""
    for i in range(first, last):
        value7_back_of(v[i], gate[i], v_first[i], v0, dv_out[i], dv[i], dgate[i], dv_first[i], dbias[i])
