"""`mix7` on a GPU, by Triton: one kernel before the recurrence and one after it, forward and backward.

Any back-end of `wkv7` may stand between them. Both work in fp32 on what they read and round once. For the backward pass
only their inputs are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rookery.ops import on_triton
from rookery.ops.backend import Call, tracked
from rookery.ops.on_triton import on, spans
from rookery.ops.packed import Packing
from rookery.ops.wkv7 import wkv7

HEAD_SIZES = (16, 32, 64, 128)


def refuses(call: Call) -> str | None:
    """Why this back-end cannot serve `call`, or None."""
    return on_triton.refuses_step(call, HEAD_SIZES)


def mix7_triton(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, g: Tensor,
    k_k: Tensor, k_a: Tensor, r_k: Tensor, ln_weight: Tensor, ln_bias: Tensor, state: Tensor | None, *,
    eps: float, kernel: str, packing: Packing | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes as in `rookery.ops.mix7`, all of one dtype but the state."""
    heads = (*r.shape[:2], *r_k.shape)
    r, w, k, v, a, g = (x.reshape(heads) for x in (r, w, k, v, a, g))
    removal, key, b = _BeforeWKV7.apply(*tracked(k, a, k_k, k_a))
    y, state = wkv7(r, w, key, v, removal, b, state, backend=kernel, packing=packing)
    return _AfterWKV7.apply(eps, *tracked(y, r, key, v, g, r_k, ln_weight, ln_bias)).flatten(2), state


def rows(N: int) -> int:
    """Tokens of a tile."""
    return 1024 // N


class _BeforeWKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from rookery.ops import mix7_triton_kernels as kernels

        k, a = k.contiguous(), a.contiguous()
        B, T, H, N = k.shape
        removal, key, b = (torch.empty_like(k) for _ in range(3))
        with on(k.device):
            kernels.before[-(-B * T // rows(N)), H](
                k, a, k_k, k_a, removal, key, b, B * T, H, N=N, ROWS=rows(N)
            )  # fmt: skip
        ctx.save_for_backward(k, a, k_k, k_a)
        return removal, key, b

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from rookery.ops import mix7_triton_kernels as kernels

        k, a, k_k, k_a = ctx.saved_tensors
        B, T, H, N = k.shape
        programs, tiles = spans(B * T, rows(N), H, k.device)
        dk, da = torch.empty_like(k), torch.empty_like(a)
        sums = k.new_empty(programs, 2, H, N, dtype=torch.float32)
        with on(k.device):
            kernels.before_back[programs, H](
                k, a, k_k, k_a, *(grad.contiguous() for grad in grads), dk, da, sums, B * T, H, tiles,
                N=N, ROWS=rows(N),
            )  # fmt: skip
        dk_k, dk_a = sums.sum(dim=0).to(k_k.dtype)
        return dk, da, dk_k.view(k_k.shape), dk_a.view(k_a.shape)


class _AfterWKV7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eps: float, y: Tensor, r: Tensor, key: Tensor, v: Tensor, g: Tensor,
        r_k: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        from rookery.ops import mix7_triton_kernels as kernels

        inputs = [x.contiguous() for x in (y, r, key, v, g)]
        B, T, H, N = y.shape
        out = torch.empty_like(inputs[0])
        with on(y.device):
            kernels.after[-(-B * T // rows(N)), H](
                *inputs, r_k, ln_weight, ln_bias, out, B * T, H, eps, N=N, ROWS=rows(N)
            )  # fmt: skip
        ctx.save_for_backward(*inputs, r_k, ln_weight, ln_bias)
        ctx.eps = eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        from rookery.ops import mix7_triton_kernels as kernels

        *inputs, r_k, ln_weight, ln_bias = ctx.saved_tensors
        B, T, H, N = inputs[0].shape
        programs, tiles = spans(B * T, rows(N), H, dout.device)
        grads = [torch.empty_like(x) for x in inputs]
        sums = dout.new_empty(programs, 3, H, N, dtype=torch.float32)
        with on(dout.device):
            kernels.after_back[programs, H](
                *inputs, r_k, ln_weight, ln_bias, dout.contiguous(), *grads, sums, B * T, H, tiles, ctx.eps,
                N=N, ROWS=rows(N),
            )  # fmt: skip
        dr_k, dweight, dbias = sums.sum(dim=0).to(r_k.dtype)
        return None, *grads, dr_k.view(r_k.shape), dweight.view(ln_weight.shape), dbias.view(ln_bias.shape)
