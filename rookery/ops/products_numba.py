"""Products of the weights of a matrix with one or a few rows of numbers, compiled by Numba: as fast as the weights come
from memory.

Weights are fp32, bf16, int8 with a scale for each row, or bf16 made narrow, which is 12 bits for each number and loses
nothing. All are computed with in fp32, and each sum is taken in the same order however many rows there are.

Memory is read as one stream wherever it can be: a core of a Zen 5 gets 30 to 40 GB/s from one stream that is called for
8 KB ahead of its use, and 18 to 26 from rows of two or four places at a time.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from rookery.ops.jit import function, inner, intrinsic, outer
from rookery.ops.simd import (
    BYTES,
    F32,
    LINE,
    READERS,
    WIDTH,
    fill,
    fma_,
    pointer,
    prefetch,
    read_f32,
    total_,
)

ADDRESS, ROWS, SIZE, STRIDE, SCALES, NARROW, BASES, BOUNDS, PLACES, VALUES = range(10)
"""Columns of a table of matrices: address, rows, numbers in a row, bytes from row to row, address of int8 rows' scales;
and addresses of the parts of a `narrow` form, or 0 where there is none."""

AHEAD = 8192
"""Bytes ahead of their use at which weights are called for."""

BLOCK, GROUP = 32, 4
"""Numbers of a row and rows that lie together in the narrow form."""

LEAST, MOST = 1, 15
"""Codes of exponents in the narrow form: 0 is for zero."""

SPREAD = 64
"""Numbers are multiplied by two to this power before they meet narrow weights, whose exponents are the smallest that
fp32 has, lest products vanish."""

PIECE = 64
"""Rows that `rows_of_product` calls a piece of work."""

FOUR, TWO, ONE = (None,) * 4, (None,) * 2, (None,)


@inner
def at(array):
    return np.int64(array.ctypes.data)


@intrinsic
def tile(typing, kind, rows, columns, weights, weight_stride, scales, size, inputs, input_stride, out, out_stride):
    """Products of R rows of weights with B rows of inputs, written to `out`: B rows of R numbers.

    Each sum is taken alike, whatever R and B: 32 partial sums over every thirty-second number, then `total`.

    Args:
        kind: `static(k)`, k an index of READERS, of the weights.
        rows, columns: `static(R)`, `static(B)`.
        weights, inputs, out: addresses; inputs and out are fp32.
        weight_stride, input_stride, out_stride: bytes from row to row.
        scales: address of R fp32 numbers by which the rows of int8 weights are multiplied; unused for other kinds.
        size: numbers in a row, a multiple of 16.
    """
    k, R, B = (len(t) for t in (kind, rows, columns))
    width = BYTES[k]

    def code(context, builder, signature, args):
        _kind, _rows, _columns, weights, weight_stride, scales, size, inputs, input_stride, out, out_stride = args
        word, number = ir.IntType(64), ir.FloatType()
        w = [builder.add(weights, builder.mul(weight_stride, word(r))) for r in range(R)]
        x = [builder.add(inputs, builder.mul(input_stride, word(b))) for b in range(B)]
        zero = fill(number, 0.0)
        sums = [[[cgutils.alloca_once_value(builder, zero) for _n in range(2)] for _b in x] for _r in w]

        def advance(i, n):
            at_w, at_x = builder.mul(i, word(width)), builder.mul(i, word(4))
            values = [read_f32(builder, builder.add(address, at_x)) for address in x]
            for r in range(R):
                weight = READERS[k](builder, builder.add(w[r], at_w))
                for b in range(B):
                    place = sums[r][b][n]
                    builder.store(fma_(builder, weight, values[b], builder.load(place)), place)

        block = max(2 * WIDTH, LINE // width)
        whole = builder.and_(size, word(-block))
        with cgutils.for_range_slice(builder, word(0), whole, word(block), intp=word) as (i, _count):
            # The rows lie one after the other: seen as one, they are called for in the order in which they lie.
            here = builder.add(weights, builder.mul(i, word(width * R)))
            for line in range(0, block * width * R, LINE):
                prefetch(builder, builder.add(here, word(AHEAD + line)))
            for part in range(0, block, WIDTH):
                advance(builder.add(i, word(part)), part // WIDTH % 2)
        with cgutils.for_range_slice(builder, whole, size, word(WIDTH), intp=word) as (i, _count):
            advance(i, 0)
        for r in range(R):
            for b in range(B):
                value = total_(builder, builder.fadd(*(builder.load(place) for place in sums[r][b])))
                if width == 1:
                    value = builder.fmul(value, _number(builder, scales, r))
                _put(builder, value, out, out_stride, b, r)
        return context.get_dummy_value()

    return types.void(kind, rows, columns, *(types.int64,) * 8), code


@intrinsic
def narrow_tile(typing, columns, weights, scales, size, inputs, input_stride, out, out_stride):
    """Products of a group of 4 rows of narrow weights with B rows of inputs, as `tile`; sums alike whatever B.

    Args:
        columns: `static(B)`.
        weights: address of the group (see `narrow`). scales: address of its 4 scales.
        size: numbers in a row, a multiple of 32.
    """
    B = len(columns)

    def code(context, builder, signature, args):
        _columns, weights, scales, size, inputs, input_stride, out, out_stride = args
        word, number = ir.IntType(64), ir.FloatType()
        integer, byte = ir.VectorType(ir.IntType(32), WIDTH), ir.VectorType(ir.IntType(8), WIDTH)
        x = [builder.add(inputs, builder.mul(input_stride, word(b))) for b in range(B)]
        sums = [[cgutils.alloca_once_value(builder, fill(number, 0.0)) for _b in x] for _r in range(GROUP)]

        def lanes(value):
            return fill(ir.IntType(32), value)

        def bytes_at(address):
            return builder.load(pointer(builder, address, byte), align=1)

        with cgutils.for_range_slice(builder, word(0), size, word(BLOCK), intp=word) as (i, _count):
            here = builder.add(weights, builder.mul(i, word(GROUP * 3 // 2)))
            low = builder.add(here, word(GROUP * BLOCK))
            for line in range(0, BLOCK * GROUP * 3 // 2, LINE):
                prefetch(builder, builder.add(here, word(AHEAD + line)))
            values = []
            for half in range(2):
                offset = builder.mul(builder.add(i, word(half * WIDTH)), word(4))
                spread = fill(number, 2.0**SPREAD)
                values.append([builder.fmul(read_f32(builder, builder.add(a, offset)), spread) for a in x])
            for r in range(GROUP):
                both = builder.zext(bytes_at(builder.add(low, word(r * WIDTH))), integer)
                for half in range(2):
                    high = builder.sext(bytes_at(builder.add(here, word(r * BLOCK + half * WIDTH))), integer)
                    high = builder.and_(builder.shl(high, lanes(20)), lanes(-0x78100000))
                    rest = builder.and_(builder.shl(both, lanes(16 - 4 * half)), lanes(0xF0000))
                    weight = builder.bitcast(builder.or_(high, rest), F32)
                    for b in range(B):
                        place = sums[r][b]
                        builder.store(fma_(builder, weight, values[half][b], builder.load(place)), place)
        for r in range(GROUP):
            scale = _number(builder, scales, r)
            for b in range(B):
                value = builder.fmul(total_(builder, builder.load(sums[r][b])), scale)
                _put(builder, value, out, out_stride, b, r)
        return context.get_dummy_value()

    return types.void(columns, *(types.int64,) * 7), code


def _number(builder, address, n):
    """The fp32 number n places after an address."""
    place = builder.add(address, ir.IntType(64)(4 * n))
    return builder.load(pointer(builder, place, ir.FloatType()), align=4)


def _put(builder, value, out, stride, b, r):
    word = ir.IntType(64)
    place = builder.add(builder.add(out, builder.mul(stride, word(b))), word(4 * r))
    builder.store(value, pointer(builder, place, ir.FloatType()), align=4)


@intrinsic
def number_at(typing, kind, address):
    """The number at an address: int32 (kind `static(0)`) or fp32 (`static(1)`)."""
    llvm = (ir.IntType(32), ir.FloatType())[len(kind)]

    def code(context, builder, signature, args):
        return builder.load(pointer(builder, args[1], llvm), align=4)

    return (types.int32, types.float32)[len(kind)](kind, types.int64), code


@function
def rows_products(kind, unit, matrix, first, last, x, y):
    """`product` of weights as they lie, `static(unit)` rows at a time."""
    weights, size, stride, scales = matrix[ADDRESS], matrix[SIZE], matrix[STRIDE], matrix[SCALES]
    B, x_stride, y_stride = x.shape[0], np.int64(x.strides[0]), np.int64(y.strides[0])
    R = len(unit)
    for o in range(first, last - R + 1, R):
        w, s = weights + o * stride, scales + 4 * o
        for b in range(0, B - 3, 4):
            xb, yb = at(x) + b * x_stride, at(y) + b * y_stride + 4 * o
            tile(kind, unit, FOUR, w, stride, s, size, xb, x_stride, yb, y_stride)
        for b in range(B // 4 * 4, B):
            xb, yb = at(x) + b * x_stride, at(y) + b * y_stride + 4 * o
            tile(kind, unit, ONE, w, stride, s, size, xb, x_stride, yb, y_stride)
    for o in range(first + (last - first) // R * R, last):
        for b in range(B):
            xb, yb = at(x) + b * x_stride, at(y) + b * y_stride + 4 * o
            tile(kind, ONE, ONE, weights + o * stride, stride, scales + 4 * o, size, xb, x_stride, yb, y_stride)


@function
def narrow_products(matrix, first, last, x, y):
    """`product` of narrow weights; first and last are multiples of 4."""
    size, bounds, places, values = matrix[SIZE], matrix[BOUNDS], matrix[PLACES], matrix[VALUES]
    B, x_stride, y_stride = x.shape[0], np.int64(x.strides[0]), np.int64(y.strides[0])
    for o in range(first, last, GROUP):
        w, s = matrix[NARROW] + o * size // 2 * 3, matrix[BASES] + 4 * o
        for b in range(0, B - 3, 4):
            xb, yb = at(x) + b * x_stride, at(y) + b * y_stride + 4 * o
            narrow_tile(FOUR, w, s, size, xb, x_stride, yb, y_stride)
        for b in range(B // 4 * 4, B):
            xb, yb = at(x) + b * x_stride, at(y) + b * y_stride + 4 * o
            narrow_tile(ONE, w, s, size, xb, x_stride, yb, y_stride)
        for row in range(o, o + GROUP):
            for n in range(number_at((), bounds + 4 * row), number_at((), bounds + 4 * row + 4)):
                place, value = number_at((), places + 4 * n), number_at(ONE, values + 4 * n)
                for b in range(B):
                    y[b, row] += value * x[b, place]


@function
def product(kind, matrix, first, last, x, y):
    """y[b, o] = sum_i W[o, i] x[b, i] for rows first..last-1 of W; x (B, in), y (B, out).

    Args:
        kind: `static(k)`, k an index of READERS. bf16 weights may have a narrow form, which is taken then.
        matrix: a row of a table of matrices.
        first, last: multiples of 4, `last` or the number of rows.
    """
    if len(kind) == 1 and matrix[NARROW]:
        narrow_products(matrix, first, last, x, y)
    elif x.shape[0] < 4:
        rows_products(kind, ONE, matrix, first, last, x, y)
    else:
        rows_products(kind, TWO, matrix, first, last, x, y)


@outer
def rows_of_product(first, last, kind, matrix, x, y):
    """A piece of work is PIECE rows of the matrix."""
    product(kind, matrix, PIECE * first, min(PIECE * last, matrix[ROWS]), x, y)


@outer
def measure(first, last, weights, bases, others):
    """What a narrow form of bf16 weights needs. A piece of work is a row.

    Args:
        weights: (rows, size) uint16, bits of bf16 numbers.
        bases: (rows) int32, what is subtracted from the exponents of a row; the result.
        others: (rows) int32, how many numbers of a row are neither zero nor in reach of its codes; the result.
    """
    for row in range(first, last):
        numbers = weights[row]
        most = 0
        for n in range(len(numbers)):
            most = max(most, numbers[n] & 0x7FFF)
        base = max(0, (most >> 7) - MOST)
        least = (base + LEAST) << 7
        count = 0
        for n in range(len(numbers)):
            count += 0 < numbers[n] & 0x7FFF < least
        bases[row], others[row] = base, count


@outer
def narrow(first, last, weights, bases, bounds, out, places, values):
    """Write the narrow form of bf16 weights. A piece of work is a group of 4 rows.

    Of a number with sign s, exponent e and fraction f (1, 8 and 7 bits), the code s, e - base (4 bits), f is kept, base
    being one for its row. The upper 8 bits of 32 numbers of each of 4 rows lie together, then their lower 4: of numbers
    i and 16 + i in one byte. What is too small for a code is zero there, and listed.

    Args:
        weights: (rows, size) uint16, bits of bf16 numbers; rows a multiple of 4, size of 32.
        bases: as `measure` found them. bounds: (rows + 1) int32; those of row r are listed from bounds[r] on.
        out: (rows / 4, size / 32, 192) uint8, the result.
        places, values: int32 and uint16, the list: columns, and the bits of numbers.
    """
    codes = np.empty(BLOCK, np.uint16)
    for group in range(first, last):
        for r in range(GROUP):
            row = GROUP * group + r
            listed, least = bounds[row], (bases[row] + LEAST) << 7
            for block in range(out.shape[1]):
                numbers, lines = weights[row, BLOCK * block : BLOCK * (block + 1)], out[group, block]
                missed = 0
                for n in range(BLOCK):
                    size = numbers[n] & 0x7FFF
                    reached = size >= least
                    missed += size != 0 and not reached
                    code = size - (bases[row] << 7) if reached else 0
                    codes[n] = numbers[n] >> 15 << 11 | code
                for n in range(BLOCK):
                    lines[BLOCK * r + n] = codes[n] >> 4
                for n in range(WIDTH):
                    lines[GROUP * BLOCK + WIDTH * r + n] = codes[n] & 15 | (codes[WIDTH + n] & 15) << 4
                if missed:
                    for n in range(BLOCK):
                        if 0 < numbers[n] & 0x7FFF < least:
                            places[listed], values[listed] = BLOCK * block + n, numbers[n]
                            listed += 1
