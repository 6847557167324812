"""Commands that a page starts and follows: convert data, convert a model, merge."""

from __future__ import annotations

import itertools
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rookery.errors import UserError
from rookery.i18n import _
from rookery.ui import failures, processes
from rookery.ui.form import quoted
from rookery.ui.runs import read_from

PATIENCE = 15.0
"""Seconds that a cancelled job has before it is ended by force."""

PERCENT = re.compile(r"(\d+(?:\.\d+)?) ?%")


class Jobs:
    """Commands of this session, newest first."""

    def __init__(self) -> None:
        self._jobs: dict[int, dict[str, Any]] = {}
        self._numbers = itertools.count(1)
        self._folder = Path(tempfile.mkdtemp(prefix="rookery-console-"))

    def start(self, kind: str, title: str, words: list[str], folder: Path, result: str = "") -> dict[str, Any]:
        """Start `rookery WORDS`.

        Args:
            kind: what the page does with it: "data", "merge", "convert".
            title: for people.
            result: the path it will write.
        """
        number = next(self._numbers)
        log = self._folder / f"{number}.log"
        pid = processes.start(processes.rookery_command(*words), folder, log)
        self._jobs[number] = {
            "id": number,
            "kind": kind,
            "title": title,
            "command": quoted(["rookery", *words]),
            "result": result,
            "pid": pid,
            "log": log,
            "started": time.time(),
            "ended": None,
            "cancelled": False,
        }
        return self.state(number)

    def state(self, number: int) -> dict[str, Any]:
        """What the page shows of a job.

        Raises:
            UserError: there is no such job.
        """
        job = self._jobs.get(number)
        if job is None:
            raise UserError(_("there is no command number {number}", number=number))
        status = processes.exit_status(job["pid"])
        if status is not None and job["ended"] is None:
            job["ended"] = time.time()
        output, _end = read_from(job["log"], -20_000)
        state = "running" if status is None else "done" if status == 0 else "failed"
        if state == "failed" and job["cancelled"] and _is_written(job["result"], job["started"]):
            state = "done"  # the end came too late: it had just finished
        elif job["cancelled"]:
            state = {"running": "cancelling", "failed": "cancelled"}.get(state, state)
        percents = PERCENT.findall(output)
        return {
            **{name: job[name] for name in ("id", "kind", "title", "command", "result", "started", "ended")},
            "state": state,
            "percent": 100.0 if state == "done" else float(percents[-1]) if percents else None,
            "output": output,
            "failure": failures.as_dict(failures.find(output)) if state == "failed" else None,
        }

    def list(self) -> list[dict[str, Any]]:
        """Every job, newest first."""
        return [self.state(number) for number in sorted(self._jobs, reverse=True)]

    def cancel(self, number: int) -> dict[str, Any]:
        """Begin to end a job that runs: it takes back what it has half written, which may last some seconds."""
        job = self._jobs.get(number)
        if job is not None and processes.exit_status(job["pid"]) is None and not job["cancelled"]:
            job["cancelled"] = True
            threading.Thread(target=processes.end, args=(job["pid"],), kwargs={"patience": PATIENCE}).start()
        return self.state(number)


def _is_written(result: str, since: float) -> bool:
    """Whether the file or folder `result`, or the data of this prefix, was written after `since`. They appear whole, of
    data the index last."""
    places = (Path(result), Path(f"{result}.idx"))
    return any(place.exists() and place.stat().st_mtime >= since for place in places)
