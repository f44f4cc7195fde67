"""Records on their way from one tier into the next faster one, and back.

    below (RAM)  -- up -->  above (VRAM)  -- down -->  below

The two tiers hold different records: 24 GB of VRAM and 16 GB of RAM hold nearly 40 GB. If a record is needed above, it
is first read into the tier below, unless it is there, and then copied up. The copy below becomes a *spare* (cache.py):
it is evicted for anything that needs its slot. If a record leaves the tier above and its spare is gone, it is copied
down into a slot below, if there is one that is free, holds a spare, or holds a record that is less likely to be used.
Otherwise the record remains on the disk only. Distinct records in both: the slots of both, less those on their way up.
If the tier below has a slot for every record (`Plan.inclusive`), no record ever leaves it, and none is copied down.

Who does what. The compute thread owns both tiers and calls everything here. Two lanes (`lane.py`), `up` and `down`,
each a thread with a stream, make the copies. They share one lock and one bell, which is rung at every change. Nobody
takes another object's lock while holding this one.

Who owns a buffer.
    below, going up     pinned from submit() until the compute thread finds that the trip is over and that no chunk of
                        it is on its way (`_sweep`). The record may still be arriving, from the disk or from above; it
                        goes up chunk by chunk as it arrives
    above, arriving     the up lane's, until arrived, failed or given up. Chunks of a trip that was given up may still
                        land, but before the chunks of the next trip to that slot, which follow in the same stream
    above, leaving      free, for the tier. But each chunk of the next record waits until the same chunk of the leaving
                        record was copied down, and its first chunk also waits for the device's work that reads the
                        slot (the fence). Copies down wait for no fence, because both only read
    below, arriving     a record that is copied down is `loading` there, by a load of ours. Who needs it waits for it.
                        It may be given up like any other load; the record is then on the disk

Who waits for whom. Up trips wait for reads of the disk, for down trips and for work that was given to the device
before. Down trips wait only for chunks that the disk's readers were already reading into their slot. Readers wait only
for chunks that are on their way down. So no cycle is possible, however few slots there are. If all slots below are
taken, a demanded record waits, in submit(), until one of the records going up from there has arrived or failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qmix.config import Cancel, ExpertKey
from qmix.device import Device, Event
from qmix.errors import Interrupted, QmixError
from qmix.offload.cache import Reason
from qmix.offload.lane import Lane, Trip
from qmix.offload.reads import DEMAND, POLL, WARM, Load
from qmix.offload.tiers import Tier
from qmix.sizes import MIB

CHUNK = 8 * MIB  # bytes of a copy: 0.3 ms at 25 GB/s
LARGE = 32 * MIB  # of a demanded record, which nothing overtakes
REASONS: tuple[Reason, ...] = ("demand", "speculative", "warm")  # by urgency


@dataclass(slots=True, eq=False)
class _Ascent(Trip):
    """began: nobody but this trip asked for the record in the tier below."""

    began: bool = False


class Copies:
    """Fills slots of a faster tier from `below`: its source, with `take_back` as what it tells of records that leave.
    Close it before the tier below, and before the device. chunk: bytes of a copy, large: of a demanded record's."""

    def __init__(self, below: Tier, device: Device, chunk: int = CHUNK, large: int = 0,
                 clock: Callable[[], float] = time.perf_counter):
        self._below = below
        self._bell = threading.Condition()
        self._up = Lane("up", device.stream(), self._bell, chunk, large, clock)
        self._down = Lane("down", device.stream(), self._bell, chunk, large, clock)
        self._rising: dict[Load, _Ascent] = {}  # until the slot below is let go of
        self._leaving: dict[int, Load] = {}  # the address of a slot above -> the load that takes its record down

    @property
    def bytes_up(self) -> list[int]:
        """Bytes copied up, by urgency."""
        return self._up.bytes

    @property
    def bytes_down(self) -> int:
        return sum(self._down.bytes)

    @property
    def busy_seconds(self) -> float:
        """How long something was on its way up, in all."""
        return self._up.busy_seconds

    @property
    def busy_seconds_down(self) -> float:
        """How long something was on its way down, in all."""
        return self._down.busy_seconds

    def submit(self, key: ExpertKey, slot: Tensor, urgency: int = DEMAND, after: Load | None = None,
               fence: Event | None = None) -> Load:
        """Start to bring a record up. A guess for which there is no slot below fails at once; a demanded
        record waits for one. after: not needed, its chunks are ahead in the same stream."""
        load = Load(key, slot, urgency, None, fence)
        self._sweep()
        began = key not in self._below
        while not self._below.want(key, REASONS[urgency]):
            if urgency != DEMAND or not self._rising:
                load.error = QmixError(f"{key}: no slot for it in the tier below")
                return load
            with self._bell:
                self._bell.wait_for(lambda: any(_is_over(rising) for rising in self._rising))
            self._sweep()
        self._below.pin(key)
        self._below.cache.unmark_spare(key)
        feed, leaving = self._below.load_of(key), self._leaving.get(slot.data_ptr())
        if feed is not None:
            feed.bell = self._ring
        if leaving is not None:
            self._hurry(leaving, urgency)
        self._rising[load] = trip = _Ascent(load, self._below.bytes_of(key), feed, leaving, began)
        self._up.submit(trip)
        return load

    def promote(self, load: Load, urgency: int = DEMAND) -> None:
        """Somebody waits for it now, and so for what it waits for."""
        if not self._hurry(load, urgency):
            return
        trip = self._rising.get(load)
        if trip is not None and trip.leaving is not None:
            self._hurry(trip.leaving, urgency)
        if trip is not None and trip.feed is not None and not trip.feed.over:
            self._below.want(load.key, REASONS[urgency])

    def cancel(self, load: Load) -> None:
        """Nobody wants it any more. Chunks on their way still land in its slot."""
        with self._bell:
            load.cancelled = True  # also where it has just arrived: it is not kept
            self._bell.notify_all()
        if load in self._rising:  # else it comes down, and the tier below, which asks, is not to be changed meanwhile
            self._sweep()

    def wait(self, load: Load, nbytes: int, cancel: Cancel | None = None) -> None:
        """See reads.Readers.wait."""
        with self._bell:
            while load.arrived < nbytes and load.error is None:
                if cancel is not None and cancel:
                    raise Interrupted("cancelled")
                assert not load.cancelled, load.key
                self._bell.wait(POLL)
        if load in self._rising:
            self._sweep()
        if load.error is not None:
            raise load.error

    def take_back(self, key: ExpertKey, slot: Tensor, comes: ExpertKey | None = None) -> None:
        """A record loses its slot above: keep it below where that is worth it, but not in place of the one that comes
        for it. Tier's `evicted`."""
        self._sweep()
        self._forget_failed(key)
        if key in self._below:
            self._below.cache.unmark_spare(key)
        else:
            self._below.adopt(key, self, lambda target, after, fence: self._descend(key, slot, target, after, fence),
                              stays=comes)

    def close(self) -> None:
        """Wait for the chunks that are on their way; what else was to come fails, and so does what is asked later."""
        self._up.close()
        self._down.close()
        self._sweep()

    def _descend(self, key: ExpertKey, slot: Tensor, target: Tensor, after: Load | None, fence: Event | None) -> Load:
        load = Load(key, target, WARM, after, fence)
        if load.after is not None:
            load.after.bell = self._ring
        self._leaving[slot.data_ptr()] = load
        self._down.submit(Trip(load, slot))
        return load

    def _hurry(self, load: Load, urgency: int) -> bool:
        """Whether it is more urgent now than it was."""
        with self._bell:
            if load.over or urgency >= load.urgency:
                return False
            load.urgency = urgency
            self._bell.notify_all()
            return True

    def _sweep(self) -> None:
        """Let go, below, of what has arrived above, and of what will not come."""
        with self._bell:
            over = [load for load in self._rising if _is_over(load)]
            down = [load for load in self._leaving.values() if _is_over(load)]
            self._leaving = {at: load for at, load in self._leaving.items() if load not in down}
        trips = [self._rising.pop(load) for load in over]
        wanted = {load.key for load in self._rising}
        for trip in trips:
            if trip.load.key not in wanted:
                self._let_go(trip)
        for load in down:
            self._forget_failed(load.key)

    def _let_go(self, trip: _Ascent) -> None:
        load, below = trip.load, self._below
        below.unpin([load.key])
        self._forget_failed(load.key)
        if load.key not in below:
            return
        if load.done and not load.cancelled:
            below.cache.mark_spare(load.key)
        elif load.cancelled and trip.began:
            below.cancel_guess(load.key)

    def _forget_failed(self, key: ExpertKey) -> None:
        """A record that could not be brought below would keep its slot until somebody asked for it."""
        load = self._below.load_of(key)
        if load is not None and load.error is not None:
            self._below.drop(key)

    def _ring(self) -> None:
        with self._bell:
            self._bell.notify_all()


def _is_over(load: Load) -> bool:
    return load.over and not load.reading
