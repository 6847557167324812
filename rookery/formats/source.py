"""A weight file read one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rookery.formats.load import divisor_beside
from rookery.formats.pieces import Pieces, are_pieces, open_pieces
from rookery.formats.stream import SAFETENSORS
from rookery.formats.weights import read_weights, weight_file
from rookery.models import ModelShape

_AT_LEAST = 1 << 24


class Source:
    """The tensors of what `read_weights` takes, under RWKV-LM's names, of which about one is in memory.

    The file is mapped, and what has been read of a mapping stays in memory until the mapping goes; so the file is
    mapped anew whenever more than the largest tensor has been read. (Files older than PyTorch 1.6 cannot be mapped.)
    Weights in pieces are put together tensor by tensor.

    Args:
        read: what reads the path.

    Raises:
        UserError: see `read_weights`.
    """

    def __init__(self, path: str | Path, read: Callable[[Path], dict[str, Tensor]] = read_weights) -> None:
        self.path = Path(path)
        self._read_all = read
        self._pieces: Pieces | None = None
        self._tensors: dict[str, Tensor] = {}
        if read is read_weights and are_pieces(file := weight_file(path)):
            self._pieces = open_pieces(file)
            self.shapes, self.dtypes = dict(self._pieces.shapes), dict(self._pieces.dtypes)
            return
        self._tensors = read(self.path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
        self._limit = max([_AT_LEAST, *(tensor.nbytes for tensor in self._tensors.values())])
        self._read = 0

    def tensor(self, name: str) -> Tensor:
        """One tensor; let go of it before asking for another."""
        if self._pieces is not None:
            return self._pieces.whole(name)
        size = self._tensors[name].nbytes
        if self._read and self._read + size > self._limit:
            self._tensors = {}
            self._tensors = self._read_all(self.path)
            self._read = 0
        self._read += size
        return self._tensors[name]

    def metadata(self) -> dict[str, str] | None:
        """What a safetensors file says of itself; None for any other."""
        file = weight_file(self.path)
        if file.suffix.lower() not in SAFETENSORS:
            return None
        with safe_open(file, framework="pt") as content:
            return content.metadata()

    def model_shape(self) -> ModelShape:
        """The dimensions of the model that the file holds.

        Raises:
            UserError: no model, or of a version that is not known.
        """
        shape = ModelShape.of_checkpoint(self.shapes, str(self.path))
        return replace(shape, head_size_divisor=divisor_beside(weight_file(self.path)))

    def dtype(self) -> torch.dtype:
        """The dtype of most elements."""
        elements: dict[torch.dtype, int] = {}
        for name, dtype in self.dtypes.items():
            elements[dtype] = elements.get(dtype, 0) + prod(self.shapes[name])
        return max(elements, key=elements.__getitem__)
