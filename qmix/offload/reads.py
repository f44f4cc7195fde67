"""Records on their way into slots: a queue of loads and a few threads that read them, chunk by chunk.

Who waits for whom. One compute thread submits loads and waits for them; a few reader threads take chunks. They share
one lock. Readers sleep on `_work` until there is a chunk to take, read it without the lock, and wake whoever sleeps on
`_arrived`. The compute thread never waits for the lock longer than it takes to choose a chunk.

Who owns a buffer. From submit() until load.done, error or cancel() a slot's bytes belong to the readers, then to the
compute thread again. The exception: chunks that are being read at a cancel() still land. So the next load into the same
slot names the cancelled one as `after`, and does not start before they have landed. In a tier below a GPU, a cancelled
load may be a copy that comes down (`copies.py`); who waits for such a load is rung by its `bell`. If a device reads the
slots, work given to it earlier may still do so: the `fence` says when that work is over.

Order. A chunk is taken from the first load of the lowest urgency number. A demanded record overtakes guesses and
warming, which never hold more than half of the threads, and a guess that turns out right is promoted. The chunks of a
record are handed out in order, so that its first bytes can be used while the last ones are read. But a record that has
to be checked counts as arrived only when it is whole and right.

A read that fails, and a thread that dies, fail the load with an error that names record and file. Whoever waits gets
the error; no thread is left behind and nobody waits for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from qmix.config import Cancel, ExpertKey
from qmix.device import Event
from qmix.errors import Interrupted, QmixError
from qmix.formats import memory

DEMAND, AHEAD, WARM = 0, 1, 2  # urgency; lower goes first
THREADS = 4  # keeps an NVMe disk's queue filled
CHUNK = 4 * 2**20  # bytes of one read
POLL = 0.05  # seconds between two looks at the cancel token


class Records(Protocol):
    """Where records come from; store.RecordFiles."""

    def read(self, key: ExpertKey, target: memoryview, start: int) -> None: ...
    def must_check(self, key: ExpertKey) -> bool: ...
    def check(self, key: ExpertKey, record: Tensor) -> None: ...
    def failed(self, key: ExpertKey, reason: str) -> QmixError: ...


class Load:
    """One record on its way into `slot`, uint8 [bytes]. done: all of it is there, and checked where it must
    be. arrived: bytes from the start that may be used. error: why it will not come. taken: bytes asked for so far,
    which is what a guess that was wrong has cost."""

    __slots__ = ("_checking", "_ends", "after", "arrived", "bell", "cancelled", "done", "error", "fence", "key",
                 "reading", "slot", "taken", "urgency", "view")

    def __init__(self, key: ExpertKey, slot: Tensor, urgency: int, after: Load | None, fence: Event | None = None):
        self.key = key
        self.slot = slot
        self.view = memoryview(b"")  # the slot's bytes, for whoever writes them with the CPU
        self.urgency = urgency
        self.reading: int = 0  # chunks being read now
        # A cancelled load that never began was itself waiting for one that may still be landing.
        self.after: Load | None = after if after is None or after.reading else after.after
        self.fence = fence
        self.bell: Callable[[], None] | None = None  # rung, without a lock, when a chunk has landed or the load failed
        self.arrived = self.taken = 0
        self.done = self.cancelled = False
        self.error: QmixError | None = None
        self._ends: dict[int, int] = {}  # finished chunks beyond the first gap: start -> end
        self._checking: bool | None = None  # whether the record is to be checked; known when it starts

    @property
    def over(self) -> bool:
        return self.done or self.cancelled or self.error is not None


class Readers:
    """Reads records with `threads` threads. Close it; what is being read then is waited for."""

    def __init__(self, records: Records, threads: int = THREADS, chunk: int = CHUNK,
                 clock: Callable[[], float] = time.perf_counter):
        self._records = records
        self._chunk = chunk
        self._clock = clock
        self._lock = threading.Lock()
        self._work, self._arrived = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queues: tuple[list[Load], ...] = ([], [], [])
        self._relaxed = max(1, threads // 2)  # threads that may read what nobody waits for
        self._reading = [0, 0, 0]  # chunks being read, by urgency
        self._closed = False
        self._busy_since = 0.0
        self._busy = 0.0
        self.bytes_read = [0, 0, 0]  # by urgency
        self._alive = threads
        self._threads = [threading.Thread(target=self._run, name=f"qmix-read-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, key: ExpertKey, slot: Tensor, urgency: int = DEMAND, after: Load | None = None,
               fence: Event | None = None) -> Load:
        """Start to read a record into `slot`. after: a cancelled load into the same slot; fence: over when no work on
        a device reads the slot any more."""
        load = Load(key, slot, urgency, after, fence)
        load.view = memory(slot)
        if load.after is not None:
            load.after.bell = self._ring
        with self._lock:
            if self._closed or not self._alive:
                load.error = self._records.failed(key, "the threads that read from the disk are gone")
            else:
                self._queues[urgency].append(load)
                self._work.notify(min(self._alive, 1 + len(load.view) // self._chunk))
        return load

    def promote(self, load: Load, urgency: int = DEMAND) -> None:
        """Somebody waits for it now."""
        with self._lock:
            if load.over or urgency >= load.urgency:
                return
            if load in self._queues[load.urgency]:
                self._queues[load.urgency].remove(load)
                self._queues[urgency].append(load)
            self._reading[load.urgency] -= load.reading
            self._reading[urgency] += load.reading
            load.urgency = urgency
            self._work.notify_all()

    def cancel(self, load: Load) -> None:
        """Nobody wants it any more. Chunks that are being read still land in its slot: see `after`."""
        with self._lock:
            if not load.over:
                load.cancelled = True
                if load in self._queues[load.urgency]:
                    self._queues[load.urgency].remove(load)

    def wait(self, load: Load, nbytes: int, cancel: Cancel | None = None) -> None:
        """Return when the first `nbytes` of the record may be used. Raises the load's error; Interrupted when
        `cancel` is set meanwhile, which leaves the load as it is."""
        with self._lock:
            while load.arrived < nbytes:
                if load.error:
                    raise load.error
                if cancel is not None and cancel:
                    raise Interrupted("cancelled")
                assert not load.cancelled, load.key
                self._arrived.wait(POLL)
        if load.error:
            raise load.error

    @property
    def busy_seconds(self) -> float:
        """How long at least one chunk was being read, in all."""
        with self._lock:
            return self._busy + (self._clock() - self._busy_since if any(self._reading) else 0.0)

    def close(self) -> None:
        """Drop what has not started, wait for what has, end the threads. Later loads fail at once."""
        with self._lock:
            self._closed = True
        self._fail_all("qmix is closing")
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        try:
            while (task := self._next()) is not None:
                self._read(*task)
        finally:
            with self._lock:
                self._alive -= 1
                last = not self._alive and not self._closed
            if last:
                self._fail_all("the threads that read from the disk are gone")

    def _next(self) -> tuple[Load, int, int] | None:
        """The next chunk (load, start, end), sleeping until there is one; None when closed."""
        with self._lock:
            while not self._closed:
                load = self._choose()
                if load is None:
                    self._work.wait()
                    continue
                start = load.taken
                load.taken = end = min(start + self._chunk, len(load.view))
                if not any(self._reading):
                    self._busy_since = self._clock()
                load.reading += 1
                self._reading[load.urgency] += 1
                if end == len(load.view):
                    self._queues[load.urgency].remove(load)
                return load, start, end
        return None

    def _choose(self) -> Load | None:
        for urgency, queue in enumerate(self._queues):
            if urgency != DEMAND and self._reading[AHEAD] + self._reading[WARM] >= self._relaxed:
                return None
            for load in queue:
                if load.after is None or not load.after.reading:
                    load.after = None
                    return load
        return None

    def _read(self, load: Load, start: int, end: int) -> None:
        """Read one chunk and account for it, whatever happens."""
        error: QmixError | None = None
        try:
            if load.fence is not None:
                load.fence.wait()
            if start == 0:
                load._checking = self._records.must_check(load.key)
            self._records.read(load.key, load.view[start:end], start)
            if self._is_last(load, start, end) and (load._checking or self._records.must_check(load.key)):
                # The others have landed: check here, beside the computing and the other reads.
                self._records.check(load.key, load.slot)
        except QmixError as e:
            error = e
        except BaseException as e:
            error = self._records.failed(load.key, f"{type(e).__name__}: {e}")
        with self._lock:
            load.reading -= 1
            self._reading[load.urgency] -= 1
            if not any(self._reading):
                self._busy += self._clock() - self._busy_since
            self.bytes_read[load.urgency] += end - start
            if error and not load.over:
                load.error = error
                if load in self._queues[load.urgency]:
                    self._queues[load.urgency].remove(load)
            elif not error and not load.over:
                self._advance(load, start, end)
            self._arrived.notify_all()
            if load.over or load.urgency != DEMAND:
                self._work.notify_all()  # a slot is free to be filled again, or a guess may go on
        if load.bell is not None:
            load.bell()

    def _ring(self) -> None:
        with self._lock:
            self._work.notify_all()

    def _is_last(self, load: Load, start: int, end: int) -> bool:
        """Note a finished chunk; whether the record is whole now."""
        with self._lock:
            load._ends[start] = end
            return sum(e - s for s, e in load._ends.items()) == len(load.view)

    def _advance(self, load: Load, start: int, end: int) -> None:
        whole = sum(e - s for s, e in load._ends.items()) == len(load.view)
        if whole and load.reading == 0:
            load.arrived, load.done = len(load.view), True
        elif load._checking is False and not whole:
            arrived = load.arrived
            while arrived in load._ends:
                arrived = load._ends[arrived]
            load.arrived = arrived

    def _fail_all(self, reason: str) -> None:
        """What has chunks to be read does not come."""
        with self._lock:
            failed = [load for queue in self._queues for load in queue]
            for queue in self._queues:
                queue.clear()
            for load in failed:
                load.error = self._records.failed(load.key, reason)
            self._arrived.notify_all()
            self._work.notify_all()
        for load in failed:
            if load.bell is not None:
                load.bell()
