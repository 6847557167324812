"""`mix7` on a CPU, compiled by Numba: one loop does all steps around the recurrence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rookery.ops import native
from rookery.ops.backend import Call, tracked
from rookery.ops.native import array_of, bounds_of, chunks_of, outgrow_caches, transposed, work_of
from rookery.ops.packed import Packing


def refuses(call: Call) -> str | None:
    """Why this back-end cannot serve `call`, or None."""
    return native.refuses(call) or native.refuses_precision(call)


def mix7_native(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, g: Tensor,
    k_k: Tensor, k_a: Tensor, r_k: Tensor, ln_weight: Tensor, ln_bias: Tensor, state: Tensor | None, *,
    eps: float, kernel: str, packing: Packing | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes as in `rookery.ops.mix7`, all fp32 or all bf16 but the state; `kernel` is "auto" or "native"."""
    bounds = bounds_of(r, packing)
    H, N = r_k.shape
    state = r.new_zeros(len(bounds) - 1, H, N, N, dtype=torch.float32) if state is None else state.float()
    return _Mix7.apply(bounds, eps, *tracked(r, w, k, v, a, g, k_k, k_a, r_k, ln_weight, ln_bias, state))


class _Mix7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bounds: np.ndarray, eps: float,
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, g: Tensor,
        k_k: Tensor, k_a: Tensor, r_k: Tensor, ln_weight: Tensor, ln_bias: Tensor, state: Tensor,
    ) -> Any:  # fmt: skip
        from rookery.ops import mix7_numba
        from rookery.ops.jit import share_out, static

        H, N = r_k.shape
        keep = any(ctx.needs_input_grad)
        inputs = [x.reshape(-1, H, N).contiguous() for x in (r, w, k, v, a, g)]
        parameters = torch.stack([x.reshape(H, N).float() for x in (k_k, k_a, r_k, ln_weight, ln_bias)], dim=1)
        S = transposed(state)
        chunks = chunks_of(bounds, mix7_numba.CHUNK)
        y, u = (state.new_empty(len(inputs[0]) if keep else 0, H, N) for _ in range(2))
        starts = state.new_empty(int(chunks[-1]) if keep else 0, H, N, N)
        out = torch.empty_like(inputs[0])
        arrays = (array_of(x) for x in (*inputs, parameters, S, y, u, starts, out))
        share_out(mix7_numba.forward, work_of(bounds, H), static(N), bounds, chunks, *arrays, eps)
        if keep:
            ctx.save_for_backward(*inputs, parameters, y, u, starts)
            ctx.bounds, ctx.chunks, ctx.eps = bounds, chunks, eps
            ctx.shapes = [x.shape for x in (k_k, k_a, r_k, ln_weight, ln_bias)]
        return out.view(r.shape), S.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> Any:
        from rookery.ops import mix7_numba
        from rookery.ops.jit import share_out, static

        *inputs, parameters, y, u, starts = ctx.saved_tensors
        _, H, N = y.shape
        G = transposed(dfinal)
        grads = [torch.empty_like(x) for x in inputs]
        dparameters = y.new_zeros(len(G), *parameters.shape)
        dflat = dout.reshape(y.shape).contiguous()
        arrays = [array_of(x) for x in (*inputs, parameters, y, u, starts, dflat, G)]
        out = [array_of(x) for x in (*grads, dparameters)]
        work, far = work_of(ctx.bounds, H), outgrow_caches(grads)
        share_out(mix7_numba.backward, work, static(N), ctx.bounds, ctx.chunks, *arrays, far, *out, ctx.eps)
        dparameters = dparameters.sum(dim=0).to(dout.dtype).unbind(dim=1)
        return (
            None,
            None,
            *(grad.view(dout.shape) for grad in grads),
            *(grad.reshape(shape) for grad, shape in zip(dparameters, ctx.shapes, strict=True)),
            G.mT,
        )
