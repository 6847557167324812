"""Rows of arrays as vectors, in code compiled by Numba.

A row has numbers of fp64, fp32 or bf16; a vector has as many of them as the first argument says, `static(n)`. Loops
compute in fp64 for fp64 and in fp32 for the others. NumPy has no bf16: such arrays come as uint16, of the same bits.
Importing this imports Numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from rookery.ops.jit import inner, intrinsic
from rookery.ops.simd import LINE, Vector, fill, from_bf16, halves, of_llvm, prefetch, splat_, to_bf16


def _vector(number: Any, lanes: Any) -> Vector:
    return Vector(types.float32 if number == types.uint16 else number, len(lanes))


def _place(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, vector: Vector, *at: Any) -> Any:
    """Pointer to the vector that begins at an element of an array, and the bytes of an element."""
    made = context.make_array(array_type)(context, builder, array)
    word, number = ir.IntType(64), array_type.dtype.bitwidth // 8
    strides = [builder.extract_value(made.strides, n) for n in range(array_type.ndim)]
    if array_type.layout == "C":
        strides[-1] = word(number)
    offset = word(0)
    for index, stride in zip(at, strides, strict=True):
        offset = builder.add(offset, builder.mul(index, stride))
    stored = ir.VectorType(ir.IntType(16), vector.llvm.count) if array_type.dtype == types.uint16 else vector.llvm
    data = builder.bitcast(made.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(data, [offset]), stored.as_pointer()), number


def _lanes(most: int) -> Any:
    @intrinsic
    def lanes(typing, size):
        """`static(n)` for the numbers of a vector in rows of `static(N)`, N being a multiple of 4."""
        n = next(n for n in (most, 16, 4) if len(size) % n == 0)

        def code(context, builder, signature, args):
            return context.get_constant_undef(signature.return_type)

        return types.UniTuple(types.none, n)(size), code

    return lanes


lanes = _lanes(16)
wide_lanes = _lanes(32)
"""For loops that use a number for many columns."""


@intrinsic
def read(typing, lanes, row, j):
    """The vector of elements from j on of an array of one dimension."""
    vector = _vector(row.dtype, lanes)

    def code(context, builder, signature, args):
        place, align = _place(context, builder, row, args[1], vector, args[2])
        value = builder.load(place, align=align)
        return from_bf16(builder, value) if row.dtype == types.uint16 else value

    return vector(lanes, row, types.int64), code


@intrinsic
def write(typing, lanes, row, j, value):
    """Set the elements from j on of an array of one dimension; for bf16 rounded to the nearest, halves to even."""

    def code(context, builder, signature, args):
        place, align = _place(context, builder, row, args[1], value, args[2])
        numbers = to_bf16(builder, args[3]) if row.dtype == types.uint16 else args[3]
        builder.store(numbers, place, align=align)
        return context.get_dummy_value()

    return types.void(lanes, row, types.int64, value), code


@intrinsic
def stream(typing, lanes, row, j, value):
    """`write` past the caches, to a multiple of the size of a vector."""

    def code(context, builder, signature, args):
        place, _ = _place(context, builder, row, args[1], value, args[2])
        stored = builder.store(args[3], place, align=len(lanes) * row.dtype.bitwidth // 8)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(lanes, row, types.int64, value), code


@intrinsic
def each(typing, lanes, row, j):
    """A vector of element j of an array of one dimension, again and again. The index is not checked for being
    negative."""
    number = types.float32 if row.dtype == types.uint16 else row.dtype

    def code(context, builder, signature, args):
        place, align = _place(context, builder, row, args[1], Vector(number, 1), args[2])
        value = builder.load(place, align=align)
        value = from_bf16(builder, value) if row.dtype == types.uint16 else value
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), [0] * len(lanes))
        return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)

    return Vector(number, len(lanes))(lanes, row, types.int64), code


@intrinsic
def every(typing, lanes, value):
    """A vector of one number."""

    def code(context, builder, signature, args):
        return splat_(builder, args[1], len(lanes))

    return _vector(value, lanes)(lanes, value), code


def _pick(builder: ir.IRBuilder, x: Any, y: Any, *places: int) -> Any:
    """Of each four numbers of x and y those at four places, those of y counting from 4."""
    W = x.type.count
    mask = [four + place if place < 4 else W + four + place - 4 for four in range(0, W, 4) for place in places]
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), W), mask))


@intrinsic
def totals(typing, a, b, c, d):
    """The sums of four vectors, as a vector of four."""

    def code(context, builder, signature, args):
        ab, cd = (
            builder.fadd(_pick(builder, x, y, 0, 4, 1, 5), _pick(builder, x, y, 2, 6, 3, 7))
            for x, y in (args[:2], args[2:])
        )
        sums = builder.fadd(_pick(builder, ab, cd, 0, 1, 4, 5), _pick(builder, ab, cd, 2, 3, 6, 7))
        while sums.type.count > 4:
            sums = builder.fadd(*halves(builder, sums))
        return sums

    return Vector(a.number, 4)(a, a, a, a), code


@intrinsic
def spread(typing, lanes, value, place):
    """A vector of the number at `static(place)` in another."""

    def code(context, builder, signature, args):
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), [len(place)] * len(lanes))
        return builder.shuffle_vector(args[1], ir.Constant(value.llvm, ir.Undefined), mask)

    return _vector(value.number, lanes)(lanes, value, place), code


@intrinsic
def absolute(typing, x):
    return x(x), lambda context, builder, signature, args: of_llvm(builder, "fabs", args[0])


@intrinsic
def where_positive(typing, x, y, z):
    """y where x >= 0, else z."""

    def code(context, builder, signature, args):
        x, y, z = args
        return builder.select(builder.fcmp_ordered(">=", x, fill(x.type.element, 0.0, x.type.count)), y, z)

    return x(x, x, x), code


@intrinsic
def transpose(typing, lanes, x, i, stride, out, j, out_stride):
    """out[j + out_stride c + m] = x[i + stride m + c] for c below 4 and m below the numbers of a vector; both arrays
    are exact."""
    vector, word = _vector(x.dtype, lanes), ir.IntType(64)

    def code(context, builder, signature, args):
        _lanes, x_value, i, stride, out_value, j, out_stride = args
        rows = []
        for m in range(len(lanes)):
            start = builder.add(i, builder.mul(stride, word(m)))
            place, align = _place(context, builder, x, x_value, Vector(vector.number, 4), start)
            rows.append(builder.load(place, align=align))
        a, b, c, d = (_joined(builder, rows[m::4]) for m in range(4))
        low, high = (0, 4, 1, 5), (2, 6, 3, 7)
        columns = [
            _pick(builder, _pick(builder, a, b, *half), _pick(builder, c, d, *half), *places)
            for half in (low, high)
            for places in ((0, 1, 4, 5), (2, 3, 6, 7))
        ]
        for n, column in enumerate(columns):
            start = builder.add(j, builder.mul(out_stride, word(n)))
            place, align = _place(context, builder, out, out_value, vector, start)
            builder.store(column, place, align=align)
        return context.get_dummy_value()

    return types.void(lanes, x, types.int64, types.int64, out, types.int64, types.int64), code


def _joined(builder: ir.IRBuilder, parts: list[Any]) -> Any:
    """One vector of several, whose number is a power of two."""
    while len(parts) > 1:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [builder.shuffle_vector(*pair, mask) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@inner
def copy(size, x, i, out, j):
    """A row of `x` from i on into `out` from j on, exact or rounded."""
    w = lanes(size)
    for o in range(0, len(size), len(w)):
        write(w, out, j + o, read(w, x, i + o))


@intrinsic
def call_for(typing, size, row):
    """Have a row of `static(N)` numbers brought into the cache."""

    def code(context, builder, signature, args):
        data = builder.ptrtoint(context.make_array(row)(context, builder, args[1]).data, ir.IntType(64))
        for line in range(0, len(size) * row.dtype.bitwidth // 8, LINE):
            prefetch(builder, builder.add(data, ir.IntType(64)(line)))
        return context.get_dummy_value()

    return types.void(size, row), code


@inner
def room(like, count):
    """`count` numbers of the dtype of an array, from the beginning of a cache line on: vectors across two lines cost
    twice as much."""
    bytes = np.empty(count * like.itemsize + LINE, np.uint8)
    begin = -np.int64(bytes.ctypes.data) % LINE
    return bytes[begin : begin + count * like.itemsize].view(like.dtype)
