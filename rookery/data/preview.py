"""What training would make of data: the first documents with what is trained in them, and how long all of them are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from rookery import tokenizer as tokenizers
from rookery.config.tree import DataSection
from rookery.data.content import Content
from rookery.data.dataset import how_to_read, make_mask_of
from rookery.data.make import Progress
from rookery.data.reading import detect, read_content
from rookery.data.rows import RowReader, choose_reader
from rookery.data.samples import CutDocuments
from rookery.data.sources import Fault, Unit, find_units, first_rows
from rookery.data.tokenise import Piece, find_characters, tokenise
from rookery.i18n import N_
from rookery.tokenizer import Character, Tokenizer

ENOUGH = 64 << 20
"""Bytes of a file after which a preview stops, unless all is asked for."""

SHOWN_FAULTS = 20
SHOWN_HEAD, SHOWN_TAIL = 750, 250
"""Tokens shown of a longer document, from its beginning and before its end."""

PHASE = N_("reading")


@dataclass(frozen=True)
class Span:
    """A run of tokens of a document.

    Attributes:
        text: decoded; for "gap" and "cut", how many tokens are not shown.
        trained: whether they are targets.
        kind: "text"; "end" of the document; "gap", left out of the display; "cut", beyond `ctx_len` and not trained.
    """

    text: str
    trained: bool
    kind: Literal["text", "end", "gap", "cut"] = "text"


@dataclass(frozen=True)
class Row:
    """A document: its number from 1, tokens, targets that are trained, and what it says."""

    number: int
    tokens: int
    trained: int
    spans: list[Span]


@dataclass(frozen=True)
class Bin:
    """Documents of `first` to `last` tokens, and how many of them are longer than a sample."""

    first: int
    last: int
    documents: int
    cut: int


@dataclass
class Preview:
    """What `preview` found; everything in it can be written as JSON.

    Attributes:
        file, data_type, data_format, template, dataload, loss_mask, tokenizer, ctx_len: how the data are read.
        complete: whether all of the data were looked at; else everything below is about the beginning.
        documents: rows, files or documents of binidx data.
        tokens: of them.
        trained: targets that count in one pass.
        longer: documents of more than `ctx_len` inputs.
        cut: those of them whose rest is not trained; none when windows of the whole stream are read.
        left_out: documents in which nothing is trained.
        thoughts_lost: conversations whose thoughts the template leaves out.
        shortest, longest, mean, median: tokens of a document.
        histogram: documents by their length.
        fault_count, faults: lines that are no documents, and the first of them.
        rows: the first documents.
    """

    file: str
    data_type: str
    data_format: str
    template: str
    dataload: str
    loss_mask: str
    tokenizer: str
    ctx_len: int
    complete: bool = True
    documents: int = 0
    tokens: int = 0
    trained: int = 0
    longer: int = 0
    cut: int = 0
    left_out: int = 0
    thoughts_lost: int = 0
    shortest: int = 0
    longest: int = 0
    mean: float = 0.0
    median: float = 0.0
    histogram: list[Bin] = field(default_factory=list)
    fault_count: int = 0
    faults: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def preview(
    data: DataSection,
    *,
    rows: int = 3,
    everything: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Preview:
    """Look at what `data` names as training would, without training.

    Args:
        data: the section of a configuration; `sft_split`, `val_split` and `mix` have no say here.
        rows: documents to show.
        everything: look at all of a large file, not only at the first 64 MiB.
        progress: is told how many bytes are done, of how many.

    Raises:
        UserError: there is nothing to read, or it is of no known format. Single bad lines are told in the result.
    """
    data_type = detect(data.data_file, data.data_type)
    if data_type == "jsonl" or Path(data.data_file).is_dir():
        units = find_units(data.data_file)
        reader = choose_reader(data.data_file, first_rows(units), data.data_format, data.sft_field, data.template)
        tokenizer = _tokenizer(data, units, reader)
        found = _Finding(data, data_type, reader.format, tokenizer, rows)
        parts: Iterator[tuple[Content, int]] = _row_parts(found, units, reader)
        total = sum(unit.stop - unit.start for unit in units)
    else:
        content = read_content(data.data_file, data_type, data, None, None)
        if not len(content.sizes):
            content = replace(content, sizes=np.array([len(content.stream)]))
        found = _Finding(data, data_type, "text", content.tokenizer, rows)
        parts = _stream_parts(content)
        total = len(content.stream) * content.stream.dtype.itemsize
    done = 0
    for part, size in parts:
        found.add(part)
        done += size
        progress(PHASE, done, total)
        if done >= ENOUGH and done < total and not everything:
            found.result.complete = False
            break
    return found.finish()


def _tokenizer(data: DataSection, units: list[Unit], reader: RowReader) -> Tokenizer:
    if data.tokenizer == "char":
        return Character.build(find_characters(units, reader), documents=True)
    return tokenizers.load(data.tokenizer or "world")


def _row_parts(found: _Finding, units: list[Unit], reader: RowReader) -> Iterator[tuple[Content, int]]:
    """Whole documents of .jsonl files and folders, with the bytes they took of the source."""
    pending: list[Piece] = []
    lines = size = 0
    for piece in tokenise(units, found.tokenizer, reader):
        pending.append(piece)
        found.add_faults([fault.later(lines) for fault in piece.faults])
        found.result.thoughts_lost += piece.thoughts_lost
        lines += piece.lines
        size += piece.bytes
        if piece.faults and not len(piece.sizes):
            pending.clear()
        if len(piece.sizes) or not pending:
            tokens = np.concatenate([part.tokens for part in pending]) if pending else np.empty(0, np.int64)
            sizes = piece.sizes.astype(np.int64) if pending else np.empty(0, np.int64)
            yield Content("", tokens, sizes, found.tokenizer, piece.said), size
            pending, size = [], 0


def _stream_parts(content: Content) -> Iterator[tuple[Content, int]]:
    """Documents by the million tokens, with their bytes."""
    first = 0
    while first < len(content.sizes):
        enough = int(np.searchsorted(content.starts, content.starts[first] + (1 << 20)))
        part = content.part(first, max(first + 1, enough))
        yield part, len(part.stream) * content.stream.dtype.itemsize
        first = max(first + 1, enough)


class _Finding:
    """A preview that comes together."""

    def __init__(self, data: DataSection, data_type: str, data_format: str, tokenizer: Tokenizer, rows: int) -> None:
        conversations = data_format != "text"
        dataload, loss_mask = how_to_read(data, conversations)
        self.tokenizer = tokenizer
        self.result = Preview(
            file=data.data_file,
            data_type=data_type,
            data_format=data_format,
            template=data.template if conversations else "",
            dataload=dataload,
            loss_mask=loss_mask,
            tokenizer=tokenizer.name,
            ctx_len=data.ctx_len,
        )
        self._rows = rows
        self._marked = conversations and loss_mask == "answer"
        self._mask = None if self._marked else make_mask_of(loss_mask, data, tokenizer)
        self._sizes: list[np.ndarray] = []
        self._room = None if dataload == "get" else data.ctx_len
        # In windows of the whole stream a document's first token is a target too: after the end of the one before.
        self._all = self._room is None and not self._marked and self._mask is None

    def add(self, content: Content) -> None:
        """Count documents, and keep the first."""
        if not self._marked:
            content = replace(content, said=None)
        result = self.result
        documents = CutDocuments(content, self._mask, self._room or max(1, len(content.stream)))
        trained = documents.trained()
        for number in range(min(len(trained), self._rows - len(result.rows))):
            result.rows.append(self._row(content, documents, number))
        result.documents += len(content.sizes)
        result.tokens += len(content.stream)
        result.trained += len(content.stream) if self._all else int(trained.sum())
        result.left_out += int(np.count_nonzero(trained == 0))
        result.longer += int(np.count_nonzero(content.sizes > result.ctx_len + 1))
        self._sizes.append(np.asarray(content.sizes))

    def add_faults(self, faults: list[Fault]) -> None:
        self.result.fault_count += len(faults)
        self.result.faults += [str(fault) for fault in faults[: max(0, SHOWN_FAULTS - len(self.result.faults))]]

    def finish(self) -> Preview:
        result = self.result
        sizes = np.concatenate([np.empty(0, np.int64), *self._sizes])
        if self._room is not None:
            result.cut = result.longer
        else:
            result.left_out = 0
        if self._all and result.trained:
            result.trained -= 1
        if len(sizes):
            result.shortest, result.longest = int(sizes.min()), int(sizes.max())
            result.mean, result.median = float(sizes.mean()), float(np.median(sizes))
            result.histogram = _histogram(sizes, result.ctx_len)
        return result

    def _row(self, content: Content, documents: CutDocuments, number: int) -> Row:
        kept = int(documents.sizes[number]) + 1
        start = int(content.starts[number])
        tokens = content.stream[start : start + kept].tolist()
        counts = [self._all and bool(self.result.rows)] * kept
        if kept > 1:
            counts[1:] = (documents.read(number)[1] != -100).tolist()
        spans: list[Span] = []
        if kept > SHOWN_HEAD + SHOWN_TAIL:
            head, tail = slice(0, SHOWN_HEAD), slice(kept - SHOWN_TAIL, kept)
            spans = self._spans(tokens[head], counts[head])
            spans.append(Span(str(kept - SHOWN_HEAD - SHOWN_TAIL), False, "gap"))
            spans += self._spans(tokens[tail], counts[tail])
        else:
            spans = self._spans(tokens, counts)
        size = int(content.sizes[number])
        if size > kept:
            spans.append(Span(str(size - kept), False, "cut"))
        return Row(len(self.result.rows) + 1, size, sum(counts), spans)

    def _spans(self, tokens: list[int], counts: list[bool]) -> list[Span]:
        end = self.tokenizer.end_of_document
        spans = []
        for (trained, is_end), run in groupby(zip(counts, tokens, strict=True), lambda pair: (pair[0], pair[1] == end)):
            text = self.tokenizer.decode_bytes([token for _count, token in run]).decode("utf-8", "replace")
            spans.append(Span(text, trained, "end" if is_end else "text"))
        return spans


def _histogram(sizes: np.ndarray, ctx_len: int) -> list[Bin]:
    """Documents whose inputs, one fewer than the tokens, lie between powers of two; `ctx_len` is a border too."""
    longest = int(sizes.max())
    borders = {2**power + 1 for power in range(4, longest.bit_length() + 1)} | {ctx_len + 1}
    bins = []
    first = int(sizes.min())
    for last in sorted(border for border in borders if border >= first):
        count = int(np.count_nonzero((sizes >= first) & (sizes <= last)))
        bins.append(Bin(first, min(last, longest), count, count if first > ctx_len + 1 else 0))
        first = last + 1
        if first > longest:
            break
    return bins
