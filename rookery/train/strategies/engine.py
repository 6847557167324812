"""What the training loop asks of a strategy: how devices share the model, the gradients and the optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rookery.formats import Pending
from rookery.train.schedule import Rates


class Engine(Protocol):
    """One rank's view of the training. With several ranks, every method is called by all of them together."""

    model: nn.Module
    """Computes the loss; its arithmetic is in the dtype of the run's precision."""
    device: torch.device
    rank: int
    world_size: int

    def backward(self, loss: Tensor, *, weight: float, last: bool) -> None:
        """Adds the gradients of `weight * loss` to those of this step.

        Args:
            loss: 0-dim, mean over this forward pass's targets of this rank.
            weight: its share in the step; the shares of all forward passes of all ranks add up to `world_size`.
            last: whether this is the step's last forward pass, so that ranks exchange gradients now.
        """

    def step(self, rates: Rates) -> tuple[Tensor, Tensor]:
        """Clips, updates the parameters and clears the gradients. Nothing waits for the device.

        An update that would not be finite is left out; unless fp16 scaling explains it, so are all that follow, and
        parameters and optimiser stay as they were before it.

        Returns:
            loss: 0-dim fp32, the step's mean loss over all ranks.
            grad_norm: 0-dim fp32, global norm of the unscaled gradients before clipping.
        """

    def total(self, count: int) -> int:
        """Sum of `count` over the ranks."""

    def diverged(self) -> bool:
        """Whether an update had to be left out because loss or gradients were not finite. Waits for the device."""

    def trained_weights(self) -> list[Pending]:
        """What trains, by the names of the .pth, in the dtype of the run's precision and in the model's order. All
        ranks produce each tensor together, in this order, so that no device ever holds more than one of them whole."""

    def save(self, folder: Path) -> None:
        """Writes masters and optimiser into `folder` (all ranks), so that `load` restores them exactly."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""

    def state_dict(self) -> dict[str, Any]:
        """Small state beside the tensors, as JSON values (loss scale)."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
