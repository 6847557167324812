"""Triton kernels of `mix7_triton`: what happens inside each head of each token before and after the recurrence.

Arithmetic is fp32; what is read and written may be bf16, fp16 or fp32. Arrays are (tokens, H, N), parameters (H, N).
Program (i, h) works on tiles of ROWS tokens of head h; in the backward pass it goes through TILES of them and writes
one row of partial sums of its parameters' gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(n, h, tokens, H, N: tl.constexpr):
    """Offsets of head h of tokens n, and which of them exist."""
    return (n.to(tl.int64) * H + h)[:, None] * N + tl.arange(0, N)[None, :], (n < tokens)[:, None]


@triton.jit
def _load(x, tile, exists):
    return tl.load(x + tile, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _parameter(x, h, N: tl.constexpr):
    return tl.load(x + h * N + tl.arange(0, N)).to(tl.float32)[None, :]


@triton.jit
def _store_sums(sums, x, which, COUNT: tl.constexpr, H, N: tl.constexpr):
    """Sum x (ROWS, N) into parameter `which` of COUNT in sums (programs, COUNT, H, N)."""
    row = (tl.program_id(0) * COUNT + which) * H + tl.program_id(1)
    tl.store(sums + row * N + tl.arange(0, N), tl.sum(x, axis=0))


@triton.jit
def _removal(raw, k_k):
    """kappa, and 1 / |k * k_k|."""
    unit = raw * k_k
    inverse = 1 / tl.maximum(tl.sqrt(tl.sum(unit * unit, axis=1)), 1e-12)[:, None]
    return unit * inverse, inverse


@triton.jit
def before(k, a, k_k, k_a, removal, key, b, tokens, H, N: tl.constexpr, ROWS: tl.constexpr):
    """removal = -kappa, key = k * (1 + (a - 1) * k_a), b = kappa * a."""
    h = tl.program_id(1)
    tile, exists = _tile(tl.program_id(0) * ROWS + tl.arange(0, ROWS), h, tokens, H, N)
    raw = _load(k, tile, exists)
    rate = _load(a, tile, exists)
    kappa, _ = _removal(raw, _parameter(k_k, h, N))
    tl.store(removal + tile, -kappa, mask=exists)
    tl.store(key + tile, raw * (1 + (rate - 1) * _parameter(k_a, h, N)), mask=exists)
    tl.store(b + tile, kappa * rate, mask=exists)


@triton.jit
def before_back(
    k, a, k_k, k_a, dremoval, dkey, db, dk, da, sums, tokens, H, TILES, N: tl.constexpr, ROWS: tl.constexpr
):
    """sums (programs, 2, H, N): of k_k and k_a."""
    h = tl.program_id(1)
    scale = _parameter(k_k, h, N)
    share = _parameter(k_a, h, N)
    nothing = tl.zeros((ROWS, N), tl.float32)
    of_scale, of_share = nothing, nothing
    for step in range(0, TILES):
        tile, exists = _tile((tl.program_id(0) * TILES + step) * ROWS + tl.arange(0, ROWS), h, tokens, H, N)
        raw = _load(k, tile, exists)
        rate = _load(a, tile, exists)
        kappa, inverse = _removal(raw, scale)
        of_b = _load(db, tile, exists)
        of_key = _load(dkey, tile, exists)
        of_kappa = of_b * rate - _load(dremoval, tile, exists)
        of_unit = (of_kappa - kappa * tl.sum(of_kappa * kappa, axis=1)[:, None]) * inverse
        tl.store(da + tile, of_b * kappa + of_key * raw * share, mask=exists)
        tl.store(dk + tile, of_key * (1 + (rate - 1) * share) + of_unit * scale, mask=exists)
        of_scale += of_unit * raw
        of_share += of_key * raw * (rate - 1)
    _store_sums(sums, of_scale, 0, 2, H, N)
    _store_sums(sums, of_share, 1, 2, H, N)


@triton.jit
def _normal(y, eps, N: tl.constexpr):
    """y with mean 0 and variance 1 in each row, and what it was multiplied with."""
    centred = y - (tl.sum(y, axis=1) / N)[:, None]
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + eps)[:, None]
    return centred * scale, scale


@triton.jit
def after(y, r, key, v, g, r_k, ln_weight, ln_bias, out, tokens, H, eps, N: tl.constexpr, ROWS: tl.constexpr):
    """out = (group_norm(y) + (r . key . r_k) v) * g."""
    h = tl.program_id(1)
    tile, exists = _tile(tl.program_id(0) * ROWS + tl.arange(0, ROWS), h, tokens, H, N)
    normal, _ = _normal(_load(y, tile, exists), eps, N)
    bonus = tl.sum(_load(r, tile, exists) * _load(key, tile, exists) * _parameter(r_k, h, N), axis=1)[:, None]
    mixed = normal * _parameter(ln_weight, h, N) + _parameter(ln_bias, h, N) + bonus * _load(v, tile, exists)
    tl.store(out + tile, mixed * _load(g, tile, exists), mask=exists)


@triton.jit
def after_back(
    y, r, key, v, g, r_k, ln_weight, ln_bias, dout, dy, dr, dkey, dv, dg, sums, tokens, H, TILES, eps,
    N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sums (programs, 3, H, N): of r_k, ln_weight and ln_bias."""
    h = tl.program_id(1)
    weight = _parameter(ln_weight, h, N)
    bias = _parameter(ln_bias, h, N)
    of_own = _parameter(r_k, h, N)
    nothing = tl.zeros((ROWS, N), tl.float32)
    of_r_k, of_weight, of_bias = nothing, nothing, nothing
    for step in range(0, TILES):
        tile, exists = _tile((tl.program_id(0) * TILES + step) * ROWS + tl.arange(0, ROWS), h, tokens, H, N)
        normal, scale = _normal(_load(y, tile, exists), eps, N)
        read = _load(r, tile, exists)
        own = _load(key, tile, exists)
        value = _load(v, tile, exists)
        gate = _load(g, tile, exists)
        grad = _load(dout, tile, exists)
        bonus = tl.sum(read * own * of_own, axis=1)[:, None]
        tl.store(dg + tile, grad * (normal * weight + bias + bonus * value), mask=exists)
        grad *= gate
        tl.store(dv + tile, grad * bonus, mask=exists)
        of_bonus = tl.sum(grad * value, axis=1)[:, None]
        tl.store(dr + tile, of_bonus * own * of_own, mask=exists)
        tl.store(dkey + tile, of_bonus * read * of_own, mask=exists)
        of_r_k += of_bonus * read * own
        of_weight += grad * normal
        of_bias += grad
        grad *= weight
        along = (tl.sum(grad * normal, axis=1) / N)[:, None]
        tl.store(dy + tile, scale * (grad - (tl.sum(grad, axis=1) / N)[:, None] - normal * along), mask=exists)
    _store_sums(sums, of_r_k, 0, 3, H, N)
    _store_sums(sums, of_weight, 1, 3, H, N)
    _store_sums(sums, of_bias, 2, 3, H, N)
