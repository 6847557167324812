"""Cross-entropy of the output head, computed in chunks of tokens so that the full logits tensor never exists.

With l = head(x) and n trained targets::

    loss = 1/n sum_i ( logsumexp(l_i) - l_i[target_i] )
    dl_i = 1/n (softmax(l_i) - onehot(target_i))  +  1e-4/n * max(l_i) * onehot(argmax(l_i))

The second term of the gradient is RWKV's L2Wrap: it pulls the largest logit of each row towards zero without appearing
in the loss. It follows the upstream gradient, as in RWKV-LM's current trainer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rookery.ops import head_loss_native, head_loss_triton
from rookery.ops.backend import Backend, Call, Op, beside, exact_dtype, never_refuses, tracked, under_autocast
from rookery.ops.linear import linear

L2WRAP = 1e-4
CHUNK_BYTES = 64 << 20
"""Size of the logits of one chunk, in the precision of sums, when `chunk` is not given."""

LARGE_CHUNK_BYTES = 512 << 20
"""The same on a GPU where logits become gradients in place, if the head trains: its gradient, summed in fp32, is read
and written for every chunk."""


NATIVE_CHUNK_BYTES = 128 << 20
"""The same on a CPU where they become gradients in place."""


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, *, trained: int | None = None, chunk: int = 0, l2wrap: bool = True,
    kernel: str = "auto",
) -> Tensor:  # fmt: skip
    """Mean cross-entropy over the trained targets.

    Args:
        x: output of the last LayerNorm, (..., C).
        weight: head matrix (V, C), same dtype as `x`.
        targets: token ids (...), int64; -100 marks a position that is not trained. Such rows cost nothing.
        trained: number of trained targets, if it is known: a GPU is then not waited for to count them.
        chunk: rows whose logits exist at one time; 0 chooses.
        l2wrap: add the L2 term on the largest logit to the gradient.
        kernel: "auto" or a back-end of the recurrence; where it does not exist here or cannot serve, the plain one.

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs); 0 when no target is trained. Gradients for `x` and `weight` are computed
        in the forward pass, so a second derivative does not exist.
    """
    if under_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    chosen = OP.choose(Call.of(x, weight), beside(kernel), instead="plain")
    if not chunk:
        size, element = CHUNK_BYTES, 4
        if chosen.name == "triton":
            size, element = LARGE_CHUNK_BYTES if weight.requires_grad else CHUNK_BYTES, x.element_size()
        elif chosen.name == "native":
            size, element = NATIVE_CHUNK_BYTES, x.element_size()
        chunk = max(1, size // (element * weight.shape[0]))
    return _HeadLoss.apply(*tracked(x, weight), targets, trained, chunk, L2WRAP if l2wrap else 0.0, chosen.run)


def head_loss_plain(x: Tensor, weight: Tensor, targets: Tensor, *, l2wrap: bool = True) -> Tensor:
    """The reference: the same loss and gradients from whole logits by autograd."""
    return logits_loss(F.linear(x, weight), targets, l2wrap=l2wrap)


def logits_loss(logits: Tensor, targets: Tensor, *, l2wrap: bool = True) -> Tensor:
    """The same loss and gradients from logits (..., V), by autograd."""
    trained = targets.reshape(-1) != -100
    logits = logits.reshape(-1, logits.shape[-1])[trained]
    logits = logits.to(exact_dtype(logits.dtype))
    rows = max(1, len(logits))
    loss = F.cross_entropy(logits, targets.reshape(-1)[trained], reduction="sum") / rows
    if l2wrap and len(logits):
        # A term whose value is zero and whose gradient is the wanted one.
        largest = logits.amax(dim=-1)
        penalty = (largest.square() / 2).sum() * (L2WRAP / rows)
        loss = loss + (penalty - penalty.detach())
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        trained: int | None,
        chunk: int,
        l2wrap: float,
        of_rows: Any,
    ) -> Tensor:
        flat_x, flat_targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        chosen = _trained_rows(flat_targets, trained)
        n = len(flat_targets) if chosen is None else len(chosen)
        exact = exact_dtype(x.dtype)
        loss = torch.zeros((), dtype=exact, device=x.device)
        need_x, need_weight = ctx.needs_input_grad[:2]
        dx = torch.zeros_like(flat_x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk) if chosen is None else chosen[start : start + chunk]
            x_rows = flat_x[rows]
            # Not yet divided by n: in fp16, gradients that small would vanish before loss scaling reaches them.
            of_chunk, dlogits = of_rows(linear(x_rows, weight), flat_targets[rows], l2wrap, need_x or need_weight)
            loss += of_chunk
            if dx is not None:
                dx[rows] = linear(dlogits, weight.T)
            if dweight is not None:
                dweight += linear(dlogits.T, x_rows.T)
        if dx is not None:
            dx = dx.reshape(x.shape)
        ctx.save_for_backward(dx, dweight)
        ctx.rows, ctx.dtype = max(n, 1), x.dtype
        return loss / ctx.rows

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        scale = upstream / ctx.rows
        dx, dweight = (
            None if grad is None else torch.mul(grad, scale, out=torch.empty_like(grad, dtype=ctx.dtype))
            for grad in ctx.saved_tensors
        )
        return dx, dweight, None, None, None, None, None


def rows_plain(logits: Tensor, targets: Tensor, l2wrap: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """Sum of the losses of `logits` (n, V), and their gradients; without `gradient` the second is not to be used."""
    dtype, targets = logits.dtype, targets[:, None]
    logits = logits.to(exact_dtype(dtype))
    lse = logits.logsumexp(dim=-1, keepdim=True)
    loss = (lse - logits.gather(1, targets)).sum()
    if not gradient:
        return loss, logits
    largest, where = logits.max(dim=-1, keepdim=True)
    dlogits = logits.sub_(lse).exp_()
    dlogits.scatter_add_(1, targets, dlogits.new_full(targets.shape, -1))
    dlogits.scatter_add_(1, where, largest * l2wrap)
    return loss, dlogits.to(dtype)


def _trained_rows(targets: Tensor, number: int | None) -> Tensor | None:
    """The rows with a target, `number` of them if that is known; None stands for all rows."""
    if number is None:
        rows = (targets != -100).nonzero().squeeze(-1)
        return None if len(rows) == len(targets) else rows
    if number == len(targets):
        return None
    # Sorted, because a GPU would have to be waited for to learn how many rows a search has found.
    return (targets == -100).byte().argsort(stable=True)[:number]


OP = Op(
    "head_loss",
    [
        Backend("triton", head_loss_triton.refuses, head_loss_triton.rows),
        Backend("native", head_loss_native.refuses, head_loss_native.rows),
        Backend("plain", never_refuses, rows_plain),
    ],
)
"""From the logits of some rows to their losses and gradients."""
