"""`rookery serve` processes: for the Chat page, and for other programs."""

from __future__ import annotations

import http.client
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rookery.errors import UserError
from rookery.i18n import _
from rookery.ui import failures, processes
from rookery.ui.form import quoted
from rookery.ui.runs import read_from

HOST = "127.0.0.1"

ANSWER_WITHIN = 600.0
"""Seconds after which a model that says nothing is given up."""


class PortTaken(UserError):
    """Somebody listens there already."""


class Servers:
    """The API servers that this console started."""

    def __init__(self) -> None:
        self._servers: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="rookery-serve-"))

    def start(self, model: Path, options: list[str], port: int, folder: Path) -> dict[str, Any]:
        """Serve a model on a port of this machine; 0 takes a free one. One that serves the same already is returned.

        Raises:
            PortTaken: the port has a listener.
        """
        with self._lock:
            return self._start(model, options, port, folder)

    def _start(self, model: Path, options: list[str], port: int, folder: Path) -> dict[str, Any]:
        for number, server in self._servers.items():
            same = server["model"] == str(model) and server["options"] == options and port in (0, server["port"])
            if same and self.state(number)["state"] in ("starting", "ready"):
                return self.state(number)
        port = free_port(port)
        number = len(self._servers) + 1
        words = ["serve", str(model), *options, "--host", HOST, "--port", str(port)]
        log = self._folder / f"{number}.log"
        pid = processes.start(processes.rookery_command(*words), folder, log)
        self._servers[number] = {
            "id": number,
            "model": str(model),
            "options": options,
            "port": port,
            "pid": pid,
            "log": log,
            "command": quoted(["rookery", *words]),
            "started": time.time(),
            "name": "",
            "stopped": False,
        }
        return self.state(number)

    def state(self, number: int) -> dict[str, Any]:
        """What the page shows of a server.

        Raises:
            UserError: there is no such server.
        """
        server = self._servers.get(number)
        if server is None:
            raise UserError(_("there is no server number {number}; start it again", number=number))
        running = processes.alive(server["pid"])
        if running and not server["name"]:
            server["name"] = served_name(server["port"])
        output, _end = read_from(server["log"], -8_000)
        failed = not running and not server["stopped"]
        return {
            **{name: server[name] for name in ("id", "model", "name", "options", "port", "command", "started")},
            "url": f"http://{HOST}:{server['port']}/v1",
            "state": ("ready" if server["name"] else "starting") if running else "failed" if failed else "stopped",
            "memory": processes.memory(server["pid"]) if running else None,
            "output": output,
            "failure": failures.as_dict(failures.find(output)) if failed else None,
        }

    def list(self) -> list[dict[str, Any]]:
        """Every server, newest first."""
        return [self.state(number) for number in sorted(self._servers, reverse=True)]

    def stop(self, number: int) -> dict[str, Any]:
        """End a server."""
        self.state(number)
        self._servers[number]["stopped"] = True
        processes.end(self._servers[number]["pid"])
        return self.state(number)

    def close(self) -> None:
        """End all: nobody could stop them later."""
        for number in list(self._servers):
            if processes.alive(self._servers[number]["pid"]):
                self.stop(number)

    def chat(self, number: int, body: dict[str, Any]) -> tuple[int, Iterator[bytes]]:
        """Pass a question on to /v1/chat/completions: status, and the answer as it comes.

        Raises:
            UserError: the server does not answer.
        """
        server = self.state(number)
        connection = http.client.HTTPConnection(HOST, server["port"], timeout=ANSWER_WITHIN)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
        except OSError as error:
            connection.close()
            raise UserError(_("the model does not answer: {reason}", reason=error)) from error

        def parts() -> Iterator[bytes]:
            # Closing the connection is how the server learns that nobody listens any more.
            try:
                while part := response.read1(1 << 16):
                    yield part
            finally:
                connection.close()

        return response.status, parts()


def free_port(port: int) -> int:
    """`port` if nobody listens on it, for 0 any such port.

    Raises:
        PortTaken: somebody does.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if port and probe.connect_ex((HOST, port)) == 0:
            raise PortTaken(_("port {port} is taken by another program", port=port))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise PortTaken(_("port {port} is taken by another program", port=port)) from error
        return int(probe.getsockname()[1])


def served_name(port: int) -> str:
    """What a server calls its model; empty while it does not answer."""
    connection = http.client.HTTPConnection(HOST, port, timeout=1)
    try:
        connection.request("GET", "/v1/models")
        return str(json.loads(connection.getresponse().read())["data"][0]["id"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        return ""
    finally:
        connection.close()
