"""Rows of logits to losses and gradients on a CPU, by a loop compiled by Numba: a row stays in the cache meanwhile, and
becomes its gradient in place."""

from __future__ import annotations

import torch
from torch import Tensor

from rookery.ops import native
from rookery.ops.backend import Call
from rookery.ops.native import array_of


def refuses(call: Call) -> str | None:
    """Why this back-end cannot serve `call`, or None."""
    return native.refuses_machine(call) or native.refuses_precision(call)


def rows(logits: Tensor, targets: Tensor, l2wrap: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """Sum of the losses of `logits` (n, V) and, with `gradient`, in their place its gradients. Arithmetic is fp32."""
    from rookery.ops import head_loss_numba
    from rookery.ops.jit import share_out

    losses = torch.empty(len(logits))
    if len(logits):
        arrays = (array_of(logits), targets.contiguous().numpy(), losses.numpy())
        share_out(head_loss_numba.rows, len(logits), *arrays, l2wrap, gradient)
    return losses.sum(), logits
