"""Running the application until a signal ends it in good order."""

from __future__ import annotations

import logging
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from rookery.serve.service import GRACE, Service

CONNECTIONS = 1024
"""Open at the same time at most."""


class Server(uvicorn.Server):
    """Serves `app`. The first SIGINT or SIGTERM lets running answers finish, the second cuts them short, the third
    waits for no client."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        config = uvicorn.Config(
            app,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=int(GRACE),
            ws="none",
            lifespan="off",
        )
        super().__init__(config)
        self._service = service
        self._signals = 0
        self._silent: dict[Any, tuple[object, float]] = {}

    def serve_on(self, listener: socket.socket) -> None:
        """Answer until a signal comes."""
        self.run(sockets=[listener])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 2:
            super().handle_exit(sig, frame)
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        # Called ten times a second.
        if self._service.drained():
            self.should_exit = True
        if counter % 10 == 0:
            self._close_silent()
        return await super().on_tick(counter)

    def _close_silent(self) -> None:
        """Close connections on which no request has arrived for too long: for the first one, and for the rest of what
        was begun, uvicorn would wait for ever, and all connections could be taken by clients that say nothing."""
        now, before = time.monotonic(), self._silent
        self._silent = {}
        for connection in self.server_state.connections:
            answered = getattr(connection, "cycle", None)  # the last request and its answer
            if answered is not None and not answered.response_complete:
                continue
            last, since = before.get(connection, (answered, now))
            self._silent[connection] = (answered, since if last is answered else now)
            if now - self._silent[connection][1] > self._service.limits.body_seconds:
                connection.transport.close()
