"""The steps of `pointwise` on a CPU in fp32 or bf16, as Numba loops that read each input once and compute in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rookery.ops import native
from rookery.ops.backend import Call
from rookery.ops.native import array_of, bounds_of, copied
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


def gates7(
    w: Tensor, a: Tensor, v: Tensor, gate: Tensor | None, v_first: Tensor | None,
    w0: Tensor, a0: Tensor, v0: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `rookery.ops.gates7`."""
    w, a = _Gates7.apply(w, a, w0, a0)
    if gate is not None and v_first is not None:
        v = _Value7.apply(v, gate, v_first, v0)
    return w, a, v


class _TokenShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor, bounds: np.ndarray, *mixes: Tensor) -> tuple[Tensor, ...]:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        x, before = x.contiguous(), before.contiguous()
        stacked = torch.stack([mix.reshape(-1).float() for mix in mixes])
        out = x.new_empty(len(mixes), *x.shape)
        arrays = (array_of(y) for y in (x.flatten(0, 1), before, stacked, out.flatten(1, 2)))
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
        dmixes = mixes.new_zeros(len(before), *mixes.shape)
        grads = tuple(grad.contiguous() for grad in grads)
        share_out(
            pointwise_numba.token_shift_back, len(before), ctx.bounds,
            array_of(x.flatten(0, 1)), array_of(before), array_of(mixes),
            np.array([grad.data_ptr() for grad in grads]),
            array_of(dx.flatten(0, 1)), array_of(dbefore), array_of(dmixes),
        )  # fmt: skip
        return dx, dbefore, None, *(grad.view(ctx.mix_shape) for grad in dmixes.sum(dim=0).to(x.dtype))


class _ReluSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        x = x.contiguous()
        y = torch.empty_like(x)
        share_out(
            pointwise_numba.relu_square,
            pointwise_numba.pieces(x.numel()),
            *(array_of(tensor.view(-1)) for tensor in (x, y)),
        )
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        arrays = (array_of(tensor.contiguous().view(-1)) for tensor in (x, dy, dx))
        share_out(pointwise_numba.relu_square_back, pointwise_numba.pieces(x.numel()), *arrays)
        return dx


class _Gates7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, a: Tensor, w0: Tensor, a0: Tensor) -> tuple[Tensor, Tensor]:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        w, a = w.contiguous(), a.contiguous()
        biases = torch.stack([bias.reshape(-1).float() for bias in (w0, a0)])
        w_out, a_out = torch.empty_like(w), torch.empty_like(a)
        share_out(pointwise_numba.gates7, len(w), *(array_of(x) for x in (w, a, biases, w_out, a_out)))
        ctx.save_for_backward(a_out)
        ctx.bias_shape = w0.shape
        return w_out, a_out

    @staticmethod
    def backward(ctx: Any, dw: Tensor, da_out: Tensor) -> Any:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        (a,) = ctx.saved_tensors
        da, dbiases = torch.empty_like(a), a.new_zeros(len(a), 2, a.shape[-1], dtype=torch.float32)
        arrays = (array_of(x.contiguous()) for x in (a, dw, da_out, da, dbiases))
        share_out(pointwise_numba.gates7_back, len(a), *arrays)
        return dw, da, *(grad.view(ctx.bias_shape) for grad in dbiases.sum(dim=0).to(a.dtype))


class _Value7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, gate: Tensor, v_first: Tensor, v0: Tensor) -> Tensor:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        inputs = [x.contiguous() for x in (v, gate, v_first)]
        bias, out = copied(v0.reshape(-1), torch.float32), torch.empty_like(inputs[0])
        share_out(pointwise_numba.value7, len(v), *(array_of(x) for x in (*inputs, bias, out)))
        ctx.save_for_backward(*inputs, bias)
        ctx.bias_shape = v0.shape
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        from rookery.ops import pointwise_numba
        from rookery.ops.jit import share_out

        *inputs, bias = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in inputs]
        dbias = bias.new_zeros(len(dout), len(bias))
        arrays = (array_of(x.contiguous()) for x in (*inputs, bias, dout, *grads, dbias))
        share_out(pointwise_numba.value7_back, len(dout), *arrays)
        return *grads, dbias.sum(dim=0).to(dout.dtype).view(ctx.bias_shape)
