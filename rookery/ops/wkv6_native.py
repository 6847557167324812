"""The recurrence of RWKV-6 on a CPU, compiled by Numba: no compiler is needed on the user's machine.

The state of a head is kept transposed, [key, value], so that the inner loops run over contiguous values. The forward
pass keeps the state at the start of every few tokens; the backward pass replays a chunk's states from there, which is
exact whatever the decay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rookery.ops.backend import exact_dtype, tracked
from rookery.ops.native import bounds_of, chunks_of, copied, transposed, work_of
from rookery.ops.packed import Packing


def wkv6_native(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, packing: Packing | None = None
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes as in `rookery.ops.wkv6`."""
    out_dtype, shape = r.dtype, r.shape
    dtype = exact_dtype(out_dtype)
    bounds = bounds_of(r, packing)
    w = w.to(dtype).expand(shape)
    r, w, k, v = (x.to(dtype).contiguous().flatten(0, 1) for x in (r, w, k, v))
    u = copied(u, dtype)
    H, N = u.shape
    state = r.new_zeros(len(bounds) - 1, H, N, N) if state is None else state.to(dtype)
    y, final = _WKV6.apply(bounds, *tracked(r, w, k, v, u, state))
    return y.view(shape).to(out_dtype), final


class _WKV6(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bounds: np.ndarray, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor
    ) -> Any:
        from rookery.ops import wkv6_numba
        from rookery.ops.jit import share_out, static

        H, N = u.shape
        # Clamped where the decay has long been 0, so that its gradient there is not 0 * inf.
        rate = torch.exp(w.clamp(max=10))
        decay = torch.exp(-rate)
        y = torch.empty_like(r)
        S = transposed(state)
        keep = any(ctx.needs_input_grad)
        chunks = chunks_of(bounds, wkv6_numba.CHUNK)
        starts = r.new_empty(int(chunks[-1]) if keep else 0, H, N, N)
        arrays = (x.detach().numpy() for x in (r, decay, k, v, u, S, y, starts))
        share_out(wkv6_numba.forward, work_of(bounds, H), static(N), bounds, chunks, *arrays)
        if keep:
            ctx.save_for_backward(r, decay, rate, k, v, u, starts)
            ctx.bounds, ctx.chunks = bounds, chunks
        return y, S.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:
        from rookery.ops import wkv6_numba
        from rookery.ops.jit import share_out, static

        r, decay, rate, k, v, u, starts = ctx.saved_tensors
        H, N = u.shape
        G = transposed(dfinal)
        dr, dd, dk, dv = (torch.empty_like(r) for _ in range(4))
        du = r.new_zeros(len(G), H, N)
        tensors = (r, decay, k, v, u, starts, dy.contiguous(), G, dr, dd, dk, dv, du)
        arrays = (x.detach().numpy() for x in tensors)
        share_out(wkv6_numba.backward, work_of(ctx.bounds, H), static(N), ctx.bounds, ctx.chunks, *arrays)
        dw = dd.mul_(decay).mul_(rate).neg_()
        return None, dr, dw, dk, dv, du.sum(dim=0), G.mT
