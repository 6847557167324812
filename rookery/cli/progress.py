"""A progress bar on a terminal, and elsewhere a line now and then, which the console reads."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY = 1.0
"""Seconds at least between two lines, each of which tells of another whole percent."""


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is, with rate and time left; call what it gives with (done, total)."""
    if not sys.stderr.isatty():
        due = when_due()

        def tell(done: int, total: int) -> None:
            if due(done, total):
                print(f"{title}: {percent(done, total)} %", file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, rate="")

        def show(done: int, total: int) -> None:
            speed = progress.tasks[0].speed
            progress.update(task, completed=done, total=total, rate=f"{speed:,.0f}/s" if speed else "")

        yield show


def percent(done: int, total: int) -> int:
    """The whole percent that is reached."""
    return 100 * done // max(total, 1)


def when_due() -> Callable[[int, int], bool]:
    """Whether (done, total) is worth a line, where each would stay."""
    said_at, said = time.monotonic(), 0

    def due(done: int, total: int) -> bool:
        nonlocal said_at, said
        now = time.monotonic()
        if now - said_at < LINE_EVERY or percent(done, total) in (0, said):
            return False
        said_at, said = now, percent(done, total)
        return True

    return due
