"""Weights of matrices for inference on a CPU: fp32, bf16, or int8 with a scale for each row, computed with in fp32.

One row or a few are multiplied by the compiled loops of `rookery.ops.products_numba`, as fast as the weights come from
memory; many by oneDNN. For the former, bf16 weights have a second, narrow form of 12 bits a number: the exponents of a
row differ so little that 4 bits tell them, and the few numbers that are too small for that are listed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rookery.adapters import Method
from rookery.config.machine import free_host_memory
from rookery.models import Model
from rookery.ops.linear import Linear
from rookery.ops.native import array_of, numba_installed

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Number of each format of weights in the compiled code."""

UNIT = 16
"""Numbers that the compiled code takes at a time."""

FEW = 32
"""Rows from which on oneDNN is faster."""

LISTED = 100
"""One weight in as many may be listed beside a narrow form; of normally distributed ones it is one in 10,000."""

ALLOCATION = 32 << 20
"""Bytes of memory asked for at a time; what is left of the last is not touched, and so not taken."""

MOST_EXPONENT = 126
"""Of a power of two that is a normal fp32 number and a row's scale."""

WORTH_SHARING = 1 << 17
"""Elements of a weight from which on a second thread saves more than it costs."""


def refused(model: Model) -> str | None:
    """Why the weights of `model` cannot be packed, or None."""
    if model.emb.weight.device.type != "cpu":
        return "the model is not on a CPU"
    if model.emb.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weights are {model.emb.weight.dtype}"
    if not numba_installed():
        return "Numba is not installed (pip install numba)"
    return None


class Room:
    """Where packed weights of a model lie: in allocations so large that NumPy asks the system for large pages, from
    which weights are read a tenth faster.

    Attributes:
        narrow: whether bf16 weights get narrow forms: if those take at most half of the memory that is free.
    """

    def __init__(self, model: nn.Module) -> None:
        numbers = sum(parameter.numel() for parameter in model.parameters())
        self.narrow = numbers * 3 // 2 <= free_host_memory() // 2
        self._left = np.empty(0, np.uint8)

    def take(self, *shape: int) -> np.ndarray:
        """Bytes, from the beginning of a cache line on."""
        from rookery.ops.simd import LINE

        size = math.prod(shape)
        if size > len(self._left):
            self._left = np.empty(max(size, ALLOCATION) + LINE, np.uint8)
            self._left = self._left[-self._left.ctypes.data % LINE :]
        taken, self._left = self._left[:size], self._left[-(-size // LINE) * LINE :]
        return taken.reshape(shape)


class Narrow(NamedTuple):
    """bf16 weights (out, in) in 12 bits a number (see `rookery.ops.products_numba.narrow`).

    Attributes:
        codes: (out / 4, in / 32, 192) uint8.
        bases: (out) fp32, what codes of each row are multiplied by.
        bounds, places, values: (out + 1) int32, (n) int32, (n) fp32: columns and numbers beside the codes.
    """

    codes: Tensor
    bases: Tensor
    bounds: Tensor
    places: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, room: Room) -> Narrow | None:
        """The narrow form of bf16 weights; None where it does not fit their shape or is not worth it."""
        from rookery.ops import products_numba as loops
        from rookery.ops.jit import share_out

        rows, size = weight.shape
        if rows % loops.GROUP or size % loops.BLOCK:
            return None
        bits = array_of(weight)
        bases, others = np.empty((2, rows), np.int32)
        share_out(loops.measure, rows, bits, bases, others)
        listed = int(others.sum())
        if listed * LISTED > weight.numel() or bases.max() > loops.SPREAD + MOST_EXPONENT:
            return None
        bounds = np.concatenate([np.zeros(1, np.int32), others.cumsum(dtype=np.int32)])
        codes = room.take(rows // loops.GROUP, size // loops.BLOCK, loops.GROUP * loops.BLOCK * 3 // 2)
        places, values = np.empty(listed, np.int32), np.empty(listed, np.uint16)
        share_out(loops.narrow, len(codes), bits, bases, bounds, codes, places, values)
        scales = np.ldexp(np.float32(1), bases - loops.SPREAD)
        return cls(
            torch.from_numpy(codes),
            torch.from_numpy(scales),
            torch.from_numpy(bounds),
            torch.from_numpy(places),
            torch.from_numpy(values).view(torch.bfloat16).float(),
        )


@dataclass
class Matrix:
    """A weight (out, in), contiguous; int8 ones have a scale for each row, (out) fp32."""

    data: Tensor
    scales: Tensor | None = None
    narrow: Narrow | None = None

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype, room: Room) -> Matrix:
        """`weight` in another format; it is shared, not copied, where it has that already. bf16 weights get a narrow
        form too, where there is room and it is worth it."""
        weight = weight.detach()
        if dtype != torch.int8:
            data = weight.to(dtype).contiguous()
            return cls(data, narrow=Narrow.of(data, room) if room.narrow and dtype == torch.bfloat16 else None)
        data = torch.from_numpy(room.take(*weight.shape).view(np.int8))
        scales = torch.empty(len(weight))
        for rows in torch.arange(len(weight)).split(4096):
            part = weight[rows].float()
            scales[rows] = part.abs().amax(1).clamp_min(1e-30) / 127
            data[rows] = (part / scales[rows, None]).round().to(torch.int8)
        return cls(data, scales)

    @property
    def kind(self) -> int:
        return KINDS[self.data.dtype]

    @cached_property
    def entry(self) -> np.ndarray:
        """What the compiled code is told of it: a row of its table of matrices."""
        rows, size = self.data.shape
        scales = self.scales.data_ptr() if self.scales is not None else 0
        narrow = [part.data_ptr() for part in self.narrow] if self.narrow else [0] * len(Narrow._fields)
        return np.array([self.data.data_ptr(), rows, size, size * self.data.element_size(), scales, *narrow], np.int64)

    def few(self, x: Tensor) -> Tensor:
        """x (B, in), fp32 and contiguous, times the weight's transpose; fp32. From FEW rows on `product` is faster."""
        from rookery.ops import products_numba
        from rookery.ops.jit import share_out, static

        y = torch.empty(len(x), len(self.data))
        pieces = -(-len(self.data) // products_numba.PIECE)
        arrays = (static(self.kind), self.entry, x.numpy(), y.numpy())
        if self.data.numel() < WORTH_SHARING:
            products_numba.rows_of_product(0, pieces, *arrays)
        else:
            share_out(products_numba.rows_of_product, pieces, *arrays)
        return y

    def product(self, x: Tensor) -> Tensor:
        """x (T, in) times the weight's transpose, in the dtype of `x`."""
        if len(x) == 1:
            # One row alone is summed in another order than each of two or more, whatever their number.
            return self.product(x.repeat(2, 1))[:1]
        y = _linear(x, self.data.to(x.dtype))
        return y if self.scales is None else y.mul_(self.scales)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.nn.functional.linear(x, weight)


class PackedLinear(nn.Module):
    """Stands for a `Linear`, the adapters that are switched on merged into it; its weight is no parameter.

    Args:
        dtype: of the weight: fp32, bf16 or int8.
        room: where it lies unless it is shared.
    """

    def __init__(self, linear: Linear, dtype: torch.dtype, room: Room) -> None:
        super().__init__()
        self.matrix = Matrix.of(whole(linear), dtype, room)
        self._compute = torch.bfloat16 if dtype != torch.float32 and fast_bf16() else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """The product of x (..., in), fp32; fp32."""
        rows = x.reshape(-1, x.shape[-1])
        y = self.matrix.few(rows.contiguous()) if len(rows) < FEW else self._many(rows)
        return y.view(*x.shape[:-1], -1)

    def _many(self, x: Tensor) -> Tensor:
        return self.matrix.product(x.to(self._compute)).float()


class WideEmbedding(nn.Module):
    """Stands for an `Embedding`: its rows as fp32. Its weight, shared, is no parameter."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._rows = embedding.weight.detach()

    def forward(self, tokens: Tensor) -> Tensor:
        return self._rows[tokens].float()


def whole(linear: Linear) -> Tensor:
    """The weight of a matrix with its adapters in it."""
    weight = linear.dense().detach()
    methods = [method for method in linear.adapters.values() if method.enabled and isinstance(method, Method)]
    if not methods:
        return weight
    exact = weight.float()
    return sum((method.merged(exact).detach() - exact for method in methods), exact)


def fast_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices faster than fp32 ones."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in known if check)
