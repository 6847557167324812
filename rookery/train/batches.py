"""Samples of the data set as batches on the device, from any position on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from rookery.train.context import WHOLE, Context
from rookery.train.loop import Batch

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Tokens, targets and lengths of a batch."""


class Samples(Protocol):
    """What the training reads: samples by number (0, 1, 2 … over the whole training and all devices)."""

    def batch(self, indices: Iterable[int]) -> Arrays:
        """Tokens and targets, each (samples, ctx_len) int64, -100 = not trained; and the lengths of packed sequences,
        int64, or None."""


def batches(
    open_samples: Callable[[], Samples],
    first_sample: int,
    micro_bsz: int,
    device: torch.device,
    *,
    context: Context = WHOLE,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Batches without end; sample i of this rank, or of the ranks that share one, is `first_sample + i * groups +
    group`.

    Args:
        open_samples: opens the data; called once in each process that reads, so it must be picklable for workers.
        first_sample: samples that all ranks together have read before.
        context: says which group this rank is in, of how many, and which part it reads.
        num_workers: processes that read ahead; 0 = read here when a batch is wanted.
    """
    groups = _groups(count(first_sample + context.group, context.groups), micro_bsz)
    read: Iterator[Arrays]
    if num_workers:
        loader: Any = DataLoader  # its types know only data sets with a length
        read = iter(
            loader(
                _Reader(open_samples),
                batch_sampler=groups,
                collate_fn=_unchanged,
                num_workers=num_workers,
                worker_init_fn=_ignore_ctrl_c,
                multiprocessing_context="spawn",
                # Its own generator: reading data must not move that of the training.
                generator=torch.Generator(),
            )
        )
    else:
        read = map(open_samples().batch, groups)
    for first, arrays in zip(count(first_sample, micro_bsz * context.groups), read, strict=False):
        yield to_device(arrays, first, device, context)


def to_device(arrays: Arrays, first_sample: int, device: torch.device, context: Context = WHOLE) -> Batch:
    """This rank's part of what `Samples.batch` gave as a batch on `device`; a GPU's copy is not waited for."""
    tokens, targets, lengths, arrives, leaves = context.part(*arrays)
    is_trained = torch.from_numpy(targets != -100)
    x, y = (torch.from_numpy(array) for array in (tokens, targets))
    if device.type == "cuda":
        x, y = x.pin_memory(), y.pin_memory()
    x, y = (tensor.to(device, non_blocking=True) for tensor in (x, y))
    packed = None if lengths is None else torch.from_numpy(lengths)
    return Batch(x, y, int(is_trained.sum()), first_sample, packed, arrives, leaves, is_trained)


def _groups(numbers: Iterator[int], size: int) -> Iterator[list[int]]:
    while True:
        yield list(islice(numbers, size))


class _Reader:
    """Opens the data in the process that reads them: mapped files do not travel between processes."""

    def __init__(self, open_samples: Callable[[], Samples]) -> None:
        self._open = open_samples
        self._samples: Samples | None = None

    def __getitems__(self, indices: list[int]) -> Arrays:
        if self._samples is None:
            self._samples = self._open()
        return self._samples.batch(indices)


def _unchanged(batch: Arrays) -> Arrays:
    return batch


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends Ctrl-C to every process; the trainer still needs the batches of its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
