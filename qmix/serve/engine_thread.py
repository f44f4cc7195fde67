"""The thread that owns the engine: it loads the model, and answers one request after the other.

    state      until                          what submit() does
    loading    the model is in memory         NotReady
    ready      stop()                         takes jobs, Busy where too many wait
    stopping   the job in hand has ended      NotReady
    stopped                                   NotReady
    failed     (the model could not be loaded, or the thread met faults one after the other)   NotReady

The engine belongs to this thread alone; others read `preparation` and `figures`, which are replaced whole.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from qmix import render
from qmix.config import Cancel
from qmix.errors import QmixError, UsageError
from qmix.serve.answering import Answering, Asked
from qmix.serve.events import Event, Failed, Finished
from qmix.serve.fair_queue import Empty, FairQueue, Full
from qmix.serve.prepare import Preparation, Prepared
from qmix.serve.remembered import Remembered
from qmix.serve.sessions import Sessions

if TYPE_CHECKING:
    from qmix.engine import Engine

State = Literal["loading", "ready", "stopping", "stopped", "failed"]
FAULTS = 3  # one after the other, after which the thread ends: the engine is of no use any more
FIGURES_EVERY = 1.0  # seconds between two looks at the engine's figures
MAP_FOR = 10.0  # seconds for which the map of the experts is kept up to date once somebody asked for it


class NotReady(QmixError):
    """The model is not loaded yet, or the server stops."""


class Fault(QmixError):
    """Something in qmix is wrong; what it is stands in the server's output."""


class Busy(QmixError):
    """As many requests wait as may."""


@dataclass(slots=True, eq=False)
class Job:
    """prepared: what to answer. client: whom to be fair to. emit: takes the events, in the engine thread. cancel: set
    it when nobody listens any more."""

    prepared: Prepared
    client: str
    emit: Callable[[Event], None]
    cancel: Cancel = field(default_factory=Cancel)


@dataclass(frozen=True, slots=True)
class Options:
    """waiting: requests that may wait. sessions: KV caches that are kept, as far as the budget has room. draft: see
    Engine.pace."""

    waiting: int = 64
    sessions: int = 4
    draft: int = 7


class EngineThread:
    """open_engine: loads the model; it is called in this thread."""

    def __init__(self, open_engine: Callable[[], Engine], options: Options,
                 clock: Callable[[], float] = time.perf_counter):
        self.options = options
        self.state: State = "loading"
        self.error: BaseException | None = None  # why it failed
        self.preparation: Preparation | None = None
        self.figures: dict[str, Any] = {}  # Engine.stats, as of a moment ago
        self.expert_map: dict[str, Any] = {}  # Engine.expert_map, as of a moment ago where somebody asks for it
        self.running: Job | None = None
        self.remembered = Remembered()
        self._open_engine = open_engine
        self._said: Callable[[State], None] = lambda state: None
        self._clock = clock
        self._queue: FairQueue[Job] = FairQueue(options.waiting)
        self._looked = 0.0
        self._map_asked = -MAP_FOR
        self._thread = threading.Thread(target=self._run, name="qmix-engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def on_state(self, said: Callable[[State], None]) -> None:
        """Before start(): who is told, in the engine thread, that the model is "ready" or has "failed"."""
        self._said = said

    def start(self) -> None:
        self._thread.start()

    def ready(self) -> Preparation:
        """NotReady unless the model is loaded and the thread takes jobs."""
        if self.state != "ready" or self.preparation is None:
            raise NotReady({"loading": "the model is being loaded", "failed": "the model could not be loaded"}.get(
                self.state, "the server stops"), "try again in a moment" if self.state == "loading" else None)
        return self.preparation

    def ask_map(self) -> dict[str, Any]:
        """`expert_map`, which from now on is kept up to date for a while; {} before the model is loaded."""
        self._map_asked = self._clock()
        return self.expert_map

    def submit(self, job: Job) -> None:
        """Busy, or NotReady."""
        self.ready()
        try:
            self._queue.put(job.client, job)
        except Full:
            raise Busy(f"{self.options.waiting} requests are waiting already", "try again later") from None

    def leave(self, job: Job) -> None:
        """Nobody waits for this job any more: it is taken out of the queue, or its computing ends before the next
        record."""
        job.cancel.set()
        self._queue.drop(job)

    def stop(self) -> None:
        """No further jobs; those that wait fail. The one in hand goes on: set its `cancel` to end it."""
        if self.state not in ("failed", "stopped"):
            self.state = "stopping"
        for job in self._queue.close():
            job.emit(Failed(NotReady("the server stops")))

    def join(self, timeout: float | None = None) -> bool:
        """Whether the thread has ended, after at most `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with ExitStack() as opened:
                engine = opened.enter_context(self._open_engine())
                sessions = Sessions(engine, self.options.sessions)
                self.preparation = Preparation(engine.tokenizer, engine.plan.context, self.remembered, engine.exact)
                self.figures, self.expert_map = engine.stats(), engine.expert_map()
                engine.on_layer(partial(self._look_between, engine))
                if self.state == "loading":
                    self.state = "ready"
                    self._said("ready")
                self._serve(engine, sessions)
            self.state = "stopped"
        except BaseException as e:
            self.error, self.state = e, "failed"
            for job in self._queue.close():
                job.emit(Failed(NotReady("the server met a fault and stops")))
            self._said("failed")

    def _serve(self, engine: Engine, sessions: Sessions) -> None:
        """A fault fails the job in hand and its session, and no other one, until FAULTS come one after the other."""
        faults = 0
        while (job := self._next(engine)) is not None:
            if job.cancel:
                continue
            self.running = job
            try:
                self._answer(engine, sessions, job)
                job.emit(Finished())
                faults = 0
            except QmixError as e:
                if not isinstance(e, UsageError | NotReady):
                    render.say(f"a request failed: {e}")
                job.emit(Failed(e))
                faults = 0
            except BaseException as e:
                job.emit(Failed(Fault("a fault in qmix; the server's output has the details")))
                faults += 1
                if not isinstance(e, Exception) or isinstance(e, MemoryError) or faults == FAULTS:
                    raise
                render.say("".join(traceback.format_exception(e)).rstrip())
                sessions.forget_taken()
            finally:
                sessions.release()
                self.running = None
                self._look(engine, now=True)

    def _next(self, engine: Engine) -> Job | None:
        """The next job, None for none any more. Meanwhile records may arrive."""
        while True:
            try:
                return self._queue.get(FIGURES_EVERY)
            except Empty:
                self._look(engine)

    def _answer(self, engine: Engine, sessions: Sessions, job: Job) -> None:
        """All choices of all prompts of a job, one after the other."""
        prepared, generation = job.prepared, job.prepared.generation
        pace = engine.pace(self.options.draft)
        choices = len(prepared.prompts) * generation.choices
        for choice in range(choices):
            prompt = prepared.prompts[choice // generation.choices]
            params, nth = generation.params, choice % generation.choices
            if params.seed is not None and nth:
                params = replace(params, seed=(params.seed + nth) % 2**63)
            answering = Answering(engine.tokenizer, Asked(
                choice, prompt, params, prepared.raw, generation.top_logprobs, not generation.parallel,
                None if prepared.grammar is None else prepared.grammar.constraint()))
            session = sessions.take(prompt.ids)
            for event in answering.answer(session, job.cancel, pace, self._clock):
                job.emit(event)
                self._look(engine)
            if answering.remembered is not None:
                self.remembered.add(*answering.remembered)
            if job.cancel:
                if choice + 1 < choices:  # an answer of fewer choices than asked for is no whole one
                    raise NotReady("the server stops", "the answer is not complete")
                return

    def _look_between(self, engine: Engine) -> None:
        """Between two layers, within an answer, which figures that cannot be read must not end: the old ones stay."""
        with suppress(OSError):
            self._look(engine)

    def _look(self, engine: Engine, now: bool = False) -> None:
        """Note the engine's figures, now and then."""
        clock = self._clock()
        if now or clock - self._looked >= FIGURES_EVERY:
            self.figures, self._looked = engine.stats(), clock
            if clock - self._map_asked < MAP_FOR:
                self.expert_map = engine.expert_map()
