"""Where documents come from: .jsonl and .json files, .txt files and folders of them, cut into units of work.

A unit is small enough to be held in memory, says where it lies and nothing else, so that any process can read it, and
does not depend on how many processes there are.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rookery.data.rows import BadRow, Document, RowReader
from rookery.errors import UserError
from rookery.i18n import _

CHUNK = 4 << 20
"""Bytes of a .jsonl file in one unit, and characters of a text or of an array read at a time."""

LOOKED_AT = 100
"""Rows that decide the format of a file."""


@dataclass(frozen=True)
class Unit:
    """A part of the data.

    Attributes:
        path: of the file.
        start, stop: the bytes at which its lines begin; of a whole file, 0 and the size.
        kind: "lines" of a .jsonl file; a whole JSON "array", whose items are rows; a whole "text", one document.
    """

    path: str
    start: int
    stop: int
    kind: Literal["lines", "array", "text"]


@dataclass(frozen=True)
class Fault:
    """A line or a file that cannot be a document. Within a unit lines count from 1; `line` 0 means the whole file.

    In a JSON array, which may be one line, `line` counts rows.
    """

    path: str
    line: int
    reason: str
    array: bool = False

    def later(self, lines: int) -> Fault:
        """The same fault, after so many lines of units before."""
        return replace(self, line=self.line + lines) if self.line else self

    def __str__(self) -> str:
        if self.line == 0:
            return f"{self.path}: {self.reason}"
        if self.array:
            return _("{path}, row {row}: {reason}", path=self.path, row=self.line, reason=self.reason)
        return _("{path}, line {line}: {reason}", path=self.path, line=self.line, reason=self.reason)


@dataclass
class Lines:
    """Rows of a unit.

    Attributes:
        documents: what they say.
        numbers: the line of each, in an array the row.
        count: lines or rows, empty lines included.
        faults: lines that hold no document.
        bytes: of the source.
    """

    documents: list[Document] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    count: int = 0
    faults: list[Fault] = field(default_factory=list)
    bytes: int = 0


def find_units(path: str | Path) -> list[Unit]:
    """The units of a .jsonl or .json file, of a .txt file, or of all .txt files below a folder, ordered by name.

    Raises:
        UserError: there is nothing to read.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise UserError(_("the folder {path} has no .txt files", path=path))
        return [_text_unit(file) for file in files]
    if not path.is_file():
        raise UserError(_("{path} does not exist", path=path))
    if path.suffix.lower() in (".bin", ".idx"):
        raise UserError(_("{path} is binidx data already; give the text it was made from", path=path))
    if path.suffix.lower() == ".txt":
        return [_text_unit(path)]
    size = path.stat().st_size
    if _is_array(path):
        return [Unit(str(path), 0, size, "array")]
    return [Unit(str(path), start, min(start + CHUNK, size), "lines") for start in range(0, size, CHUNK)]


def _text_unit(path: Path) -> Unit:
    return Unit(str(path), 0, path.stat().st_size, "text")


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def read_text(path: str | Path, encoding: str = "utf-8-sig") -> Iterator[str]:
    """A text in pieces, every newline as LF.

    Raises:
        UnicodeError: it is not in that encoding.
    """
    with open(path, encoding=encoding) as file:
        while piece := file.read(CHUNK):
            yield piece


def first_rows(units: list[Unit]) -> list[Any]:
    """What JSON gives for the first rows, those that it cannot read left out; nothing for text files."""
    if not units or units[0].kind == "text":
        return []
    rows = islice(read_rows(units[0]), LOOKED_AT)
    return [row for _number, row in rows if not isinstance(row, BadRow)]


def read_lines(unit: Unit, reader: RowReader) -> Iterator[Lines]:
    """The documents of a unit of lines, or in several parts those of an array."""
    lines = Lines()
    array = unit.kind == "array"
    size = told = 0
    for number, row in read_rows(unit):
        lines.count += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if row is EMPTY:
                continue
            document = reader.read(row)
        except BadRow as error:
            lines.faults.append(Fault(unit.path, number, str(error), array))
            continue
        lines.documents.append(document)
        lines.numbers.append(number)
        size += len(document.text)
        if array and size > CHUNK:
            # An array's text is not met as bytes: that of its documents is near enough for a display.
            lines.bytes = min(size, unit.stop - told)
            told += lines.bytes
            yield lines
            lines, size = Lines(), 0
    lines.bytes = unit.stop - unit.start - told
    yield lines


EMPTY = object()
"""Of a line without anything."""

_BETWEEN_ITEMS = re.compile(r"[\s,]*")


def read_rows(unit: Unit) -> Iterator[tuple[int, Any]]:
    """Line or row numbers from 1, and what JSON gives there, `EMPTY`, or a `BadRow` that says why it gives nothing."""
    if unit.kind == "array":
        yield from _array_rows(unit.path)
        return
    content = _read_bytes(unit)
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    rows: list[str | bytes]
    try:
        rows = [*content.decode("utf-8").split("\n")]
    except UnicodeDecodeError:
        rows = [*content.split(b"\n")]
    if not rows[-1]:
        rows.pop()
    for number, row in enumerate(rows, 1):
        try:
            yield number, _parse(row)
        except BadRow as error:
            yield number, error


def _array_rows(path: str) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array, a few in memory at a time; after one that is no JSON nothing more can be read."""
    decoder = json.JSONDecoder()
    number, line = 0, 1
    with open(path, encoding="utf-8-sig") as file:
        try:
            text = file.read(CHUNK)
            place = text.index("[") + 1
            while not text.startswith("]", place := _BETWEEN_ITEMS.match(text, place).end()):  # type: ignore[union-attr]
                reason, at, value, end = _("the array has no end"), place, None, len(text)
                try:
                    if place < len(text):
                        value, end = decoder.raw_decode(text, place)
                        reason = ""
                except json.JSONDecodeError as error:
                    reason, at = error.msg, error.pos
                if end == len(text):
                    # Perhaps there is more of it to come: even a number may go on.
                    more = file.read(max(CHUNK, len(text)))
                    if more:
                        line += text.count("\n", 0, place)
                        text, place = text[place:] + more, 0
                        continue
                number += 1
                if reason:
                    at_line = line + text.count("\n", 0, at)
                    yield number, BadRow(_("not JSON ({reason} at line {line})", reason=reason, line=at_line))
                    return
                yield number, value
                place = end
        except UnicodeDecodeError:
            yield number + 1, BadRow(_("not UTF-8 text"))
        except RecursionError as error:
            yield number + 1, BadRow(_("not JSON ({reason})", reason=error))


def _read_bytes(unit: Unit) -> bytes:
    with open(unit.path, "rb") as file:
        if unit.start == 0:
            mark = file.read(3)
            if mark != b"\xef\xbb\xbf":
                file.seek(0)
        else:
            # The line that is under way at `start` belongs to the unit before.
            file.seek(unit.start - 1)
            file.readline()
        rest = unit.stop - file.tell()
        if rest <= 0:
            return b""
        content = file.read(rest)
        return content if content.endswith(b"\n") else content + file.readline()


def _parse(row: str | bytes) -> Any:
    """What JSON gives for a line; `EMPTY` for an empty one.

    Raises:
        BadRow: it is no JSON.
    """
    try:
        return json.loads(row)
    except (ValueError, RecursionError) as error:
        try:
            stripped = row.strip() if isinstance(row, str) else row.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise BadRow(_("not UTF-8 text")) from error
        if not stripped:
            return EMPTY
        if stripped != row:
            # The reference strips everything Unicode calls white space, JSON knows only four kinds.
            return _parse(stripped)
        if isinstance(error, json.JSONDecodeError):
            raise BadRow(_("not JSON ({reason} at column {column})", reason=error.msg, column=error.colno)) from error
        raise BadRow(_("not JSON ({reason})", reason=error)) from error


def available_cpus() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
