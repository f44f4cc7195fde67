"""uvicorn around the application, and how it ends.

    first SIGTERM or Ctrl-C   no new connections; requests that wait fail; the one in hand may take `grace` seconds,
                              then it is cancelled, and its stream ends in its own form
    second one                it is cancelled at once

A stream is never torn: it ends with what its API has for an error. The process leaves with 0.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from contextlib import suppress
from types import FrameType

import uvicorn
from starlette.types import Receive, Scope, Send

from qmix.config import SamplingParams
from qmix.errors import UsageError
from qmix.serve.app import make_app
from qmix.serve.engine_thread import EngineThread, State
from qmix.serve.service import ServerOptions, Service

LOOPBACK = ("localhost", "127.0.0.1", "::1")
UNWRITTEN = 10.0  # seconds that the ends of streams may take to reach clients that read slowly


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address. UsageError for a name that means nothing here."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        pass
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as e:
        raise UsageError(f"--host {host}: {e.strerror or e}") from None
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; UsageError where that address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host.strip("[]"), port))
    except (OSError, OverflowError) as e:
        bound.close()
        raise UsageError(f"--host {host} --port {port}: {getattr(e, 'strerror', None) or e}",
                         "choose another --port, 0 for any that is free") from None
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """One engine thread and one event loop. run() it in the main thread, which then gets the signals; stop() it from
    any thread, as a signal does. grace: see above, seconds."""

    def __init__(self, engine: EngineThread, options: ServerOptions, defaults: SamplingParams, grace: float):
        super().__init__(uvicorn.Config(
            self._application, interface="asgi3", lifespan="off", ws="none", http="h11", loop="asyncio",
            log_config=None, log_level="error", access_log=False, server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=int(grace + UNWRITTEN)))
        self.engine = engine
        self._options = options
        self._defaults = defaults
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._service: Service | None = None
        self._stops = 0

    def serve_on(self, bound: socket.socket) -> None:
        """Until it is stopped. QmixError where the model cannot be loaded; what the engine thread raised otherwise."""
        self.engine.start()
        try:
            self.run(sockets=[bound])
        finally:
            self.engine.stop()
            if (running := self.engine.running) is not None:
                running.cancel.set()
            if self.engine.preparation is not None or self.engine.state == "failed":
                self.engine.join()  # else it is loading, which nothing ends before its time; the process need not wait
            bound.close()
        if self.engine.error is not None:
            raise self.engine.error

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._service = Service(self.engine, self._options)
        self._asgi = make_app(self._service, self._defaults)
        if self.engine.state == "failed" or self._stops:  # before there was a loop to be told
            return
        await super().serve(sockets)

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._asgi(scope, receive, send)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self._stops += 1
        self.should_exit = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: there is nothing left to end
                self._loop.call_soon_threadsafe(self._end_answers)

    def _end_answers(self) -> None:
        self.engine.stop()
        if self._service is None or self._loop is None:
            return
        if self._stops > 1 or self._grace <= 0:
            self._service.cancel_all()
        else:
            self._loop.call_later(self._grace, self._service.cancel_all)

    def engine_says(self, state: State) -> None:
        """For EngineThread: without a model there is nothing to serve."""
        if state == "failed":
            self.stop()

