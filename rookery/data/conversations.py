"""Conversations of a file, in any of the formats of `rookery.data.rows`, as messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rookery.data.rows import BadRow, choose_reader
from rookery.data.sources import EMPTY, Fault, find_units, first_rows, read_rows
from rookery.errors import UserError
from rookery.i18n import _
from rookery.tokenizer.chat import Message


def read_conversations(
    path: str | Path, *, data_format: str = "auto", fields: Sequence[str] | None = None
) -> Iterator[list[Message]]:
    """The conversations of a .jsonl or .json file, one a row.

    Raises:
        UserError: the file is missing or its rows are no conversations; the first that is none is named.
    """
    units = find_units(path)
    reader = choose_reader(str(path), first_rows(units), data_format, fields)
    if reader.format == "text":
        raise UserError(
            _("{path} holds texts, not conversations: its rows have no messages, or prompt and completion", path=path)
        )
    before = 0
    for unit in units:
        number = 0
        for number, row in read_rows(unit):
            if row is EMPTY:
                continue
            try:
                if isinstance(row, BadRow):
                    raise row
                yield reader.messages(row)
            except BadRow as error:
                fault = Fault(unit.path, number, str(error), unit.kind == "array").later(before)
                raise UserError(str(fault)) from error
        before += number
