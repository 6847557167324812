"""What every request passes before anything else sees it: who asks, from where, and how much."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rookery.i18n import _
from rookery.serve.errors import ApiError
from rookery.serve.metrics import Metrics

OPEN = ("/health",)
"""Paths that need no key: what asks whether a server lives has none."""

DISCARDED = 8
"""A body that is too large is read and thrown away up to this many times the limit: only then can most clients read
the refusal."""


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can only be reached from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses requests, hands on the others with their body already here, and counts both.

    Args:
        app: what is guarded.
        metrics: where requests are counted.
        hosts: names that a Host header may have, against DNS rebinding: the page of another site can make its name
            lead to this machine, and then talk to the server as its own; empty allows all.
        origins: web pages that may ask.
        keys: any of these must be shown; empty asks for none.
        body: largest body, in bytes.
        seconds: time in which it must have arrived.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        hosts: Collection[str],
        origins: Collection[str],
        keys: Collection[str],
        body: int,
        seconds: float,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.hosts = {host.lower() for host in hosts}
        self.origins = origins
        self.keys = [_digest(key) for key in keys]
        self.body = body
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests[route, message["status"]] += 1
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        if body is None:
            return
        rest = [body]

        async def replayed() -> Message:
            # After the body there is only the client's going away to be heard of.
            return {"type": "http.request", "body": rest.pop(), "more_body": False} if rest else await receive()

        await self.app(scope, replayed, counted)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts and _name(host) not in self.hosts:
            raise ApiError(
                403,
                _("This server does not answer to the name {host}; --allow-host adds one.", host=host[:200]),
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and _place(origin) != host:
            raise ApiError(
                403,
                _("Pages of {origin} may not ask; --allow-origin lets them.", origin=origin[:200]),
                code="unknown_origin",
            )
        asks_whether = scope["method"] == "OPTIONS" and origin in self.origins
        if self.keys and scope["path"] not in OPEN and not asks_whether:
            scheme, _space, key = headers.get("authorization", "").partition(" ")
            shown = _digest(key.strip())
            # All are compared, so that the time tells nothing.
            known = [hmac.compare_digest(shown, one) for one in self.keys]
            if scheme.lower() != "bearer" or not any(known):
                raise ApiError(
                    401,
                    _("A valid API key is needed, as: Authorization: Bearer KEY"),
                    code="invalid_api_key",
                )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of it; None if the client is gone."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= self.body:
                        parts.append(part)
                    if not message.get("more_body", False) or size > DISCARDED * self.body:
                        break
        except TimeoutError:
            raise ApiError(408, _("The request did not arrive in time."), code="timeout") from None
        if size > self.body:
            raise ApiError(413, _("The request is larger than {most} bytes.", most=self.body), code="request_too_large")
        return b"".join(parts)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _place(origin: str) -> str:
    """Host and port of an Origin header; "" if it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
