"""The event loop's side of the engine thread: a Generation goes in, an async iterator of Events comes out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from starlette.concurrency import run_in_threadpool

from qmix.serve.engine_thread import EngineThread, Job
from qmix.serve.events import Event, Failed, Finished
from qmix.serve.figures import Figures
from qmix.serve.metrics import Metrics
from qmix.serve.request import Generation

if TYPE_CHECKING:
    from qmix.serve.prepare import Preparation, Prepared

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """names: under which the model is served, the first one is told. ping: seconds between two comments in a stream
    that says nothing. keys: of which a request must have one, none: no key is asked for. hosts: what a request's Host
    may be, empty for all. origins: of web pages that may ask. largest: bytes of a request's body."""

    names: tuple[str, ...]
    ping: float = 10.0
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    largest: int = 32 << 20


class Service:
    """Of one event loop."""

    def __init__(self, engine: EngineThread, options: ServerOptions, clock: Callable[[], float] = time.monotonic):
        self.engine = engine
        self.options = options
        self.created = int(time.time())
        self.metrics = Metrics(options.names[0], self.figures)
        self._clock = clock
        self._encoding = asyncio.Lock()  # prompts are encoded one at a time: nothing says that a template is reentrant
        self._answers: set[Answer] = set()

    def figures(self) -> Figures:
        return Figures(int(self.engine.running is not None), self.engine.waiting, self.engine.figures)

    async def with_preparation(self, work: Callable[[Preparation], Result]) -> Result:
        """`work` in a worker thread. NotReady before the model is there."""
        preparation = self.engine.ready()
        async with self._encoding:
            return await run_in_threadpool(work, preparation)

    async def answer(self, generation: Generation, client: str) -> Answer:
        """A UsageError that says what is wrong with the request; Busy; NotReady."""
        arrived = self._clock()
        prepared = await self.with_preparation(lambda preparation: preparation.prepare(generation))
        answer = Answer(self, prepared, client, self.metrics.watch(arrived, self._clock))
        self.engine.submit(answer.job)
        self._answers.add(answer)
        return answer

    def cancel_all(self) -> None:
        """End what is computed. Its streams end in their own form."""
        for answer in list(self._answers):
            answer.job.cancel.set()

    def forget(self, answer: Answer) -> None:
        self._answers.discard(answer)

    @property
    def context(self) -> int | None:
        """Tokens; None before the model is loaded."""
        preparation = self.engine.preparation
        return None if preparation is None else preparation.context

    @property
    def answering(self) -> int:
        """Requests whose answers are not at their end."""
        return len(self._answers)


class Answer:
    """The events of one request, once. Close it in any case: then nothing more is computed for it."""

    def __init__(self, service: Service, prepared: Prepared, client: str, see: Callable[[Event], None]):
        self._service = service
        self._see = see
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.prepared = prepared
        self.job = Job(prepared, client, self._emit)

    def _emit(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """Until Finished, which is left out. Raises the error of Failed."""
        try:
            while True:
                event = await self._events.get()
                self._see(event)
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    return
                yield event
        finally:
            self.close()

    def close(self) -> None:
        self._service.engine.leave(self.job)
        self._service.forget(self)
