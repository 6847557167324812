"""Elementwise steps between the matrix products. On a CPU in fp32 they are Numba loops that read each input once; where
those cannot serve, the formula in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rookery.ops.native import bounds_of, numba_installed
from rookery.ops.packed import Packing, previous


def native(*tensors: Tensor) -> bool:
    """Whether Numba loops serve these tensors: all fp32 on a CPU, outside autocast."""
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and numba_installed()
        and not torch.is_autocast_enabled("cpu")
    )


def token_shift(x: Tensor, before: Tensor, *mixes: Tensor, packing: Packing | None = None) -> tuple[Tensor, ...]:
    """For each mix m: x_t + m * (x_{t-1} - x_t).

    Args:
        x: (B, T, C).
        before: (B, C), what came before the first token.
        mixes: each with C elements.
        packing: the S sequences in the one row of `x`; `before` is then (S, C).
    """
    if native(x, before, *mixes):
        return _TokenShift.apply(x, before, bounds_of(x, packing), *mixes)
    difference = previous(x, before, packing) - x
    return tuple(torch.addcmul(x, difference, mix) for mix in mixes)


def relu_square(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    if native(x):
        return _ReluSquare.apply(x)
    return torch.relu(x).square()


class _TokenShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor, bounds: np.ndarray, *mixes: Tensor) -> tuple[Tensor, ...]:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        x, before = x.contiguous(), before.contiguous()
        stacked = torch.stack([mix.reshape(-1) for mix in mixes])
        out = x.new_empty(len(mixes), *x.shape)
        arrays = (x.flatten(0, 1).numpy(), before.numpy(), stacked.numpy(), out.flatten(1, 2).numpy())
        share_out(pointwise_numba.token_shift, len(before), bounds, *arrays)
        ctx.save_for_backward(x, before, stacked)
        ctx.bounds, ctx.mix_shape = bounds, mixes[0].shape
        return out.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        x, before, mixes = ctx.saved_tensors
        dx, dbefore = torch.empty_like(x), torch.empty_like(before)
        dmixes = x.new_zeros(len(before), *mixes.shape)
        share_out(
            pointwise_numba.token_shift_back, len(before), ctx.bounds,
            x.flatten(0, 1).numpy(), before.numpy(), mixes.numpy(),
            tuple(grad.flatten(0, 1).contiguous().numpy() for grad in grads),
            dx.flatten(0, 1).numpy(), dbefore.numpy(), dmixes.numpy(),
        )  # fmt: skip
        return dx, dbefore, None, *(grad.view(ctx.mix_shape) for grad in dmixes.sum(dim=0))


class _ReluSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        x = x.contiguous()
        y = torch.empty_like(x)
        share_out(
            pointwise_numba.relu_square, -(-x.numel() // pointwise_numba.PIECE), x.view(-1).numpy(), y.view(-1).numpy()
        )
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        flat = (tensor.contiguous().view(-1).numpy() for tensor in (x, dy, dx))
        share_out(pointwise_numba.relu_square_back, -(-x.numel() // pointwise_numba.PIECE), *flat)
        return dx
