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

import numpy as np

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
    """

    tokens: np.ndarray
    sizes: np.ndarray
    lines: int = 0
    faults: list[Fault] = field(default_factory=list)
    bytes: int = 0


def choose_workers(units: Sequence[Unit]) -> int:
    """Processes for these units: as many as there are CPUs, fewer for little input."""
    return max(1, min(available_cpus(), sum(unit.stop - unit.start for unit in units) // WORKER_BYTES))


def tokenise(units: Sequence[Unit], tokenizer: Tokenizer, workers: int = 1) -> Iterator[Piece]:
    """The tokens of all units, in their order, each document followed by its end.

    The result does not depend on `workers`. Memory holds a few units for each worker. With several workers the calling
    script must be importable (``if __name__ == "__main__":``), as for everything that starts processes.
    """
    if workers == 1:
        for unit in units:
            yield from _pieces(unit, tokenizer)
        return
    with _pool(workers, tokenizer) as pool:
        pending: deque[Future[list[Piece]] | Iterator[Piece]] = deque()
        for unit in units:
            large = unit.text and unit.stop > LARGE_TEXT
            pending.append(_pieces(unit, tokenizer) if large else pool.submit(_work, unit))
            if len(pending) > 2 * workers:
                yield from _result(pending.popleft())
        while pending:
            yield from _result(pending.popleft())


def find_characters(units: Sequence[Unit], workers: int = 1) -> set[str]:
    """The characters of all documents; lines that hold none are left out."""
    if workers == 1:
        return {c for unit in units for c in _characters(unit)}
    with _pool(workers, None) as pool:
        return {c for found in pool.map(_characters, units) for c in found}


def _characters(unit: Unit) -> str:
    found = set[str]()
    if unit.text:
        try:
            for piece in read_text(unit.path):
                found.update(piece)
        except UnicodeError:
            return ""
    else:
        for document in read_lines(unit).documents:
            found.update(document.decode("utf-8"))
    return "".join(found)


def _pieces(unit: Unit, tokenizer: Tokenizer) -> Iterator[Piece]:
    return _text_pieces(unit, tokenizer) if unit.text else iter([_lines_piece(unit, tokenizer)])


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


def _lines_piece(unit: Unit, tokenizer: Tokenizer) -> Piece:
    lines = read_lines(unit)
    try:
        tokens, sizes = tokenizer.encode_documents(lines.documents)
    except UserError:
        tokens, sizes = _encode_singly(unit, lines, tokenizer)
    faults = sorted(lines.faults, key=lambda fault: fault.line)
    return Piece(tokens, sizes, lines.count, faults, unit.stop - unit.start)


def _encode_singly(unit: Unit, lines: Lines, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """As `encode_documents`, with a fault for each document that the vocabulary cannot hold."""
    good = []
    for number, document in zip(lines.numbers, lines.documents, strict=True):
        try:
            tokenizer.encode_documents([document])
            good.append(document)
        except UserError as error:
            lines.faults.append(Fault(unit.path, number, str(error)))
    return tokenizer.encode_documents(good)


_tokenizer: Tokenizer
"""Of a worker process."""


@contextmanager
def _pool(workers: int, tokenizer: Tokenizer | None) -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (tokenizer, language()))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: Tokenizer | None, its_language: str) -> None:
    global _tokenizer
    if tokenizer is not None:
        _tokenizer = tokenizer
    set_language(its_language)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A killed parent tells nobody, and its workers would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(unit: Unit) -> list[Piece]:
    return list(_pieces(unit, _tokenizer))


def _result(entry: Future[list[Piece]] | Iterator[Piece]) -> Iterator[Piece]:
    yield from entry.result() if isinstance(entry, Future) else entry
