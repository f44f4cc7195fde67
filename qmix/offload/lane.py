"""One direction of the bus between two tiers: a stream of the device, and the thread that keeps it supplied.

The thread takes chunks from the trips it was given, the lowest urgency number first. It submits a copy and an event
after it to the stream, and waits for the event. It keeps two chunks on their way: the bus then continues while the host
reacts, and a demanded record still overtakes guesses after two chunks. A chunk counts as arrived when its event is
over.

A chunk may go when its bytes can be read (`feed`) and when nothing else needs its destination: the slot's earlier
record has been copied down (`leaving`), and what others were copying there has landed (`after`). The stream, not the
thread, waits for work of the device that reads the slot (`fence`). A trip that may not go yet is passed over, and
delays no other trip. The lane counts as busy while a chunk is copied, not while it waits for a fence.

A trip that fails, fails its load. A lane whose thread ends fails all its trips, so that nobody waits for ever.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qmix.device import Event, Stream
from qmix.errors import QmixError
from qmix.offload.reads import DEMAND, Load

ON_THE_WAY = 2  # chunks


@dataclass(slots=True, eq=False)
class Trip:
    """A record on its way. load: into which slot, and how far it is; source: copied from here, uint8 [bytes].

    feed: the load that still brings the record to `source`; leaving: the one that still takes from load.slot what was
    there before."""

    load: Load
    source: Tensor
    feed: Load | None = None
    leaving: Load | None = None

    def may_copy(self, end: int) -> bool:
        """Whether the bytes up to `end`, those before them having gone, may go."""
        after, feed, leaving = self.load.after, self.feed, self.leaving
        return ((feed is None or feed.arrived >= end)
                and (after is None or not after.reading)
                and (leaving is None or leaving.arrived >= end or (leaving.over and not leaving.reading)))

    def why_not(self) -> QmixError | None:
        """Why the record will never be at `source`."""
        feed = self.feed
        if feed is None or feed.done:
            return None
        if feed.error is not None:
            return feed.error
        return QmixError(f"{self.load.key}: given up in the tier below") if feed.cancelled else None


@dataclass(slots=True)
class _Flight:
    """A chunk on its way. event: over when it has landed; or why it did not start. fence: of a chunk that waits for
    one, an event of the stream that is over when the wait is."""

    trip: Trip
    start: int
    end: int
    event: Event | BaseException
    fence: Event | None = None


class Lane:
    """name: "up" or "down"; bell: the lock of all lanes and of those who wait for them, rung whenever something has
    changed; chunk: bytes of a copy, large: of a demanded record's. bytes: how many have landed, by urgency."""

    def __init__(self, name: str, stream: Stream, bell: threading.Condition, chunk: int, large: int = 0,
                 clock: Callable[[], float] = time.perf_counter):
        self._name = name
        self._stream = stream
        self._bell = bell
        self._chunk = chunk
        self._large = max(large, chunk)
        self._clock = clock
        self._queue: list[Trip] = []  # with chunks that have not started
        self._flying = 0
        self._busy = 0.0
        self._busy_since: float | None = None  # None: nothing is copied now
        self._closed = False
        self._over = "qmix is closing"  # why nothing is copied any more
        self.bytes = [0, 0, 0]
        self._thread = threading.Thread(target=self._run, name=f"qmix-copy-{name}", daemon=True)
        self._thread.start()

    def submit(self, trip: Trip) -> None:
        """Have it made. After close() it fails at once."""
        with self._bell:
            self._queue.append(trip)
            if self._closed:
                self._fail_all()
            self._bell.notify_all()

    @property
    def busy_seconds(self) -> float:
        """How long chunks were copied, in all."""
        with self._bell:
            return self._busy + (0.0 if self._busy_since is None else self._clock() - self._busy_since)

    def close(self) -> None:
        """Wait for the chunks that are on their way; what else was to come fails."""
        with self._bell:
            self._closed = True
            self._bell.notify_all()
        self._thread.join()

    def _run(self) -> None:
        flights: deque[_Flight] = deque()
        try:
            self._stream.enter()
            while True:
                while len(flights) < ON_THE_WAY and (flight := self._take(wait=not flights)) is not None:
                    flights.append(flight)
                    self._launch(flight)
                if not flights:
                    return
                self._land(flights.popleft())
        finally:
            with self._bell:
                if not self._closed:
                    self._closed, self._over = True, "the thread that copies is gone"
                self._fail_all()

    def _take(self, wait: bool) -> _Flight | None:
        """The next chunk that may go, from now on on its way. None where there is none now, or, having waited for one,
        where the lane is closed."""
        with self._bell:
            while not self._closed:
                trip = self._choose()
                if trip is not None:
                    load = trip.load
                    start = load.taken
                    load.taken = end = self._end(trip)
                    load.reading += 1
                    if not self._flying and not (start == 0 and load.fence is not None):
                        self._busy_since = self._clock()
                    self._flying += 1
                    if end == len(load.slot):
                        self._queue.remove(trip)
                    return _Flight(trip, start, end, QmixError("not started"))
                if not wait:
                    return None
                self._bell.wait()
        return None

    def _choose(self) -> Trip | None:
        for trip in self._queue:
            why = trip.why_not()
            if why is not None and not trip.load.over:
                trip.load.error = why
                self._bell.notify_all()
        self._queue = [trip for trip in self._queue if not trip.load.over]
        for trip in sorted(self._queue, key=lambda trip: trip.load.urgency):
            if trip.may_copy(self._ends(trip)[-1]):
                return trip
        return None

    def _end(self, trip: Trip) -> int:
        """Where the chunk of it that goes now ends."""
        return next(end for end in self._ends(trip) if trip.may_copy(end))

    def _ends(self, trip: Trip) -> list[int]:
        """Where its next chunk may end, the longest first."""
        load = trip.load
        sizes = (self._large, self._chunk) if load.urgency == DEMAND else (self._chunk,)
        return [min(load.taken + size, len(load.slot)) for size in sizes]

    def _launch(self, flight: _Flight) -> None:
        load = flight.trip.load
        target, source = load.slot[flight.start:flight.end], flight.trip.source[flight.start:flight.end]
        try:
            if flight.start == 0 and load.fence is not None:
                self._stream.after(load.fence)
                flight.fence = self._stream.record()
            self._stream.run(lambda: _copy(source, target))
            flight.event = self._stream.record()
        except BaseException as e:
            flight.event = e

    def _land(self, flight: _Flight) -> None:
        """Wait for a chunk and account for it, whatever happens."""
        load, error = flight.trip.load, None
        try:
            if isinstance(flight.event, BaseException):
                raise flight.event
            if flight.fence is not None:
                self._count(False)
                flight.fence.wait()
                self._count(True)
            flight.event.wait()
        except QmixError as e:
            error = QmixError(f"{load.key}: could not be copied {self._name}: {e.message}", e.cure)
        except BaseException as e:
            error = QmixError(f"{load.key}: could not be copied {self._name}: {type(e).__name__}: {e}")
        with self._bell:
            load.reading -= 1
            self._flying -= 1
            self._count(self._flying > 0)
            if error is None:
                self.bytes[load.urgency] += flight.end - flight.start
            if not load.over:
                load.error = error
                if error is None:
                    load.arrived = flight.end
                    load.done = flight.end == len(load.slot)
            self._bell.notify_all()
        if load.bell is not None:
            load.bell()

    def _count(self, busy: bool) -> None:
        """From now on something is copied, or not."""
        with self._bell:
            now = self._clock()
            if self._busy_since is not None:
                self._busy += now - self._busy_since
            self._busy_since = now if busy else None

    def _fail_all(self) -> None:
        for trip in self._queue:
            if not trip.load.over:
                trip.load.error = QmixError(f"{trip.load.key}: could not be copied {self._name}: {self._over}")
        self._queue.clear()
        self._bell.notify_all()


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source, non_blocking=True)
