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
from numba.extending import models, register_model

from rookery.ops.jit import inner, intrinsic
from rookery.ops.simd import LINE, Vector, fill, fma_, from_bf16, halves, of_llvm, prefetch, splat_, to_bf16


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


def _lanes(*choices: int) -> Any:
    @intrinsic
    def lanes(typing, size):
        """`static(n)` for the numbers of a vector in rows of `static(N)`, N being a multiple of 4."""
        n = next(n for n in choices if len(size) % n == 0)

        def code(context, builder, signature, args):
            return context.get_constant_undef(signature.return_type)

        return types.UniTuple(types.none, n)(size), code

    return lanes


lanes = _lanes(16, 4)
wide_lanes = _lanes(32, 16, 4)
"""For loops that use a number for many columns."""
portion = _lanes(32, 48, 16, 4)
"""The part of a row, as a row of its own, that a loop keeps in registers together with three others."""


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
        place, number = _place(context, builder, row, args[1], value, args[2])
        numbers = to_bf16(builder, args[3]) if row.dtype == types.uint16 else args[3]
        stored = builder.store(numbers, place, align=len(lanes) * number)
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
def absolute(typing, x):
    return x(x), lambda context, builder, signature, args: of_llvm(builder, "fabs", args[0])


@intrinsic
def where_positive(typing, x, y, z):
    """y where x >= 0, else z."""

    def code(context, builder, signature, args):
        x, y, z = args
        return builder.select(builder.fcmp_ordered(">=", x, fill(x.type.element, 0.0, x.type.count)), y, z)

    return x(x, x, x), code


class Row(types.Type):
    """The Numba type of a whole row of numbers as vectors, for loops that keep it in registers."""

    def __init__(self, vector: Vector, count: int) -> None:
        super().__init__(name=f"{count}x{vector.name}")
        self.vector, self.count = vector, count


@register_model(Row)
class _RowModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(fe_type.vector.llvm, fe_type.count))


def _row(size: Any, number: Any) -> Row:
    width = 16 if len(size) % 16 == 0 else 4
    return Row(Vector(number, width), len(size) // width)


def _places(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, start: Any, row: Row) -> Any:
    for n in range(row.count):
        at = builder.add(start, ir.IntType(64)(n * row.vector.llvm.count))
        yield _place(context, builder, array_type, array, row.vector, at)


@intrinsic
def read_row(typing, size, x, i):
    """The row of `static(N)` numbers from i on in an exact array of one dimension."""
    row = _row(size, x.dtype)

    def code(context, builder, signature, args):
        made = ir.Constant(ir.ArrayType(row.vector.llvm, row.count), ir.Undefined)
        for n, (place, align) in enumerate(_places(context, builder, x, args[1], args[2], row)):
            made = builder.insert_value(made, builder.load(place, align=align), n)
        return made

    return row(size, x, types.int64), code


@intrinsic
def write_row(typing, size, x, i, row):
    """Set the numbers from i on of an exact array of one dimension."""

    def code(context, builder, signature, args):
        for n, (place, align) in enumerate(_places(context, builder, x, args[1], args[2], row)):
            builder.store(builder.extract_value(args[3], n), place, align=align)
        return context.get_dummy_value()

    return types.void(size, x, types.int64, row), code


@intrinsic
def no_row(typing, size, like):
    """A row of zeros, of the numbers of an array."""
    row = _row(size, like.dtype)
    zero = fill(row.vector.llvm.element, 0.0, row.vector.llvm.count)
    return row(size, like), lambda context, builder, signature, args: ir.Constant(
        ir.ArrayType(row.vector.llvm, row.count), [zero] * row.count
    )


@intrinsic
def fma_row(typing, row, times, plus):
    """row * times + plus, `times` being a vector for all parts of the row."""

    def code(context, builder, signature, args):
        made = args[2]
        for n in range(row.count):
            part, more = builder.extract_value(args[0], n), builder.extract_value(args[2], n)
            made = builder.insert_value(made, fma_(builder, part, args[1], more), n)
        return made

    return row(row, times, row), code


@intrinsic
def along(typing, a, b):
    """The vector whose numbers have the sum of the products of two rows."""

    def code(context, builder, signature, args):
        parts = [[builder.extract_value(x, n) for x in args] for n in range(a.count)]
        made = builder.fmul(*parts[0])
        for x, y in parts[1:]:
            made = fma_(builder, x, y, made)
        return made

    return a.vector(a, a), code


@inner
def copy(size, x, i, out, j):
    """A row of `x` from i on into `out` from j on, exact or rounded."""
    w = lanes(size)
    for o in range(0, len(size), len(w)):
        write(w, out, j + o, read(w, x, i + o))


@inner
def past(size, x, i, out, j):
    """`copy` past the caches: it spares them, and reading what is overwritten."""
    w = lanes(size)
    for o in range(0, len(size), len(w)):
        stream(w, out, j + o, read(w, x, i + o))


@inner
def put(size, far, x, i, out):
    """A row of `x` from i on into `out`, past the caches if `far`."""
    if far:
        past(size, x, i, out, 0)
    else:
        copy(size, x, i, out, 0)


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
