"""Notices a rank that died, hangs or failed, and ends the others, which would wait for it for ever.

Each rank has a thread that reports to rank 0 over a connection of its own: that it lives, and whether its main thread
moves. Rank 0 tells all ranks when one is lost: its connection broke (its process ended), nothing came for
`SILENCE` seconds (its machine is gone, or the process is stopped), its main thread stood still for `STILL` seconds at a
place where it waits for no other rank, or it reported an error.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil

from rookery.config.launcher import Place
from rookery.errors import UserError
from rookery.i18n import _

BEAT = 1.0
"""Seconds between two signs of life."""

SILENCE = 20.0
STILL = 30.0
PATIENT = 600.0
"""In place of `STILL` while files are written."""

GRACE = 5.0
"""Seconds in which a rank may end by itself after another one was lost."""

BUSY = 0.2
"""Part of a core that a process uses which computes; one that waits uses next to nothing."""

WAITING = ("torch/distributed/", "deepspeed/", "rookery/ops/context.py", "rookery/train/monitor.py")
"""Where a main thread stands still because of another rank, or for its own GPU, which does."""


class Loss(NamedTuple):
    """Which rank was lost first, and why."""

    rank: int
    reason: str

    def __str__(self) -> str:
        return _("rank {rank}: {reason}", rank=self.rank, reason=self.reason)


class Watch:
    """The watching thread of this rank; on rank 0 also that which judges."""

    def __init__(self, rank: int, connection: socket.socket, server: _Server | None) -> None:
        self.loss: Loss | None = None
        """Set once, when a rank is lost."""
        self.on_end: Callable[[str], None] = lambda reason: None
        """Told why, before this process is ended in spite of a main thread that stands still."""
        self._rank = rank
        self._connection = connection
        self._server = server
        self._lost = threading.Event()
        self._closed = threading.Event()
        self._writing = threading.Lock()
        self._patient = 0
        self._main = threading.main_thread().ident
        self._parent = psutil.Process().parent()
        self._thread = threading.Thread(target=self._run, name="rookery watch", daemon=True)
        self._thread.start()

    @classmethod
    def begin(cls, place: Place, first: Callable[[Any], Any]) -> Watch:
        """
        Args:
            first: gives every rank what rank 0 gave it.
        """
        server = None
        if place.rank == 0:
            server = _Server(place.world_size, "127.0.0.1" if place.local_size == place.world_size else "")
        port, token = first(None if server is None else (server.port, server.token))
        connection = socket.create_connection((place.address, port), timeout=60)
        connection.settimeout(SILENCE)
        connection.sendall(json.dumps({"token": token, "rank": place.rank}).encode() + b"\n")
        return cls(place.rank, connection, server)

    def cause(self, error: BaseException) -> Loss | None:
        """Why this rank ends with `error`: None if by itself, of which the others are told; else what happened before
        to another one, of which `error` is an echo."""
        if isinstance(error, RuntimeError):
            self._lost.wait(GRACE)
        if self.loss is None:
            known = isinstance(error, UserError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            self._send(failure=text)
            self._lost.wait(GRACE)  # so that rank 0 tells the others before it ends
        own = self.loss is None or self.loss.rank == self._rank or isinstance(error, (UserError, KeyboardInterrupt))
        return None if own else self.loss

    @contextmanager
    def patience(self) -> Iterator[None]:
        """While entered, this rank may stand still for ten minutes."""
        self._patient += 1
        try:
            yield
        finally:
            self._patient -= 1

    def close(self) -> None:
        """This rank has ended well."""
        self._closed.set()
        self._send(done=True)
        self._thread.join(2 * BEAT)
        self._connection.close()
        if self._server is not None:
            self._server.close()

    def _send(self, **message: Any) -> None:
        with self._writing, suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _run(self) -> None:
        movement = _Movement(self._main)
        heard, received = time.monotonic(), b""
        while not self._closed.is_set() and self.loss is None:
            still, place, waits = movement.look()
            self._send(still=0.0 if self._patient and still < PATIENT else still, place=place, waits=waits)
            self._follow_parent()
            try:
                readable, _w, _x = select.select([self._connection], [], [], BEAT)
                if readable:
                    new = self._connection.recv(65536)
                    if not new:
                        self._found(Loss(0, _("its process has ended")))
                        break
                    heard, received = time.monotonic(), received + new
            except (OSError, ValueError):
                self._found(Loss(0, _("the connection to it broke")))
                break
            *lines, received = received.split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "lost" in message:
                    self._found(Loss(*message["lost"]))
            if time.monotonic() - heard > SILENCE:
                self._found(Loss(0, _("no sign of life for {seconds} seconds", seconds=round(SILENCE))))
            if not readable:
                continue
            self._closed.wait(BEAT)
        if self.loss is not None and not self._closed.wait(GRACE):
            self._end()

    def _found(self, loss: Loss) -> None:
        if not self._closed.is_set() and self.loss is None:
            self.loss = loss
            self._lost.set()

    def _end(self) -> NoReturn:
        """The main thread waits for a rank that is lost, in code that nothing can interrupt."""
        with suppress(Exception):
            self.on_end(str(self.loss))
        if self._rank == 0:
            os.write(2, f"{self.loss}\n".encode())
        os._exit(1)

    def _follow_parent(self) -> None:
        """Whoever started the ranks is gone: nobody could stop them any more, so they save and stop."""
        if self._parent is not None and not self._parent.is_running():
            self._parent = None
            signal.raise_signal(signal.SIGTERM)


class _Movement:
    """How long a thread has been standing still, and where."""

    def __init__(self, thread: int | None) -> None:
        self._thread = thread
        self._position: object = None
        self._since = self._looked = time.monotonic()
        self._used = time.process_time()

    def look(self) -> tuple[float, str, bool]:
        """Seconds without movement, the place in the source, and whether it is one where others are waited for."""
        now, used = time.monotonic(), time.process_time()
        frame = sys._current_frames().get(self._thread or 0)
        position, files, place = [], [], "?"
        while frame is not None:
            position.append((id(frame), frame.f_lasti))
            files.append(Path(frame.f_code.co_filename).as_posix())
            if len(position) == 1:
                place = f"{files[0]}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        busy = used - self._used > BUSY * (now - self._looked)
        if position != self._position or busy:
            self._position, self._since = position, now
        self._looked, self._used = now, used
        waits = any(part in file for file in files for part in WAITING)
        return now - self._since, place, waits


@dataclass
class _Rank:
    """What rank 0 knows of a rank."""

    number: int
    heard: float
    still: float = 0.0
    place: str = "?"
    waits: bool = True
    received: bytes = field(default=b"", repr=False)


class _Server:
    """On rank 0: listens to all ranks, itself included, and judges."""

    def __init__(self, world_size: int, address: str) -> None:
        self._listener = socket.create_server((address, 0), backlog=world_size)
        self.port = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._strangers: dict[socket.socket, bytes] = {}
        self._ranks: dict[socket.socket, _Rank] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rookery judge", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(2 * BEAT)
        for connection in [self._listener, *self._strangers, *self._ranks]:
            connection.close()

    def _run(self) -> None:
        spoken = 0.0
        while not self._closed.is_set():
            sockets = [self._listener, *self._strangers, *self._ranks]
            readable, _w, _x = select.select(sockets, [], [], BEAT)
            loss = None
            for connection in readable:
                if connection is self._listener:
                    stranger, _address = self._listener.accept()
                    stranger.settimeout(SILENCE)
                    self._strangers[stranger] = b""
                else:
                    loss = loss or self._read(connection)
            loss = loss or self._judge()
            if loss is not None:
                self._tell(lost=[loss.rank, loss.reason])
                return
            if time.monotonic() - spoken > BEAT:
                spoken = time.monotonic()
                self._tell()

    def _read(self, connection: socket.socket) -> Loss | None:
        try:
            new = connection.recv(65536)
        except OSError:
            new = b""
        if connection in self._strangers:
            self._admit(connection, new)
            return None
        rank = self._ranks[connection]
        if not new:
            del self._ranks[connection]
            return Loss(rank.number, _("its process has ended"))
        rank.heard = time.monotonic()
        *lines, rank.received = (rank.received + new).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "failure" in message:
                return Loss(rank.number, message["failure"])
            if "done" in message:
                del self._ranks[connection]
                connection.close()
                return None
            rank.still, rank.place, rank.waits = message["still"], message["place"], message["waits"]
        return None

    def _admit(self, connection: socket.socket, new: bytes) -> None:
        """A stranger must know the token, which only the ranks of this run were told."""
        received = self._strangers[connection] + new
        self._strangers[connection] = received
        if new and b"\n" not in received and len(received) < 1000:
            return
        del self._strangers[connection]
        line, _newline, rest = received.partition(b"\n")
        with suppress(ValueError, KeyError, TypeError):
            message = json.loads(line)
            if hmac.compare_digest(message["token"], self.token):
                self._ranks[connection] = _Rank(message["rank"], time.monotonic(), received=rest)
                return
        connection.close()

    def _judge(self) -> Loss | None:
        now = time.monotonic()
        ranks = list(self._ranks.values())
        for rank in ranks:
            if now - rank.heard > SILENCE:
                return Loss(rank.number, _("no sign of life for {seconds} seconds", seconds=round(SILENCE)))
            if rank.still > STILL and not rank.waits:
                return Loss(
                    rank.number,
                    _("it has not moved for {seconds} seconds: {place}", seconds=round(STILL), place=rank.place),
                )
        if ranks and all(rank.still > STILL for rank in ranks):
            places = "; ".join(f"{rank.number}: {rank.place}" for rank in ranks[:8])
            return Loss(ranks[0].number, _("all ranks wait for each other ({places})", places=places))
        return None

    def _tell(self, **message: Any) -> None:
        for connection in list(self._ranks):
            with suppress(OSError):
                connection.sendall(json.dumps(message).encode() + b"\n")
