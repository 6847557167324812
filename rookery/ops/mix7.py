"""RWKV-7's time mixing between its matrix products: removal key, recurrence, group norm, bonus and gate.

Each step works inside one head of one token, so that back-ends do them together and read and write each tensor once.
The plain one runs the formulas as PyTorch operations around `wkv7`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rookery.ops import mix7_native, mix7_triton
from rookery.ops.backend import Backend, Call, Op, beside, exact_dtype, never_refuses
from rookery.ops.packed import Packing
from rookery.ops.wkv7 import wkv7


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
        kernel: "auto" or one of the back-ends of `wkv7`. One that exists here too does all of it, where it can; of any
            other, the recurrence alone.
        packing: the S sequences in the one row of the inputs; states are then (S, H, N, N).

    Returns:
        `out` (B, T, C), and the final state (B, H, N, N).
    """
    tensors = (r, w, k, v, a, g, k_k, k_a, r_k, ln_weight, ln_bias)
    chosen = OP.choose(Call.of(*tensors, head_size=r_k.shape[1]), beside(kernel), instead="plain")
    return chosen.run(*tensors, state, eps=eps, kernel=kernel, packing=packing)


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


OP = Op(
    "mix7",
    [
        Backend("triton", mix7_triton.refuses, mix7_triton.mix7_triton, packs=True),
        Backend("native", mix7_native.refuses, mix7_native.mix7_native, packs=True),
        Backend("plain", never_refuses, mix7_plain, packs=True),
    ],
)
