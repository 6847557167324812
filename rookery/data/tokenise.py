"""Documents to tokens, in order, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from rookery.data.rows import Document, RowReader
from rookery.data.sources import Fault, Lines, Unit, available_cpus, read_lines, read_text
from rookery.errors import UserError
from rookery.i18n import _, language, set_language
from rookery.tokenizer import Tokenizer

WORKER_BYTES = 128 << 20
"""Input for which a further process is worth its start."""

LARGE_TEXT = 64 << 20
"""A text file above this size is encoded piece by piece in this process instead of being sent from a worker whole."""

MAX_DOCUMENT = 2**31 - 1
"""Tokens of a document that the index can describe."""


@dataclass
class Piece:
    """Tokens in the order of the source.

    Attributes:
        tokens: of whole documents, or of one that goes on in the next piece.
        sizes: int32, tokens of each document that ends here (counted from its beginning, in whatever piece that was).
        lines: lines read.
        faults: lines that gave no document, and a file that was given up after pieces of it had come.
        bytes: of the source.
        said: bool, which tokens the assistant generates; None for plain text.
        thoughts_lost: conversations whose thoughts the template leaves out.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    lines: int = 0
    faults: list[Fault] = field(default_factory=list)
    bytes: int = 0
    said: np.ndarray | None = None
    thoughts_lost: int = 0


def choose_workers(units: Sequence[Unit]) -> int:
    """Processes for these units: as many as there are CPUs, fewer for little input."""
    return max(1, min(available_cpus(), sum(unit.stop - unit.start for unit in units) // WORKER_BYTES))


def tokenise(units: Sequence[Unit], tokenizer: Tokenizer, reader: RowReader, workers: int = 1) -> Iterator[Piece]:
    """The tokens of all units, in their order, each document followed by its end.

    The result does not depend on `workers`. Memory holds a few units for each worker. With several workers the calling
    script must be importable (``if __name__ == "__main__":``), as for everything that starts processes.
    """
    if workers == 1:
        for unit in units:
            yield from _pieces(unit, tokenizer, reader)
        return
    with _pool(workers, tokenizer, reader) as pool:
        pending: deque[Future[list[Piece]] | Iterator[Piece]] = deque()
        for unit in units:
            # Their pieces would all have to be held by a worker before the first could be sent.
            large = unit.kind == "array" or (unit.kind == "text" and unit.stop > LARGE_TEXT)
            pending.append(_pieces(unit, tokenizer, reader) if large else pool.submit(_work, unit))
            if len(pending) > 2 * workers:
                yield from _result(pending.popleft())
        while pending:
            yield from _result(pending.popleft())


def find_characters(units: Sequence[Unit], reader: RowReader, workers: int = 1) -> set[str]:
    """The characters of all documents; lines that hold none are left out."""
    characters = partial(_characters, reader=reader)
    if workers == 1:
        return {c for unit in units for c in characters(unit)}
    with _pool(workers, None, reader) as pool:
        return {c for found in pool.map(characters, units) for c in found}


def _characters(unit: Unit, reader: RowReader) -> str:
    found = set[str]()
    if unit.kind == "text":
        try:
            for piece in read_text(unit.path):
                found.update(piece)
        except UnicodeError:
            return ""
    else:
        for lines in read_lines(unit, reader):
            for document in lines.documents:
                found.update(document.text.decode("utf-8"))
    return "".join(found)


def _pieces(unit: Unit, tokenizer: Tokenizer, reader: RowReader) -> Iterator[Piece]:
    if unit.kind == "text":
        return _text_pieces(unit, tokenizer)
    return (_lines_piece(unit.path, lines, tokenizer) for lines in read_lines(unit, reader))


def _text_pieces(unit: Unit, tokenizer: Tokenizer) -> Iterator[Piece]:
    none = np.empty(0, np.int32)
    size = 1
    read = reported = 0

    def pieces() -> Iterator[str]:
        nonlocal read
        for piece in read_text(unit.path):
            read += len(piece.encode("utf-8"))
            yield piece

    try:
        for tokens in tokenizer.encode_stream(pieces()):
            size += len(tokens)
            if size > MAX_DOCUMENT:
                raise UserError(_("a document of more than 2147483646 tokens cannot be indexed; split the file"))
            if tokenizer.end_of_document in tokens:
                raise UserError(_("a document contains the character U+0000, which ends documents in this vocabulary"))
            yield Piece(tokens, none, bytes=read - reported)
            reported = read
        end, _sizes = tokenizer.encode_documents([b""])
    except (UserError, UnicodeError) as error:
        reason = str(error) if isinstance(error, UserError) else _("not UTF-8 text")
        fault = Fault(unit.path, 0, reason)
        yield Piece(none.astype(tokenizer.dtype), none, faults=[fault], bytes=unit.stop - reported)
    else:
        yield Piece(end, np.array([size], np.int32), bytes=unit.stop - reported)


def _lines_piece(path: str, lines: Lines, tokenizer: Tokenizer) -> Piece:
    documents = lines.documents
    try:
        tokens, sizes, said = encode(documents, tokenizer)
    except UserError:
        documents = _encodable(path, lines, tokenizer)
        tokens, sizes, said = encode(documents, tokenizer)
    faults = sorted(lines.faults, key=lambda fault: fault.line)
    lost = sum(document.thoughts_lost for document in documents)
    return Piece(tokens, sizes, lines.count, faults, lines.bytes, said, lost)


def _encodable(path: str, lines: Lines, tokenizer: Tokenizer) -> list[Document]:
    """The documents that the vocabulary can hold; a fault for each of the others."""
    good = []
    for number, document in zip(lines.numbers, lines.documents, strict=True):
        try:
            encode([document], tokenizer)
            good.append(document)
        except UserError as error:
            lines.faults.append(Fault(path, number, str(error)))
    return good


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The tokens of documents, each followed by its end.

    Where an answer begins, a token begins, whatever the vocabulary could join: there a prompt ends, and the model
    generates from there on. A token counts as said if its first byte is.

    Returns:
        tokens: (sum of sizes), of the tokenizer's dtype.
        sizes: int32 (documents), tokens of each, its end included.
        said: bool (sum of sizes), whether the assistant says it; None when these are no conversations. The end of a
            document is said by whoever spoke last.

    Raises:
        UserError: the vocabulary cannot hold one of them.
    """
    if all(document.answers is None for document in documents):
        tokens, sizes = tokenizer.encode_documents([document.text for document in documents])
        return tokens, sizes, None
    sections: list[bytes] = []
    answers: list[int] = []  # bytes that each section begins with and the assistant says
    last_sections = np.empty(len(documents), np.int64)
    for number, (text, spans, _lost) in enumerate(documents):
        starts, ends = (spans or ())[::2], (spans or ())[1::2]
        for start, stop in zip((0, *starts), (*starts, len(text)), strict=True):
            sections.append(text[start:stop])
        answers += [0, *(end - start for start, end in zip(starts, ends, strict=True))]
        last_sections[number] = len(sections) - 1
    end = tokenizer.end_of_document
    ids, counts = tokenizer.encode_documents(sections, end=False)
    if end is None or (ids == end).any():
        # Encoding them as documents says what is wrong.
        tokenizer.encode_documents([document.text for document in documents])
    said_bytes = np.array(answers)
    places = _places(ids, counts, tokenizer)
    said = places < np.repeat(said_bytes, counts)

    section_ends = np.cumsum(counts, dtype=np.int64)
    document_ends = section_ends[last_sections] + np.arange(len(documents))
    whole = np.fromiter(map(len, sections), np.int64, len(sections))[last_sections]
    is_end = np.zeros(len(ids) + len(documents), bool)
    is_end[document_ends] = True
    tokens = np.empty(len(is_end), ids.dtype)
    all_said = np.empty(len(is_end), bool)
    tokens[~is_end], all_said[~is_end] = ids, said
    tokens[is_end] = end
    all_said[is_end] = (said_bytes[last_sections] == whole) & (whole > 0)
    return tokens, np.diff(document_ends + 1, prepend=0).astype(np.int32), all_said


def _places(ids: np.ndarray, counts: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """First byte of each token within its section; `counts` are the tokens of the sections."""
    _data, offsets = tokenizer.token_bytes()
    widths = np.diff(offsets)[ids]
    begins = np.cumsum(widths) - widths
    firsts = np.cumsum(counts, dtype=np.int64) - counts
    filled = counts > 0
    return begins - np.repeat(begins[firsts[filled]], counts[filled])


_tokenizer: Tokenizer
_reader: RowReader
"""Of a worker process."""


@contextmanager
def _pool(workers: int, tokenizer: Tokenizer | None, reader: RowReader) -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (tokenizer, reader, language()))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: Tokenizer | None, reader: RowReader, its_language: str) -> None:
    global _tokenizer, _reader
    if tokenizer is not None:
        _tokenizer = tokenizer
    _reader = reader
    set_language(its_language)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A killed parent tells nobody, and its workers would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(unit: Unit) -> list[Piece]:
    return list(_pieces(unit, _tokenizer, _reader))


def _result(entry: Future[list[Piece]] | Iterator[Piece]) -> Iterator[Piece]:
    yield from entry.result() if isinstance(entry, Future) else entry
