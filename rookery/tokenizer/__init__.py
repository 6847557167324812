"""Text to token ids and back.

`World` is the vocabulary of the RWKV models, `Character` the one that is built from a text. Both have the same interface,
`Tokenizer`. The text of a chat is in `rookery.tokenizer.chat`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer.character import FILE_NAME, Character
from rookery.tokenizer.interface import Tokenizer
from rookery.tokenizer.stream import StreamDecoder

__all__ = ["Character", "StreamDecoder", "Tokenizer", "World", "load"]


def __getattr__(name: str) -> Any:
    # Numba takes a quarter of a second to import, which a character vocabulary does not need.
    if name == "World":
        from rookery.tokenizer.world import World

        return World
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(name: str | Path) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: "world"; the path of a character vocabulary (``.json``); the path of a vocabulary in the World format
            (``.txt``); or a run directory, which keeps ``vocab.json`` when its tokenizer is not World.

    Raises:
        UserError: there is no such tokenizer, or its file is damaged.
    """
    from rookery.tokenizer.world import World

    if str(name) == "world":
        return World()
    path = Path(name)
    if path.is_dir():
        vocabulary = path / FILE_NAME
        return Character(vocabulary) if vocabulary.exists() else World()
    if not path.exists():
        raise UserError(_("tokenizer {name}: expected world, or the path of a vocabulary file", name=name))
    return Character(path) if path.suffix == ".json" else World(path)
