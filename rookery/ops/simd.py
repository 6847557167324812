"""Vectors in code compiled by Numba: of 16 fp32 numbers where nothing else is said.

Where a sum must be the same bits however many sequences are computed together, its order is written down here instead
of being left to the compiler. The operations are LLVM's own on vectors, so they compile for every processor, into
several instructions where its registers are shorter. Memory is addressed by plain integers; `rows_numba` has the same
for arrays. Importing this imports Numba.
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
    """The Numba type of a vector: of numbers of a type, fp32 or fp64."""

    def __init__(self, number: types.Float, width: int) -> None:
        super().__init__(name=f"{number}x{width}")
        self.number = number
        self.llvm = ir.VectorType(ir.DoubleType() if number == types.float64 else ir.FloatType(), width)


vector = Vector(types.float32, WIDTH)


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


def fill(element: ir.Type, value: float, width: int = WIDTH) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, width), [value] * width)


def pointer(builder: ir.IRBuilder, address: Any, to: ir.Type) -> Any:
    return builder.inttoptr(address, to.as_pointer())


def read_f32(builder: ir.IRBuilder, address: Any) -> Any:
    return builder.load(pointer(builder, address, F32), align=4)


def read_bf16(builder: ir.IRBuilder, address: Any) -> Any:
    return from_bf16(builder, builder.load(pointer(builder, address, I16), align=2))


def from_bf16(builder: ir.IRBuilder, bits: Any) -> Any:
    """fp32 numbers of the bits of bf16 ones."""
    width = bits.type.count
    bits = builder.zext(bits, ir.VectorType(ir.IntType(32), width))
    return builder.bitcast(builder.shl(bits, fill(ir.IntType(32), 16, width)), ir.VectorType(ir.FloatType(), width))


def to_bf16(builder: ir.IRBuilder, value: Any) -> Any:
    """Bits of fp32 numbers rounded to bf16: to the nearest, halves to even; NaN stays NaN."""
    word, width = ir.IntType(32), value.type.count
    bits = builder.bitcast(value, ir.VectorType(word, width))
    odd = builder.and_(builder.lshr(bits, fill(word, 16, width)), fill(word, 1, width))
    nearest = builder.add(bits, builder.add(odd, fill(word, 0x7FFF, width)))
    nearest = builder.select(builder.fcmp_unordered("uno", value, value), fill(word, 0x7FC00000, width), nearest)
    return builder.trunc(builder.lshr(nearest, fill(word, 16, width)), ir.VectorType(ir.IntType(16), width))


def read_i8(builder: ir.IRBuilder, address: Any) -> Any:
    return builder.sitofp(builder.load(pointer(builder, address, I8), align=1), F32)


READERS: tuple[Callable[[ir.IRBuilder, Any], Any], ...] = (read_f32, read_bf16, read_i8)
"""How 16 numbers of each kind are read as fp32."""

BYTES = (4, 2, 1)
"""Bytes of a number of each kind."""

LINE = 64
"""Bytes of a cache line."""


def of_llvm(builder: ir.IRBuilder, name: str, *args: Any) -> Any:
    """Call LLVM's function `name` of vectors."""
    vector = args[0].type
    signature = ir.FunctionType(vector, [vector] * len(args))
    suffix = f"v{vector.count}f{64 if vector.element == ir.DoubleType() else 32}"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}.{suffix}"), args)


def fma_(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return of_llvm(builder, "fmuladd", a, b, c)


def prefetch(builder: ir.IRBuilder, address: Any) -> None:
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


def splat_(builder: ir.IRBuilder, value: Any, width: int = WIDTH) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, width), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, fill(ir.IntType(32), 0, width))


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
        builder.store(to_bf16(builder, value), pointer(builder, address, I16), align=2)
        return context.get_dummy_value()

    return types.void(kind, types.int64, vector), code


@intrinsic
def fma(typing, a, b, c):
    """a * b + c."""
    return a(a, a, a), lambda context, builder, signature, args: fma_(builder, *args)


def _binary(name: str) -> Any:
    @intrinsic
    def operation(typing, a, b):
        return a(a, a), lambda context, builder, signature, args: getattr(builder, name)(*args)

    return operation


_add, _sub, _mul, _div = (_binary(name) for name in ("fadd", "fsub", "fmul", "fdiv"))


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Vector) and a == b


@overload(operator.add, inline="always")
def _overload_add(a, b):
    if _alike(a, b):
        return lambda a, b: _add(a, b)


@overload(operator.sub, inline="always")
def _overload_sub(a, b):
    if _alike(a, b):
        return lambda a, b: _sub(a, b)


@overload(operator.mul, inline="always")
def _overload_mul(a, b):
    if _alike(a, b):
        return lambda a, b: _mul(a, b)


@overload(operator.truediv, inline="always")
def _overload_div(a, b):
    if _alike(a, b):
        return lambda a, b: _div(a, b)


@intrinsic
def positive(typing, value):
    """max(value, 0); NaN stays NaN."""

    def code(context, builder, signature, args):
        zero = fill(ir.FloatType(), 0.0)
        return builder.select(builder.fcmp_ordered("<", args[0], zero), zero, args[0])

    return vector(vector), code


@intrinsic
def exp(typing, value):
    """e to the power of `value`: in fp32 to 2 units in the last place, and inputs are clamped to +-87."""
    return value(value), lambda context, builder, signature, args: exp_(builder, args[0])


def exp_(builder: ir.IRBuilder, x: Any) -> Any:
    element, width = x.type.element, x.type.count
    if element == ir.DoubleType():
        return of_llvm(builder, "exp", x)
    word = ir.IntType(32)
    integers = ir.VectorType(word, width)

    def number(value: float) -> Any:
        return fill(element, value, width)

    least, most = number(-87.0), number(87.0)
    y = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    y = builder.select(builder.fcmp_ordered(">", y, most), most, y)
    n = of_llvm(builder, "rint", builder.fmul(y, number(1 / math.log(2))))
    # ln 2 in two parts, the first of which has so few bits that its multiples are exact.
    y = fma_(builder, n, number(-0.693359375), y)
    y = fma_(builder, n, number(2.12194440e-4), y)
    power = number(1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        power = fma_(builder, power, y, number(coefficient))
    scale = builder.shl(builder.fptosi(n, integers), fill(word, 23, width))
    return builder.bitcast(builder.add(builder.bitcast(power, integers), scale), x.type)


@intrinsic
def total(typing, value):
    """The sum of the numbers, in pairs of halves."""
    return value.number(value), lambda context, builder, signature, args: total_(builder, args[0])


def total_(builder: ir.IRBuilder, value: Any) -> Any:
    while value.type.count > 1:
        value = builder.fadd(*halves(builder, value))
    return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))


def halves(builder: ir.IRBuilder, value: Any) -> list[Any]:
    half = value.type.count // 2
    return [
        builder.shuffle_vector(
            value,
            ir.Constant(value.type, ir.Undefined),
            ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(start, start + half))),
        )
        for start in (0, half)
    ]
