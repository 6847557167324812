"""Writing weight files tensor by tensor: one in memory at a time, and a file that appears whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from rookery.errors import UserError
from rookery.i18n import _

if TYPE_CHECKING:
    from typing_extensions import Buffer  # of collections.abc from Python 3.12 on

AI00 = (".st", ".state")
"""Names of safetensors files in Ai00's layout: of a model or adapter, and of a state."""

SAFETENSORS = (".safetensors", *AI00)

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes of all tensors) after each tensor."""


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its turn to be written comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], Tensor]
    """Returns the tensor, of that shape and dtype, on any device."""

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def content(self) -> Buffer:
        """The bytes of the elements in row-major order."""
        tensor = self.produce()
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise ValueError(f"{self.name} was announced as {self.dtype} {self.shape}: {tensor.dtype} {tensor.shape}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Place:
    """Where a tensor under RWKV-LM's name stands in another layout: the same elements in the same order, after its last
    two axes were swapped if it is `transposed`."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


def pending(tensors: Mapping[str, Tensor]) -> list[Pending]:
    """Tensors that exist already, to be written as they are."""
    return [Pending(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]  # type: ignore[misc]


def write_weights(
    path: str | Path,
    tensors: Iterable[Pending],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    called: Path | None = None,
) -> None:
    """Write a flat name -> tensor file: safetensors if it is called .safetensors or .st, else a .pth as `torch.save`
    writes it.

    Args:
        metadata: of a safetensors file; {"format": "pt"} when left out, which other readers ask for.
        called: what a message calls the file, where it is on its way to that place.

    Raises:
        UserError: the file cannot be written, or has no place for a dtype.
    """
    path, tensors = Path(path), list(tensors)
    for tensor in tensors:
        if tensor.dtype not in _SAFETENSORS_DTYPES:
            raise UserError(_("{name} is {dtype}, which cannot be written", name=tensor.name, dtype=tensor.dtype))
    with replacing(path, called) as beside, open(beside, "wb") as file:
        if path.suffix.lower() in SAFETENSORS:
            _write_safetensors(file, tensors, metadata or {"format": "pt"}, progress)
        else:
            _write_pth(file, tensors, progress)


def write_pth(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a flat name -> tensor .pth, whatever the name of the file. It appears whole or not at all."""
    with replacing(Path(path)) as beside, open(beside, "wb") as file:
        _write_pth(file, pending(tensors), None)


@contextmanager
def replacing(path: Path, called: Path | None = None) -> Iterator[Path]:
    """A place to write a file that takes the place of `path` when all went well, and leaves no trace otherwise; a
    message names `called` instead, if that is given."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            _("cannot write {path}: {error}", path=called or path, error=error.strerror or error)
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def _write_each(tensors: Sequence[Pending], write: Callable[[int, Buffer], Any], progress: Progress | None) -> None:
    done, total = 0, sum(tensor.bytes for tensor in tensors)
    for index, tensor in enumerate(tensors):
        write(index, tensor.content())
        done += tensor.bytes
        if progress is not None:
            progress(done, total)


_SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _write_safetensors(
    file: BinaryIO, tensors: Sequence[Pending], metadata: Mapping[str, str], progress: Progress | None
) -> None:
    """https://huggingface.co/docs/safetensors: length of the header in 8 bytes, the header in JSON, the tensors."""
    # Readers map the file: the widest elements first keeps every tensor aligned.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        dtype = _SAFETENSORS_DTYPES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    _write_each(tensors, lambda index, content: file.write(content), progress)


_STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}  # fmt: skip


_ALIGNMENT = 64
"""Of each tensor in the file, as `torch.save` has it, so that it can be mapped."""


@dataclass(frozen=True)
class _Storage:
    """Stands for the elements of a tensor in the pickled dictionary; they have a file of their own in the archive."""

    key: str
    tensor: Pending


class _Pickler(pickle.Pickler):
    """Writes `Pending` as `torch.save` writes a contiguous tensor."""

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, Pending):
            return NotImplemented
        strides = [prod(value.shape[axis + 1 :]) for axis in range(len(value.shape))]
        storage = _Storage(str(self.count), value)
        self.count += 1
        no_hooks: OrderedDict[str, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (storage, 0, value.shape, tuple(strides), False, no_hooks)

    def persistent_id(self, value: object) -> Any:
        if not isinstance(value, _Storage):
            return None
        return "storage", _STORAGES[value.tensor.dtype], value.key, "cpu", prod(value.tensor.shape)

    count = 0


def _write_pth(file: BinaryIO, tensors: Sequence[Pending], progress: Progress | None) -> None:
    """The zip archive of `torch.save`: a pickled dictionary, and the elements of the N-th tensor as data/N."""
    dictionary = BytesIO()
    _Pickler(dictionary, protocol=2).dump({tensor.name: tensor for tensor in tensors})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: Buffer) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}")
            # 30 bytes, the name, the sizes in 64 bits (20 bytes), and a field of padding (4 bytes and the padding).
            gap = -(file.tell() + 30 + len(entry.filename) + 20 + 4) % _ALIGNMENT
            entry.extra = b"FB" + gap.to_bytes(2, "little") + b"Z" * gap
            with archive.open(entry, "w", force_zip64=True) as part:
                part.write(content)

        add("data.pkl", dictionary.getvalue())
        add("byteorder", sys.byteorder.encode())
        _write_each(tensors, lambda index, content: add(f"data/{index}", content), progress)
        add("version", b"3\n")
