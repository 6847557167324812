"""Products of fp32 matrices, compiled by Numba.

A tile of ROWS x COLUMNS sums stays in registers while the numbers of a row are taken one by one from the first factor
and COLUMNS at once from the second. That asks nothing of the first factor's layout, so that a weight's gradient, whose
sums run over tokens, needs no transposed copy; and a call costs half of what entering oneDNN does.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

from rookery.ops.jit import function, intrinsic, outer
from rookery.ops.simd import F32, LINE, WIDTH, fill, fma_, pointer, prefetch, read_f32, splat_


def _avx512() -> bool:
    """Whether code is compiled for registers of 512 bits. Numba's caches hold code for the same answer only."""
    return "+avx512f" in str(cpu_target.target_context.codegen().magic_tuple())


ROWS, VECTORS = (8, 2) if _avx512() else (6, 1)
"""So many sums that registers hold all of them, and what they are made of."""

COLUMNS = VECTORS * WIDTH
DEPTH = 256
"""Numbers of a sum that are added before the next tile: so many rows of the second factor, COLUMNS wide, stay in L1."""

BLOCK, GROUP = COLUMNS, 512
"""Rows of the first factor and columns of the second that meet while both are in L2."""

NARROW = 384
"""Columns up to which matrices are read where they are: a column of a wider one has too few places in L1."""

SOON = 32
"""Rows that are called for ahead of being copied."""


def packed_size(K: int, N: int) -> int:
    """Numbers of a matrix (K, N) once it is packed."""
    return K * -(-N // COLUMNS) * COLUMNS


def pieces(M: int, N: int) -> int:
    """Pieces of work of a product."""
    return -(-M // BLOCK) * -(-N // GROUP)


def _columns(builder: ir.IRBuilder, left: ir.Value) -> list[ir.Value]:
    """For each vector of a row, which of its numbers are among the `left` first of the row."""
    masks = []
    for v in range(VECTORS):
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [v * WIDTH + lane for lane in range(WIDTH)])
        masks.append(builder.icmp_signed("<", lanes, splat_(builder, builder.trunc(left, ir.IntType(32)))))
    return masks


def _read_some(builder: ir.IRBuilder, address: ir.Value, mask: ir.Value) -> ir.Value:
    """16 fp32 numbers; 0 where `mask` is false, and memory is not touched there."""
    place = pointer(builder, address, F32)
    signature = ir.FunctionType(F32, [place.type, ir.IntType(32), mask.type, F32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.masked.load.v16f32.p0")
    return builder.call(function, [place, ir.IntType(32)(4), mask, fill(ir.FloatType(), 0.0)])


def _write_some(builder: ir.IRBuilder, address: ir.Value, mask: ir.Value, value: ir.Value) -> None:
    place = pointer(builder, address, F32)
    signature = ir.FunctionType(ir.VoidType(), [F32, place.type, ir.IntType(32), mask.type])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.masked.store.v16f32.p0")
    builder.call(function, [value, place, ir.IntType(32)(4), mask])


@intrinsic
def _tile(typing, a, row_step, step, b, b_step, count, begin, out, out_step, rows, columns, soon, soon_row, soon_step):
    """out[r, c] = begin[r, c] + sum over n < count of a[r, n] b[n, c].

    Args:
        a, b, begin, out: addresses. COLUMNS numbers are read of each row of b. begin has rows like those of out and may
            be out itself; 0 stands for zeros.
        row_step, step, b_step, out_step: bytes from row to row of a, from number to number in its rows, from row to row
            of b, and of out.
        rows, columns: how many of ROWS and COLUMNS there are.
        soon, soon_row, soon_step: address of memory that is needed next; a line of each of ROWS rows is called for in
            turn, then those soon_step bytes later.
    """

    def code(context, builder, signature, args):
        a, row_step, step, b, b_step, count, begin, out, out_step, rows, columns, soon, soon_row, soon_step = args
        word = ir.IntType(64)
        # Rows beyond the last are the last once more: the same numbers are written twice.
        last = builder.sub(rows, word(1))
        row = [builder.select(builder.icmp_signed("<", word(r), rows), word(r), last) for r in range(ROWS)]
        first = [builder.add(a, builder.mul(r, row_step)) for r in row]
        offsets = [[builder.add(builder.mul(r, out_step), word(4 * WIDTH * v)) for v in range(VECTORS)] for r in row]
        places = [[builder.add(out, offset) for offset in of_row] for of_row in offsets]
        masks = _columns(builder, columns)
        begins = builder.icmp_signed("!=", begin, word(0))
        present = _columns(builder, builder.select(begins, columns, word(0)))
        begin = builder.select(begins, begin, out)  # a load that is masked off takes long where there is no memory
        zero = fill(ir.FloatType(), 0.0)
        sums = [[cgutils.alloca_once_value(builder, zero) for _vector in masks] for _row in range(ROWS)]
        for of_row in places:
            for place in of_row:
                prefetch(builder, place)  # so that what is written at the end does not wait for memory
        with cgutils.for_range(builder, count, intp=word) as loop:
            row = builder.mul(builder.urem(loop.index, word(ROWS)), soon_row)
            line = builder.mul(builder.udiv(loop.index, word(ROWS)), soon_step)
            prefetch(builder, builder.add(soon, builder.add(row, line)))
            here = builder.add(b, builder.mul(loop.index, b_step))
            values = [read_f32(builder, builder.add(here, word(4 * WIDTH * v))) for v in range(VECTORS)]
            offset = builder.mul(loop.index, step)
            for r in range(ROWS):
                number = builder.load(pointer(builder, builder.add(first[r], offset), ir.FloatType()), align=4)
                factor = splat_(builder, number)
                for total, value in zip(sums[r], values, strict=True):
                    builder.store(fma_(builder, factor, value, builder.load(total)), total)
        # What is there is added last, lest each product is rounded as coarsely as a large number; and all of it is read
        # before any is written, as rows may come twice.
        wholes = [
            [builder.fadd(_read_some(builder, builder.add(begin, offset), mask), builder.load(total))
             for offset, mask, total in zip(of_row, present, sums_of_row, strict=True)]
            for of_row, sums_of_row in zip(offsets, sums, strict=True)
        ]  # fmt: skip
        for of_row, wholes_of_row in zip(places, wholes, strict=True):
            for place, mask, whole in zip(of_row, masks, wholes_of_row, strict=True):
                _write_some(builder, place, mask, whole)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 14), code


@intrinsic
def _pack(typing, b, row_step, step, count, columns, out):
    """out[n, c] = b[n, c] for n < count and c < columns, 0 beyond; out has COLUMNS numbers in a row.

    Args:
        b, out: addresses.
        row_step, step: bytes from row to row of b, and from number to number in its rows.
    """

    def code(context, builder, signature, args):
        b, row_step, step, count, columns, out = args
        word, number = ir.IntType(64), ir.FloatType()

        def rows(body):
            with cgutils.for_range(builder, count, intp=word) as loop:
                row = builder.add(out, builder.mul(loop.index, word(4 * COLUMNS)))
                place = builder.add(b, builder.mul(loop.index, row_step))
                body(place, row)

        def by_vectors(place, row):
            for v, mask in enumerate(masks):
                at = word(4 * WIDTH * v)
                prefetch(builder, builder.add(builder.add(place, at), builder.mul(word(SOON), row_step)))
                value = _read_some(builder, builder.add(place, at), mask)
                builder.store(value, pointer(builder, builder.add(row, at), F32), align=4)

        def clear(_place, row):
            for v in range(VECTORS):
                place = builder.add(row, word(4 * WIDTH * v))
                builder.store(fill(number, 0.0), pointer(builder, place, F32), align=4)

        masks = _columns(builder, columns)
        with builder.if_else(builder.icmp_signed("==", step, word(4))) as (contiguous, scattered):
            with contiguous:
                rows(by_vectors)
            with scattered:
                with builder.if_then(builder.icmp_signed("<", columns, word(COLUMNS))):
                    rows(clear)
                with cgutils.for_range(builder, columns, intp=word) as column:
                    start = builder.add(b, builder.mul(column.index, step))
                    target = builder.add(out, builder.mul(column.index, word(4)))
                    with cgutils.for_range(builder, count, intp=word) as loop:
                        source = builder.add(start, builder.mul(loop.index, row_step))
                        value = builder.load(pointer(builder, source, number), align=4)
                        place = builder.add(target, builder.mul(loop.index, word(4 * COLUMNS)))
                        builder.store(value, pointer(builder, place, number), align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6), code


@outer
def product(first, last, M, N, K, a, a_row, a_step, b, b_row, b_step, out, adds):
    """out (M, N) = a (M, K) @ b (K, N), added to what is there if `adds`. Sums are taken in the order of K, whatever M
    and N.

    A piece of work is BLOCK rows of GROUP columns, columns first; there are `pieces(M, N)`.

    Args:
        a, b, out: addresses; out is contiguous.
        a_row, b_row: bytes from row to row.
        a_step, b_step: bytes from number to number in a row.
    """
    blocks, panel = -(-M // BLOCK), 4 * COLUMNS * DEPTH
    room = np.empty(panel * (GROUP // COLUMNS + 1) + LINE, np.uint8)
    packed_a = np.int64(room.ctypes.data)
    packed_a += -packed_a % LINE
    packed_b = packed_a + panel
    apart = a_step != 4
    for k in range(0, K, DEPTH):
        count, packed_group = min(DEPTH, K - k), -1
        next_a, next_b = a + (k + count) * a_step, b + (k + count) * b_row
        following = min(DEPTH, K - k - count)
        end_a, end_b = next_a + following * a_step, next_b + following * b_row
        for piece in range(first, last):
            group, block = piece // blocks * GROUP, piece % blocks * BLOCK
            end = min(block + BLOCK, M)
            columns, rows = range(group, min(group + GROUP, N), COLUMNS), range(block, end, ROWS)
            if group != packed_group:
                for n in columns:
                    place = packed_b + (n - group) // COLUMNS * panel
                    _pack(b + k * b_row + n * b_step, b_row, b_step, count, min(COLUMNS, N - n), place)
                packed_group = group
            here, row_step, step = a + block * a_row + k * a_step, a_row, a_step
            if apart and N > COLUMNS:  # read more than once
                _pack(here, a_step, a_row, count, min(BLOCK, M - block), packed_a)
                here, row_step, step = packed_a, 4, 4 * BLOCK
            for m in rows:
                for n in columns:
                    at = here + (m - block) * row_step
                    soon, soon_row, soon_step = at + ROWS * row_step, row_step, LINE
                    if apart:  # what the next sums need: all of it lies together, in b and in a
                        soon, soon_row, soon_step = next_b if next_b < end_b else next_a, LINE, ROWS * LINE
                        if next_b < end_b:
                            next_b += count * LINE
                        else:
                            next_a = min(next_a + count * LINE, end_a)
                    place = packed_b + (n - group) // COLUMNS * panel
                    target = out + 4 * (m * N + n)
                    _tile(at, row_step, step, place, 4 * COLUMNS, count, target if adds or k else 0, target, 4 * N,
                          min(ROWS, end - m), min(COLUMNS, N - n), soon, soon_row, soon_step)  # fmt: skip
    room[0] = 0  # which lives until its last use


@function
def pack(K, N, b, b_row, b_step, panels):
    """Copy b (K, N) for `packed_product`: COLUMNS columns after one another, `packed_size(K, N)` numbers. Arguments are
    those of `product`."""
    for n in range(0, N, COLUMNS):
        _pack(b + n * b_step, b_row, b_step, K, min(COLUMNS, N - n), panels + n * K * 4)


@function
def packed_product(M, N, K, a, panels, begin, out):
    """out (M, N) = begin (M, N) + a (M, K) @ b (K, N), with b as `pack` copied it.

    Args:
        a, panels, begin, out: addresses; `begin` may be out, or 0 for zeros. All are contiguous.
    """
    for k in range(0, K, DEPTH):
        count = min(DEPTH, K - k)
        for n in range(0, N, COLUMNS):
            panel = panels + 4 * (n * K + k * COLUMNS)
            for m in range(0, M, ROWS):
                offset, row = 4 * (m * N + n), a + 4 * (m * K + k)
                _tile(row, 4 * K, 4, panel, 4 * COLUMNS, count, out + offset if k else (begin + offset if begin else 0),
                      out + offset, 4 * N, min(ROWS, M - m), min(COLUMNS, N - n),
                      row + ROWS * 4 * K, 4 * K, LINE)  # fmt: skip


@function
def gradient(M, N, K, a, b, out):
    """out (M, N) += the transposed a (K, M) @ b (K, N), addresses of contiguous matrices."""
    if max(M, N) > NARROW:
        product(0, -(-M // BLOCK) * -(-N // GROUP), M, N, K, a, 4, 4 * M, b, 4 * N, 4, out, True)
        return
    for k in range(0, K, DEPTH):
        count = min(DEPTH, K - k)
        for n in range(0, N, COLUMNS):
            for m in range(0, M, ROWS):
                target = out + 4 * (m * N + n)
                _tile(a + 4 * (k * M + m), 4, 4 * M, b + 4 * (k * N + n), 4 * N, count, target, target, 4 * N,
                      min(ROWS, M - m), min(COLUMNS, N - n), target + 4 * ROWS * N, 4 * N, LINE)  # fmt: skip
