"""The stream by which a page learns what changes: server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from rookery.ui import machine, processes
from rookery.ui.console import Console, encoded
from rookery.ui.runs import Run, elsewhere, read_from, started_here

EVERY = 1.0
"""Seconds between two looks at the files."""


class Changes:
    """What one page has been told, so that it is only told what is new.

    Events: ``runs`` (path -> summary, or null for one that is gone), ``run`` (new steps and log of the run it shows),
    ``jobs``, ``servers``, ``machine``.
    """

    def __init__(self, console: Console, run: Run | None, count: int, generation: int) -> None:
        self.console = console
        self.run = run
        self._count, self._generation = count, generation
        self._log_offset = -1
        self._log_file = ""
        self._runs: dict[str, Any] = {}
        self._said: dict[str, str] = {}

    def collect(self) -> list[tuple[str, str]]:
        """(event, data) for everything that changed since the last call."""
        now = self.console.runs.summaries()
        changed = {path: summary for path, summary in now.items() if self._runs.get(path) is not summary}
        gone = self._runs.keys() - now.keys()
        first, self._runs = not self._said, now
        events = [("runs", encoded({**changed, **dict.fromkeys(gone)}))] if changed or gone or first else []
        if self.run is not None:
            events += self._of_run(self.run)
        states: dict[str, Callable[[], Any]] = {
            "jobs": self.console.jobs.list,
            "servers": self.console.servers.list,
            "machine": machine.machine,
        }
        for name, state in states.items():
            data = encoded(state())
            if self._said.get(name) != data:
                self._said[name] = data
                events.append((name, data))
        return events

    def _of_run(self, run: Run) -> list[tuple[str, str]]:
        run.metrics.refresh()
        news: dict[str, Any] = {}
        if run.metrics.generation != self._generation or len(run.metrics) < self._count:
            news["reset"] = True
        elif len(run.metrics) > self._count:
            news["steps"] = run.metrics.after(self._count)
        self._count, self._generation = len(run.metrics), run.metrics.generation
        file = run.log_file()
        if str(file) != self._log_file or not file.exists():
            self._log_file, self._log_offset = str(file), 0
            text, self._log_offset = read_from(file, -100_000)
            news["log"] = {"text": text, "whole": True}
        else:
            text, offset = read_from(file, self._log_offset)
            if text:
                news["log"] = {"text": text, "whole": offset < self._log_offset}
                self._log_offset = offset
        started = started_here(run.path)
        status = run.status()
        pid = status.get("pid") or (started or {}).get("pid")
        if pid and not elsewhere(status) and processes.alive(pid, status.get("started", 0)):
            news["memory"] = processes.memory(pid)
        return [("run", encoded(news))] if news else []


async def stream(changes: Changes, ended: Callable[[], bool]) -> AsyncIterator[str]:
    """Events as text until `ended`."""
    yield "retry: 1000\n\n"
    while not ended():
        for name, data in await asyncio.to_thread(changes.collect):
            yield f"event: {name}\ndata: {data}\n\n"
        await asyncio.sleep(EVERY)
