"""How devices share a training. One engine a strategy; the loop sees only the `Engine` interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rookery.config.tree import DeviceSection
from rookery.errors import UserError
from rookery.i18n import _
from rookery.train.strategies.engine import Engine
from rookery.train.strategies.single import SingleDevice

__all__ = ["Engine", "SingleDevice", "check_devices", "create_engine"]


def check_devices(device: DeviceSection) -> None:
    """
    Raises:
        UserError: more devices are asked for than any strategy here can use.
    """
    if device.devices * device.num_nodes > 1:
        raise UserError(
            _(
                "--devices {devices} --num_nodes {nodes}: training on several devices comes with a later version of "
                "Rookery; this one uses one. Leave both out, and raise accumulate_grad_batches for the same batch.",
                devices=device.devices,
                nodes=device.num_nodes,
            )
        )


def create_engine(
    model: nn.Module,
    build_optimizer: Callable[[dict[str, Tensor]], torch.optim.Optimizer],
    *,
    dtype: torch.dtype,
    grad_clip: float,
) -> Engine:
    """The engine of the run's strategy around `model`, which is on its device with unrounded weights."""
    return SingleDevice(model, build_optimizer, dtype=dtype, grad_clip=grad_clip)
