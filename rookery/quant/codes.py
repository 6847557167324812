"""Weights in 8 or 4 bits: a code for each weight and a scale for each block of 64 weights of a row.

* ``int8``: code -127..127; weight = code * scale, scale = largest magnitude of the block / 127.
* ``nf4``: code 0..15; weight = NF4[code] * scale, scale = largest magnitude of the block. Two codes a byte, the first
  in the high bits. Source of the code points: QLoRA (arXiv:2305.14314), as in bitsandbytes.

Relative error |W' - W| / |W| (Frobenius norms; `benchmarks/quant_memory.py`) and bits a weight, scales included:

===========================  ====  ======  ===================  =================  ==================
kind                         bits  normal  uneven rows, cols    Student t, 4 d.f.  trained checkpoint
===========================  ====  ======  ===================  =================  ==================
int8                         8.5   0.0059  0.0084               0.0089             0.0050
int8, one scale a row        8.03  0.0078  0.0144               0.0188             0.0054
dynamic, one scale a tensor  8.0   0.0165  0.0221               0.0263             0.0114
nf4                          4.5   0.0920  0.1075               0.1113             0.0916
===========================  ====  ======  ===================  =================  ==================

The third line is RWKV-PEFT's int8 (bitsandbytes' dynamic code). Rounding to bf16 costs 0.0017.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rookery.ops.native import numba_installed

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = ("int8", "nf4")

BLOCK = 64
"""Weights of a row that share a scale; a row is padded with zeros to whole blocks."""

PIECE = 1 << 18
"""Weights that are quantised at one time, so that what is needed on the way stays small."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def padded(in_features: int) -> int:
    """Columns that a row of `in_features` weights takes up."""
    return -(-in_features // BLOCK) * BLOCK


def code_size(kind: Kind, in_features: int) -> int:
    """Bytes of the codes of a row."""
    return padded(in_features) // (2 if kind == "nf4" else 1)


def quantise_weight(
    weight: Tensor,
    kind: Kind,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of `weight` on `device` (its own when None). A few rows at a time are read.

    Args:
        weight: (out, in), floating; may be memory-mapped.
        low_rank: A0 (r, in) and B0 (out, r): quantise `weight` - B0 A0 instead.

    Returns:
        codes: (out, `code_size`), uint8; those of int8 in two's complement.
        scales: (out, blocks), fp32; 0 for a block of zeros.
    """
    out_features, in_features = weight.shape
    device = device or weight.device
    codes = torch.empty(out_features, code_size(kind, in_features), dtype=torch.uint8, device=device)
    scales = torch.empty(out_features, padded(in_features) // BLOCK, device=device)
    A0, B0 = (None, None) if low_rank is None else (factor.detach().to(device).float() for factor in low_rank)
    step = max(1, PIECE // in_features)
    for first in range(0, out_features, step):
        rows = slice(first, first + step)
        piece = weight[rows].detach().to(device).float()
        if A0 is not None and B0 is not None:
            piece = piece - B0[rows] @ A0
        codes[rows], scales[rows] = _quantise_rows(piece, kind)
    return codes, scales


def _quantise_rows(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    rows, in_features = weight.shape
    blocks = F.pad(weight, (0, padded(in_features) - in_features)).view(rows, -1, BLOCK)
    scales = blocks.abs().amax(dim=-1)
    if kind == "int8":
        scales = scales / 127
    # A block of zeros keeps scale 0; so does one of subnormal numbers whose scale would be 0.
    blocks = blocks / torch.where(scales > 0, scales, 1.0)[..., None]
    if kind == "int8":
        codes = blocks.round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    else:
        # Counting the borders below a number is four times as fast as torch.bucketize.
        nearest = torch.zeros(blocks.shape, dtype=torch.uint8, device=blocks.device)
        for border in _borders():
            nearest += blocks > border
        codes = nearest[..., 0::2] << 4 | nearest[..., 1::2]
    return codes.flatten(1), scales


def dequantise(codes: Tensor, scales: Tensor, kind: Kind, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight (rows, in) in `dtype`: the product of code point and scale in fp32, rounded once.

    bitsandbytes' kernels serve on CUDA where it is installed, a Numba loop nf4 on a CPU; all give the same bits.
    """
    if codes.device.type == "cuda" and bitsandbytes_installed():
        return dequantise_bitsandbytes(codes, scales, kind, in_features, dtype)
    if kind == "nf4" and codes.device.type == "cpu" and numba_installed():
        return dequantise_native(codes, scales, in_features).to(dtype)
    return dequantise_plain(codes, scales, kind, in_features).to(dtype)


def dequantise_plain(codes: Tensor, scales: Tensor, kind: Kind, in_features: int) -> Tensor:
    """`dequantise` in fp32 by PyTorch operations, on any device."""
    values = codes.view(torch.int8).float() if kind == "int8" else F.embedding(codes.int(), _pairs(codes.device))
    blocks = values.view(*scales.shape, BLOCK).mul_(scales[..., None])
    return blocks.flatten(1)[:, :in_features]


def dequantise_native(codes: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """nf4's `dequantise` in fp32 by a Numba loop, on a CPU."""
    from rookery.ops.jit import share_out
    from rookery.quant import codes_numba

    weight = torch.empty(len(codes), in_features)
    arrays = (codes.contiguous(), _points(codes.device), scales.contiguous(), weight)
    share_out(codes_numba.nf4, len(codes), *(array.numpy() for array in arrays))
    return weight


def dequantise_bitsandbytes(codes: Tensor, scales: Tensor, kind: Kind, in_features: int, dtype: torch.dtype) -> Tensor:
    """`dequantise` by the kernels of bitsandbytes, whose layout is ours."""
    import bitsandbytes  # noqa: F401 - registers the operations

    flat = codes.reshape(-1)
    shape = (len(codes), padded(in_features))
    if kind == "int8":
        code = torch.arange(256, device=codes.device).to(torch.uint8).view(torch.int8).float()
        weight = torch.ops.bitsandbytes.dequantize_blockwise(flat, scales.reshape(-1), code, BLOCK, dtype)
    else:
        weight = torch.ops.bitsandbytes.dequantize_4bit(flat, scales.reshape(-1), BLOCK, "nf4", shape, dtype)
    return weight.view(shape)[:, :in_features]


@cache
def bitsandbytes_installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


@cache
def _borders() -> list[float]:
    """The numbers half-way between code points."""
    points = torch.tensor(NF4)
    return ((points[1:] + points[:-1]) / 2).tolist()


@cache
def _points(device: torch.device) -> Tensor:
    return torch.tensor(NF4, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Byte -> its two code points, (256, 2)."""
    return torch.cartesian_prod(_points(device), _points(device))
