"""Records on their way from one tier into the next faster one, and back.

The two tiers exclude each other: what is above needs no slot below, so that 24 GB above 16 GB hold 40. A record
that is wanted above is first brought into the tier below, if it is only on the disk, then copied up, then
dropped below. A record that leaves the tier above goes down into a slot below, if there is a free one or one
whose record is less likely to be wanted; otherwise it is on the disk still.

Who waits on whom. The compute thread owns both tiers and calls everything here but `_run`. One copying thread, which
stands for the copy stream of a GPU, takes loads whose record below is whole, lowest urgency first, and copies
chunk by chunk, so that a demanded record overtakes guesses. From submit() until the compute thread sees the load
over (`_sweep`), the record below is pinned and its bytes do not move.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

from qmix.config import Cancel, ExpertKey
from qmix.errors import Interrupted, QmixError
from qmix.offload.reads import CHUNK, DEMAND, POLL, Load
from qmix.offload.tiers import Tier

REASONS = ("demand", "speculative", "warm")  # by urgency


def copy_bytes(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


class Copies:
    """Fills slots of a faster tier from `below`. Close it before the tier below."""

    def __init__(self, below: Tier, chunk: int = CHUNK, copy: Callable[[Tensor, Tensor], None] = copy_bytes):
        self._below = below
        self._chunk = chunk
        self._copy = copy
        self._lock = threading.Lock()
        self._work, self._arrived = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: list[Load] = []
        # A load -> the record's slot below, and the load that brings it in there.
        self._fetching: dict[Load, tuple[Tensor, Load | None]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="qmix-copy", daemon=True)
        self._thread.start()

    def submit(self, key: ExpertKey, slot: Tensor, urgency: int = DEMAND, after: Load | None = None) -> Load:
        """Start to bring a record up. A guess for which there is no slot below fails at once; a demanded
        record waits for one."""
        load = Load(key, slot, urgency, after)
        self._sweep()
        while not self._below.want(key, REASONS[urgency]):  # type: ignore[arg-type]
            if urgency != DEMAND or not self._fetching:
                load.error = QmixError(f"{key}: no slot for it in the tier below")
                return load
            with self._lock:
                self._arrived.wait(POLL)
            self._sweep()
        self._below.pin(key)
        with self._lock:
            self._fetching[load] = self._below.bytes_of(key), self._below.load_of(key)
            self._queue.append(load)
            self._work.notify()
        return load

    def promote(self, load: Load, urgency: int = DEMAND) -> None:
        if load.over or urgency >= load.urgency:
            return
        self._below.want(load.key, REASONS[urgency])  # type: ignore[arg-type]
        with self._lock:
            load.urgency = urgency
            self._work.notify()

    def cancel(self, load: Load) -> None:
        with self._lock:
            if not load.over:
                load.cancelled = True
        self._sweep()

    def wait(self, load: Load, nbytes: int, cancel: Cancel | None = None) -> None:
        """See reads.Readers.wait."""
        with self._lock:
            while load.arrived < nbytes and load.error is None:
                if cancel is not None and cancel:
                    raise Interrupted("cancelled")
                self._arrived.wait(POLL)
        self._sweep()
        if load.error:
            raise load.error

    def take_back(self, key: ExpertKey, slot: Tensor) -> None:
        """A record loses its slot above: keep it below where that is worth it. Tier's `evicted`."""
        self._sweep()
        self._below.adopt(key, lambda target: self._copy(slot, target))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._work.notify()
        self._thread.join()
        for load in self._fetching:
            if not load.over:
                load.cancelled = True
        self._sweep()

    def _sweep(self) -> None:
        """Let go, below, of what has arrived above, and of what will not come."""
        with self._lock:
            over = [load for load in self._fetching if load.over and not load.reading]
            for load in over:
                del self._fetching[load]
                if load in self._queue:
                    self._queue.remove(load)
            wanted = {load.key for load in self._fetching}
        for load in over:
            if load.key not in wanted:
                self._below.unpin([load.key])
                if load.done and load.key in self._below:
                    self._below.drop(load.key)

    def _run(self) -> None:
        while (task := self._next()) is not None:
            load, below = task
            error: QmixError | None = None
            start, end = load.arrived, min(load.arrived + self._chunk, len(load.slot))
            try:
                self._copy(below[start:end], load.slot[start:end])
            except BaseException as e:
                error = QmixError(f"{load.key}: could not be copied to the faster tier: {type(e).__name__}: {e}")
            with self._lock:
                load.reading -= 1
                if error is not None:
                    load.error = error
                elif not load.cancelled:
                    load.arrived = end
                    load.done = end == len(load.slot)
                self._arrived.notify_all()

    def _next(self) -> tuple[Load, Tensor] | None:
        """A load whose next chunk can be copied now, and where from; None when closed."""
        with self._lock:
            while not self._closed:
                for load in sorted(self._queue, key=lambda load: load.urgency):
                    if load.over or (load.after is not None and load.after.reading):
                        continue
                    below, source = self._fetching[load]
                    if source is not None and source.error is not None:
                        load.error = source.error
                        self._arrived.notify_all()
                    elif source is None or source.done:
                        load.reading += 1
                        return load, below
                # The tier below has no bell for this thread; a GPU's events are polled just so.
                self._work.wait(0.001 if any(not load.over for load in self._queue) else None)
        return None
