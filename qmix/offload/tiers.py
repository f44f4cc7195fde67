"""A tier: a fixed pool of slots, the table that says which record is in which, and what fills them.

    disk (complete)  ->  RAM  ->  VRAM

Each arrow is one Tier: it has slots of its own and a source that brings a record into one. The source of
the RAM tier is the disk (`reads.Readers`); a tier above takes what the tier below has (`copies.py`).

A slot belongs to one key from admission to eviction. In between it is
    loading   its bytes are arriving, and belong to the source
    ready     its bytes are there; a kernel may read them
    pinned    ready or loading, and needed by the pass that runs: it does not leave
All of this is the compute thread's own; only `reads.py` knows of other threads. A load that is given up leaves
its slot at once, and the next load into that slot waits for its last chunks (`after`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from qmix.config import Cancel, ExpertKey
from qmix.errors import QmixError
from qmix.offload.cache import Cache, Reason
from qmix.offload.reads import AHEAD, DEMAND, WARM, Load

URGENCY = {"demand": DEMAND, "prefill": DEMAND, "speculative": AHEAD, "warm": WARM}


class Source(Protocol):
    """Brings records into slots, in the background; reads.Readers, copies.Copies."""

    def submit(self, key: ExpertKey, slot: Tensor, urgency: int = DEMAND, after: Load | None = None) -> Load: ...
    def promote(self, load: Load, urgency: int = DEMAND) -> None: ...
    def cancel(self, load: Load) -> None: ...
    def wait(self, load: Load, nbytes: int, cancel: Cancel | None = None) -> None: ...


class Tier:
    """Slots, filled from `source` as `cache` decides. pool: [S, bytes] uint8; of a mixed store one such pool for each
    kind of record, in the order of the kinds.

    evicted: told (key, slot tensor) of each whole record that is about to lose its slot, for a tier that
    hands what leaves it to the one below.
    """

    def __init__(self, pool: Tensor | Sequence[Tensor], cache: Cache, source: Source,
                 evicted: Callable[[ExpertKey, Tensor], None] | None = None):
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
        self._draining: dict[int, Load] = {}  # given up, but its last chunks may still land in the slot
        self._pinned: set[ExpertKey] = set()

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
            del self._loading[key]
            return True
        return False

    def load_of(self, key: ExpertKey) -> Load | None:
        """How a record that is not ready is coming along."""
        return self._loading.get(key)

    def want(self, key: ExpertKey, reason: Reason) -> bool:
        """Have the record brought in, or sooner if it is on its way; again, if it failed on its way. False: no slot
        for it now, since all are pinned, or since for a guess nothing may be displaced."""
        load = self._loading.get(key)
        if load is not None and load.error is not None:
            self.drop(key)
            load = None
        if load is not None:
            self._source.promote(load, URGENCY[reason])
        if key in self._slots:
            return True
        leaves = self.cache.admit(key, reason, self._pinned)
        if leaves is False:
            return False
        if leaves is not True:
            self._release(leaves)
        slot = self._free[self.cache.kind_of(key)].pop()
        self._slots[key] = slot
        self._loading[key] = self._source.submit(key, self.slots[slot], URGENCY[reason], self._draining.pop(slot, None))
        return True

    def wait(self, key: ExpertKey, nbytes: int, cancel: Cancel | None = None) -> None:
        """Return when the first `nbytes` of the record may be read. Raises what kept it from coming, after
        which its slot is free again; Interrupted leaves the load running."""
        load = self._loading.get(key)
        if load is None:
            return
        try:
            self._source.wait(load, nbytes, cancel)
        except QmixError:
            if load.error is not None:  # else it was interrupted
                self.drop(key)
            raise
        if load.done:
            del self._loading[key]

    def slot(self, key: ExpertKey) -> int:
        """The index of its slot."""
        return self._slots[key]

    def bytes_of(self, key: ExpertKey) -> Tensor:
        """Its slot, uint8 [bytes]."""
        return self.slots[self._slots[key]]

    def adopt(self, key: ExpertKey, fill: Callable[[Tensor], None]) -> bool:
        """Take in a whole record from elsewhere: fill(slot) writes it. False where no slot is worth it."""
        if key in self._slots:
            return True
        leaves = self.cache.admit(key, "warm", self._pinned | self._loading.keys())
        if leaves is False:
            return False
        if leaves is not True:
            self._release(leaves)
        free = self._free[self.cache.kind_of(key)]
        slot = free.pop()
        draining = self._draining.pop(slot, None)
        landing = draining is not None and (draining.reading or (draining.after and draining.after.reading))
        if draining is not None and landing:  # its last chunks would land in the new record
            free.append(slot)
            self._draining[slot] = draining
            self.cache.remove(key)
            return False
        fill(self.slots[slot])
        self._slots[key] = slot
        return True

    def pin(self, key: ExpertKey) -> None:
        self._pinned.add(key)

    def unpin(self, keys: Iterable[ExpertKey]) -> None:
        self._pinned.difference_update(keys)

    def cancel_guess(self, key: ExpertKey) -> int:
        """Give up a guess that turned out wrong, unless it is there already; the bytes read for it."""
        load = self._loading.get(key)
        if load is None or load.done or load.urgency == DEMAND:
            return 0
        taken = load.taken
        self.drop(key)
        return taken

    def drop(self, key: ExpertKey) -> None:
        """Forget a record; its slot is free."""
        self.cache.remove(key)
        self._release(key)

    def _release(self, key: ExpertKey) -> None:
        slot = self._slots.pop(key)
        load = self._loading.pop(key, None)
        if load is not None and not load.done:
            self._source.cancel(load)
            if load.reading or load.after is not None:
                self._draining[slot] = load
        elif self._evicted is not None:
            self._evicted(key, self.slots[slot])
        self._free[self.cache.kind_of(key)].append(slot)
