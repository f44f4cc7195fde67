"""Times one repetition of a case on a loaded engine, and records what the engine counted meanwhile.

The clock runs only around the passes: tokens are given, not sampled, in `pp` and in `tg`. A `tg` is teacher forced:
each step appends the next token of the text, whatever the model would have said, so that every run of every store
of a model routes the same text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qmix.bench.cases import Case
from qmix.bench.device import Moved
from qmix.bench.work import Workload
from qmix.engine import Engine, Session


@dataclass(frozen=True, slots=True)
class Repetition:
    """Seconds that `tokens` took, of them stalled: waiting for records. ram_bytes, operations: see work.Workload; where
    there is a device, operations are its own and `moved` tells the rest.

    disk_bytes: records read for this repetition or guessed for it, warmed_bytes: read meanwhile by the warming that
    a load begins. chosen records were needed (once per layer and pass), hits of them were in a slot. recall: share of
    the choices that had been guessed, None where nothing was; wasted_bytes: read for guesses that were wrong.
    """

    tokens: int
    seconds: float
    stalled: float
    ram_bytes: int
    operations: int
    disk_bytes: int
    warmed_bytes: int
    chosen: int
    hits: int
    recall: float | None
    wasted_bytes: int
    moved: Moved | None = None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def repeat(engine: Engine, session: Session, workload: Workload, case: Case, ids: Sequence[int],
           clock: Callable[[], float] = time.perf_counter) -> Repetition:
    """Run `case` on `ids`, as many as it has positions; the session is empty again at the end, however that comes."""
    try:
        if case.depth:
            session.prefill(ids[:case.depth])
        engine.reset_stats()
        warmed = engine.stats()["offload"]["warmed_bytes"]
        start = clock()
        if case.kind == "pp":
            session.prefill(ids[case.depth:])
        else:
            for token in ids[case.depth:]:
                session.decode(token)
        seconds = max(clock() - start, 1e-9)
    finally:
        session.trim(0)
    report = engine.stats()["offload"]
    figures = report["prefill" if case.kind == "pp" else "decode"]
    guesses, computed = report["prefetcher"], figures["computed"]
    fast = workload.bytes_read(case, figures["chosen"] - computed)  # what the fast memory gave
    moved = None if engine.device is None else Moved.of(fast, figures)
    # Only single tokens leave a record to the CPU, so each is one expert's products.
    return Repetition(case.tokens, seconds, figures["stalled_seconds"],
                      fast if moved is None else computed * workload.record + moved.bus_bytes,
                      workload.operations(case) - computed * 2 * workload.expert, figures["bytes_read"],
                      report["warmed_bytes"] - warmed, figures["chosen"], figures["hits"], guesses["recall"],
                      guesses["wasted_bytes"], moved)
