"""The recurrence of RWKV-6 on a CPU, compiled by Numba: no compiler is needed on the user's machine.

The state of a head is kept transposed, [key, value], so that the inner loops run over contiguous values. The forward
pass keeps the state at the start of every few tokens; the backward pass replays a chunk's states from there, which is
exact whatever the decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rookery.ops.backend import exact_dtype
from rookery.ops.native import transposed


def wkv6_native(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes as in `rookery.ops.wkv6`."""
    out_dtype = r.dtype
    dtype = exact_dtype(out_dtype)
    r, w, k, v, u = (x.to(dtype).contiguous() for x in (r, w, k, v, u))
    B, _, H, N = r.shape
    state = r.new_zeros(B, H, N, N) if state is None else state.to(dtype)
    y, final = _WKV6.apply(r, w.expand_as(r).contiguous(), k, v, u, state)
    return y.to(out_dtype), final


class _WKV6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> Any:
        from rookery.ops import wkv6_numba
        from rookery.ops.jit import share_out, static

        B, T, H, N = r.shape
        # Clamped where the decay has long been 0, so that its gradient there is not 0 * inf.
        rate = torch.exp(w.clamp(max=10))
        decay = torch.exp(-rate)
        y = torch.empty_like(r)
        S = transposed(state)
        keep = any(ctx.needs_input_grad)
        starts = r.new_empty(B, H, -(-T // wkv6_numba.CHUNK) if keep else 0, N, N)
        arrays = (r, decay, k, v, u, S, y, starts)
        share_out(wkv6_numba.forward, B * H, static(N), *(x.detach().numpy() for x in arrays))
        if keep:
            ctx.save_for_backward(r, decay, rate, k, v, u, starts)
        return y, S.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:
        from rookery.ops import wkv6_numba
        from rookery.ops.jit import share_out, static

        r, decay, rate, k, v, u, starts = ctx.saved_tensors
        B, _, H, N = r.shape
        G = transposed(dfinal)
        dr, dd, dk, dv = (torch.empty_like(r) for _ in range(4))
        du = r.new_zeros(B, H, N)
        arrays = (r, decay, k, v, u, starts, dy.contiguous(), G, dr, dd, dk, dv, du)
        share_out(wkv6_numba.backward, B * H, static(N), *(x.detach().numpy() for x in arrays))
        dw = dd.mul_(decay).mul_(rate).neg_()
        return dr, dw, dk, dv, du.sum(dim=0), G.mT
