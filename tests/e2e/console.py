"""A console in a process of its own, and a real browser in front of it."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from command import environment

COMMAND = [sys.executable, "-P", "-m", "rookery"]


class ConsoleProcess:
    """A running `rookery ui`."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.address = address

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and answer of a request as the pages make it; `headers` replace theirs."""
        base, _question, token = self.address.partition("?")
        sent = {"Content-Type": "application/json", "X-Rookery": "1"}
        if token:
            sent["Cookie"] = "rookery_token=" + token.removeprefix("token=")
        sent |= headers or {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(base + path, data, {name: text for name, text in sent.items() if text})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, _read(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _read(error.read())

    def events(self, words: str = "") -> dict[str, Any]:
        """The first of each kind of event that a page would hear."""
        host, port = self.address.removeprefix("http://").rstrip("/").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("GET", f"/api/events?{words}")
        response = connection.getresponse()
        found: dict[str, Any] = {}
        while "machine" not in found:
            line = response.readline().decode().strip()
            if line.startswith("event: "):
                found[line[7:]] = json.loads(response.readline().decode().removeprefix("data: "))
        connection.close()
        return found

    def wait(self, path: str, ready: Any, seconds: float = 60) -> Any:
        """Ask until `ready(answer)`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = self.ask(path)[1]
            if ready(answer):
                return answer
            time.sleep(0.1)
        raise AssertionError(f"{path}: {answer}")


def _read(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode("utf-8")


@contextmanager
def running_console(folder: Path, *options: str, before: Callable[[], None] | None = None) -> Iterator[ConsoleProcess]:
    """`rookery ui` in `folder`, on a free port, with settings of its own; `before` is called in the new process."""
    words = ["ui", "--no-open", "--port", "0", "--settings", str(folder.parent / f"{folder.name}-settings.json")]
    process = subprocess.Popen(
        [*COMMAND, "--lang", "en", *words, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=before,
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        found = re.search(r"http://\S+", first)
        assert found, first + process.stdout.read()
        yield ConsoleProcess(process, found[0])
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


def chromium() -> str | None:
    """The program of a browser on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
    return next(filter(None, map(shutil.which, names)), None)
