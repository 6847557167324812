"""Rows of logits to losses and gradients on a GPU, by Triton: each logit is read twice and written once, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from rookery.ops import on_triton
from rookery.ops.backend import Call
from rookery.ops.on_triton import on

BLOCK, WARPS = 4096, 8


def refuses(call: Call) -> str | None:
    """Why this back-end cannot serve `call`, or None."""
    return on_triton.refuses_step(call)


def rows(logits: Tensor, targets: Tensor, l2wrap: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """Sum of the losses of `logits` (n, V) and, with `gradient`, in their place its gradients. Arithmetic is fp32."""
    from rookery.ops import head_loss_triton_kernels as kernels

    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with on(logits.device):
        kernels.rows[(len(logits),)](
            logits, targets, losses, logits.shape[1], l2wrap, GRADIENT=gradient, BLOCK=BLOCK, num_warps=WARPS
        )
    return losses.sum(), logits
