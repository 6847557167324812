"""The generations of RWKV, one file each, and the state they share."""

from __future__ import annotations

import torch

from rookery.models.common import LanguageModel as Model
from rookery.models.legacy import LegacyRWKV5, LegacyRWKV6
from rookery.models.rwkv5 import RWKV5
from rookery.models.rwkv6 import RWKV6
from rookery.models.rwkv7 import RWKV7
from rookery.models.shape import ModelShape, Parts
from rookery.models.state import State

__all__ = ["RWKV5", "RWKV6", "RWKV7", "Model", "ModelShape", "Parts", "State", "create", "initialise"]

CLASSES: dict[str, type[RWKV5 | RWKV6 | RWKV7]] = {"x052": RWKV5, "x060": RWKV6, "x070": RWKV7}
LEGACY_CLASSES: dict[str, type[LegacyRWKV5 | LegacyRWKV6]] = {"x052": LegacyRWKV5, "x060": LegacyRWKV6}


def create(shape: ModelShape, *, kernel: str = "auto", dropout: float = 0.0) -> Model:
    """A model of the given shape on the CPU, its parameters not yet set.

    Args:
        kernel: back-end of the recurrence.
        dropout: probability of dropping an element of the residual stream in training.
    """
    classes = CLASSES if shape.parts == Parts() else LEGACY_CLASSES
    return classes[shape.version](shape, kernel=kernel, dropout=dropout)


def initialise(model: Model, seed: int) -> None:
    """Set every parameter to its initial value for pretraining; the same seed gives the same values.

    The values are those of the reference's `generate_init_weight` (what rwkv-init.pth holds).
    """
    model.initialise(torch.Generator().manual_seed(seed))
