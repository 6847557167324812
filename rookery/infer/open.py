"""Opening a model together with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from rookery import formats, tokenizer
from rookery.errors import UserError
from rookery.i18n import _
from rookery.models import Model
from rookery.tokenizer import Tokenizer
from rookery.tokenizer.world import World

WORLD_SIZE = 65536


def open_model(
    path: str | Path,
    *,
    tokenizer_name: str = "",
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    state: str | Path | None = None,
    adapter: str | Path | None = None,
) -> tuple[Model, Tokenizer]:
    """The model of a .pth, .safetensors or .st file or a run directory, as `rookery.load` takes them, and its tokenizer
    (see `find_tokenizer`).

    Raises:
        UserError: a file is missing or damaged, or no tokenizer of the model's size was found.
    """
    model = formats.load(path, device=device, dtype=dtype, state=state, adapter=adapter)
    return model, find_tokenizer(path, model.shape.vocab_size, tokenizer_name)


def find_tokenizer(path: str | Path, vocab_size: int, name: str = "") -> Tokenizer:
    """The tokenizer called `name`; without a name, World for a model of its size, else the vocabulary kept beside it.

    Raises:
        UserError: there is none, or it has more ids than the model.
    """
    if name:
        found = tokenizer.load(name)
    elif vocab_size == WORLD_SIZE:
        found = World()
    else:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        beside = tokenizer.load_beside(folder / "vocab")
        if beside is None:
            raise UserError(
                _(
                    "{path} has {size} token ids, so its tokenizer is not World, and neither vocab.json nor vocab.txt "
                    "is beside it. Name the vocabulary with --tokenizer FILE.",
                    path=path,
                    size=vocab_size,
                )
            )
        found = beside
    if found.vocab_size > vocab_size:
        raise UserError(
            _(
                "The tokenizer {name} has {ids} ids and {path} only {size}; it belongs to another model.",
                name=found.name,
                ids=found.vocab_size,
                path=path,
                size=vocab_size,
            )
        )
    return found
