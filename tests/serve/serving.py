"""Starting the real server, and asking it how it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from openai import OpenAI

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "rookery", "serve"]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "PYTHONUTF8": "1",
    "LC_ALL": "C.UTF-8",
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
]
"""What a client offers."""


class Server:
    """`rookery serve ARGS` on a free port, ready when this returns.

    Attributes:
        url: as `http://127.0.0.1:PORT`.
        greeting: the two lines that it printed, and of a run directory a third.
        status: of the process, when it has ended.
    """

    def __init__(self, *args: object, log: Path, key: str = "unused") -> None:
        self.log = log
        self._stderr = log.open("wb")
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, args), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=ENVIRONMENT,
            encoding="utf-8",
        )
        assert self.process.stdout
        lines = 3 if Path(args[0]).is_dir() else 2
        self.greeting = [self.process.stdout.readline() for _line in range(lines)]
        found = re.search(r"http://\S+:\d+", self.greeting[0])
        assert found, self.errors
        self.url = found[0]
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    @property
    def errors(self) -> str:
        """What it wrote to stderr."""
        return self.log.read_text(encoding="utf-8")

    def figures(self) -> dict[str, float]:
        """The metrics: name with labels -> value."""
        page = self.http.get("/metrics")
        assert page.status_code == 200
        rows = [line.rpartition(" ") for line in page.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _space, value in rows}

    def wait_until(self, seconds: float = 10, **wanted: float) -> dict[str, float]:
        """Wait until figures, named without `rookery_`, are as wanted."""
        end = time.monotonic() + seconds
        while True:
            figures = self.figures()
            if all(figures[f"rookery_{name}"] == value for name, value in wanted.items()):
                return figures
            assert time.monotonic() < end, {name: figures[f"rookery_{name}"] for name in wanted}
            time.sleep(0.02)

    def end(self, sign: int = signal.SIGTERM, seconds: float = 20) -> int:
        """Ask it to end and wait; the exit status."""
        self.client.close()
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(sign)
        return self.wait(seconds)

    def wait(self, seconds: float = 20) -> int:
        """Wait for its end; the exit status."""
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout
            self.process.stdout.close()
            self._stderr.close()
