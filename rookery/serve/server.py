"""Running the application until a signal ends it in good order."""

from __future__ import annotations

import logging
import socket
from types import FrameType

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
        return await super().on_tick(counter)
