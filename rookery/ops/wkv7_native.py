"""The recurrence of RWKV-7 on a CPU, compiled by Numba: no compiler is needed on the user's machine.

The forward pass keeps u_t = S_{t-1} a_t of every token and the state at the start of every few tokens; the backward
pass replays a chunk's states from there, which is exact whatever the decay (dividing the decay out, as the published
CUDA kernels do, is not). bf16 is read and written as it is; all arithmetic is fp32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rookery.ops.backend import exact_dtype, tracked
from rookery.ops.native import array_of, bounds_of, chunks_of, loop_dtype, outgrow_caches, transposed, work_of
from rookery.ops.packed import Packing

LOG_DECAY_SCALE = -math.exp(-0.5)


def wkv7_native(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes and dtypes as in `rookery.ops.wkv7`."""
    out_dtype, shape = r.dtype, r.shape
    dtype = loop_dtype(out_dtype)
    bounds = bounds_of(r, packing)
    r, w, k, v, a, b = (x.to(dtype).contiguous().flatten(0, 1) for x in (r, w, k, v, a, b))
    _, H, N = r.shape
    exact = exact_dtype(dtype)
    state = r.new_zeros(len(bounds) - 1, H, N, N, dtype=exact) if state is None else state.to(exact)
    y, final = _WKV7.apply(bounds, *tracked(r, w, k, v, a, b, state))
    return y.view(shape).to(out_dtype), final


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bounds: np.ndarray,
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
    ) -> Any:  # fmt: skip
        from rookery.ops import wkv7_numba
        from rookery.ops.jit import share_out, static

        _, H, N = r.shape
        y, u = torch.empty_like(r), r.new_empty(r.shape, dtype=state.dtype)
        S = transposed(state)
        keep = any(ctx.needs_input_grad)
        chunks = chunks_of(bounds, wkv7_numba.CHUNK)
        starts = state.new_empty(int(chunks[-1]) if keep else 0, H, N, N)
        arrays = (array_of(x) for x in (r, w, k, v, a, b, S, y, u, starts))
        share_out(wkv7_numba.forward, work_of(bounds, H), static(N), bounds, chunks, *arrays)
        if keep:
            ctx.save_for_backward(r, w, k, v, a, b, u, starts)
            ctx.bounds, ctx.chunks = bounds, chunks
        return y, S.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:
        from rookery.ops import wkv7_numba
        from rookery.ops.jit import share_out, static

        r, w, k, v, a, b, u, starts = ctx.saved_tensors
        G = transposed(dfinal)
        grads = [torch.empty_like(r) for _ in range(6)]
        _, H, N = r.shape
        arrays = [array_of(x) for x in (r, w, k, v, a, b, u, starts, dy.contiguous(), G)]
        out = [array_of(x) for x in grads]
        work, far = work_of(ctx.bounds, H), outgrow_caches(grads)
        share_out(wkv7_numba.backward, work, static(N), ctx.bounds, ctx.chunks, *arrays, far, *out)
        return None, *grads, G.mT
