"""The loss over data that are not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from rookery.data import Dataset
from rookery.train.batches import to_device
from rookery.train.loop import Batch, LossFunction


class Validation:
    """Mean loss over every window of a data set, always in the same order."""

    def __init__(self, dataset: Dataset, batch_size: int, device: torch.device) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._device = device

    @torch.no_grad()
    def loss(self, model: nn.Module, loss_function: LossFunction, interrupted: Callable[[], bool]) -> float | None:
        """Mean over all trained targets; None when `interrupted` says so in between."""
        total, trained = 0.0, 0
        model.eval()
        try:
            for batch in self._batches():
                if interrupted():
                    return None
                total += sum(part.loss.item() * part.trained for part in loss_function(model, batch))
                trained += batch.trained
        finally:
            model.train()
        return total / max(1, trained)

    def _batches(self) -> Iterator[Batch]:
        samples = self._dataset.facts.samples
        for first in range(0, samples, self._batch_size):
            numbers = range(first, min(first + self._batch_size, samples))
            yield to_device(self._dataset.batch(numbers), first, self._device)
