"""The binidx format: `<name>.bin` holds the tokens of all documents back to back, `<name>.idx` where each one lies.

An .idx is little-endian: 9 bytes of magic, uint64 version 1, uint8 dtype code, uint64 items n, uint64 entries m of the
document index; then int32[n] sizes in tokens, int64[n] byte offsets in the .bin, int64[m] item count at each end of
document. Every writer in the field stores one item a document, so m = n + 1.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike

from rookery import tokenizer as tokenizers
from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
# Code 6 is float32 in the files of json2binidx; RWKV-LM, where it means a Python float, never wrote one.
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}


def prefix_of(name: str | Path) -> str:
    """`name` without a last ``.bin`` or ``.idx``."""
    text = str(name)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


class BinIdx:
    """Documents of tokens, memory-mapped.

    Args:
        prefix: path of the two files, with ``.bin``, with ``.idx``, or with neither.

    Attributes:
        prefix: the path with neither.
        dtype: numpy dtype of the tokens.
        tokens: number of tokens in the .bin.
        sizes: int32 (documents), tokens of each.
        pointers: int64 (documents), byte offset of each in the .bin.
        document_ends: int64, the document index as stored.
        stream: (tokens), everything in the .bin.

    Raises:
        UserError: a file is missing, truncated, of another format, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = prefix_of(prefix)
        index_path, data_path = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        for path in (index_path, data_path):
            if not path.is_file():
                raise UserError(_("{path} does not exist; binidx data is a pair NAME.bin and NAME.idx", path=path))
        code, items = self._read_header(index_path)
        self.dtype = np.dtype(DTYPES[code])
        index = np.memmap(index_path, np.uint8, "r", HEADER.size)
        self.sizes = index[: 4 * items].view("<i4")
        self.pointers = index[4 * items : 12 * items].view("<i8")
        self.document_ends = index[12 * items :].view("<i8")

        stored = data_path.stat().st_size
        expected = int(self.sizes.sum(dtype=np.int64)) * self.dtype.itemsize
        if stored != expected:
            message = _(
                "{bin} has {stored} bytes, but {idx} describes {expected}: the two files do not belong together, "
                "or a copy was cut short",
                bin=data_path,
                idx=index_path,
                stored=stored,
                expected=expected,
            )
            raise UserError(message)
        if stored == 0:
            raise UserError(_("{path} holds no tokens", path=data_path))
        self.tokens = stored // self.dtype.itemsize
        self.stream = np.memmap(data_path, self.dtype, "r")

    @staticmethod
    def _read_header(path: Path) -> tuple[int, int]:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise UserError(_("{path} is not a binidx index: it does not begin with MMIDIDX", path=path))
        if len(header) < HEADER.size:
            raise UserError(_("{path} was cut short: not even its header is whole", path=path))
        _magic, version, code, items, ends = HEADER.unpack(header)
        if version != 1:
            raise UserError(_("{path} has format version {version}; only 1 is known", path=path, version=version))
        if code not in DTYPES:
            raise UserError(_("{path} has the unknown token type {code}; 1 to 8 are known", path=path, code=code))
        stored, expected = path.stat().st_size, HEADER.size + 12 * items + 8 * ends
        if stored != expected:
            message = _(
                "{path} has {stored} bytes where its header announces {expected}: the file was cut short or is damaged",
                path=path,
                stored=stored,
                expected=expected,
            )
            raise UserError(message)
        if items == 0:
            raise UserError(_("{path} lists no documents", path=path))
        return code, items

    def __len__(self) -> int:
        return len(self.sizes)

    def get(self, item: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens from the middle of the stream.

        Args:
            item: document to start in.
            offset: tokens after its start.
            length: tokens to read, past the end of the document into the next ones if need be; to its end when None.

        Returns:
            (length), dtype of the file, a view of the mapped file.

        Raises:
            IndexError: no such document, or the stream ends before.
        """
        if length is None:
            length = int(self.sizes[item]) - offset
        start = int(self.pointers[item]) // self.dtype.itemsize + offset
        if start < 0 or length < 0 or start + length > self.tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.prefix}.bin, which has {self.tokens}")
        return self.stream[start : start + length]


class BinIdxWriter:
    """Write a pair of binidx files that appear only when they are whole.

    A context manager: at a normal end both files take their names, after an exception neither does. Until then they are
    called ``.bin.partial`` and ``.idx.partial``, so that even a killed process leaves no half-written data set.

    Args:
        prefix: path of the two files, with ``.bin``, with ``.idx``, or with neither.
        dtype: of the tokens.
        tokenizer: kept beside the data (`rookery.tokenizer.save_beside`), so that whoever reads them finds it.

    Attributes:
        tokens, documents: written so far.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, tokenizer: Tokenizer) -> None:
        self.prefix = prefix_of(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._tokenizer = tokenizer
        self._code = CODES[self.dtype]
        self._sizes: list[np.ndarray] = []
        self.tokens = 0
        self.documents = 0

    def __enter__(self) -> BinIdxWriter:
        self._file: BinaryIO = open(self.prefix + ".bin.partial", "wb")
        return self

    def add(self, tokens: np.ndarray) -> None:
        """Append one document."""
        self.add_many(tokens, np.array([len(tokens)], np.int32))

    def add_many(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents that lie back to back in `tokens`; `sizes`, int32 (documents), says where they end."""
        self._file.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._sizes.append(np.asarray(sizes, np.int32))
        self.tokens += len(tokens)
        self.documents += len(sizes)

    def add_spans(self, tokens: np.ndarray, ends: np.ndarray, order: Sequence[int]) -> None:
        """Append documents of `tokens`, which end at `ends` (int64), in the given order of their numbers."""
        content = np.ascontiguousarray(tokens, self.dtype).data.cast("B")
        numbers = np.asarray(order)
        stops = ends[numbers]
        starts = np.where(numbers > 0, ends[numbers - 1], 0)
        width = self.dtype.itemsize
        for start, stop in zip((starts * width).tolist(), (stops * width).tolist(), strict=True):
            self._file.write(content[start:stop])
        sizes = (stops - starts).astype(np.int32)
        self._sizes.append(sizes)
        self.tokens += int(sizes.sum(dtype=np.int64))
        self.documents += len(sizes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        binary, index = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        partial_binary, partial_index = Path(f"{binary}.partial"), Path(f"{index}.partial")
        try:
            if kind is None:
                self._write_index(partial_index)
                # Without the old index there is no moment at which one data set's index lies beside another's tokens.
                index.unlink(missing_ok=True)
                tokenizers.save_beside(self._tokenizer, self.prefix + ".vocab")
                os.replace(partial_binary, binary)
                os.replace(partial_index, index)
        finally:
            partial_binary.unlink(missing_ok=True)
            partial_index.unlink(missing_ok=True)

    def _write_index(self, path: Path) -> None:
        sizes = np.concatenate(self._sizes) if self._sizes else np.empty(0, np.int32)
        with path.open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, self._code, self.documents, self.documents + 1))
            file.write(sizes.astype("<i4", copy=False).data)
            pointers = np.zeros(self.documents + 1, "<i8")
            np.cumsum(sizes, out=pointers[1:])
            pointers *= self.dtype.itemsize
            file.write(pointers[:-1].data)
            file.write(np.arange(self.documents + 1, dtype="<i8").data)
