"""Who may use the console: the right host name, the token when others can reach it, and no other web site."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rookery.i18n import _
from rookery.serve.guard import is_loopback

COOKIE = "rookery_token"

HEADER = "x-rookery"
"""A request that changes something carries this header, which another site's page cannot add."""


class Guard:
    """Refuses requests before anything else sees them.

    Args:
        app: what is guarded.
        host: the address listened on.
        token: what a visitor must know; empty on the loopback address.
        script_hash: of the only inline script.
    """

    def __init__(self, app: ASGIApp, *, host: str, token: str, script_hash: str) -> None:
        self.app = app
        self.token = token
        self.names = {"localhost", "127.0.0.1", "::1", host.strip("[]")}
        if not is_loopback(host):
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.policy = (
            f"default-src 'self'; script-src 'self' '{script_hash}'; style-src 'self'; "
            "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self._headers()]
            await send(message)

        await (refusal or self.app)(scope, receive, send_with_policy)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-security-policy", self.policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-cache"),
        ]

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if not self._known(host):
            return _refuse(403, _("the console does not answer to the name {host}", host=host))
        if self.token:
            asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if scope["path"] == "/" and self._is_token(asked):
                response = RedirectResponse("/", status_code=303)
                response.set_cookie(COOKIE, self.token, httponly=True, samesite="strict", max_age=30 * 86400)
                return response
            if not self._is_token(_cookie(headers)):
                message = _("open the address that `rookery ui` printed: it holds the token")
                return PlainTextResponse(message, 401) if scope["path"] == "/" else _refuse(401, message)
        if scope["method"] not in ("GET", "HEAD"):
            return _foreign(headers, host)
        return None

    def _known(self, host: str) -> bool:
        """Whether a Host header names this machine: with DNS rebinding, another site's name leads here."""
        name = (urlsplit(f"//{host}").hostname or "").lower()
        if name in self.names:
            return True
        try:
            # Behind the token, any number will do: machines have several addresses.
            return bool(self.token) and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())


def _foreign(headers: Headers, host: str) -> Response | None:
    """The refusal of a request that a page of another site may have made."""
    origin = headers.get("origin")
    same = origin is None or urlsplit(origin).netloc == host
    if not same or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") or HEADER not in headers:
        return _refuse(403, _("this request does not come from a page of the console"))
    return None


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)
