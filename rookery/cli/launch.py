"""`rookery train --devices N`: the processes of one machine, one a device, started by the command itself.

Each is the same command with the environment that torchrun would give it. Rank 0 has the terminal; what the others say
is kept, and shown if one of them fails. No torch here: this process only waits.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

import typer

from rookery.config.launcher import LAUNCHED, Place
from rookery.config.tree import DeviceSection
from rookery.errors import UserError
from rookery.i18n import _

GRACE = 8.0
"""Seconds that the other ranks have to end by themselves after one has failed."""

POLL = 0.1
LAST_LINES = 30

CTRL_BREAK: int | None = getattr(signal, "CTRL_BREAK_EVENT", None)
"""What ends a process on Windows so that it can save."""

OWN_GROUP: dict[str, Any] = (
    {"start_new_session": True} if CTRL_BREAK is None else {"creationflags": 0x200}  # CREATE_NEW_PROCESS_GROUP
)

FAULT, USER_FAULT, INTERRUPTED = 1, 2, 130


def launch(words: Sequence[str], device: DeviceSection, proj_dir: Path, env: Mapping[str, str] = os.environ) -> int:
    """Run `python -m rookery WORDS` once for each device of this machine, until all have ended.

    Args:
        env: with several machines, MASTER_ADDR (and MASTER_PORT) and NODE_RANK say which one this is, as for PyTorch
            Lightning.

    Returns:
        The exit status for the whole.

    Raises:
        UserError: there are several machines, and the environment does not say which this is.
    """
    nodes, size = device.num_nodes, device.devices
    if nodes > 1 and not ("MASTER_ADDR" in env and "NODE_RANK" in env):
        raise UserError(
            _(
                "--num_nodes {nodes}: start the command on every machine with torchrun or srun (docs/en/cluster.md), "
                "or set MASTER_ADDR, MASTER_PORT and NODE_RANK there",
                nodes=nodes,
            )
        )
    node = int(env["NODE_RANK"]) if nodes > 1 else 0
    address = env["MASTER_ADDR"] if nodes > 1 else "127.0.0.1"
    port = int(env.get("MASTER_PORT", "29500")) if nodes > 1 else _free_port()
    threads = {} if "OMP_NUM_THREADS" in env else _threads(size)
    with ExitStack() as stack:
        ranks = []
        for local in range(size):
            place = Place("Rookery", node * size + local, nodes * size, local, size, address, port)
            output = None if local == 0 else stack.enter_context(tempfile.TemporaryFile())
            ranks.append(_Process(words, {**env, **threads, **place.environment, LAUNCHED: "1"}, place.rank, output))
        return _Group(ranks, proj_dir).wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _threads(size: int) -> dict[str, str]:
    """Processes that compute on the same CPU share its cores."""
    cores = str(max(1, (os.cpu_count() or 1) // size))
    return {"OMP_NUM_THREADS": cores, "NUMBA_NUM_THREADS": cores}


class _Process:
    """A rank that this process has started."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], rank: int, output: IO[bytes] | None) -> None:
        self.rank = rank
        self._output = output
        # A group of its own: Ctrl-C in a terminal reaches this process alone, which passes it on once.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rookery", *words],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            **OWN_GROUP,
        )

    @property
    def status(self) -> int | None:
        """Exit status; of a process ended by a signal, its negative number; None while it runs."""
        return self._process.poll()

    def send(self, number: int) -> None:
        with suppress(OSError):
            self._process.send_signal(number if CTRL_BREAK is None else CTRL_BREAK)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def last_lines(self) -> str:
        if self._output is None:
            return ""
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LAST_LINES:])


class _Group:
    """All ranks of this machine."""

    def __init__(self, ranks: list[_Process], proj_dir: Path) -> None:
        self._ranks = ranks
        self._proj_dir = proj_dir

    def wait(self) -> int:
        before = {number: signal.signal(number, self._pass_on) for number in _signals()}
        try:
            lost = self._wait()
        finally:
            for rank in self._ranks:
                if rank.status is None:
                    rank.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        if lost is not None:
            self._explain(lost)
        return _together([rank.status for rank in self._ranks])

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for rank in self._ranks:
            rank.send(number)

    def _wait(self) -> _Process | None:
        """Until all have ended, or one has failed and the others had time to.

        Returns:
            The rank that was ended first by a signal, if one was.
        """
        deadline = None
        lost = None
        while any(rank.status is None for rank in self._ranks):
            failed = [rank for rank in self._ranks if rank.status not in (None, 0)]
            if failed and deadline is None:
                deadline = time.monotonic() + GRACE
                lost = next((rank for rank in failed if (rank.status or 0) < 0), None)
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(POLL)
        if lost is None:
            lost = next((rank for rank in self._ranks if (rank.status or 0) < 0), None)
        return lost

    def _explain(self, lost: _Process) -> None:
        name = _signal_name(-(lost.status or 0))
        reason = _("rank {rank} was ended by the system or by somebody ({signal})", rank=lost.rank, signal=name)
        said = lost.last_lines()
        typer.echo(f"{said}\n{reason}" if said else reason, err=True)
        if lost.rank == 0:
            _report_failure(self._proj_dir, reason)


def _signals() -> list[int]:
    names = ("SIGINT", "SIGTERM", "SIGBREAK")  # the last is Windows' Ctrl-Break
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _together(statuses: list[int | None]) -> int:
    """One exit status for all."""
    if not any(statuses):
        return 0
    if all(status in (0, INTERRUPTED) for status in statuses):
        return INTERRUPTED
    return USER_FAULT if USER_FAULT in statuses and not any((s or 0) < 0 for s in statuses) else FAULT


def _report_failure(proj_dir: Path, reason: str) -> None:
    """Rank 0, which keeps status.json, could not do it itself."""
    file = proj_dir / "status.json"
    with suppress(OSError, ValueError):
        status = json.loads(file.read_text(encoding="utf-8"))
        status |= {"phase": "failed", "exit_reason": reason, "updated": time.time()}
        beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(status, indent=1), encoding="utf-8")
        os.replace(beside, file)
