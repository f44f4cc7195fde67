"""Tiers: the right bytes in the right slot under any sequence of requests, and the memory they lie in."""

from __future__ import annotations

import errno
import os
import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reads import CHUNK, RECORD, FakeRecords, content, key

from qmix.config import ExpertKey
from qmix.device import StandIn
from qmix.errors import DoesNotFit, StoreError
from qmix.formats import memory
from qmix.offload import pool as pool_module
from qmix.offload.cache import Cache, make_policy
from qmix.offload.pool import begin_pool, slot_pool
from qmix.offload.reads import Readers
from qmix.offload.tiers import Tier

LAYERS = 3  # of 8 experts

pytestmark = pytest.mark.usefixtures("no_thread_stays")


def cache(slots: int) -> Cache:
    return Cache(slots, LAYERS, make_policy("lfu", {}), probation=1)


def right(tier: Tier, wanted: ExpertKey) -> bool:
    return bytes(memory(tier.bytes_of(wanted))) == content(wanted)


def slots_add_up(tier: Tier) -> bool:
    used = [tier.slot(k) for k in tier]
    free = [slot for slots in tier._free for slot in slots]
    return len(set(used)) == len(used) and sorted(used + free) == list(range(len(tier.slots))) \
        and set(tier) == set(tier.cache)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 9))
def test_any_sequence_of_requests_finds_the_right_bytes(seed: int, slots: int) -> None:
    """As experts.py does it: pin, want, guess, give up, wait, use; with slow and failing reads."""
    dice = random.Random(seed)

    def fault(k: ExpertKey, start: int) -> None:
        time.sleep(dice.random() * 0.0004)
        if dice.random() < 0.01:
            raise OSError(5, "unlucky")

    readers = Readers(FakeRecords(fault=fault), 3, CHUNK)
    tier = Tier(slot_pool(slots, RECORD), cache(slots), readers)
    table: dict[ExpertKey, int] = {}  # what who follows knows
    tier.follow(table.__setitem__, lambda k: table.pop(k, None))
    for _ in range(40):
        tier.cache.begin_token()
        layer = dice.randrange(LAYERS)
        chosen = [ExpertKey(layer, e) for e in dice.sample(range(8), 2)]
        for k in chosen:
            tier.cache.use(k)
            tier.pin(k)
        guess = ExpertKey((layer + 1) % LAYERS, dice.randrange(8))
        tier.want(guess, "speculative")
        for k in chosen:
            try:
                while not tier.want(k, "demand"):
                    raise AssertionError("a demanded record got no slot")
                tier.wait(k, RECORD)
                assert tier.ready(k)
                assert right(tier, k)
            except StoreError:
                assert k not in tier
        tier.unpin(chosen)
        if dice.random() < 0.5:
            tier.cancel_guess(guess)
        assert slots_add_up(tier)
        assert all(tier.slot(k) == slot and tier.load_of(k) is None and right(tier, k) for k, slot in table.items())
        assert table.keys() == {k for k in tier if tier.load_of(k) is None}
    late: dict[ExpertKey, int] = {}
    tier.follow(late.__setitem__, lambda k: None)
    assert late == table
    readers.close()


def test_a_failed_load_frees_its_slot_and_is_read_again() -> None:
    failing = {key(1)}

    def fault(k: ExpertKey, start: int) -> None:
        if k in failing:
            raise OSError(5, "unlucky")

    readers = Readers(FakeRecords(fault=fault), 2, CHUNK)
    tier = Tier(slot_pool(2, RECORD), cache(2), readers)
    for _ in range(3):
        assert tier.want(key(1), "demand")
        with pytest.raises(StoreError, match="layer 0 expert 1"):
            tier.wait(key(1), RECORD)
        assert key(1) not in tier and slots_add_up(tier)
    failing.clear()
    assert tier.want(key(1), "demand")
    tier.wait(key(1), RECORD)
    assert right(tier, key(1))
    readers.close()


def test_a_record_that_fails_after_its_first_half_was_used_is_told_at_the_next_wait() -> None:
    stop = threading.Event()

    def fault(k: ExpertKey, start: int) -> None:
        if start >= RECORD // 2:
            stop.wait(20)
            raise OSError(5, "unlucky")

    readers = Readers(FakeRecords(fault=fault), 2, CHUNK)
    tier = Tier(slot_pool(2, RECORD), cache(2), readers)
    tier.want(key(1), "demand")
    tier.wait(key(1), RECORD // 2)
    stop.set()
    while (load := tier.load_of(key(1))) is None or load.error is None:
        time.sleep(0.001)
    with pytest.raises(StoreError, match="layer 0 expert 1"):
        tier.wait(key(1), RECORD)
    assert key(1) not in tier and slots_add_up(tier)
    readers.close()


def test_a_slot_given_up_twice_is_still_not_filled_too_soon() -> None:
    """The first load's chunks are landing when the second one, which waits for them, is given up too."""
    records = FakeRecords()
    records.gate.clear()
    readers = Readers(records, 4, CHUNK)
    tier = Tier(slot_pool(1, RECORD), cache(1), readers)
    assert tier.want(key(0), "speculative")
    while len(records.seen) < 2:
        time.sleep(0.001)
    tier.cancel_guess(key(0))
    assert tier.want(key(1), "speculative")
    tier.cancel_guess(key(1))
    assert tier.want(key(2), "demand")
    time.sleep(0.02)
    assert {k for k, _ in records.seen} == {key(0)}
    records.gate.set()
    tier.wait(key(2), RECORD)
    assert right(tier, key(2))
    readers.close()


def test_the_pool_is_aligned_and_private() -> None:
    pool = slot_pool(3, 8192)
    assert pool.shape == (3, 8192) and pool.data_ptr() % 4096 == 0
    assert pool.sum() == 0


def test_work_on_a_device_that_still_reads_a_slot_holds_back_what_is_read_into_it() -> None:
    """A tier whose slots a device reads in place, filled from the disk: by two reader threads, chunks side by side."""
    device, gate, saw = StandIn(), threading.Event(), list[bytes]()
    readers = Readers(FakeRecords(), 2, CHUNK)
    tier = Tier(slot_pool(1, RECORD), cache(1), readers)

    def work() -> None:
        assert gate.wait(20)
        saw.append(bytes(memory(tier.slots[0])))

    tier.want(key(0), "demand")
    tier.wait(key(0), RECORD)
    device.compute.run(work)
    tier.used([key(0)], device.compute.record())
    tier.want(key(1), "speculative")
    tier.cancel_guess(key(1))  # the fence outlives a load that did not begin
    tier.want(key(2), "demand")
    time.sleep(0.02)
    assert tier.load_of(key(2)).arrived == 0  # type: ignore[union-attr]
    gate.set()
    tier.wait(key(2), RECORD)
    device.synchronize()
    assert saw == [content(key(0))] and right(tier, key(2))
    readers.close()
    device.close()


def test_what_is_written_while_the_pool_is_touched_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PIECE", 2**20)
    pool, touching = begin_pool(16, 4 * 2**20)
    for slot in range(16):
        pool[slot].fill_(slot + 1)
    touching.wait()
    assert [int(slot.min()) for slot in pool] == [int(slot.max()) for slot in pool] == list(range(1, 17))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOMEM])
def test_a_pool_without_populate_is_touched_page_by_page_and_one_without_memory_is_refused(
        code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(start: int, nbytes: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pool_module, "_populate", lambda: refuse)
    if code == errno.ENOMEM:
        with pytest.raises(DoesNotFit, match="3 expert slots"):
            begin_pool(3, 8192)
    else:
        pool, touching = begin_pool(3, 8192)
        touching.wait()
        assert not pool.any()


def test_memory_that_runs_out_later_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def some(start: int, nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) > 2:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(pool_module, "_populate", lambda: some)
    monkeypatch.setattr(pool_module, "PIECE", 8192)
    with pytest.raises(DoesNotFit, match="Cannot allocate"):
        slot_pool(16, 4096)


def test_a_closed_pool_touches_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[int] = []

    def slow(start: int, nbytes: int) -> None:
        time.sleep(0.02)
        touched.append(start)

    monkeypatch.setattr(pool_module, "_populate", lambda: slow)
    monkeypatch.setattr(pool_module, "PIECE", 4096)
    _, touching = begin_pool(1000, 4096)
    touching.close()
    assert len(touched) < 100
