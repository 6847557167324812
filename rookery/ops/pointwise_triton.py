"""The steps of `pointwise` on a GPU, by Triton: each reads its inputs once, forward and backward, in fp32 arithmetic.

Gradients of what is added up over all tokens (mixes, biases) are summed in fp32 by a fixed number of programs, each
over tokens of its own, and then over the programs: always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rookery.ops import on_triton
from rookery.ops.backend import Call, tracked
from rookery.ops.on_triton import on, spans
from rookery.ops.packed import Packing

MOST_MIXES = 6
ROWS, COLUMNS = 16, 64
SIZE = 2048


def refuses(call: Call) -> str | None:
    """Why this back-end cannot serve `call`, or None."""
    return on_triton.refuses_step(call)


def token_shift(x: Tensor, before: Tensor, mixes: Sequence[Tensor], packing: Packing | None) -> tuple[Tensor, ...]:
    """As `rookery.ops.token_shift`, of at most `MOST_MIXES` mixes."""
    assert len(mixes) <= MOST_MIXES
    return _TokenShift.apply(packing, *tracked(x, before, *mixes))


def relu_square(x: Tensor) -> Tensor:
    """As `rookery.ops.relu_square`."""
    return _ReluSquare.apply(*tracked(x))


def gates7(
    w: Tensor, a: Tensor, v: Tensor, gate: Tensor | None, v_first: Tensor | None,
    w0: Tensor, a0: Tensor, v0: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `rookery.ops.gates7`."""
    if gate is None or v_first is None:
        w, a = _Gates7.apply(*tracked(w, a, w0, a0))
        return w, a, v
    return _Gates7.apply(*tracked(w, a, w0, a0, v, gate, v_first, v0))


def _grid(tokens: int, channels: int) -> tuple[int, int]:
    return -(-tokens // ROWS), -(-channels // COLUMNS)


def _begins(packing: Packing | None, x: Tensor) -> Tensor:
    return x if packing is None else packing.begins


class _TokenShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packing: Packing | None, x: Tensor, before: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
        from rookery.ops import pointwise_triton_kernels as kernels

        x, before = x.contiguous(), before.contiguous()
        B, T, C = x.shape
        stacked = torch.stack([mix.reshape(-1) for mix in mixes])
        out = x.new_empty(len(mixes), B, T, C)
        with on(x.device):
            kernels.token_shift[_grid(B * T, C)](
                x, before, _begins(packing, x), stacked, out, B * T, T, C,
                M=len(mixes), PACKED=packing is not None, ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
        ctx.save_for_backward(x, before, stacked)
        ctx.packing, ctx.mix_shape = packing, mixes[0].shape
        return out.unbind()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from rookery.ops import pointwise_triton_kernels as kernels

        x, before, mixes = ctx.saved_tensors
        B, T, C = x.shape
        columns = -(-C // COLUMNS)
        programs, tiles = spans(B * T, ROWS, columns, x.device)
        dx, dbefore = torch.empty_like(x), torch.empty_like(before)
        dmixes = x.new_empty(programs, *mixes.shape, dtype=torch.float32)
        given = [grad.contiguous() for grad in grads]
        given += given[:1] * (MOST_MIXES - len(given))
        with on(x.device):
            kernels.token_shift_back[programs, columns](
                x, before, _begins(ctx.packing, x), mixes, *given, dx, dbefore, dmixes, B * T, T, C, tiles,
                M=len(mixes), PACKED=ctx.packing is not None, ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
        return None, dx, dbefore, *dmixes.sum(dim=0).to(mixes.dtype).view(len(mixes), *ctx.mix_shape).unbind()


class _ReluSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from rookery.ops import pointwise_triton_kernels as kernels

        x = x.contiguous()
        y = torch.empty_like(x)
        with on(x.device):
            kernels.relu_square[(-(-x.numel() // SIZE),)](x, y, x.numel(), SIZE=SIZE)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        from rookery.ops import pointwise_triton_kernels as kernels

        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        with on(x.device):
            kernels.relu_square_back[(-(-x.numel() // SIZE),)](x, dy.contiguous(), dx, x.numel(), SIZE=SIZE)
        return dx


class _Gates7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, a: Tensor, w0: Tensor, a0: Tensor, *of_values: Tensor) -> tuple[Tensor, ...]:
        """`of_values`: v, gate, v_first and v0, or nothing."""
        from rookery.ops import pointwise_triton_kernels as kernels

        w, a, *given = (x.contiguous() for x in (w, a, *of_values))
        v, gate, v_first, v0 = given or (a, a, a, a0)
        B, T, C = a.shape
        outputs = tuple(torch.empty_like(a) for _ in range(3 if of_values else 2))
        with on(a.device):
            kernels.gates7[_grid(B * T, C)](
                w, a, v, gate, v_first, w0, a0, v0, *outputs[:2], outputs[-1], B * T, C,
                VALUES=bool(of_values), ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
        ctx.save_for_backward(a, a0, *given)
        ctx.bias_shape = w0.shape
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dw: Tensor, da_out: Tensor, *dv_out: Tensor) -> Any:
        from rookery.ops import pointwise_triton_kernels as kernels

        a, a0, *of_values = ctx.saved_tensors
        v, gate, v_first, v0 = of_values or (a, a, a, a0)
        B, T, C = a.shape
        columns = -(-C // COLUMNS)
        programs, tiles = spans(B * T, ROWS, columns, a.device)
        dw, da_out, *of_v = (grad.contiguous() for grad in (dw, da_out, *dv_out))
        da, *dvalues = (torch.empty_like(a) for _ in range(4 if of_values else 1))
        sums = a.new_empty(programs, 3, C, dtype=torch.float32)
        with on(a.device):
            kernels.gates7_back[programs, columns](
                a, v, gate, v_first, a0, v0, dw, da_out, *(of_v or [da_out]), da, *(dvalues or [da] * 3), sums,
                B * T, C, tiles, VALUES=bool(of_values), ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
        dw0, da0, *dv0 = (
            bias.to(a0.dtype).view(ctx.bias_shape) for bias in sums[:, : 3 if of_values else 2].sum(dim=0)
        )
        if not of_values:
            return dw, da, dw0, da0
        dv, dgate, dv_first = dvalues
        return dw, da, dw0, da0, dv, dgate, dv_first, *dv0
