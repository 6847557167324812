"""Processes that outlive the console: starting, watching and stopping them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from rookery.i18n import language

ROOKERY = (sys.executable, "-P", "-m", "rookery")

CLOCK_STEP = 120
"""Seconds by which a clock that was set may move the beginning of a process."""

BREAK = """
import ctypes, sys
kernel = ctypes.windll.kernel32
kernel.FreeConsole()
kernel.SetConsoleCtrlHandler(None, True)
sys.exit(not (kernel.AttachConsole(int(sys.argv[1])) and kernel.GenerateConsoleCtrlEvent(1, int(sys.argv[1]))))
"""
"""Windows: Ctrl-Break for a process that has a console of its own, by a program that leaves its own console for it."""

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Processes started here: somebody must take note of their end, or they stay as zombies."""


def rookery_command(*words: object) -> list[str]:
    """The command line of `rookery WORDS`, in the language of the console."""
    return [*ROOKERY, "--lang", language(), *map(str, words)]


def environment() -> dict[str, str]:
    """This process's, so that a child finds this Rookery and writes UTF-8 at once."""
    tree = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (tree, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}


def start(command: Sequence[str], folder: Path, output: Path) -> int:
    """Start a process that goes on when the console ends; what it prints is added to `output`. Returns its id."""
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
    with output.open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
            creationflags=flags,
        )
    _children[process.pid] = process
    return process.pid


def exit_status(pid: int) -> int | None:
    """How a process started here has ended; None while it runs, or when it was not started here."""
    child = _children.get(pid)
    return None if child is None else child.poll()


def alive(pid: int | None, since: float = 0) -> bool:
    """Whether process `pid` runs.

    Args:
        since: seconds since 1970 at which it is known to have run: a process that began clearly later is another one,
            which was given the same number.
    """
    if not pid:
        return False
    if pid in _children and _children[pid].poll() is not None:
        return False
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        # Who set the clock forward has moved the beginning of every process: its command line still tells.
        return not since or process.create_time() < since + CLOCK_STEP or _trains(process.cmdline())
    except psutil.Error:
        return False


def _trains(words: Sequence[str]) -> bool:
    """Whether these are the words of `rookery train`."""
    return "train" in words and any("rookery" in word for word in words)


def memory(pid: int) -> int | None:
    """Bytes that a process occupies."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def interrupt(pid: int) -> None:
    """Ask a process to save and stop, as Ctrl-C does."""
    if sys.platform == "win32":
        subprocess.run([sys.executable, "-c", BREAK, str(pid)], creationflags=subprocess.CREATE_NO_WINDOW, check=False)
    else:
        os.kill(pid, signal.SIGTERM)


def end(pid: int, patience: float = 5.0) -> None:
    """End a process and those it started: first as Ctrl-C does, so that it takes back what it has half written, then
    by force."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        interrupt(pid)
    except (psutil.Error, OSError):
        return
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and any(alive(member.pid) for member in family):
        time.sleep(0.05)
    for member in family:
        try:
            member.kill()
        except psutil.Error:
            continue
