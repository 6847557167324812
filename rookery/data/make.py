"""Make binidx data: every document tokenised once, then written for each epoch in its own order."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rookery import tokenizer as tokenizers
from rookery.data.binidx import BinIdxWriter, prefix_of
from rookery.data.rows import RowReader, choose_reader
from rookery.data.sources import Fault, find_units, first_rows
from rookery.data.tokenise import Piece, choose_workers, find_characters, tokenise
from rookery.errors import UserError
from rookery.i18n import N_, _
from rookery.tokenizer import Character, Tokenizer
from rookery.tokenizer.chat import Template

SHOWN_FAULTS = 5
PHASES = (N_("reading characters"), N_("tokenising"), N_("writing"))

Progress = Callable[[str, int, int], None]
"""Called with one of `PHASES`, and how much of it is done and how much there is, in bytes."""


@dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
        prefix: of the two files.
        documents, tokens: written, over all epochs.
        dtype: of the tokens.
        tokenizer: that was used.
        skipped: lines left out.
        faults: the first of them.
        reader: of the rows; its format is what they were found to be.
    """

    prefix: str
    documents: int
    tokens: int
    dtype: np.dtype
    tokenizer: Tokenizer
    skipped: int
    faults: list[Fault]
    reader: RowReader


def make(
    source: str | Path,
    epochs: int = 1,
    output: str | Path | None = None,
    *,
    tokenizer: str = "world",
    shuffle: bool = True,
    seed: int = 0,
    on_error: Literal["stop", "skip"] = "stop",
    workers: int = 0,
    data_format: str = "auto",
    fields: Sequence[str] | None = None,
    template: Template = "world",
    progress: Progress = lambda phase, done, total: None,
) -> Made:
    """Write ``<output>.bin`` and ``<output>.idx``, as the reference's make_data.py does for the same order of lines.

    With `shuffle`, the order is that of make_data.py after ``random.seed(seed)``. The result depends on source, epochs,
    tokenizer, shuffle and seed, not on `workers`. Both files appear when they are whole and not before. Memory holds a
    few chunks of text and 12 to 20 bytes a document; the disk holds the tokens of one epoch in addition to the result.

    Args:
        source: a .jsonl or .json file (see `rookery.data.rows`), a .txt file (one document) or a folder of .txt files.
        epochs: how often each document is written.
        output: prefix of the files; the name of `source`, in the current directory, when not given.
        tokenizer: as `rookery.tokenizer.load` takes it, or "char" or "compact" (see `World.compact`) to build a
            vocabulary from the characters of the source. A vocabulary other than World is kept as
            ``<output>.vocab.json`` (or ``.txt``).
        shuffle: give each epoch a new order; else each has the order of the source.
        seed: of the orders.
        on_error: what to do about lines that hold no document: "stop" writes nothing, "skip" leaves them out.
        workers: processes; 0 = as the machine and the size of the source suggest.
        data_format, fields, template: of rows, as `rookery.data.rows.choose_reader` takes them. Conversations become
            text: binidx cannot hold which tokens are to be trained.
        progress: is told how far it is.

    Raises:
        UserError: unreadable source, lines at fault (their numbers are named), or nowhere to write.
    """
    if epochs < 1:
        raise UserError(_("the number of epochs is {epochs}; it must be at least 1", epochs=epochs))
    units = find_units(source)
    reader = choose_reader(str(source), first_rows(units), data_format, fields, template)
    workers = workers or choose_workers(units)
    total = sum(unit.stop - unit.start for unit in units)
    if tokenizer in ("char", "compact"):
        progress(PHASES[0], 0, total)
        found = find_characters(units, reader, workers)
        encoder: Tokenizer = (
            Character.build(found, documents=True) if tokenizer == "char" else tokenizers.World.compact(found)
        )
        progress(PHASES[0], total, total)
    else:
        encoder = tokenizers.load(tokenizer)
        if encoder.end_of_document is None:
            raise UserError(
                _(
                    "the vocabulary {name} has no end of document (U+0000); build one with --tokenizer char",
                    name=tokenizer,
                )
            )

    prefix = prefix_of(output) if output is not None else Path(source).resolve().stem
    spool_path = Path(prefix + ".tokens.partial")
    try:
        spool_path.parent.mkdir(parents=True, exist_ok=True)
        with _Spool(spool_path, encoder.dtype, on_error) as spool:
            done = 0
            progress(PHASES[1], 0, total)
            for piece in tokenise(units, encoder, reader, workers):
                spool.add(piece)
                done += piece.bytes
                progress(PHASES[1], done, total)
            if not spool.documents:
                raise UserError(_("{path} holds no documents", path=source))
            with BinIdxWriter(prefix, encoder.dtype, encoder) as writer:
                _write_epochs(writer, spool, epochs, random.Random(seed) if shuffle else None, progress)
    except OSError as error:
        raise UserError(_("cannot write {path}: {reason}", path=prefix, reason=error)) from error
    return Made(prefix, writer.documents, writer.tokens, writer.dtype, encoder, spool.skipped, spool.faults, reader)


def _write_epochs(
    writer: BinIdxWriter, spool: _Spool, epochs: int, shuffler: random.Random | None, progress: Progress
) -> None:
    tokens, ends = spool.content()
    total = epochs * tokens.nbytes
    order: array[int] = array("q", range(len(ends)))
    progress(PHASES[2], 0, total)
    for epoch in range(epochs):
        if shuffler is not None:
            # Cumulative, as the reference: each epoch shuffles the order of the one before.
            shuffler.shuffle(order)
        for start in range(0, len(order), 1 << 16):
            writer.add_spans(tokens, ends, order[start : start + (1 << 16)])
            progress(PHASES[2], writer.tokens * tokens.itemsize, total)
        progress(PHASES[2], (epoch + 1) * tokens.nbytes, total)


class _Spool:
    """The tokens of one pass over the source, in a file that is gone afterwards."""

    def __init__(self, path: Path, dtype: type[np.generic], on_error: Literal["stop", "skip"]) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._stop = on_error == "stop"
        self._sizes: list[np.ndarray] = []
        self._lines = 0
        self._complete = 0
        self.documents = 0
        self.skipped = 0
        self.faults: list[Fault] = []

    def __enter__(self) -> _Spool:
        self._file = open(self._path, "w+b")
        self._tokens: np.ndarray | None = None
        return self

    def __exit__(self, *_error: object) -> None:
        # Windows cannot remove a file that is still mapped, as it may be by the frames of an exception under way; the
        # next run writes over it.
        self._tokens = None
        self._file.close()
        with suppress(PermissionError):
            self._path.unlink(missing_ok=True)

    def add(self, piece: Piece) -> None:
        faults = [fault.later(self._lines) for fault in piece.faults]
        if faults and self._stop:
            raise UserError(_fault_message(faults))
        self._lines += piece.lines
        self._file.write(piece.tokens.data)
        self._complete += int(piece.sizes.sum(dtype=np.int64))
        self._sizes.append(piece.sizes)
        self.documents += len(piece.sizes)
        if faults:
            self.skipped += len(faults)
            self.faults += faults[: max(0, SHOWN_FAULTS - len(self.faults))]
            # A text file may have turned out bad after a part of it was written.
            self._file.seek(self._complete * self._dtype.itemsize)

    def content(self) -> tuple[np.ndarray, np.ndarray]:
        """All tokens, memory-mapped, and where each document ends in them (int64)."""
        self._file.flush()
        self._tokens = np.memmap(self._path, self._dtype, "r", shape=self._complete)
        return self._tokens, np.cumsum(np.concatenate(self._sizes), dtype=np.int64)


def _fault_message(faults: Sequence[Fault]) -> str:
    lines = [str(fault) for fault in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        lines.append(_("and {count} more close by", count=len(faults) - SHOWN_FAULTS))
    lines.append(_("Nothing was written. Mend the input, or leave such lines out with --on-error skip."))
    return "\n".join(lines)
