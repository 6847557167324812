"""Tensors of a training, saved in pieces by all ranks at once; `rookery.formats.pieces` reads them back.

A piece is a range of the elements of a flattened tensor: the rows of a rank under FSDP2, what a rank owns under ZeRO,
or the whole. A reader takes the ranges it needs, whoever wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rookery.formats import Pending, write_weights
from rookery.train.lean_adamw import Moment8, dense


class Piece(NamedTuple):
    """A range of a flattened tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """First element of the range."""
    elements: Tensor | Moment8
    """1-dim, or in codes."""


def file_name(name: str, rank: int, world_size: int) -> str:
    """Of the file that one of several ranks writes."""
    return f"{name}-{rank:05d}-of-{world_size:05d}.safetensors"


def write_pieces(folder: Path, name: str, pieces: Iterable[Piece], rank: int, world_size: int) -> None:
    """Write this rank's pieces; those without elements are left out. Tensors are copied from the device one by one."""
    pieces = [piece for piece in pieces if piece.elements.numel()]
    places = {piece.name: [piece.start, list(piece.shape)] for piece in pieces}
    tensors = [
        Pending(p.name, (p.elements.numel(),), p.elements.dtype, lambda p=p: dense(p.elements).reshape(-1))  # type: ignore[misc]
        for p in pieces
    ]
    write_weights(
        folder / file_name(name, rank, world_size), tensors, metadata={"format": "pt", "pieces": json.dumps(places)}
    )
