"""Products with a matrix of low rank, given as two factors, perhaps with a function between them.

On a CPU a model of small width spends on each of the operations in it about as long as its arithmetic takes. The native
back-end makes them one step of autograd, whose gradients of the factors have the layout of the factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rookery.ops import native
from rookery.ops.backend import Backend, Call, Op, beside, never_refuses, tracked
from rookery.ops.linear import linear, product
from rookery.ops.native import array_of

BETWEEN = {"": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def low_rank(x: Tensor, down: Tensor, up: Tensor, between: str = "", *, kernel: str = "auto") -> Tensor:
    """between(x @ down) @ up.

    Args:
        x: (..., in).
        down: (in, rank).
        up: (rank, out).
        between: "tanh", "sigmoid", or "" for nothing.
        kernel: "auto" or a back-end of the recurrence; where it does not exist here or cannot serve, the plain one.

    Returns:
        (..., out).
    """
    chosen = OP.choose(Call.of(x, down, up), beside(kernel), instead="plain")
    return chosen.run(x, down, up, between)


def low_rank_plain(x: Tensor, down: Tensor, up: Tensor, between: str) -> Tensor:
    """`low_rank` as separate operations."""
    return linear(BETWEEN[between](linear(x, down.T)), up.T)


def low_rank_native(x: Tensor, down: Tensor, up: Tensor, between: str) -> Tensor:
    """`low_rank` on a CPU in fp32 or bf16."""
    return _LowRank.apply(*tracked(x, down, up), between)


def _refuses(call: Call) -> str | None:
    return native.refuses_machine(call) or native.refuses_precision(call)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, between: str) -> Tensor:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        low = product(x, down.T)
        if between:
            loop = {"tanh": pointwise_numba.tanh, "sigmoid": pointwise_numba.sigmoid}[between]
            share_out(loop, pointwise_numba.pieces(low.numel()), array_of(low.view(-1)))
        _need_x, need_down, need_up = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if need_down else None, low if need_up or between else None, down, up)
        ctx.between = between
        return product(low, up.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        x, low, down, up = ctx.saved_tensors
        need_x, need_down, need_up = ctx.needs_input_grad[:3]
        dup = product(_rows(low).T, _rows(dy).T) if need_up else None
        if not (need_x or need_down):
            return None, None, dup, None
        dlow = product(dy, up)
        if ctx.between:
            back = {"tanh": pointwise_numba.tanh_back, "sigmoid": pointwise_numba.sigmoid_back}[ctx.between]
            share_out(back, pointwise_numba.pieces(low.numel()), array_of(low.view(-1)), array_of(dlow.view(-1)))
        dx = product(dlow, down) if need_x else None
        return dx, product(_rows(x).T, _rows(dlow).T) if need_down else None, dup, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


OP = Op(
    "low_rank",
    [
        Backend("native", _refuses, low_rank_native),
        Backend("plain", never_refuses, low_rank_plain),
    ],
)
