"""Tensors of a training, saved in pieces by all ranks at once, and read back by any number of ranks.

A piece is a range of the elements of a flattened tensor: the rows of a rank under FSDP2, what a rank owns under ZeRO,
or the whole. Each rank writes a file `NAME-RANK-of-RANKS.safetensors` whose metadata say where its pieces belong, so
that a reader takes the ranges it needs, whoever wrote them. A single device writes `NAME.safetensors`, whole tensors in
their own shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from rookery.formats import Pending, write_weights
from rookery.train.lean_adamw import Moment8, dense

WEIGHTS, OPTIMIZER = "weights", "optimizer"
"""Names of the files: fp32 weights, by the names of the .pth, and the optimiser's tensors, `exp_avg/NAME`."""


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


class Pieces:
    """The tensors called `name` in a checkpoint, whoever wrote them. A context manager: files stay open inside it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._stack = ExitStack()
        self._ranges: dict[str, list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted([*folder.glob(f"{name}-*-of-*.safetensors"), *folder.glob(f"{name}.safetensors")]):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            places = (file.metadata() or {}).get("pieces")
            known = None if places is None else json.loads(places)
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                size = file.get_slice(key).get_shape()
                start, shape = (0, size) if known is None else known[key]
                self.shapes[key] = tuple(shape)
                self._ranges.setdefault(key, []).append((start, start + math.prod(size), file))

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *error: object) -> None:
        self._ranges.clear()
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor; (1-dim), in memory of its own.

        Raises:
            KeyError: no file has the tensor, or a part of the range.
        """
        stop = math.prod(self.shapes[name]) if stop is None else stop
        parts, at = [], start
        for first, end, file in sorted(self._ranges[name], key=lambda found: found[:2]):
            if first <= at < min(end, stop):
                upto = min(end, stop)
                content = file.get_tensor(name).reshape(-1)
                parts.append(content[at - first : upto - first])
                at = upto
        if at < stop:
            raise KeyError(f"{name}: elements {at} to {stop}")
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, name: str) -> Tensor:
        """The tensor in its own shape."""
        return self.read(name).reshape(self.shapes[name])
