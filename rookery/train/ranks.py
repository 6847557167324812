"""The processes ("ranks") that train together, and the few things they say to each other beside gradients."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from rookery.config.launcher import Place
from rookery.errors import Interrupted, UserError
from rookery.i18n import _
from rookery.train.watch import Watch

LONGEST_WAIT = timedelta(hours=1)
"""After which a collective operation gives up by itself. `Watch` finds a rank that is lost much earlier."""


class RankLost(Exception):
    """Another rank died, hung or failed, so that the run cannot go on; names it and says why."""


class Ranks:
    """This process and the others, if there are any. With several, every method is called by all of them together."""

    def __init__(self, place: Place | None = None, watch: Watch | None = None) -> None:
        self.rank = 0 if place is None else place.rank
        self.world_size = 1 if place is None else place.world_size
        self.local_rank = 0 if place is None else place.local_rank
        self.local_size = 1 if place is None else place.local_size
        self.launcher = "" if place is None else place.launcher
        self.watch = watch

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes the files of a run and speaks for it."""
        return self.rank == 0

    def total(self, count: int) -> int:
        """Sum of `count` over the ranks."""
        return self._reduce([count], dist.ReduceOp.SUM)[0]

    def sums(self, *numbers: float) -> list[float]:
        """Of each number, its sum over the ranks."""
        if self.world_size == 1:
            return list(numbers)
        together = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(together)
        return together.tolist()

    def least(self, count: int) -> int:
        """The smallest `count` of any rank."""
        return -self._reduce([-count], dist.ReduceOp.MAX)[0]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank."""
        return tuple(map(bool, self._reduce([int(flag) for flag in flags], dist.ReduceOp.MAX)))

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self._reduce([0], dist.ReduceOp.MAX)

    def _reduce(self, numbers: list[int], how: Any) -> list[int]:
        if self.world_size == 1:
            return numbers
        together = torch.tensor(numbers)  # on the CPU: a GPU's queue is not waited for
        dist.all_reduce(together, how)
        return together.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """What rank 0 gave."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def patience(self) -> Iterator[None]:
        """While entered, a rank that does not move is given ten minutes: disks can be slow."""
        if self.watch is None:
            yield
            return
        with self.watch.patience():
            yield


ALONE = Ranks()


@contextmanager
def joined(place: Place | None, accelerator: str) -> Iterator[Ranks]:
    """This process among those of `place`, connected until the end of the block.

    Args:
        accelerator: that of the configuration; "auto" takes the GPU if there is one.

    Raises:
        UserError: there are more processes than GPUs on this machine, or the others do not come.
        RankLost: inside the block, something failed because another rank was lost.
    """
    if place is None:
        yield ALONE
        return
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if place.local_size > torch.cuda.device_count():
            raise UserError(
                _(
                    "{processes} processes share this machine, which has {gpus} GPUs: one process needs one GPU. "
                    "Ask for --devices {gpus}, or for --accelerator cpu.",
                    processes=place.local_size,
                    gpus=torch.cuda.device_count(),
                )
            )
        torch.cuda.set_device(place.local_rank)
    os.environ.update(place.environment)
    interface = _interface_towards(place.address)
    if interface is not None:
        # By default gloo takes the one that the machine's own name stands for, which is often a wrong one or none.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        dist.init_process_group(backend, timeout=LONGEST_WAIT, rank=place.rank, world_size=place.world_size)
    except (RuntimeError, OSError) as error:
        raise UserError(
            _(
                "rank {rank} cannot join the others at {address}:{port}: {reason}",
                rank=place.rank,
                address=place.address,
                port=place.port,
                reason=str(error).splitlines()[0],
            )
        ) from error
    ranks = Ranks(place)
    ranks.watch = Watch.begin(place, ranks.first)
    failed = False
    try:
        yield ranks
    except Interrupted:  # by all ranks, after the same step
        raise
    except BaseException as error:
        failed = True
        loss = ranks.watch.cause(error)
        if loss is not None:
            raise RankLost(str(loss)) from error
        raise
    finally:
        _leave(ranks.watch, failed)


def _interface_towards(address: str) -> str | None:
    """Name of the network interface through which this machine reaches `address`."""
    try:
        family, kind, _protocol, _name, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # of a datagram socket: only the route is looked up, nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.split("%")[0] == own for found in addresses):
            return name
    return None


def _leave(watch: Watch, failed: bool) -> None:
    """The end of the process group.

    gloo aborts the process now and then when it is destroyed while a peer still reads or a tensor of an operation is
    alive: first all ranks meet, then everything is let go. After a failure there is nobody to meet.
    """
    if not failed:
        gc.collect()
        dist.barrier()
    watch.close()
    if not failed:
        dist.destroy_process_group()
