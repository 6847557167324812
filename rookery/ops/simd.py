"""Vectors of 16 fp32 numbers in code compiled by Numba.

Where a sum must be the same bits however many sequences are computed together, its order is written down here instead
of being left to the compiler. The operations are LLVM's own on vectors, so they compile for every processor, into
several instructions where its registers are shorter. Memory is addressed by plain integers. Importing this imports
Numba.

Numba keeps compiled code until the file of the function itself changes: whoever changes this file must remove the
`__pycache__/*.nb?` of those that use it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, overload, register_model

from rookery.ops.jit import intrinsic

WIDTH = 16

F32 = ir.VectorType(ir.FloatType(), WIDTH)
I32 = ir.VectorType(ir.IntType(32), WIDTH)
I16 = ir.VectorType(ir.IntType(16), WIDTH)
I8 = ir.VectorType(ir.IntType(8), WIDTH)


class Vector(types.Type):
    """The Numba type of a vector."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = Vector()


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, F32)


def fill(element: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, WIDTH), [value] * WIDTH)


def pointer(builder: ir.IRBuilder, address: Any, to: ir.Type) -> Any:
    return builder.inttoptr(address, to.as_pointer())


def read_f32(builder: ir.IRBuilder, address: Any) -> Any:
    return builder.load(pointer(builder, address, F32), align=4)


def read_bf16(builder: ir.IRBuilder, address: Any) -> Any:
    bits = builder.zext(builder.load(pointer(builder, address, I16), align=2), I32)
    return builder.bitcast(builder.shl(bits, fill(ir.IntType(32), 16)), F32)


def read_i8(builder: ir.IRBuilder, address: Any) -> Any:
    return builder.sitofp(builder.load(pointer(builder, address, I8), align=1), F32)


READERS: tuple[Callable[[ir.IRBuilder, Any], Any], ...] = (read_f32, read_bf16, read_i8)
"""How 16 numbers of each kind are read as fp32."""

BYTES = (4, 2, 1)
"""Bytes of a number of each kind."""

LINE = 64
AHEAD = 4096
"""Bytes of a cache line, and how far ahead of their use bf16 and int8 weights are called for. By itself the processor
gets 22 and 19 GB/s from memory that gives 33 to 40 this way (one core of a Zen 5, shared); fp32 rows need no help.
"""


def of_llvm(builder: ir.IRBuilder, name: str, *args: Any) -> Any:
    """Call LLVM's function `name` of vectors."""
    signature = ir.FunctionType(F32, [F32] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}.v16f32"), args)


def fma_(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return of_llvm(builder, "fmuladd", a, b, c)


def call_for(builder: ir.IRBuilder, address: Any) -> None:
    """Have the line at `address` brought into the cache; any address will do."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    signature = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, byte), flag(0), flag(3), flag(1)])


@intrinsic
def zeros(typing):
    """A vector of zeros."""
    return vector(), lambda context, builder, signature, args: fill(ir.FloatType(), 0.0)


@intrinsic
def splat(typing, value):
    """A vector of 16 times `value`, a float32."""

    def code(context, builder, signature, args):
        return splat_(builder, args[0])

    return vector(types.float32), code


def splat_(builder: ir.IRBuilder, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(F32, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(F32, ir.Undefined), fill(ir.IntType(32), 0))


@intrinsic
def load(typing, address):
    """16 fp32 numbers at an address."""
    return vector(types.int64), lambda context, builder, signature, args: read_f32(builder, args[0])


@intrinsic
def load_as(typing, kind, address):
    """16 numbers at an address; kind: `static(k)`, k an index of READERS."""
    read = READERS[len(kind)]
    return vector(kind, types.int64), lambda context, builder, signature, args: read(builder, args[1])


@intrinsic
def store(typing, address, value):
    """Write 16 fp32 numbers to an address."""

    def code(context, builder, signature, args):
        builder.store(args[1], pointer(builder, args[0], F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), code


@intrinsic
def store_as(typing, kind, address, value):
    """Write 16 numbers to an address: as fp32 (kind `static(0)`), or as bf16 (`static(1)`), rounded to the nearest,
    halves to even."""

    def code(context, builder, signature, args):
        _kind, address, value = args
        if len(kind) == 0:
            builder.store(value, pointer(builder, address, F32), align=4)
            return context.get_dummy_value()
        word = ir.IntType(32)
        bits = builder.bitcast(value, I32)
        odd = builder.and_(builder.lshr(bits, fill(word, 16)), fill(word, 1))
        rounded = builder.add(bits, builder.add(odd, fill(word, 0x7FFF)))
        half = builder.trunc(builder.lshr(rounded, fill(word, 16)), I16)
        builder.store(half, pointer(builder, address, I16), align=2)
        return context.get_dummy_value()

    return types.void(kind, types.int64, vector), code


@intrinsic
def fma(typing, a, b, c):
    """a * b + c."""
    return vector(vector, vector, vector), lambda context, builder, signature, args: fma_(builder, *args)


def _binary(name: str) -> Any:
    @intrinsic
    def operation(typing, a, b):
        return vector(vector, vector), lambda context, builder, signature, args: getattr(builder, name)(*args)

    return operation


_add, _sub, _mul, _div = (_binary(name) for name in ("fadd", "fsub", "fmul", "fdiv"))


@overload(operator.add, inline="always")
def _overload_add(a, b):
    if a == b == vector:
        return lambda a, b: _add(a, b)


@overload(operator.sub, inline="always")
def _overload_sub(a, b):
    if a == b == vector:
        return lambda a, b: _sub(a, b)


@overload(operator.mul, inline="always")
def _overload_mul(a, b):
    if a == b == vector:
        return lambda a, b: _mul(a, b)


@overload(operator.truediv, inline="always")
def _overload_div(a, b):
    if a == b == vector:
        return lambda a, b: _div(a, b)


@intrinsic
def positive(typing, value):
    """max(value, 0)."""

    def code(context, builder, signature, args):
        zero = fill(ir.FloatType(), 0.0)
        return builder.select(builder.fcmp_ordered(">", args[0], zero), args[0], zero)

    return vector(vector), code


@intrinsic
def exp(typing, value):
    """e to the power of `value`, to 2 units in the last place; inputs are clamped to +-87."""

    def code(context, builder, signature, args):
        number = ir.FloatType()
        least, most = fill(number, -87.0), fill(number, 87.0)
        x = builder.select(builder.fcmp_ordered("<", args[0], least), least, args[0])
        x = builder.select(builder.fcmp_ordered(">", x, most), most, x)
        n = of_llvm(builder, "rint", builder.fmul(x, fill(number, 1 / math.log(2))))
        # ln 2 in two parts, the first of which has so few bits that its multiples are exact.
        x = fma_(builder, n, fill(number, -0.693359375), x)
        x = fma_(builder, n, fill(number, 2.12194440e-4), x)
        y = fill(number, 1 / 5040)
        for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            y = fma_(builder, y, x, fill(number, coefficient))
        power = builder.shl(builder.fptosi(n, I32), fill(ir.IntType(32), 23))
        return builder.bitcast(builder.add(builder.bitcast(y, I32), power), F32)

    return vector(vector), code


@intrinsic
def total(typing, value):
    """The sum of the 16 numbers, in pairs of halves."""
    return types.float32(vector), lambda context, builder, signature, args: total_(builder, args[0])


def total_(builder: ir.IRBuilder, value: Any) -> Any:
    half = WIDTH // 2
    while half:
        low, high = (
            builder.shuffle_vector(
                value,
                ir.Constant(value.type, ir.Undefined),
                ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(start, start + half))),
            )
            for start in (0, half)
        )
        value, half = builder.fadd(low, high), half // 2
    return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))


@intrinsic
def tile(typing, kind, rows, columns, weights, weight_stride, scales, size, inputs, input_stride, out, out_stride):
    """Products of R rows of weights with B rows of inputs, written to `out`: B rows of R numbers.

    Each sum is taken alike, whatever R and B: 16 partial sums over every sixteenth number, then `total`.

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

        def at(address: Any, n: int, stride: Any) -> Any:
            return builder.add(address, builder.mul(stride, word(n)))

        w = [at(weights, r, weight_stride) for r in range(R)]
        x = [at(inputs, b, input_stride) for b in range(B)]
        sums = [[cgutils.alloca_once_value(builder, fill(number, 0.0)) for _b in x] for _r in w]

        def advance(i: Any) -> None:
            at_w, at_x = builder.mul(i, word(width)), builder.mul(i, word(4))
            values = [read_f32(builder, builder.add(address, at_x)) for address in x]
            for r in range(R):
                weight = READERS[k](builder, builder.add(w[r], at_w))
                for b in range(B):
                    builder.store(fma_(builder, weight, values[b], builder.load(sums[r][b])), sums[r][b])

        # A line of each row at a time, while the one needed AHEAD bytes later is called for. Past the end of a row,
        # that is one of the row R rows later.
        block = LINE // width
        whole = builder.and_(size, word(-block))
        with cgutils.for_range_slice(builder, word(0), whole, word(block), intp=word) as (i, _count):
            if width < 4:
                ahead = builder.add(builder.mul(i, word(width)), word(AHEAD))
                beyond = builder.icmp_signed(">=", ahead, builder.mul(size, word(width)))
                skipped = builder.select(beyond, builder.mul(weight_stride, word(R - 1)), word(0))
                for address in w:
                    call_for(builder, builder.add(builder.add(address, ahead), skipped))
            for part in range(0, block, WIDTH):
                advance(builder.add(i, word(part)))
        with cgutils.for_range_slice(builder, whole, size, word(WIDTH), intp=word) as (i, _count):
            advance(i)
        for r in range(R):
            for b in range(B):
                value = total_(builder, builder.load(sums[r][b]))
                if width == 1:
                    scale = builder.load(pointer(builder, builder.add(scales, word(4 * r)), number), align=4)
                    value = builder.fmul(value, scale)
                place = builder.add(at(out, b, out_stride), word(4 * r))
                builder.store(value, pointer(builder, place, number), align=4)
        return context.get_dummy_value()

    return types.void(kind, rows, columns, *(types.int64,) * 8), code
