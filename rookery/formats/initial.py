"""Initial weights written block by block, so that a new model is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rookery.formats.combine import combine
from rookery.formats.stream import Pending, write_weights
from rookery.models import Model, ModelShape, create


def write_initial(
    path: Path, shape: ModelShape, seed: int, dtype: torch.dtype, loaded: Mapping[str, Tensor], name: str
) -> None:
    """Write a .pth with the weights of `rookery.models.initialise`, or what `rookery.formats.combine` makes of them.

    In memory are one block, embedding or head, and the head once more in `dtype`.

    Args:
        loaded: weights of an old model that the new one is made from; empty = none.
        name: what to call their file in an error.

    Raises:
        UserError: the file cannot be written, or the old model does not fit into the new one.
    """
    with torch.device("meta"):
        model = create(shape)
    sizes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    combine({}, {key: tensor for key, tensor in loaded.items() if key not in sizes}, name)  # refuses what has no place
    stream = _initialised(model, torch.Generator().manual_seed(seed))
    early: dict[str, Tensor] = {}
    """Made before their turn: the order of initialisation is not that of the file."""

    def produce(key: str) -> Tensor:
        while key not in early:
            made, tensor = next(stream)
            old = {made: loaded[made]} if made in loaded else {}
            early[made] = combine({made: tensor}, old, name)[made].to(dtype)
        return early.pop(key)

    write_weights(path, [Pending(key, size, dtype, partial(produce, key)) for key, size in sizes.items()])


@torch.no_grad()
def _initialised(model: Model, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model on the meta device, fp32, of one part after another."""
    names = {module: name for name, module in model.named_modules()}
    for part, initialise in model.parts():
        part.to_empty(device="cpu")
        initialise(generator)
        yield from ((f"{names[part]}.{key}", tensor) for key, tensor in part.state_dict().items())
        part.to("meta")
