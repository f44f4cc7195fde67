"""A tier: a fixed pool of slots, the table that says which record is in which slot, and the source that fills them.

    disk (complete)  ->  RAM  ->  VRAM

Each arrow is one Tier. It has slots of its own and a source that brings a record into one. The source of the RAM tier
is the disk (`reads.Readers`). A tier above takes records from the tier below (`copies.py`), and copies evicted records
back down, so a tier below has loads of two owners.

A slot belongs to one key from admission to eviction. In between it is
    loading   its bytes are arriving, and belong to the load's owner
    ready     its bytes are there; a kernel may read them
    pinned    ready or loading, and needed by the pass that runs: it does not leave
All of this belongs to the compute thread; only the sources know of other threads. A load that is given up leaves its
slot at once. The next load into that slot waits for the last chunks of the earlier one (`after`), and for work of the
device that still reads the slot (`used`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from qmix.config import Cancel, ExpertKey
from qmix.device import Event
from qmix.errors import QmixError
from qmix.offload.cache import Cache, Reason
from qmix.offload.reads import AHEAD, DEMAND, WARM, Load

URGENCY = {"demand": DEMAND, "prefill": DEMAND, "speculative": AHEAD, "warm": WARM}


class Source(Protocol):
    """Brings records into slots, in the background; reads.Readers, copies.Copies."""

    def submit(self, key: ExpertKey, slot: Tensor, urgency: int = DEMAND, after: Load | None = None,
               fence: Event | None = None) -> Load: ...
    def promote(self, load: Load, urgency: int = DEMAND) -> None: ...
    def cancel(self, load: Load) -> None: ...
    def wait(self, load: Load, nbytes: int, cancel: Cancel | None = None) -> None: ...


class Tier:
    """Slots, filled from `source` as `cache` decides. pool: [S, bytes] uint8; of a mixed store one such pool for each
    kind of record, in the order of the kinds.

    evicted: told (key, slot tensor, the key that comes instead) of each whole record that is about to lose its slot,
    for a tier that hands what leaves it to the one below.
    """

    def __init__(self, pool: Tensor | Sequence[Tensor], cache: Cache, source: Source,
                 evicted: Callable[[ExpertKey, Tensor, ExpertKey | None], None] | None = None):
        pools = [pool] if isinstance(pool, Tensor) else pool
        self.slots = [slot for one in pools for slot in one]
        assert cache.slots == len(self.slots)
        self.cache = cache
        self._source = source
        self._evicted = evicted
        self._slots: dict[ExpertKey, int] = {}
        ends = list(accumulate(map(len, pools)))
        self._free = [list(range(end - 1, end - len(one) - 1, -1)) for one, end in zip(pools, ends, strict=True)]
        self._loading: dict[ExpertKey, Load] = {}
        self._owners: dict[ExpertKey, Source] = {}  # of loads that are not the source's
        self._draining: dict[int, Load] = {}  # given up, but its last chunks may still land in the slot
        self._used: dict[int, Event] = {}  # a slot -> over when the device has read it for the last time
        self._pinned: set[ExpertKey] = set()
        self._new: dict[int, set[ExpertKey]] = {}  # by layer: admitted, and not told by `arrived` yet
        self._entered: Callable[[ExpertKey, int], None] | None = None  # see follow
        self._left: Callable[[ExpertKey], None] | None = None

    def __contains__(self, key: ExpertKey) -> bool:
        """In a slot, or on its way into one."""
        return key in self._slots

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._slots)

    def ready(self, key: ExpertKey) -> bool:
        """Whether the whole record can be used now."""
        load = self._loading.get(key)
        if load is None:
            return key in self._slots
        if load.done:
            self._landed(key)
            return True
        return False

    def follow(self, entered: Callable[[ExpertKey, int], None], left: Callable[[ExpertKey], None]) -> None:
        """From now on tell entered(key, slot) of each record that turns out to be whole, and left(key) before the slot
        of any record is given away. One may follow."""
        self._entered, self._left = entered, left
        for key, slot in self._slots.items():
            if key not in self._loading:
                entered(key, slot)

    def arrived(self, layer: int) -> list[ExpertKey]:
        """Its records that can be used now, and were not named by an earlier call."""
        new = self._new.get(layer)
        if not new:
            return []
        found = [key for key in new if self.ready(key)]
        new.difference_update(found)
        return found

    def load_of(self, key: ExpertKey) -> Load | None:
        """How a record that is not ready is coming along."""
        return self._loading.get(key)

    def want(self, key: ExpertKey, reason: Reason) -> bool:
        """Have the record brought in, or sooner if it is on its way; again, if it failed on its way. False: no slot
        for it now, since all are pinned, or since for a guess nothing may be displaced, here or where it comes from."""
        load = self._loading.get(key)
        if load is not None and load.error is not None:
            self.drop(key)
            load = None
        if load is not None:
            self._owner(key).promote(load, URGENCY[reason])
        if key in self._slots:
            return True
        slot = self._admit(key, reason, self._pinned)
        if slot is None:
            return False
        self._loading[key] = load = self._source.submit(key, self.slots[slot], URGENCY[reason],
                                                        self._draining.pop(slot, None), self._used.get(slot))
        if load.error is not None and load.urgency != DEMAND:
            self.drop(key)  # the source has no room for a guess
            return False
        return True

    def wait(self, key: ExpertKey, nbytes: int, cancel: Cancel | None = None) -> None:
        """Return when the first `nbytes` of the record may be read. Raises what kept it from coming, after
        which its slot is free again; Interrupted leaves the load running."""
        load = self._loading.get(key)
        if load is None:
            return
        try:
            self._owner(key).wait(load, nbytes, cancel)
        except QmixError:
            if load.error is not None:  # else it was interrupted
                self.drop(key)
            raise
        if load.done:
            self._landed(key)

    def used(self, keys: Iterable[ExpertKey], event: Event) -> None:
        """Work that reads these records was given to a device, and is over when `event` is: what comes into their
        slots next waits for it. Events of one stream, the later ones later."""
        for key in keys:
            self._used[self._slots[key]] = event

    def read(self, slots: Iterable[int], event: Event) -> None:
        """The same of slots, whatever is in them."""
        self._used.update(dict.fromkeys(slots, event))

    def slot(self, key: ExpertKey) -> int:
        """The index of its slot."""
        return self._slots[key]

    def bytes_of(self, key: ExpertKey) -> Tensor:
        """Its slot, uint8 [bytes]."""
        return self.slots[self._slots[key]]

    def adopt(self, key: ExpertKey, owner: Source, begin: Callable[[Tensor, Load | None, Event | None], Load],
              stays: ExpertKey | None = None) -> bool:
        """Take in a record that others have and bring, if it is worth a slot: begin(slot, after, fence) starts that,
        and `owner` is asked what the source is asked of its own loads. False where no slot is worth it. stays: a
        record that is not worth less, whatever its score."""
        busy = {key for key in list(self._loading) if not self.ready(key) and not self._loading[key].over}
        if stays is not None:
            busy.add(stays)
        slot = self._admit(key, "warm", self._pinned | busy)
        if slot is None:
            return False
        self._owners[key] = owner
        self._loading[key] = begin(self.slots[slot], self._draining.pop(slot, None), self._used.get(slot))
        return True

    def pin(self, key: ExpertKey) -> bool:
        """Whether it was not pinned before: else whoever pinned it unpins it too."""
        if key in self._pinned:
            return False
        self._pinned.add(key)
        return True

    def unpin(self, keys: Iterable[ExpertKey]) -> None:
        self._pinned.difference_update(keys)

    def cancel_guess(self, key: ExpertKey) -> int:
        """Give up a guess that turned out wrong, unless it is there already; the bytes read for it. What was adopted
        was no guess."""
        load = self._loading.get(key)
        if load is None or load.done or load.urgency == DEMAND or key in self._owners:
            return 0
        taken = load.taken
        self.drop(key)
        return taken

    def drop(self, key: ExpertKey) -> None:
        """Forget a record; its slot is free."""
        self.cache.remove(key)
        self._release(key)

    def _admit(self, key: ExpertKey, reason: Reason, busy: Collection[ExpertKey]) -> int | None:
        """The slot that is the record's from now on."""
        leaves = self.cache.admit(key, reason, busy)
        if leaves is False:
            return None
        if leaves is not True:
            self._release(leaves, key)
        slot = self._slots[key] = self._free[self.cache.kind_of(key)].pop()
        self._new.setdefault(key.layer, set()).add(key)
        return slot

    def _release(self, key: ExpertKey, comes: ExpertKey | None = None) -> None:
        slot = self._slots.pop(key)
        if self._left is not None:
            self._left(key)
        self._new[key.layer].discard(key)
        load, owner = self._loading.pop(key, None), self._owners.pop(key, self._source)
        if load is not None and not load.done:
            owner.cancel(load)
            if load.reading or load.after is not None:
                self._draining[slot] = load
        elif self._evicted is not None:
            self._evicted(key, self.slots[slot], comes)
        self._free[self.cache.kind_of(key)].append(slot)

    def _owner(self, key: ExpertKey) -> Source:
        return self._owners.get(key, self._source)

    def _landed(self, key: ExpertKey) -> None:
        del self._loading[key]
        self._owners.pop(key, None)
        if self._entered is not None:
            self._entered(key, self._slots[key])
