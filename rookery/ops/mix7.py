"""RWKV-7's time mixing between its matrix products: removal key, recurrence, group norm, bonus and gate.

Each step works inside one head of one token, so on a CPU in fp32 one Numba loop does them all around the recurrence,
which reads and writes each tensor once. Elsewhere the same formulas run as PyTorch operations around `wkv7`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rookery.ops.backend import exact_dtype, tracked
from rookery.ops.native import bounds_of, chunks_of, transposed, work_of
from rookery.ops.packed import Packing
from rookery.ops.pointwise import native
from rookery.ops.wkv7 import LOG_DECAY_SCALE, wkv7


def mix7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, g: Tensor,
    k_k: Tensor, k_a: Tensor, r_k: Tensor, ln_weight: Tensor, ln_bias: Tensor, state: Tensor | None, *,
    eps: float = 64e-5, kernel: str = "auto", packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Read a sequence::

        kappa = (k * k_k) / |k * k_k|            of each head
        k     = k * (1 + (a - 1) * k_a)
        y     = wkv7(r, w, k, v, -kappa, kappa * a)
        y     = group_norm(y) + (r . k . r_k) v   of each head
        out   = y * g

    Args:
        r, k, v: receptance, key, value (after the value residual), (B, T, C).
        w: raw pre-activation of the decay, (B, T, C).
        a: in-context learning rate, (B, T, C), between 0 and 1.
        g: gate, (B, T, C).
        k_k, k_a: C elements. r_k: (H, N). ln_weight, ln_bias: C elements.
        state: (B, H, N, N), [value, key]; None means zeros.
        eps: of the group norm.
        kernel: back-end of the recurrence, as in `wkv7`.
        packing: the S sequences in the one row of the inputs; states are then (S, H, N, N).

    Returns:
        `out` (B, T, C), and the final state (B, H, N, N).
    """
    H, N = r_k.shape
    parameters = (k_k, k_a, r_k, ln_weight, ln_bias)
    if kernel in ("auto", "native") and N % 4 == 0 and native(r, w, k, v, a, g, *parameters):
        bounds = bounds_of(r, packing)
        state = r.new_zeros(len(bounds) - 1, H, N, N) if state is None else state
        return _Mix7.apply(bounds, eps, *tracked(r, w, k, v, a, g, *parameters, state))
    return mix7_plain(r, w, k, v, a, g, *parameters, state, eps=eps, kernel=kernel, packing=packing)


def mix7_plain(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, g: Tensor,
    k_k: Tensor, k_a: Tensor, r_k: Tensor, ln_weight: Tensor, ln_bias: Tensor, state: Tensor | None, *,
    eps: float = 64e-5, kernel: str = "auto", packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mix7` as separate operations. In half precision each of the two steps around the recurrence works in fp32 and
    rounds once, as the reference's fused kernels do."""
    B, T, C = r.shape
    H, dtype, exact = len(r_k), r.dtype, exact_dtype(r.dtype)
    k, a = k.to(exact), a.to(exact)
    kappa = F.normalize((k * k_k).view(B, T, *r_k.shape), dim=-1, eps=1e-12)
    k = (k * (1 + (a - 1) * k_a)).to(dtype)
    r, w, k, v, a = (x.view(B, T, *r_k.shape) for x in (r, w, k, v, a))
    y, state = wkv7(r, w, k, v, -kappa.to(dtype), (kappa * a).to(dtype), state, backend=kernel, packing=packing)
    y = F.group_norm(y.view(B * T, C).to(exact), H, ln_weight.to(exact), ln_bias.to(exact), eps)
    bonus = (r.to(exact) * k * r_k).sum(dim=-1, keepdim=True) * v
    return ((y.view(B, T, C) + bonus.view(B, T, C)) * g).to(dtype), state


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
        w = w.reshape(-1, H, N)
        sigmoid = torch.sigmoid(w)
        decay = torch.exp(LOG_DECAY_SCALE * sigmoid)
        inputs = [x.reshape(-1, H, N).contiguous() for x in (r, decay, k, v, a, g)]
        parameters = torch.stack([x.reshape(H, N) for x in (k_k, k_a, r_k, ln_weight, ln_bias)], dim=1)
        y, u, out = (torch.empty_like(inputs[0]) for _ in range(3))
        S = transposed(state)
        chunks = chunks_of(bounds, mix7_numba.CHUNK)
        starts = r.new_empty(int(chunks[-1]) if keep else 0, H, N, N)
        arrays = (x.detach().numpy() for x in (*inputs, parameters, S, y, u, starts, out))
        share_out(mix7_numba.forward, work_of(bounds, H), static(N), bounds, chunks, *arrays, eps)
        if keep:
            slope = torch.sigmoid(-w).mul_(sigmoid)
            ctx.save_for_backward(*inputs, slope, parameters, y, u, starts)
            ctx.bounds, ctx.chunks, ctx.eps = bounds, chunks, eps
            ctx.shapes = [x.shape for x in (k_k, k_a, r_k, ln_weight, ln_bias)]
        return out.view(r.shape), S.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> Any:
        from rookery.ops import mix7_numba
        from rookery.ops.jit import share_out, static

        *inputs, slope, parameters, y, u, starts = ctx.saved_tensors
        _, H, N = y.shape
        G = transposed(dfinal)
        grads = [torch.empty_like(y) for _ in inputs]
        dparameters = y.new_zeros(len(G), *parameters.shape)
        tensors = (
            *inputs,
            slope,
            parameters,
            y,
            u,
            starts,
            dout.reshape(y.shape).contiguous(),
            G,
            *grads,
            dparameters,
        )
        arrays = (x.numpy() for x in tensors)
        share_out(mix7_numba.backward, work_of(ctx.bounds, H), static(N), ctx.bounds, ctx.chunks, *arrays, ctx.eps)
        dparameters = dparameters.sum(dim=0).unbind(dim=1)
        return (
            None,
            None,
            *(grad.view(dout.shape) for grad in grads),
            *(grad.reshape(shape) for grad, shape in zip(dparameters, ctx.shapes, strict=True)),
            G.mT,
        )
