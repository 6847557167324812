"""Text to token ids and back.

`World` is the vocabulary of the RWKV models, `Character` the one that is built from a text. Both have the same
interface, `Tokenizer`. The text of a chat is in `rookery.tokenizer.chat`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer.character import Character
from rookery.tokenizer.interface import Tokenizer
from rookery.tokenizer.stream import StreamDecoder

__all__ = ["Character", "StreamDecoder", "Tokenizer", "World", "load", "load_beside", "save_beside"]


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
            (``.txt``); or a run directory, which keeps its vocabulary when that is not World.

    Raises:
        UserError: there is no such tokenizer, or its file is damaged.
    """
    from rookery.tokenizer.world import World

    if str(name) == "world":
        return World()
    path = Path(name)
    if path.is_dir():
        return load_beside(path / "vocab") or World()
    if not path.exists():
        raise UserError(_("tokenizer {name}: expected world, or the path of a vocabulary file", name=name))
    return Character(path) if path.suffix == ".json" else World(path)


def save_beside(tokenizer: Tokenizer, stem: str | Path) -> None:
    """Keep a tokenizer with what depends on it: as ``<stem>.json`` or ``<stem>.txt``; World needs no file.

    A vocabulary that lay there before is removed, so that `load_beside` finds this tokenizer. A run directory uses the
    stem ``<directory>/vocab``, binidx data ``<prefix>.vocab``.
    """
    for suffix in (".json", ".txt"):
        path = Path(f"{stem}{suffix}")
        if suffix == tokenizer.file_suffix:
            tokenizer.save(path)
        else:
            path.unlink(missing_ok=True)


def load_beside(stem: str | Path) -> Tokenizer | None:
    """The tokenizer that `save_beside` left at `stem`; None when it left no file, as for World."""
    for suffix in (".json", ".txt"):
        path = Path(f"{stem}{suffix}")
        if path.exists():
            return load(path)
    return None
