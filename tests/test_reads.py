"""Records on their way into slots: order, faults, cancellation, and no thread left behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmix.config import Cancel, ExpertKey
from qmix.errors import Interrupted, QmixError, StoreError
from qmix.formats import memory
from qmix.offload.reads import AHEAD, DEMAND, WARM, Load, Readers

CHUNK = 4096
RECORD = 8 * CHUNK


class FakeRecords:
    """Records with known bytes; `gate` holds reads back, `fault` may raise, every read is noted."""

    def __init__(self, must_check: bool = False, fault: Callable[[ExpertKey, int], None] = lambda key, start: None):
        self.gate = threading.Event()
        self.gate.set()
        self.fault = fault
        self.checking = must_check
        self.checked: list[ExpertKey] = []
        self.wrong: set[ExpertKey] = set()
        self.seen: list[tuple[ExpertKey, int]] = []
        self.lock = threading.Lock()

    def read(self, key: ExpertKey, target: memoryview, start: int) -> None:
        with self.lock:
            self.seen.append((key, start))
        assert self.gate.wait(20)
        self.fault(key, start)
        target.cast("B")[:] = content(key)[start:start + len(target)]

    def must_check(self, key: ExpertKey) -> bool:
        return self.checking

    def check(self, key: ExpertKey, record: torch.Tensor) -> None:
        assert bytes(memory(record)) == content(key), "checked before it was whole"
        self.checked.append(key)
        if key in self.wrong:
            raise StoreError(f"{key}: wrong")

    def failed(self, key: ExpertKey, reason: str) -> QmixError:
        return StoreError(f"{key}: {reason}")


def content(key: ExpertKey) -> bytes:
    return random.Random(str(key)).randbytes(RECORD)


def slot() -> torch.Tensor:
    return torch.zeros(RECORD, dtype=torch.uint8)


def key(number: int) -> ExpertKey:
    return ExpertKey(number // 8, number % 8)

pytestmark = pytest.mark.usefixtures("no_thread_stays")


def has_right_bytes(load: Load) -> bool:
    return bytes(memory(load.slot)) == content(load.key)


@pytest.mark.parametrize("threads", [1, 4])
def test_every_byte_arrives(threads: int) -> None:
    records = FakeRecords()
    readers = Readers(records, threads, CHUNK)
    loads = [readers.submit(key(i), slot(), i % 3) for i in range(12)]
    for load in loads:
        readers.wait(load, RECORD)
        assert load.done and load.arrived == RECORD
        assert has_right_bytes(load)
    readers.close()
    assert sum(readers.bytes_read) == 12 * RECORD
    assert readers.bytes_read[DEMAND] == 4 * RECORD
    assert sorted(records.seen) == sorted((key(i), c * CHUNK) for i in range(12) for c in range(8))


def test_a_demanded_record_overtakes_guesses_and_warming() -> None:
    records = FakeRecords()
    records.gate.clear()
    readers = Readers(records, 1, CHUNK)
    warm = readers.submit(key(0), slot(), WARM)
    while not records.seen:
        time.sleep(0.001)
    guess = readers.submit(key(1), slot(), AHEAD)
    demanded = readers.submit(key(2), slot(), DEMAND)
    records.gate.set()
    for load in (warm, guess, demanded):
        readers.wait(load, RECORD)
    readers.close()
    order = [k for k, _ in records.seen]
    assert order == [key(0)] + [key(2)] * 8 + [key(1)] * 8 + [key(0)] * 7


def test_a_promoted_guess_goes_first() -> None:
    records = FakeRecords()
    records.gate.clear()
    readers = Readers(records, 1, CHUNK)
    loads = [readers.submit(key(0), slot(), AHEAD)]
    while not records.seen:
        time.sleep(0.001)
    loads += [readers.submit(key(i), slot(), AHEAD) for i in (1, 2)]
    readers.promote(loads[2])
    records.gate.set()
    readers.wait(loads[1], RECORD)
    readers.close()
    assert [k for k, _ in records.seen] == [key(0)] + [key(2)] * 8 + [key(0)] * 7 + [key(1)] * 8


def test_guesses_never_hold_more_than_half_of_the_threads() -> None:
    records = FakeRecords()
    records.gate.clear()
    readers = Readers(records, 4, CHUNK)
    guesses = [readers.submit(key(i), slot(), AHEAD) for i in range(3)]
    while len(records.seen) < 2:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(records.seen) == 2
    demanded = readers.submit(key(9), slot())
    while len(records.seen) < 4:
        time.sleep(0.001)
    assert [k for k, _ in records.seen[2:]] == [key(9), key(9)]
    records.gate.set()
    for load in (*guesses, demanded):
        readers.wait(load, RECORD)
    readers.close()


def test_the_first_bytes_can_be_used_while_the_last_are_read() -> None:
    stop = threading.Event()
    records = FakeRecords(fault=lambda k, start: None if start < 4 * CHUNK else (stop.wait(20), None)[1])
    readers = Readers(records, 2, CHUNK)
    load = readers.submit(key(0), slot())
    readers.wait(load, 4 * CHUNK)
    assert not load.done
    assert bytes(memory(load.slot))[:4 * CHUNK] == content(key(0))[:4 * CHUNK]
    stop.set()
    readers.wait(load, RECORD)
    readers.close()


def test_a_record_that_is_checked_arrives_whole_or_not_at_all() -> None:
    stop = threading.Event()
    records = FakeRecords(True, lambda k, start: None if start < 4 * CHUNK else (stop.wait(20), None)[1])
    readers = Readers(records, 2, CHUNK)
    load = readers.submit(key(0), slot())
    while len(records.seen) < 6:
        time.sleep(0.001)
    assert load.arrived == 0
    stop.set()
    readers.wait(load, RECORD)
    assert records.checked == [key(0)]
    records.wrong = {key(1)}
    with pytest.raises(StoreError, match="layer 0 expert 1: wrong"):
        readers.wait(readers.submit(key(1), slot()), RECORD)
    readers.close()


@pytest.mark.parametrize("error", [StoreError("the disk says no"), OSError("x"), SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 5 * CHUNK])
def test_a_read_that_fails_fails_the_load_and_nothing_else(error: BaseException, at: int) -> None:
    def fault(k: ExpertKey, start: int) -> None:
        if k == key(1) and start == at:
            raise error

    readers = Readers(FakeRecords(fault=fault), 2, CHUNK)
    good, bad, other = (readers.submit(key(i), slot()) for i in range(3))
    with pytest.raises(StoreError, match=r"the disk says no|layer 0 expert 1"):
        readers.wait(bad, RECORD)
    assert not bad.done
    for load in (good, other):
        readers.wait(load, RECORD)
        assert has_right_bytes(load)
    again = readers.submit(key(4), slot())
    readers.wait(again, RECORD)
    readers.close()


def test_threads_that_die_fail_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    records = FakeRecords()
    readers = Readers(records, 2, CHUNK)

    def broken() -> Load | None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(readers, "_choose", broken)
    load = readers.submit(key(0), slot())
    with pytest.raises(StoreError, match="threads that read from the disk are gone"):
        readers.wait(load, RECORD)
    with pytest.raises(StoreError, match="threads that read from the disk are gone"):
        readers.wait(readers.submit(key(1), slot()), RECORD)
    readers.close()


def test_cancel_token_ends_a_wait_and_leaves_the_load() -> None:
    records = FakeRecords()
    records.gate.clear()
    readers = Readers(records, 2, CHUNK)
    load, cancel = readers.submit(key(0), slot()), Cancel()
    threading.Timer(0.02, cancel.set).start()
    with pytest.raises(Interrupted):
        readers.wait(load, RECORD, cancel)
    records.gate.set()
    readers.wait(load, RECORD)
    assert has_right_bytes(load)
    readers.close()


def test_a_slot_is_not_filled_anew_before_the_last_chunk_of_a_cancelled_load_landed() -> None:
    records = FakeRecords()
    records.gate.clear()
    readers = Readers(records, 2, CHUNK)
    shared = slot()
    old = readers.submit(key(0), shared)
    while len(records.seen) < 2:
        time.sleep(0.001)
    readers.cancel(old)
    new = readers.submit(key(1), shared, after=old)
    time.sleep(0.02)
    assert {k for k, _ in records.seen} == {key(0)}
    records.gate.set()
    readers.wait(new, RECORD)
    assert has_right_bytes(new) and not old.done
    assert len([k for k, _ in records.seen if k == key(0)]) == 2
    readers.close()


def test_nor_when_a_load_between_was_cancelled_before_it_began() -> None:
    records = FakeRecords()
    records.gate.clear()
    readers = Readers(records, 4, CHUNK)  # guesses take two of them: the others are free
    shared = slot()
    first = readers.submit(key(0), shared, AHEAD)
    while len(records.seen) < 2:
        time.sleep(0.001)
    readers.cancel(first)
    second = readers.submit(key(1), shared, after=first)
    readers.cancel(second)
    third = readers.submit(key(2), shared, after=second)
    time.sleep(0.02)
    assert {k for k, _ in records.seen} == {key(0)}
    records.gate.set()
    readers.wait(third, RECORD)
    assert has_right_bytes(third)
    readers.close()


def test_close_during_reads_waits_for_them_and_fails_the_rest() -> None:
    records = FakeRecords()
    records.gate.clear()
    readers = Readers(records, 2, CHUNK)
    loads = [readers.submit(key(i), slot()) for i in range(3)]
    while len(records.seen) < 2:
        time.sleep(0.001)
    closing = threading.Thread(target=readers.close)
    closing.start()
    for load in loads:
        with pytest.raises(StoreError, match="closing"):
            readers.wait(load, RECORD)
    assert closing.is_alive(), "close returned while a thread still wrote into a slot"
    records.gate.set()
    closing.join()
    with pytest.raises(StoreError):
        readers.wait(readers.submit(key(5), slot()), RECORD)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_any_order_of_calls_leaves_right_bytes(seed: int, threads: int) -> None:
    """Submit, promote, cancel and reuse slots at random, with reads of random length and random faults."""
    dice = random.Random(seed)

    def fault(k: ExpertKey, start: int) -> None:
        time.sleep(dice.random() * 0.0005)
        if dice.random() < 0.02:
            raise OSError(5, "unlucky")

    readers = Readers(FakeRecords(must_check=seed % 2 == 0, fault=fault), threads, CHUNK)
    slots = [slot() for _ in range(4)]
    last: list[Load | None] = [None] * 4
    for number in range(40):
        at = dice.randrange(4)
        before = last[at]
        if before is not None and not before.over:
            action = dice.random()
            if action < 0.3:
                readers.promote(before, dice.choice((DEMAND, AHEAD)))
                continue
            if action < 0.6:
                try:
                    readers.wait(before, dice.choice((1, RECORD)))
                except StoreError:
                    assert before.error is not None
                continue
            readers.cancel(before)
        last[at] = readers.submit(key(number), slots[at], dice.choice((DEMAND, AHEAD, WARM)), before)
    for load in last:
        if load is not None:
            try:
                readers.wait(load, RECORD)
                assert has_right_bytes(load)
            except StoreError:
                assert load.error is not None
    readers.close()
