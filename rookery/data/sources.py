"""Where documents come from: .jsonl files, .txt files and folders of them, cut into units of work.

A unit is small enough to be held in memory, says where it lies and nothing else, so that any process can read it, and
does not depend on how many processes there are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from rookery.errors import UserError
from rookery.i18n import _

CHUNK = 4 << 20
"""Bytes of a .jsonl file in one unit, and characters of a text read at a time."""


@dataclass(frozen=True)
class Unit:
    """The lines of a .jsonl file that begin at bytes `start` to `stop`, or (`text`) a whole text file, one document."""

    path: str
    start: int
    stop: int
    text: bool


@dataclass(frozen=True)
class Fault:
    """A line or a file that cannot be a document. Within a unit lines count from 1; `line` 0 means the whole file."""

    path: str
    line: int
    reason: str

    def later(self, lines: int) -> Fault:
        """The same fault, after so many lines of units before."""
        return replace(self, line=self.line + lines) if self.line else self

    def __str__(self) -> str:
        if self.line == 0:
            return f"{self.path}: {self.reason}"
        return _("{path}, line {line}: {reason}", path=self.path, line=self.line, reason=self.reason)


@dataclass
class Lines:
    """What a unit of a .jsonl file holds.

    Attributes:
        documents: the texts, as UTF-8.
        numbers: the line of each.
        count: lines of the unit, empty ones included.
        faults: lines that hold no document.
    """

    documents: list[bytes] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    count: int = 0
    faults: list[Fault] = field(default_factory=list)


def find_units(path: str | Path) -> list[Unit]:
    """The units of a .jsonl file, of a .txt file, or of all .txt files below a folder in the order of their names.

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
    return [Unit(str(path), start, min(start + CHUNK, size), text=False) for start in range(0, size, CHUNK)]


def _text_unit(path: Path) -> Unit:
    return Unit(str(path), 0, path.stat().st_size, text=True)


def read_text(path: str | Path, encoding: str = "utf-8-sig") -> Iterator[str]:
    """A text in pieces, every newline as LF.

    Raises:
        UnicodeError: it is not in that encoding.
    """
    with open(path, encoding=encoding) as file:
        while piece := file.read(CHUNK):
            yield piece


def read_lines(unit: Unit) -> Lines:
    """The documents of a .jsonl unit: the key `text` of every line that is not empty."""
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
    lines = Lines(count=len(rows))
    for number, row in enumerate(rows, 1):
        try:
            document = _parse(row)
        except _BadLine as error:
            lines.faults.append(Fault(unit.path, number, str(error)))
            continue
        if document is not None:
            lines.documents.append(document)
            lines.numbers.append(number)
    return lines


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


class _BadLine(Exception):
    pass


def _parse(row: str | bytes) -> bytes | None:
    """The text of a line as UTF-8; None for an empty line."""
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        try:
            stripped = row.strip() if isinstance(row, str) else row.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise _BadLine(_("not UTF-8 text")) from error
        if not stripped:
            return None
        if stripped != row:
            # The reference strips everything Unicode calls white space, JSON knows only four kinds.
            return _parse(stripped)
        if isinstance(error, json.JSONDecodeError):
            raise _BadLine(_("not JSON ({reason} at column {column})", reason=error.msg, column=error.colno)) from error
        raise _BadLine(_("not JSON ({reason})", reason=error)) from error
    if not isinstance(value, dict):
        raise _BadLine(_("not an object of the form {example}", example='{"text": "…"}'))
    text = value.get("text")
    if text is None:
        raise _BadLine(_("no key {key}", key='"text"'))
    if not isinstance(text, str):
        raise _BadLine(_("{key} is not a string", key='"text"'))
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadLine(
            _("the text has half of a surrogate pair (\\ud800 to \\udfff), which is no character")
        ) from error


def available_cpus() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
