"""The steps of `pointwise` on a CPU in fp32, as Numba loops that read each input once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rookery.ops import native
from rookery.ops.backend import Call
from rookery.ops.native import bounds_of
from rookery.ops.packed import Packing


def refuses(call: Call) -> str | None:
    """Why this back-end cannot serve `call`, or None."""
    return native.refuses_machine(call) or native.refuses_precision(call)


def token_shift(x: Tensor, before: Tensor, mixes: Sequence[Tensor], packing: Packing | None) -> tuple[Tensor, ...]:
    """As `rookery.ops.token_shift`."""
    return _TokenShift.apply(x, before, bounds_of(x, packing), *mixes)


def relu_square(x: Tensor) -> Tensor:
    """As `rookery.ops.relu_square`."""
    return _ReluSquare.apply(x)


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
