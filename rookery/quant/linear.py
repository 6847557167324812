"""A frozen linear layer whose weight is kept in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rookery.ops.linear import Linear, linear
from rookery.quant.codes import BLOCK, Kind, code_size, dequantise, padded, quantise_weight

AT_ONCE = 1 << 22
"""Weights that exist dequantised at one time, about: 8 MiB in bf16. Memory that is used again and again stays in
the cache; smaller products would be slower."""


class QuantLinear(Linear):
    """`Linear` whose weight does not train and is dequantised for each product, forward and backward.

    Gradients flow to the input, and nothing but what the weight is made of is kept for them. Codes and scales are
    integer buffers (the scales as the bits of fp32 numbers), so that moving the layer to another dtype or device
    leaves them as they are; the layer computes in the dtype of its input.
    """

    codes: Tensor
    """(out, bytes), uint8, as in `rookery.quant.codes`."""
    scales: Tensor
    """(out, blocks): fp32 numbers, viewed as int32."""
    low_rank_A: Tensor | None
    low_rank_B: Tensor | None
    like: Tensor
    """Empty, in the dtype of the model."""

    def __init__(self, in_features: int, out_features: int, kind: Kind, rank: int = 0) -> None:
        """Nothing is set.

        Args:
            rank: of the factors kept beside the codes; 0 = none.
        """
        with torch.device("meta"):
            super().__init__(in_features, out_features)
        self.register_parameter("weight", None)
        self.kind = kind
        blocks = padded(in_features) // BLOCK
        self.register_buffer("codes", torch.empty(out_features, code_size(kind, in_features), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(out_features, blocks, dtype=torch.int32))
        self.register_buffer("low_rank_A", torch.empty(rank, in_features) if rank else None)
        self.register_buffer("low_rank_B", torch.empty(out_features, rank) if rank else None)
        self.register_buffer("like", torch.empty(0), persistent=False)

    @classmethod
    def of(
        cls,
        layer: Linear,
        kind: Kind,
        low_rank: tuple[Tensor, Tensor] | None = None,
        *,
        weight: Tensor | None = None,
        device: torch.device | None = None,
    ) -> QuantLinear:
        """The quantised form of `layer`, with its adapters.

        Args:
            low_rank: A0 (r, in) and B0 (out, r). What is quantised is then the residual W - B0 A0, and B0 A0 is kept as
                it is (PiSSA: the rest of a weight without its largest singular values has the smaller error).
            weight: (out, in), the weight to quantise where it is not `layer.weight`. It may be memory-mapped: a few
                rows at a time are read.
            device: of the result; that of the weight when None.

        Raises:
            ValueError: the weight holds NaN or Inf.
        """
        weight = layer.weight.detach() if weight is None else weight
        device = device or weight.device
        with torch.device("meta"):
            quantised = cls(layer.in_features, layer.out_features, kind)
        if low_rank is not None:
            A0, B0 = (factor.detach().to(device) for factor in low_rank)
            quantised.low_rank_A, quantised.low_rank_B = A0, B0
        codes, scales = quantise_weight(weight, kind, low_rank=low_rank, device=device)
        if not scales.isfinite().all():
            raise ValueError("the weight holds NaN or Inf")
        quantised.codes, quantised.scales = codes, scales.view(torch.int32)
        quantised.like = torch.empty(0, dtype=layer.weight.dtype, device=device)
        quantised.adapters = layer.adapters
        return quantised.train(layer.training)

    def product(self, x: Tensor) -> Tensor:
        """W x: (..., in) -> (..., out)."""
        y = _Product.apply(x, self)
        if self.low_rank_A is not None and self.low_rank_B is not None:
            y = y + linear(linear(x, self.low_rank_A), self.low_rank_B)
        return y

    def dense(self) -> Tensor:
        """The weight that the layer stands for, (out, in), in the model's dtype; it has no gradient."""
        dtype = self.like.dtype
        weight = self._dequantise(slice(None), slice(None), dtype)
        if self.low_rank_A is not None and self.low_rank_B is not None:
            weight = weight + self.low_rank_B @ self.low_rank_A
        return weight

    def rows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The quantised weight a few rows after the other."""
        step = max(1, AT_ONCE // self.in_features)
        for first in range(0, self.out_features, step):
            yield self._dequantise(slice(first, first + step), slice(None), dtype)

    def columns(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The quantised weight a few columns after the other."""
        step = max(1, AT_ONCE // (self.out_features * BLOCK))
        for first in range(0, self.scales.shape[1], step):
            yield self._dequantise(slice(None), slice(first, first + step), dtype)

    def _dequantise(self, rows: slice, blocks: slice, dtype: torch.dtype) -> Tensor:
        """Some rows and blocks of columns."""
        scales = self.scales.view(torch.float32)[rows, blocks]
        codes = self.codes.unflatten(1, (self.scales.shape[1], -1))[rows, blocks].flatten(1)
        first = blocks.start or 0
        width = min(scales.shape[1] * BLOCK, self.in_features - first * BLOCK)
        return dequantise(codes, scales, self.kind, width, dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    """Rows forward, columns backward: each element of a result is one sum, whatever the size of the pieces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return _joined([linear(x, rows) for rows in layer.rows(x.dtype)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _joined([linear(dy, columns.T) for columns in ctx.layer.columns(dy.dtype)]), None


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
