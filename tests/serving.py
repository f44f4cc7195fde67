"""A server on a free port in this process, over the bundled model or over an engine that says what a test wrote."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import torch

from qmix.config import Cancel, SamplingParams
from qmix.errors import Interrupted
from qmix.serve.engine_thread import EngineThread, Options
from qmix.serve.server import LOOPBACK, Server, listen, url_of
from qmix.serve.service import ServerOptions
from qmix.tokenizer import Tokenizer
from qmix.tokenizer.vocabulary import OWN, Rendered

GREEDY = SamplingParams(temperature=0)
ASK = {"messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"


class ScriptedSession:
    """A session whose answers an engine's script says. An end token follows what the script says."""

    warm = True

    def __init__(self, engine: ScriptedEngine):
        self._engine = engine
        self.context = engine.plan.context
        self.ids: list[int] = []
        self.read: list[int] = []  # how many ids each prefill was given
        self._answer: Iterator[int] = iter(())

    @property
    def length(self) -> int:
        return len(self.ids)

    def trim(self, length: int) -> None:
        del self.ids[length:]

    def prefill(self, ids: Sequence[int], cancel: Cancel | None = None) -> torch.Tensor:
        self.read.append(len(ids))
        self._wait(cancel)
        self.ids += ids
        self._answer = iter(self._engine.script(self.ids))
        return self._next()

    def decode(self, token: int, cancel: Cancel | None = None) -> torch.Tensor:
        self._wait(cancel)
        self.ids.append(token)
        return self._next()

    def _wait(self, cancel: Cancel | None) -> None:
        """Each pass goes on when the test lets it, or ends when it is cancelled."""
        self._engine.passes += 1
        while not self._engine.may_go.wait(0.005):
            if cancel:
                raise Interrupted("cancelled")

    def _next(self) -> torch.Tensor:
        logits = self._engine.floor.clone()
        logits[next(self._answer, self._engine.tokenizer.eos_ids[0])] = 1e4
        return logits


class ScriptedEngine:
    """script: the ids of the answer to the ids of a prompt. Where these are not allowed, any other id that is more than
    white space comes. may_go: clear it, and passes wait."""

    exact = False

    def __init__(self, tokenizer: Tokenizer, script: Callable[[Sequence[int]], Sequence[int]], context: int = 4096):
        self.tokenizer = tokenizer
        self.script = script
        self.plan = SimpleNamespace(context=context)
        self.may_go = threading.Event()
        self.may_go.set()
        self.passes = 0
        self.sessions: list[ScriptedSession] = []
        self.floor = torch.tensor([20.0 * bool(tokenizer.piece(i).data.strip()) for i in range(tokenizer.rows)])

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def session(self) -> ScriptedSession:
        self.sessions.append(ScriptedSession(self))
        return self.sessions[-1]

    def pace(self, longest: int) -> None:
        return None

    def on_layer(self, notify: Callable[[], None]) -> None:
        pass

    def expert_map(self) -> dict[str, Any]:
        return {"layers": [0], "experts": 2, "tokens": self.passes, "tiers": [], "held": ["r."], "heat": [[50, 0]]}

    def stats(self) -> dict[str, Any]:
        phase = dict.fromkeys(("chosen", "hits", "prefetched", "below", "bytes_read", "bytes_up", "bytes_down"), 0)
        return {"experts": {"ram": 100.0}, "memory": {"budget": 1, "peak": 1},
                "offload": {"prefill": phase, "decode": phase, "prefetcher": {"issued": 0}}}


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """ids of a text as a model writes it: what spells a control token is that token."""
    vocabulary = tokenizer._vocabulary
    return vocabulary.encode_rendered([Rendered(text, OWN * len(text))])


def says(tokenizer: Tokenizer, *texts: str) -> Callable[[Sequence[int]], Sequence[int]]:
    """A script: the first answer, then the second; the last one is said again and again."""
    left = [spelled(tokenizer, text) for text in texts]
    return lambda ids: left.pop(0) if len(left) > 1 else left[0]


class Running:
    """A server that runs. url: without a path; thread: of the event loop."""

    def __init__(self, server: Server, url: str, thread: threading.Thread, errors: list[BaseException]):
        self.server = server
        self.url = url
        self.thread = thread
        self.errors = errors

    @property
    def engine(self) -> EngineThread:
        return self.server.engine

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not come"
            time.sleep(0.005)

    def idle(self) -> None:
        self.until(lambda: self.engine.running is None and not self.engine.waiting)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextmanager
def serving(open_engine: Callable[[], Any], options: Options | None = None, grace: float = 5.0, ready: bool = True,
            defaults: SamplingParams = GREEDY, **server: Any) -> Iterator[Running]:
    bound = listen("127.0.0.1", 0)
    engine = EngineThread(open_engine, options or Options())
    made = Server(engine, ServerOptions(**{"names": ("demo",), "hosts": LOOPBACK, **server}), defaults, grace)
    engine.on_state(made.engine_says)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            made.serve_on(bound)
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run, name="server")
    url = url_of(bound)
    thread.start()
    running = Running(made, url, thread, errors)
    try:
        running.until(lambda: made.started or bool(errors))
        if ready:
            running.until(lambda: httpx.get(url + "/health").status_code == 200)
        yield running
    finally:
        running.stop()


def raw(url: str, body: Any, path: str = CHAT) -> socket.socket:
    """A connection on which a request was sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                       + data)
    return connection
