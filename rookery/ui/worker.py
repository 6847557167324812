"""A helper process that has torch loaded and answers questions: what would a run do, what is in a file.

The console itself never imports torch. The helper starts at the first question, ends after a while without any, and
before a run starts, so that it takes no memory from training.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rookery.i18n import _, language
from rookery.ui import processes

IDLE = 120.0
"""Seconds without a question after which the helper ends."""


class Worker:
    """Questions and answers, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._asked = 0.0
        self._ended = 0
        """How often it was ended on purpose."""
        self._closed = False

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """The answer of `rookery.cli.ui_worker`: its ``result``, or ``error`` (and ``trace``)."""
        with self._lock:
            while True:
                ended_before = self._ended
                line = self._answer({"operation": operation, "language": language(), **arguments})
                if line:
                    return dict(json.loads(line))
                self._end()
                if self._ended == ended_before or self._closed:
                    return {"error": _("the helper process ended; memory may have run out"), "trace": ""}

    def _answer(self, question: dict[str, Any]) -> str:
        """One line; empty when the helper ended."""
        try:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            self._asked = time.monotonic()
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            return process.stdout.readline()
        except OSError:
            return ""
        finally:
            self._asked = time.monotonic()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rookery.cli.ui_worker"],
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=processes.environment(),
                encoding="utf-8",
            )
            threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()
        return self._process

    def _watch(self, process: subprocess.Popen[str]) -> None:
        """End the helper when nobody has asked it for a while."""
        while process.poll() is None:
            time.sleep(1)
            if time.monotonic() - self._asked > IDLE and self._lock.acquire(blocking=False):
                try:
                    if process is self._process:
                        self._end()
                finally:
                    self._lock.release()

    def rest(self) -> None:
        """End the helper, because something else needs its memory. A question under way is asked again."""
        self._ended += 1
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the helper for good, also in the middle of an answer."""
        self._closed = True
        self.rest()
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
