"""Triton kernels of `pointwise_triton`. Arithmetic is fp32; what is read and written may be bf16, fp16 or fp32.

Tokens are counted through all rows of the batch. A program works on ROWS tokens and COLUMNS channels; where it sums
over tokens it goes through TILES such tiles and writes one row of partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(n, c, total, C):
    """Offsets of tokens `n` and channels `c` of a (total, C) array, and which of them exist."""
    return n[:, None] * C + c[None, :], (n < total)[:, None] & (c < C)[None, :]


@triton.jit
def _load(x, tile, exists):
    return tl.load(x + tile, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _begins(begins, n, total, T, PACKED: tl.constexpr):
    """The number of the sequence that begins with token n, or -1. PACKED: as `begins` says; else each T tokens."""
    if PACKED:
        return tl.load(begins + n, mask=n < total, other=-1).to(tl.int64)
    else:
        return tl.where((n % T == 0) & (n < total), n // T, -1)


@triton.jit
def _change(here, x, before, sequence, n, c, tile, exists, C):
    """The token before each, less the token."""
    first = (sequence >= 0)[:, None]
    previous = tl.load(x + tile - C, mask=exists & ~first, other=0.0).to(tl.float32)
    previous += tl.load(before + sequence[:, None] * C + c[None, :], mask=exists & first, other=0.0).to(tl.float32)
    return previous - here


@triton.jit
def token_shift(
    x, before, begins, mixes, out, total, T, C,
    M: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x (total, C), before (S, C), mixes (M, C) -> out (M, total, C)."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tile, exists = _tile(n, c, total, C)
    here = _load(x, tile, exists)
    change = _change(here, x, before, _begins(begins, n, total, T, PACKED), n, c, tile, exists, C)
    size = total.to(tl.int64) * C
    for m in tl.static_range(M):
        mix = _load(mixes, m * C + c, c < C)
        tl.store(out + m * size + tile, here + mix[None, :] * change, mask=exists)


@triton.jit
def _mix_back(grads, mixes, m, change, of_here, of_previous, of_mix, tile, exists, goes_on, c, C):
    """Add what one mix gives to the gradients of a tile, of the tokens before it, and, row by row, of itself."""
    mix = _load(mixes, m * C + c, c < C)[None, :]
    grad = _load(grads, tile, exists)
    of_here += grad * (1 - mix) + mix * _load(grads + C, tile, exists & goes_on[:, None])
    return of_here, of_previous + grad * mix, of_mix + grad * change


@triton.jit
def token_shift_back(
    x, before, begins, mixes, g0, g1, g2, g3, g4, g5, dx, dbefore, dmixes, total, T, C, TILES,
    M: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first M of g0.. are the gradients (total, C) of the outputs; dmixes (programs, M, C), fp32."""
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    nothing = tl.zeros((ROWS, COLUMNS), tl.float32)
    d0, d1, d2, d3, d4, d5 = nothing, nothing, nothing, nothing, nothing, nothing
    for step in range(0, TILES):
        n = (tl.program_id(0).to(tl.int64) * TILES + step) * ROWS + tl.arange(0, ROWS)
        tile, exists = _tile(n, c, total, C)
        sequence = _begins(begins, n, total, T, PACKED)
        goes_on = (n + 1 < total) & (_begins(begins, n + 1, total, T, PACKED) < 0)
        change = _change(_load(x, tile, exists), x, before, sequence, n, c, tile, exists, C)
        here, before_it = nothing, nothing
        here, before_it, d0 = _mix_back(g0, mixes, 0, change, here, before_it, d0, tile, exists, goes_on, c, C)
        if M > 1:
            here, before_it, d1 = _mix_back(g1, mixes, 1, change, here, before_it, d1, tile, exists, goes_on, c, C)
        if M > 2:
            here, before_it, d2 = _mix_back(g2, mixes, 2, change, here, before_it, d2, tile, exists, goes_on, c, C)
        if M > 3:
            here, before_it, d3 = _mix_back(g3, mixes, 3, change, here, before_it, d3, tile, exists, goes_on, c, C)
        if M > 4:
            here, before_it, d4 = _mix_back(g4, mixes, 4, change, here, before_it, d4, tile, exists, goes_on, c, C)
        if M > 5:
            here, before_it, d5 = _mix_back(g5, mixes, 5, change, here, before_it, d5, tile, exists, goes_on, c, C)
        tl.store(dx + tile, here, mask=exists)
        first = exists & (sequence >= 0)[:, None]
        tl.store(dbefore + sequence[:, None] * C + c[None, :], before_it, mask=first)
    of_mixes = (d0, d1, d2, d3, d4, d5)
    for m in tl.static_range(M):
        tl.store(dmixes + (tl.program_id(0) * M + m) * C + c, tl.sum(of_mixes[m], axis=0), mask=c < C)


@triton.jit
def relu_square(x, y, total, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    positive = tl.maximum(_load(x, i, i < total), 0.0)
    tl.store(y + i, positive * positive, mask=i < total)


@triton.jit
def relu_square_back(x, dy, dx, total, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(dx + i, 2 * tl.maximum(_load(x, i, i < total), 0.0) * _load(dy, i, i < total), mask=i < total)


@triton.jit
def gates7(
    w, a, v, gate, v_first, w0, a0, v0, w_out, a_out, v_out, total, C,
    VALUES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All (total, C) but the biases (C). Without VALUES, what has to do with v is not touched."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tile, exists = _tile(n, c, total, C)
    tl.store(w_out + tile, _load(w, tile, exists) + _load(w0, c, c < C)[None, :], mask=exists)
    tl.store(a_out + tile, tl.sigmoid(_load(a, tile, exists) + _load(a0, c, c < C)[None, :]), mask=exists)
    if VALUES:
        value = _load(v, tile, exists)
        share = tl.sigmoid(_load(gate, tile, exists) + _load(v0, c, c < C)[None, :])
        tl.store(v_out + tile, value + share * (_load(v_first, tile, exists) - value), mask=exists)


@triton.jit
def gates7_back(
    a, v, gate, v_first, a0, v0, dw, da_out, dv_out, da, dv, dgate, dv_first, sums, total, C, TILES,
    VALUES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums (programs, 3, C) get the gradients of w0, a0 and, with VALUES, v0, fp32."""
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    a_bias = _load(a0, c, c < C)[None, :]
    nothing = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_w, of_a, of_v = nothing, nothing, nothing
    for step in range(0, TILES):
        n = (tl.program_id(0).to(tl.int64) * TILES + step) * ROWS + tl.arange(0, ROWS)
        tile, exists = _tile(n, c, total, C)
        of_w += _load(dw, tile, exists)
        raw = _load(a, tile, exists) + a_bias
        slope = _load(da_out, tile, exists) * tl.sigmoid(raw) * tl.sigmoid(-raw)
        tl.store(da + tile, slope, mask=exists)
        of_a += slope
        if VALUES:
            raw = _load(gate, tile, exists) + _load(v0, c, c < C)[None, :]
            share = tl.sigmoid(raw)
            grad = _load(dv_out, tile, exists)
            tl.store(dv + tile, grad * tl.sigmoid(-raw), mask=exists)
            tl.store(dv_first + tile, grad * share, mask=exists)
            slope = grad * (_load(v_first, tile, exists) - _load(v, tile, exists)) * share * tl.sigmoid(-raw)
            tl.store(dgate + tile, slope, mask=exists)
            of_v += slope
    row = sums + tl.program_id(0) * 3 * C + c
    tl.store(row, tl.sum(of_w, axis=0), mask=c < C)
    tl.store(row + C, tl.sum(of_a, axis=0), mask=c < C)
    if VALUES:
        tl.store(row + 2 * C, tl.sum(of_v, axis=0), mask=c < C)
