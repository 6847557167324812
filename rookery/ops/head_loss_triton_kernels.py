"""Triton kernel of `head_loss_triton`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows(logits, targets, losses, V, l2wrap, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Loss of one row of logits (n, V) into losses (n), fp32, and, with GRADIENT, in place of the logits::

        softmax(l) - onehot(target) + l2wrap * max(l) * onehot(argmax(l))

    Each of BLOCK lanes goes through its own columns first, so that the row is reduced once. Of equal largest logits the
    first counts. Lanes begin at a finite number, with which a column that does not exist adds exactly nothing to a row
    that has any logit above it.
    """
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * V
    target = tl.load(targets + row)
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        c = start + lanes
        x = tl.load(base + c, mask=c < V, other=float("-inf")).to(tl.float32)
        where = tl.where(x > largest, c, where)
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    top = tl.max(largest, axis=0)
    place = tl.min(tl.where(largest == top, where, V), axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    tl.store(losses + row, lse - tl.load(base + target).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, V, BLOCK):
            c = start + lanes
            x = tl.load(base + c, mask=c < V, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - lse) - tl.where(c == target, 1.0, 0.0) + tl.where(c == place, top * l2wrap, 0.0)
            tl.store(base + c, grad, mask=c < V)
