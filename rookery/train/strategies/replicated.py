"""Data parallelism: every rank holds the whole model and the whole optimiser, and gradients are averaged (`ddp`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rookery.formats.pieces import OPTIMIZER, WEIGHTS
from rookery.train.optim import Optimizer
from rookery.train.ranks import Ranks
from rookery.train.strategies.pieces import Piece, write_pieces
from rookery.train.strategies.single import SingleDevice

BUCKET_BYTES = 25 << 20
"""Gradients that travel together, as in PyTorch's DistributedDataParallel."""


class Replicated(SingleDevice):
    """`SingleDevice` on each of several ranks, kept alike. Implements `Engine`.

    Gradients travel in buckets while the backward pass goes on, as in PyTorch's DistributedDataParallel, which itself
    cannot serve: it watches calls of `forward` only, and would average the gradients of a bf16 model in bf16, where
    here the fp32 ones of the masters travel.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[dict[str, Tensor]], Optimizer],
        *,
        dtype: torch.dtype,
        grad_clip: float = 0.0,
        masters: bool = True,
        ranks: Ranks,
    ) -> None:
        super().__init__(model, build_optimizer, dtype=dtype, grad_clip=grad_clip, masters=masters)
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self._ranks = ranks
        self._exchange = _Exchange(zip(self._parameters, self._masters.values(), strict=True))

    def backward(self, loss: Tensor, *, weight: float, last: bool) -> None:
        if last:
            self._exchange.begin()
        super().backward(loss, weight=weight / self.world_size, last=last)
        if last:
            self._exchange.send_rest()

    def _finish_gradients(self) -> tuple[Tensor, Tensor]:
        self._exchange.finish()
        assert self._loss is not None, "step without backward"
        dist.all_reduce(self._loss)
        return super()._finish_gradients()

    def total(self, count: int) -> int:
        return self._ranks.total(count)

    def save(self, folder: Path) -> None:
        """Each rank writes whole tensors, as many bytes as the others."""
        own = share_out({name: p.numel() for name, p in self._masters.items()}, self.world_size)[self.rank]
        weights = (Piece(name, tuple(p.shape), 0, p.detach().reshape(-1)) for name, p in self._masters.items())
        write_pieces(folder, WEIGHTS, (w for w in weights if w.name in own), self.rank, self.world_size)
        state = (Piece(key, tuple(t.shape), 0, t) for key, name, t in self._optimizer_tensors() if name in own)
        write_pieces(folder, OPTIMIZER, state, self.rank, self.world_size)


def share_out(sizes: dict[str, int], shares: int) -> list[set[str]]:
    """The names in `shares` sets of nearly the same total size."""
    found: list[set[str]] = [set() for _ in range(shares)]
    loads = [0] * shares
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        least = loads.index(min(loads))
        found[least].add(name)
        loads[least] += sizes[name]
    return found


class _Exchange:
    """Adds up the gradients of all ranks, bucket by bucket, in the same order everywhere.

    A hook on each parameter tells when the last backward pass of a step has made its gradient. A bucket is sent when it
    and all before it are complete. A parameter that no rank used keeps no gradient, as on a single device.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        pairs = list(pairs)
        self._buckets = list(_buckets(reversed(pairs)))  # gradients come from the head to the embedding
        self._next = len(self._buckets)
        self._active = False
        for bucket in self._buckets:
            for parameter, _master in bucket.pairs:
                parameter.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._made(bucket))

    def begin(self) -> None:
        """The next backward pass is the last of the step."""
        self._active, self._next = True, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.pairs)

    def _made(self, bucket: _Bucket) -> None:
        if self._active:
            bucket.missing -= 1
            while self._next < len(self._buckets) and not self._buckets[self._next].missing:
                self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        gradients = [_take_gradient(*pair) for pair in bucket.pairs]
        bucket.used = [gradient is not None for gradient in gradients]
        bucket.sum = torch.cat(
            [
                (torch.zeros_like(master) if gradient is None else gradient).reshape(-1)
                for gradient, (_p, master) in zip(gradients, bucket.pairs, strict=True)
            ]
        )
        bucket.work = dist.all_reduce(bucket.sum, async_op=True)

    def send_rest(self) -> None:
        """The backward pass is over: what has no gradient will not get one."""
        self._active = False
        while self._next < len(self._buckets):
            self._send_next()

    def finish(self) -> None:
        """Wait for the sums and make them the gradients of the masters."""
        used = torch.tensor([used for bucket in self._buckets for used in bucket.used], dtype=torch.uint8)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        used_by_any = iter(used.tolist())
        for bucket in self._buckets:
            bucket.work.wait()
            parts = bucket.sum.split([master.numel() for _p, master in bucket.pairs])
            for part, (_p, master) in zip(parts, bucket.pairs, strict=True):
                master.grad = part.view_as(master) if next(used_by_any) else None
            del bucket.sum, bucket.work


@dataclass
class _Bucket:
    pairs: list[tuple[Tensor, Tensor]]
    """Parameter of the model and master, which may be the same."""
    missing: int = 0
    """Gradients that the backward pass has not yet made."""
    used: list[bool] = field(default_factory=list)
    sum: Any = None
    work: Any = None


def _buckets(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[_Bucket]:
    bucket: list[tuple[Tensor, Tensor]] = []
    size = 0
    for pair in pairs:
        bucket.append(pair)
        size += pair[1].nbytes
        if size >= BUCKET_BYTES:
            yield _Bucket(bucket)
            bucket, size = [], 0
    if bucket:
        yield _Bucket(bucket)


def _take_gradient(parameter: Tensor, master: Tensor) -> Tensor | None:
    """What both have, in the master's dtype; afterwards neither has one."""
    new, before = parameter.grad, None if master is parameter else master.grad
    parameter.grad = master.grad = None
    if new is None or before is None:
        found = new if before is None else before
        return None if found is None else found.to(master.dtype)
    return before.add_(new)
