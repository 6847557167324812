"""The recurrence of RWKV-6 on a CPU, compiled by Numba: no compiler is needed on the user's machine.

The state of a head is kept transposed, [key, value], so that the inner loops run over contiguous values. The forward
pass keeps the state at the start of every `CHUNK` tokens; the backward pass replays a chunk's states from there, which
is exact whatever the decay.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

CHUNK = 16


def wkv6_native(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes as in `rookery.ops.wkv6`."""
    out_dtype = r.dtype
    dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    r, w, k, v, u = (x.to(dtype).contiguous() for x in (r, w, k, v, u))
    B, _, H, N = r.shape
    state = r.new_zeros(B, H, N, N) if state is None else state.to(dtype)
    y, final = _WKV6.apply(r, w, k, v, u, state)
    return y.to(out_dtype), final


class _WKV6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> Any:
        B, T, H, N = r.shape
        # Clamped far above where the decay is 0, so that the gradient there is not 0 * inf.
        minus_log_decay = torch.exp(w.clamp(max=10))
        decay = torch.exp(-minus_log_decay)
        y = torch.empty_like(r)
        S = state.mT.contiguous().clone()
        keep = any(ctx.needs_input_grad)
        starts = r.new_empty(B, H, -(-T // CHUNK) if keep else 0, N, N)
        kernels(N).forward(*(x.detach().numpy() for x in (r, decay, k, v, u, S, y, starts)))
        if keep:
            ctx.save_for_backward(r, decay, minus_log_decay, k, v, u, starts)
        return y, S.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:
        r, decay, minus_log_decay, k, v, u, starts = ctx.saved_tensors
        G = dfinal.mT.contiguous().clone()
        dr, dd, dk, dv = (torch.empty_like(r) for _ in range(4))
        du = r.new_zeros(r.shape[0], *u.shape)
        arrays = (r, decay, k, v, u, starts, dy.contiguous(), G, dr, dd, dk, dv, du)
        kernels(r.shape[-1]).backward(*(x.detach().numpy() for x in arrays))
        dw = dd.mul_(decay).mul_(minus_log_decay).neg_()
        return dr, dw, dk, dv, du.sum(dim=0), G.mT


@cache
def kernels(head_size: int) -> Any:
    """The compiled loops for one head size (a constant lets the compiler unroll them)."""
    from rookery.ops import wkv6_numba

    return wkv6_numba.build(head_size)
