"""Two tiers over fake records, the CPU for a device, whose streams a test holds back or lets wait at random."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from test_reads import CHUNK, RECORD, FakeRecords, key
from test_reads import content as slow_content
from test_tiers import LAYERS, slots_add_up
from torch import Tensor

from qmix.config import ExpertKey
from qmix.device import StandIn
from qmix.errors import QmixError
from qmix.formats import memory
from qmix.offload.cache import Cache, make_policy
from qmix.offload.copies import Copies
from qmix.offload.pool import slot_pool
from qmix.offload.reads import Readers
from qmix.offload.tiers import Tier

ALL = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(8)]
OPEN = 10**9  # pieces of work
content = functools.cache(slow_content)


class Gates:
    """What each stream does before each piece of work: waits until its gate is open, or for a pass through it."""

    def __init__(self, dice: random.Random | None = None, slow: float = 0.0):
        self._dice, self._slow = dice, slow
        self._cond = threading.Condition()
        self._passes = {"qmix-compute": OPEN, "qmix-stream-1": OPEN, "qmix-stream-2": OPEN}

    def __call__(self) -> None:
        name = threading.current_thread().name
        if self._dice is not None:
            time.sleep(self._dice.random() * self._slow)
        with self._cond:
            assert self._cond.wait_for(lambda: self._passes[name] > 0, 20)
            self._passes[name] -= 1

    def let(self, compute: int | None = None, up: int | None = None, down: int | None = None) -> None:
        """How many pieces may pass from now on."""
        with self._cond:
            for name, count in (("qmix-compute", compute), ("qmix-stream-1", up), ("qmix-stream-2", down)):
                if count is not None:
                    self._passes[name] = count
            self._cond.notify_all()


def right(found: Tensor | bytes, k: ExpertKey) -> bool:
    return (found if isinstance(found, bytes) else bytes(memory(found))) == content(k)[:len(found)]


class Stack:
    """Two tiers over fake records. mixed: so many slots each for records of even experts, and for those of odd ones,
    which have half as many bytes."""

    def __init__(self, above: int, below: int, records: FakeRecords | None = None, gates: Gates | None = None,
                 device: StandIn | None = None, mixed: bool = False):
        self.records = records or FakeRecords()
        self.gates = gates or Gates()
        self.device = device or StandIn(self.gates)
        self.readers = Readers(self.records, 2, CHUNK)
        kinds = [RECORD, RECORD // 2] if mixed else [RECORD]

        def tier(slots: int, *how: Any) -> Tier:
            store = Cache([slots] * len(kinds), LAYERS, make_policy("lfu", {}), probation=1,
                          kind_of=lambda k: k.expert % len(kinds))
            return Tier([slot_pool(slots, nbytes) for nbytes in kinds], store, *how)

        self.low = tier(below, self.readers)
        self.copies = Copies(self.low, self.device, CHUNK)
        self.high = tier(above, self.copies, self.copies.take_back)

    def bring(self, *numbers: int) -> None:
        """Demand records one after the other, as a token each."""
        for number in numbers:
            self.begin(number)
            self.high.wait(key(number), RECORD)

    def begin(self, number: int) -> None:
        self.high.cache.begin_token()
        self.high.cache.use(key(number))
        assert self.high.want(key(number), "demand")

    def check(self) -> None:
        """Whatever is ready, above or below, is right; slots add up; spares are what is above."""
        for tier in (self.high, self.low):
            for k in list(tier):
                assert not tier.ready(k) or right(tier.bytes_of(k), k)
            assert slots_add_up(tier)
        assert set(self.low.cache.spares) <= set(self.low)
        assert all(self.high.ready(k) for k in self.low.cache.spares), "the only copy is the first to leave"

    def wait_for_all(self) -> None:
        """Wait for all that is on its way."""
        for tier in (self.high, self.low):
            for k in list(tier):
                with suppress(QmixError):
                    tier.wait(k, len(tier.bytes_of(k)))
        self.copies._sweep()

    def close(self) -> None:
        self.gates.let(OPEN, OPEN, OPEN)
        self.records.gate.set()
        self.copies.close()
        self.readers.close()
        self.device.close()
        assert self.readers._reading == [0, 0, 0], "they were asked about loads that are not theirs"


def stacks() -> Iterator[Callable[..., Stack]]:
    opened: list[Stack] = []

    def make(*args: object, **kwargs: object) -> Stack:
        opened.append(Stack(*args, **kwargs))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for stack in opened:
        stack.close()
