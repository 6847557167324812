"""The generations of RWKV, one file each, and the state they share."""

from __future__ import annotations

import torch

from rookery.models.rwkv7 import RWKV7
from rookery.models.shape import ModelShape
from rookery.models.state import State

__all__ = ["RWKV7", "Model", "ModelShape", "State", "create", "initialise"]

Model = RWKV7
"""A language model of any generation."""

CLASSES = {"x070": RWKV7}


def create(shape: ModelShape, *, kernel: str = "auto") -> Model:
    """A model of the given shape on the CPU, its parameters not yet set."""
    with torch.device("meta"):
        model = CLASSES[shape.version](shape, kernel=kernel)
    return model.to_empty(device="cpu")


def initialise(model: Model, seed: int) -> None:
    """Set every parameter to its initial value for pretraining; the same seed gives the same values.

    The values are those of the reference's `generate_init_weight` (what rwkv-init.pth holds).
    """
    model.initialise(torch.Generator().manual_seed(seed))
