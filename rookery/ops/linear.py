"""Matrix product of activations with a weight.

PyTorch's fp32 products on a CPU go to MKL, which on AMD processors takes its AVX2 path; oneDNN, which PyTorch also
carries, uses AVX-512 on any processor and is 2.3 times as fast there, equally exact. Everything else is `F.linear`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_ROWS = 16
"""Below this, the cost of a call counts more than its arithmetic."""


class Linear(nn.Linear):
    """`nn.Linear` without bias whose product is `linear`, and whose weight is not set."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Values come from a checkpoint or from the model's own rules."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: `x` (..., in), `weight` (out, in), result (..., out). `weight` may be a transposed view."""
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    ):
        return _OneDNN.apply(x, weight)
    return F.linear(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx = _product(dy, weight.T) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        return dx, _product(dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)
