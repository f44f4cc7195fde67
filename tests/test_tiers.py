"""Tiers: the right bytes in the right slot under any sequence of requests, alone and one above the other."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reads import CHUNK, RECORD, FakeRecords, content, key

from qmix.config import ExpertKey
from qmix.errors import DoesNotFit, QmixError, StoreError
from qmix.formats import memory
from qmix.offload import pool as pool_module
from qmix.offload.cache import Cache, make_policy
from qmix.offload.copies import Copies
from qmix.offload.pool import begin_pool, slot_pool
from qmix.offload.reads import Readers
from qmix.offload.tiers import Tier

LAYERS = 3  # of 8 experts


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


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


def two_tiers(above: int, below: int, records: FakeRecords, slow: float = 0.0,
              ) -> tuple[Tier, Tier, Copies, Readers]:
    dice = random.Random(above * 100 + below)

    def copy(source: torch.Tensor, target: torch.Tensor) -> None:
        time.sleep(dice.random() * slow)
        target.copy_(source)

    readers = Readers(records, 2, CHUNK)
    low = Tier(slot_pool(below, RECORD), cache(below), readers)
    copies = Copies(low, CHUNK, copy)
    high = Tier(slot_pool(above, RECORD), cache(above), copies, copies.take_back)
    return high, low, copies, readers


def test_a_record_is_above_or_below_and_comes_back_down_when_it_leaves() -> None:
    records = FakeRecords()
    high, low, copies, readers = two_tiers(2, 3, records)
    for i in (0, 1, 2, 3):
        high.cache.begin_token()
        high.cache.use(key(i))
        assert high.want(key(i), "demand")
        high.wait(key(i), RECORD)
        assert right(high, key(i))
    assert set(high) == {key(2), key(3)}
    copies._sweep()
    assert set(low) == {key(0), key(1)}
    assert all(right(low, k) for k in low)
    read = len(records.seen)
    assert high.want(key(0), "demand")
    high.wait(key(0), RECORD)
    assert right(high, key(0)) and len(records.seen) == read, "read from the disk though it was in the tier below"
    copies._sweep()
    assert not set(high) & set(low)
    copies.close()
    readers.close()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 8), st.integers(2, 6))
def test_two_tiers_under_any_sequence_with_delays_and_faults(seed: int, above: int, below: int) -> None:
    dice = random.Random(seed)

    def fault(k: ExpertKey, start: int) -> None:
        time.sleep(dice.random() * 0.0004)
        if dice.random() < 0.01:
            raise OSError(5, "unlucky")

    high, low, copies, readers = two_tiers(above, below, FakeRecords(fault=fault), slow=0.0003)
    for _ in range(30):
        high.cache.begin_token()
        layer = dice.randrange(LAYERS)
        chosen = [ExpertKey(layer, e) for e in dice.sample(range(8), 2)]
        for k in chosen:
            high.cache.use(k)
            high.pin(k)
        guess = ExpertKey((layer + 1) % LAYERS, dice.randrange(8))
        high.want(guess, "speculative")
        for k in chosen:
            try:
                assert high.want(k, "demand")
                high.wait(k, RECORD)
                assert right(high, k)
            except QmixError:
                assert k not in high
        high.unpin(chosen)
        if dice.random() < 0.5:
            high.cancel_guess(guess)
        assert slots_add_up(high) and slots_add_up(low)
    for k in list(high):  # a guess that arrived between the sweep and the count would be seen in both
        with suppress(QmixError):
            high.wait(k, RECORD)
    copies._sweep()
    settled = {k for k in list(high) if high.ready(k)} & {k for k in list(low) if low.ready(k)}
    assert not settled, "a record lies in both tiers"
    copies.close()
    readers.close()


def test_close_while_records_are_on_their_way() -> None:
    records = FakeRecords()
    records.gate.clear()
    high, _, copies, readers = two_tiers(4, 4, records)
    for i in range(3):
        high.want(key(i), "demand")
    copies.close()
    records.gate.set()
    readers.close()


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
