"""Matrix product of activations with a weight, and the place where an adapter adds to it.

PyTorch's fp32 products on a CPU go to MKL, which on AMD processors takes its AVX2 path; oneDNN, which PyTorch also
carries, uses AVX-512 on any processor and is 2.3 times as fast there, equally exact. Where our own loop serves
(`linear_numba`), a weight's gradient takes a quarter less time, and small products do. Everything else is `F.linear`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rookery.ops.native import numba_installed

FEWEST_ROWS = 16
"""Below this, the cost of a call counts more than its arithmetic."""

LARGEST = 1 << 22
"""Numbers of a weight up to which our own loop is the faster one."""

ALONE = 1 << 25
"""Multiplications up to which one thread is done before a second one would have begun."""


class Adapter(nn.Module):
    """What fine-tuning adds to the product of a frozen `Linear`, zero at first."""

    enabled = True

    def input_delta(self, x: Tensor) -> Tensor | None:
        """What is added to the input of the product itself, shaped as `x`; None when nothing is."""
        return None

    def forward(self, x: Tensor, moved: Tensor | None, y: Tensor | None, linear: Linear) -> Tensor:
        """What is added to the output (..., out).

        Args:
            x: input of `linear`, (..., in).
            moved: what `input_delta` gave.
            y: product of `x` with the weight alone, (..., out); None when an input delta was added before it.
        """
        raise NotImplementedError


class Linear(nn.Linear):
    """`nn.Linear` without bias whose product is `linear`, whose weight is not set, and to which adapters may be added.

    Adapters add up: each sees what it would see alone.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.adapters: MutableMapping[str, Adapter] = nn.ModuleDict()  # type: ignore[assignment]  # no element type

    def reset_parameters(self) -> None:
        """Values come from a checkpoint or from the model's own rules."""

    def __repr__(self) -> str:
        return super().__repr__() if self.adapters else f"{self._get_name()}({self.extra_repr()})"

    def product(self, x: Tensor) -> Tensor:
        """The product with the weight, without adapters: (..., in) -> (..., out)."""
        return linear(x, self.weight)

    def dense(self) -> Tensor:
        """The weight, (out, in)."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        if not self.adapters:
            return self.product(x)
        adapters = [adapter for adapter in self.adapters.values() if adapter.enabled]
        moves = [adapter.input_delta(x) for adapter in adapters]
        moving = [move for move in moves if move is not None]
        y = self.product(sum(moving, x))
        plain = None if moving else y
        return sum((adapter(x, move, plain, self) for adapter, move in zip(adapters, moves, strict=True)), y)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: `x` (..., in), `weight` (out, in), result (..., out). `weight` may be a transposed view."""
    return _Product.apply(x, weight) if _ours(x, weight) else F.linear(x, weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` of tensors with any strides, for where no gradient is recorded."""
    return _product(x, weight) if _ours(x, weight) else F.linear(x, weight)


def _ours(x: Tensor, weight: Tensor) -> bool:
    """Whether `_product` is faster than `F.linear`."""
    return (
        x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and _has_onednn()
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available()


@cache
def _has_loop() -> bool:
    """Whether our own loop runs here, and is faster than what PyTorch has."""
    return numba_installed() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in fp32."""
    # oneDNN would first copy an input whose rows are not contiguous, as that of a weight's gradient.
    if _has_loop() and (weight.numel() <= LARGEST or x.stride(-1) != 1):
        return _looped(x, weight)
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        # oneDNN has no fast path for rows with gaps between them: it would take 500 times as long.
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _looped(x: Tensor, weight: Tensor) -> Tensor:
    from rookery.ops import linear_numba
    from rookery.ops.jit import share_out

    rows = x.reshape(-1, x.shape[-1])
    (M, K), (row, step) = rows.shape, rows.stride()
    N, (weight_row, weight_step) = weight.shape[0], weight.stride()
    out = x.new_empty(*x.shape[:-1], N)
    sizes = (M, N, K, rows.data_ptr(), 4 * row, 4 * step, weight.data_ptr(), 4 * weight_step, 4 * weight_row)
    if M * N * K < ALONE:
        linear_numba.product(0, linear_numba.pieces(M, N), *sizes, out.data_ptr(), False)
    else:
        share_out(linear_numba.product, linear_numba.pieces(M, N), *sizes, out.data_ptr(), False)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx = _product(dy, weight.T) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        return dx, _product(dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)
