"""What every request must pass before a route sees it. Plain ASGI, so that streams are not buffered.

    Host     one that this server goes by: a page whose name was made to point at 127.0.0.1 (DNS rebinding) has another
    Origin   none, the server's own, or one that --cors names: other pages may not even ask
    key      Authorization: Bearer, or x-api-key, compared in constant time; /health and the chat page need none
    body     not longer than allowed, whatever Content-Length says, not slower, and not too many at a time
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qmix.serve.page import is_page
from qmix.serve.service import ServerOptions

OPEN_PATHS = ("/health",)
BODIES = 8  # of the largest size that may be in memory together
SLOWEST = 60.0  # seconds between two pieces of a body
LONGEST = 600.0  # seconds for all of a body
Refusal = Callable[[Scope, int, str, str], Response]  # path, status, code, message -> a body in the API's own form


class BodyRefused(Exception):
    """A body is too long, too slow, or one too many. problem: status, code, message."""

    def __init__(self, *problem: Any):
        super().__init__(*problem)
        self.problem = problem


class _Body:
    """taken: bytes of it that have come."""

    taken = 0


class Guard:
    """refuse: makes the answer to a request that does not pass."""

    def __init__(self, app: ASGIApp, options: ServerOptions, refuse: Refusal):
        self._app = app
        self._options = options
        self._refuse = refuse
        self._in_flight = 0  # bytes of the bodies of all requests that are not answered yet
        self._keys = [key.encode() for key in options.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._check(scope, headers)
        if refusal is not None:
            await self._refuse(scope, *refusal)(scope, receive, send)
            return
        began = False
        body = _Body()

        async def sending(message: Message) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, self._bounded(receive, body), sending)
        except BodyRefused as e:
            if began:
                raise
            await self._refuse(scope, *e.problem)(scope, receive, send)
        finally:
            self._in_flight -= body.taken

    def _check(self, scope: Scope, headers: Headers) -> tuple[int, str, str] | None:
        host = headers.get("host", "")
        if self._options.hosts and _host_name(host) not in self._options.hosts:
            return 403, "host_not_allowed", f"the Host header is {host!r:.100}, which this server does not go by"
        origin = headers.get("origin")
        if origin is not None and not {origin, "*"} & {*self._options.origins} and _netloc(origin) != host:
            return 403, "origin_not_allowed", f"pages of {origin!r:.100} may not use this server; --cors allows them"
        is_open = scope["path"] in OPEN_PATHS or is_page(scope["path"]) or scope["method"] == "OPTIONS"
        wanted = self._keys and not is_open
        if wanted and not self._has_key(headers):
            return 401, "invalid_api_key", "no valid API key was given: send Authorization: Bearer KEY, or x-api-key"
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._options.largest:
            return self._too_large()
        return None

    def _too_large(self) -> tuple[int, str, str]:
        return 413, "request_too_large", f"the body has more than {self._options.largest} bytes"

    def _bounded(self, receive: Receive, body: _Body) -> Receive:
        """`receive` that raises BodyRefused."""
        complete = False
        clock = asyncio.get_running_loop().time
        end = clock() + LONGEST

        async def bounded() -> Message:
            nonlocal complete
            try:
                async with asyncio.timeout_at(None if complete else min(end, clock() + SLOWEST)):
                    message = await receive()
            except TimeoutError:
                raise BodyRefused(408, "request_timeout", f"the body took more than {LONGEST:g} s" if clock() >= end
                                  else f"no piece of the body came for {SLOWEST:g} s") from None
            if message["type"] == "http.request":
                complete = not message.get("more_body", False)
                length = len(message.get("body", b""))
                body.taken += length
                self._in_flight += length
                if body.taken > self._options.largest:
                    raise BodyRefused(*self._too_large())
                if self._in_flight > BODIES * self._options.largest:
                    raise BodyRefused(503, "server_busy", "the bodies of too many requests are in memory")
            return message

        return bounded

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer.strip()] if scheme.lower() == "bearer" else []
        given += [value for value in (headers.get("x-api-key"),) if value is not None]
        # All of them are compared, so that the time says nothing of which one fits.
        found = [hmac.compare_digest(key, value.encode("latin-1")) for key in self._keys for value in given]
        return any(found)


def _netloc(origin: str) -> str | None:
    """None for what is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _host_name(host: str) -> str:
    """Without the port: "[::1]:8080" -> "::1", "Localhost:1" -> "localhost"."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
