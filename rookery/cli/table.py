"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import typer

ENDLESS = 10_000


def print_table(rows: Iterable[Sequence[str]], headings: Sequence[str] = ()) -> None:
    """Print aligned columns, the first one coloured. A terminal folds long cells; elsewhere lines stay whole."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else ENDLESS)
    table = Table(*headings, box=None, pad_edge=False, show_header=bool(headings))
    for row in rows:
        while len(table.columns) < len(row):
            table.add_column()
        table.add_row(*(Text(cell) for cell in row))
    table.columns[0].style = "cyan"
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.overflow = "fold"
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        typer.echo(line.rstrip())
