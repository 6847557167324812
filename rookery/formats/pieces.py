"""Tensors that several devices saved in pieces, read by whoever needs them.

A piece is a range of the elements of a flattened tensor. Files are called `NAME-RANK-of-RANKS.safetensors`, and their
metadata say where pieces belong; a single device writes `NAME.safetensors`, whole tensors in their own shapes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rookery.errors import UserError
from rookery.i18n import _

WEIGHTS, OPTIMIZER = "weights", "optimizer"
"""Names of the files: fp32 weights, by the names of the .pth, and the optimiser's tensors, `exp_avg/NAME`."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names in safetensors -> what a training saves."""

_PIECE = re.compile(rf"{WEIGHTS}-\d+-of-(\d+)\.safetensors")


class Pieces:
    """The tensors called `name` in a checkpoint, whoever wrote them. A context manager: files stay open inside it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._stack = ExitStack()
        self._ranges: dict[str, list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in sorted([*folder.glob(f"{name}-*-of-*.safetensors"), *folder.glob(f"{name}.safetensors")]):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            places = (file.metadata() or {}).get("pieces")
            known = None if places is None else json.loads(places)
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                view = file.get_slice(key)
                size = view.get_shape()
                self.dtypes[key] = DTYPES[view.get_dtype()]
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


def are_pieces(file: Path) -> bool:
    """Whether `file` is one of those that several devices saved the weights in."""
    return _PIECE.fullmatch(file.name) is not None


def read_pieces(file: Path) -> dict[str, Tensor]:
    """All tensors of the weights of which `file` holds pieces, put together."""
    with open_pieces(file) as pieces:
        try:
            return {name: pieces.whole(name) for name in pieces}
        except KeyError as error:
            raise _incomplete(file) from error


def open_pieces(file: Path) -> Pieces:
    """The weights of which `file` holds pieces.

    Raises:
        UserError: a file is missing or damaged.
    """
    match = _PIECE.fullmatch(file.name)
    assert match is not None
    if len(list(file.parent.glob(f"{WEIGHTS}-*-of-{match[1]}.safetensors"))) != int(match[1]):
        raise _incomplete(file)
    try:
        return Pieces(file.parent, WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(_("{path} is damaged or no safetensors file ({error})", path=file, error=error)) from error


def _incomplete(file: Path) -> UserError:
    return UserError(_("{folder} holds only some of the pieces of its weights", folder=file.parent))
