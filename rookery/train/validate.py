"""The loss over data that are not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from rookery.data import Dataset
from rookery.train.batches import to_device
from rookery.train.context import Context
from rookery.train.loop import Batch, LossFunction


class Validation:
    """Mean loss over every window of a data set, always in the same order; ranks, or groups of ranks that share
    samples, share the batches."""

    def __init__(self, dataset: Dataset, batch_size: int, device: torch.device, context: Context) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._device = device
        self._context = context

    @torch.no_grad()
    def loss(self, model: nn.Module, loss_function: LossFunction, interrupted: Callable[[], bool]) -> float | None:
        """Mean over all trained targets; None when `interrupted` says so in between."""
        total, trained = 0.0, 0.0
        model.eval()
        try:
            for batch, counts in self._batches():
                if any(self._context.ranks.any(interrupted())):
                    return None
                loss = sum(part.loss.item() * part.trained for part in loss_function(model, batch))
                if counts:
                    total += loss
                    trained += batch.trained
        finally:
            model.train()
        total, trained = self._context.ranks.sums(total, trained)
        return total / max(1, trained)

    def _batches(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's batches, and whether each counts: all ranks get equally many, some of them for nothing."""
        samples, size, context = self._dataset.facts.samples, self._batch_size, self._context
        for first in range(0, samples, size * context.groups):
            own = first + context.group * size
            counts = own < samples
            start = own if counts else 0
            numbers = range(start, min(start + size, samples))
            yield to_device(self._dataset.batch(numbers), start, self._device, context), counts
