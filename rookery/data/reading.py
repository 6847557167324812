"""Reading training data: what lies at a path, and which tokens it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rookery import tokenizer as tokenizers
from rookery.data.binidx import BinIdx, prefix_of
from rookery.data.content import Content
from rookery.data.rows import RowReader, choose_reader
from rookery.data.sources import Unit, find_units, first_rows, read_text
from rookery.data.tokenise import find_characters, tokenise
from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer import Character, Tokenizer

if TYPE_CHECKING:
    from rookery.config.tree import DataSection

WORLD_SIZE = 65530
"""A model with fewer token ids cannot have the World vocabulary."""


def detect(name: str, data_type: str) -> str:
    """The data type of a file, from its name and from what lies there."""
    if data_type != "auto":
        return data_type
    path = Path(name)
    if not name:
        raise UserError(_("no training data: give data_file"))
    if path.is_dir() or path.suffix.lower() == ".txt":
        return "utf-8"
    if path.suffix.lower() in (".jsonl", ".json"):
        return "jsonl"
    if path.suffix.lower() == ".npy":
        return "numpy"
    prefix = prefix_of(name)
    if Path(prefix + ".idx").exists() or Path(prefix + ".bin").exists():
        return "binidx"
    message = _(
        "data_file {name}: there is no {prefix}.bin and {prefix}.idx, and it is no .jsonl, .txt or .npy file "
        "and no folder",
        name=name,
        prefix=prefix,
    )
    raise UserError(message)


def read_content(
    name: str, data_type: str, data: DataSection, vocab_size: int | None, tokenizer: Tokenizer | None
) -> Content:
    """The tokens of a file.

    Args:
        name: its path.
        data_type: what it is, from `detect`.
        data: says how rows are read.
        vocab_size: ids the model has; 0 builds a character vocabulary.
        tokenizer: the one to take, if that is known.

    Raises:
        UserError: it is missing, damaged, or not what it was said to be.
    """
    unknown = np.empty(0, np.int64)
    wanted = data.tokenizer
    if data_type == "binidx":
        binidx = BinIdx(name)
        known = known_tokenizer(binidx.prefix, wanted if tokenizer is None else "")
        if tokenizer is not None and known.file_suffix and not _same(tokenizer, known):
            raise UserError(
                _(
                    "{prefix} was made with another vocabulary than the training data: {path}",
                    prefix=name,
                    path=known.name,
                )
            )
        return Content(name, binidx.stream, binidx.sizes, tokenizer or known)
    if data_type in ("numpy", "uint16"):
        return Content(name, _read_array(name, data_type), unknown, tokenizer or known_tokenizer(name, wanted))
    if data_type == "dummy":
        text = _dummy_text()
        tokenizer = tokenizer or Character.build(text)
        return Content(name, tokenizer.encode_array(text), unknown, tokenizer)

    path = Path(name)
    # To the reference, these types are characters, whatever the size of the vocabulary.
    characters = data.data_type in ("utf-8", "utf-16le") and (vocab_size or 0) < WORLD_SIZE
    if tokenizer is None and not (wanted == "char" or (not wanted and (vocab_size == 0 or characters))):
        tokenizer = tokenizers.load(wanted or "world")
    if data_type == "jsonl" or path.is_dir():
        units = find_units(path)
        reader = choose_reader(name, first_rows(units), data.data_format, data.sft_field, data.template)
        tokenizer = tokenizer or Character.build(find_characters(units, reader), documents=True)
        return _read_rows(name, units, reader, tokenizer)
    if not path.is_file():
        raise UserError(_("{path} does not exist", path=path))
    encoding = "utf-16-le" if data_type == "utf-16le" else "utf-8-sig"
    try:
        tokenizer = tokenizer or Character.build(read_text(path, encoding))
        pieces = list(tokenizer.encode_stream(read_text(path, encoding)))
    except UnicodeError as error:
        raise UserError(_("{path} is not {encoding} text", path=path, encoding=encoding)) from error
    stream = np.concatenate(pieces) if pieces else np.empty(0, tokenizer.dtype)
    return Content(name, stream, np.array([len(stream)]), tokenizer)


def _read_rows(name: str, units: list[Unit], reader: RowReader, tokenizer: Tokenizer) -> Content:
    streams = [np.empty(0, tokenizer.dtype)]
    sizes = [np.empty(0, np.int64)]
    said = [np.empty(0, bool)]
    lines = lost = 0
    for piece in tokenise(units, tokenizer, reader):
        for fault in piece.faults:
            raise UserError(str(fault.later(lines)))
        lines += piece.lines
        lost += piece.thoughts_lost
        sizes.append(piece.sizes)
        streams.append(piece.tokens)
        if piece.said is not None:
            said.append(piece.said)
    marks = None if reader.format == "text" else np.concatenate(said)
    stream, rows = np.concatenate(streams), np.concatenate(sizes)
    return Content(name, stream, rows, tokenizer, marks, reader.format, lost)


def known_tokenizer(prefix: str, wanted: str) -> Tokenizer:
    """The tokenizer of data that are tokens already."""
    kept = tokenizers.load_beside(prefix + ".vocab")
    if wanted == "char" and kept is None:
        message = _("{prefix} has no {prefix}.vocab.json; give the path of its vocabulary as tokenizer", prefix=prefix)
        raise UserError(message)
    if wanted and wanted != "char":
        return tokenizers.load(wanted)
    return kept or tokenizers.load("world")


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether every id stands for the same bytes."""
    return all(np.array_equal(a, b) for a, b in zip(one.token_bytes(), other.token_bytes(), strict=True))


def _read_array(name: str, data_type: str) -> np.ndarray:
    try:
        stream = np.memmap(name, "<u2", "r") if data_type == "uint16" else np.load(name, "r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(_("cannot read {path}: {reason}", path=name, reason=error)) from error
    if stream.ndim != 1 or stream.dtype.kind not in "iu":
        message = _(
            "{path} holds {dtype} of shape {shape}; token ids are one row of integers",
            path=name,
            dtype=stream.dtype,
            shape=stream.shape,
        )
        raise UserError(message)
    start = stream[: 1 << 20]
    if data_type == "uint16" and len(start) >= 64 and start[::2].any() and not start[1::2].any():
        message = _(
            "{path}: every second uint16 is 0, so these are int32 ids; save them as .npy and they are read as they are",
            path=name,
        )
        raise UserError(message)
    return stream


def _dummy_text() -> str:
    """The reference's dummy data: ``.a+b=c.`` for i < 100000 with a = i mod 10000, b = i**2 mod 10000, c = a + b."""

    def sums() -> Iterator[str]:
        for i in range(100_000):
            a, b = i % 10_000, i * i % 10_000
            yield f".{a}+{b}={a + b}."

    return "".join(sums())
