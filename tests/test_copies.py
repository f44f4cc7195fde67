"""Two tiers, one above the other: the right bytes in both whenever they are ready, nothing lost, nobody left waiting.

The CPU stands in for the device (`StandIn`); a `Gates` holds each of its streams back, or lets them wait at random.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lane import stays, until
from test_reads import CHUNK, RECORD, FakeRecords, key
from test_reads import content as slow_content
from test_tiers import LAYERS, slots_add_up
from torch import Tensor

from qmix.config import Cancel, ExpertKey
from qmix.device import StandIn
from qmix.device.device import Work
from qmix.errors import Interrupted, QmixError
from qmix.formats import memory
from qmix.offload.cache import Cache, make_policy
from qmix.offload.copies import Copies
from qmix.offload.pool import slot_pool
from qmix.offload.reads import AHEAD, DEMAND, WARM, Readers
from qmix.offload.tiers import Tier

ALL = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(8)]
OPEN = 10**9  # pieces of work
content = functools.cache(slow_content)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


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

    def settle(self) -> None:
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


@pytest.fixture
def stacked() -> Iterator[Callable[..., Stack]]:
    opened: list[Stack] = []

    def make(*args: object, **kwargs: object) -> Stack:
        opened.append(Stack(*args, **kwargs))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for stack in opened:
        stack.close()


def play(stack: Stack, dice: random.Random, tokens: int, faults: bool) -> None:
    """As experts.py does it: pin, want, guess, wait, compute on the device, give up; with faults, what else callers
    may do. At most two guesses and two demanded records are on their way."""
    high, device = stack.high, stack.device
    saw: list[tuple[ExpertKey, bytes]] = []

    def compute(k: ExpertKey) -> Work:
        slot = high.bytes_of(k)
        return lambda: saw.append((k, bytes(memory(slot))))

    for _ in range(tokens):
        high.cache.begin_token()
        layer = dice.randrange(LAYERS)
        chosen = [ExpertKey(layer, e) for e in dice.sample(range(8), 2)]
        guess = ExpertKey((layer + 1) % LAYERS, dice.randrange(8))
        for k in chosen:
            high.cache.use(k)
            high.pin(k)
        if dice.random() < 0.7 and sum(not high.ready(k) for k in high) < 2:
            high.want(guess, "speculative")
        came = []
        for k in chosen:
            try:
                assert high.want(k, "demand"), "a demanded record got no slot"
                if dice.random() < 0.5:
                    high.wait(k, len(high.bytes_of(k)))
                came.append(k)
            except QmixError:
                assert faults and k not in high
        for k in list(came):
            try:
                high.wait(k, len(high.bytes_of(k)))
                assert high.ready(k)
                device.compute.run(compute(k))
            except QmixError:
                assert faults and k not in high
                came.remove(k)
        high.used(came, device.compute.record())
        high.unpin(chosen)
        if dice.random() < 0.5:
            high.cancel_guess(guess)
        if faults:
            meddle(stack, dice)
        stack.check()
    device.settle()
    assert all(right(found, k) for k, found in saw), "overwritten while it was computed"


def meddle(stack: Stack, dice: random.Random) -> None:
    """What callers do seldom."""
    what, k = dice.randrange(8), dice.choice(ALL)
    if what == 0 and k in stack.high and k not in stack.high._pinned:
        stack.high.drop(k)
    elif what == 1:
        stack.low.want(k, "warm")
    elif what == 2 and k in stack.low and k not in stack.low._pinned:
        stack.low.drop(k)
    elif what == 3 and k in stack.low:
        with suppress(QmixError):
            stack.low.wait(k, len(stack.low.bytes_of(k)))
    elif what == 4:
        stack.low.cancel_guess(k)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(2, 7), st.booleans())
def test_any_sequence_with_delays_and_faults(seed: int, above: int, below: int, mixed: bool) -> None:
    dice = random.Random(seed)

    def fault(k: ExpertKey, start: int) -> None:
        time.sleep(dice.random() * 0.0003)
        if dice.random() < 0.005:
            raise OSError(5, "unlucky")

    checked = not mixed and dice.random() < 0.3
    stack = Stack(above, below, FakeRecords(checked, fault), Gates(dice, 0.0003), mixed=mixed)
    play(stack, dice, 30, faults=True)
    stack.settle()
    stack.check()
    stack.close()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, len(ALL)), st.integers(4, 6))
def test_two_tiers_that_hold_all_records_between_them_read_each_of_them_once(seed: int, above: int, more: int) -> None:
    dice = random.Random(seed)
    stack = Stack(above, max(2, len(ALL) - above + more), gates=Gates(dice, 0.0002))
    for k in dice.sample(ALL, len(ALL)):
        assert stack.high.want(k, "demand")
        stack.high.wait(k, RECORD)
    play(stack, dice, 40, faults=False)
    stack.settle()
    stack.check()
    assert sorted(stack.records.seen) == sorted((k, start) for k in ALL for start in range(0, RECORD, CHUNK))
    assert set(stack.high) | set(stack.low) == set(ALL)
    stack.close()


def test_what_is_above_stays_below_as_a_spare_and_is_ordinary_again_when_it_leaves(
        stacked: Callable[..., Stack]) -> None:
    stack = stacked(2, 3)
    stack.bring(0, 1)
    stack.settle()
    assert set(stack.low.cache.spares) == {key(0), key(1)}
    stack.check()
    stack.bring(2)
    stack.settle()
    assert set(stack.high) == {key(1), key(2)} and set(stack.low.cache.spares) == {key(1), key(2)}
    assert stack.low.ready(key(0)) and stack.copies.bytes_down == 0
    stack.check()
    read = len(stack.records.seen)
    stack.bring(0)
    assert len(stack.records.seen) == read and stack.copies.bytes_up == [4 * RECORD, 0, 0]
    stack.check()


def test_a_record_whose_spare_is_gone_comes_down_and_can_be_wanted_meanwhile(stacked: Callable[..., Stack]) -> None:
    stack = stacked(3, 2)
    low, high = stack.low, stack.high
    stack.bring(0, 1, 2)  # the spares of two of them are still there
    gone, = {key(i) for i in range(3)} - set(low)
    stack.gates.let(down=0)
    high.drop(gone)
    load = low.load_of(gone)
    assert load is not None and not low.ready(gone) and load.urgency == WARM
    assert low.cancel_guess(gone) == 0 and gone in low
    assert low.want(gone, "demand") and load.urgency == DEMAND
    with pytest.raises(Interrupted):
        cancel = Cancel()
        cancel.set()
        low.wait(gone, RECORD, cancel)
    stack.gates.let(down=3)
    low.wait(gone, 2 * CHUNK)
    assert not low.ready(gone)
    stack.gates.let(down=OPEN)
    low.wait(gone, RECORD)
    assert low.ready(gone) and stack.copies.bytes_down == RECORD
    assert len(stack.records.seen) == 3 * RECORD // CHUNK
    stack.check()


def test_a_record_on_its_way_down_can_be_given_up_and_its_slot_filled_from_the_disk(
        stacked: Callable[..., Stack]) -> None:
    """The readers wait for the chunks that still come down, and hear of it when they are there."""
    stack = stacked(3, 2)
    low, high = stack.low, stack.high
    stack.bring(0, 1, 2)
    gone, = {key(i) for i in range(3)} - set(low)
    stack.gates.let(down=1)
    high.drop(gone)
    load = low.load_of(gone)
    assert load is not None
    until(lambda: load.taken >= 2 * CHUNK)
    slot = low.slot(gone)
    low.drop(gone)
    low.cache.begin_token()
    assert low.want(key(5), "demand") and low.slot(key(5)) == slot
    read = len(stack.records.seen)
    assert stays(lambda: len(stack.records.seen) == read)
    stack.gates.let(down=OPEN)
    low.wait(key(5), RECORD)
    stack.check()


def test_a_record_comes_down_into_a_slot_that_readers_were_still_filling(stacked: Callable[..., Stack]) -> None:
    stack = stacked(3, 2)
    low, high = stack.low, stack.high
    stack.bring(0, 1, 2)
    gone, = {key(i) for i in range(3)} - set(low)
    stack.records.gate.clear()
    read = len(stack.records.seen)
    assert low.want(key(6), "speculative")  # in place of a spare
    until(lambda: len(stack.records.seen) > read)
    slot = low.slot(key(6))
    low.cancel_guess(key(6))
    high.drop(gone)
    load = low.load_of(gone)
    assert load is not None and low.slot(gone) == slot
    assert stays(lambda: load.taken == 0)
    stack.records.gate.set()
    low.wait(gone, RECORD)
    stack.check()


def test_a_record_wanted_above_while_it_goes_down_comes_back_chunk_by_chunk(stacked: Callable[..., Stack]) -> None:
    stack = stacked(3, 2)
    stack.bring(0, 1, 2)
    gone, = {key(i) for i in range(3)} - set(stack.low)
    stack.gates.let(down=0)
    stack.high.drop(gone)
    stack.high.cache.use(gone)
    assert stack.high.want(gone, "demand")  # into the very slot that it leaves
    going, coming = stack.low.load_of(gone), stack.high.load_of(gone)
    assert going is not None and coming is not None and going.urgency == DEMAND
    assert stays(lambda: coming.taken == 0)
    stack.gates.let(down=3)
    until(lambda: coming.arrived == 3 * CHUNK)
    stack.gates.let(down=OPEN)
    stack.high.wait(gone, RECORD)
    stack.check()
    assert len(stack.records.seen) == 3 * RECORD // CHUNK


def test_what_comes_into_a_slot_follows_what_leaves_it_chunk_by_chunk(stacked: Callable[..., Stack]) -> None:
    stack = stacked(2, 2)
    stack.bring(0, 1, 2)
    assert key(0) in stack.low, "0 came down or stayed"
    stack.gates.let(down=0)
    leaves = next(k for k in stack.high if k not in stack.low)
    slot = stack.high.slot(leaves)
    stack.high.drop(leaves)
    going = stack.low.load_of(leaves)
    assert going is not None
    assert stack.high.want(key(5), "demand") and stack.high.slot(key(5)) == slot
    coming = stack.high.load_of(key(5))
    assert coming is not None and going.urgency == DEMAND, "what it waits for is as urgent"
    assert stays(lambda: coming.taken == 0)
    stack.gates.let(down=4)
    until(lambda: coming.arrived == 4 * CHUNK)
    stack.gates.let(down=OPEN)
    stack.high.wait(key(5), RECORD)
    stack.check()


def test_what_comes_down_does_not_take_the_slot_of_what_goes_up_for_it(stacked: Callable[..., Stack]) -> None:
    stack = stacked(1, 2)
    stack.bring(0, 1, 2)
    assert stack.low.want(key(3), "warm")  # in place of the spare
    stack.low.wait(key(3), RECORD)
    assert list(stack.low) == [key(1), key(3)] and list(stack.high) == [key(2)]
    read = len(stack.records.seen)
    stack.bring(1)
    stack.settle()
    assert len(stack.records.seen) == read and stack.low.ready(key(2)) and key(3) not in stack.low
    stack.check()


def test_a_guess_given_up_keeps_its_place_below_while_chunks_are_on_their_way(stacked: Callable[..., Stack]) -> None:
    stack = stacked(2, 2)
    stack.gates.let(up=0)
    assert stack.high.want(key(1), "speculative")
    load = stack.high.load_of(key(1))
    assert load is not None
    until(lambda: load.reading == 2)
    stack.high.cancel_guess(key(1))
    assert key(1) in stack.low._pinned and stays(lambda: load.taken == 2 * CHUNK)
    stack.gates.let(up=OPEN)
    until(lambda: load.reading == 0)
    stack.copies._sweep()
    assert key(1) not in stack.low._pinned and key(1) in stack.low and not stack.low.cache.spares


def test_a_guess_that_arrives_while_it_is_given_up_leaves_no_spare(stacked: Callable[..., Stack]) -> None:
    """The tier saw it on its way, and gives it up when it is there: the copy below is the only one."""
    stack = stacked(2, 2)
    assert stack.high.want(key(1), "speculative")
    load = stack.high.load_of(key(1))
    assert load is not None
    until(lambda: load.done)
    stack.copies.cancel(load)
    assert stack.low.ready(key(1)) and not stack.low.cache.spares


def test_the_first_half_can_be_used_while_the_second_one_comes(stacked: Callable[..., Stack]) -> None:
    stack = stacked(2, 2)
    stack.gates.let(up=4)
    stack.begin(0)
    stack.high.wait(key(0), RECORD // 2)
    load = stack.high.load_of(key(0))
    assert load is not None and load.arrived == RECORD // 2 and not stack.high.ready(key(0))
    assert bytes(memory(stack.high.bytes_of(key(0))))[:RECORD // 2] == content(key(0))[:RECORD // 2]
    stack.gates.let(up=OPEN)
    stack.high.wait(key(0), RECORD)


def test_chunks_go_up_while_the_disk_still_reads(stacked: Callable[..., Stack]) -> None:
    stop = threading.Event()

    def fault(k: ExpertKey, start: int) -> None:
        if start >= RECORD // 2:
            assert stop.wait(20)

    stack = stacked(2, 2, FakeRecords(fault=fault))
    stack.begin(0)
    stack.high.wait(key(0), RECORD // 2)
    assert not stack.low.ready(key(0))
    stop.set()
    stack.high.wait(key(0), RECORD)
    stack.check()


def test_more_demanded_records_than_slots_below_need_no_waiting_in_between(stacked: Callable[..., Stack]) -> None:
    """Two slots below, both taken by what goes up and what comes down: the next ones wait their turn."""
    stack = stacked(6, 2, gates=Gates(random.Random(1), 0.001))
    for _ in range(3):
        for numbers in (range(6), range(6, 12)):
            for number in numbers:
                stack.high.cache.use(key(number))
                assert stack.high.want(key(number), "demand")
            for number in numbers:
                stack.high.wait(key(number), RECORD)
            stack.check()


def test_a_guess_without_a_slot_below_fails_at_once_and_costs_nothing(stacked: Callable[..., Stack]) -> None:
    stack = stacked(4, 2)
    stack.records.gate.clear()
    stack.begin(0)
    stack.begin(1)
    assert stack.high.want(key(2), "speculative")
    with pytest.raises(QmixError, match="no slot for it in the tier below"):
        stack.high.wait(key(2), RECORD)
    assert key(2) not in stack.high and key(2) not in stack.low


def test_a_guess_given_up_is_not_read_to_its_end_but_one_that_others_want_is(stacked: Callable[..., Stack]) -> None:
    stack = stacked(4, 4)
    stack.records.gate.clear()
    assert stack.low.want(key(1), "warm")
    for number in (1, 2):
        assert stack.high.want(key(number), "speculative")
        stack.high.cancel_guess(key(number))
    assert key(2) not in stack.low and key(1) in stack.low
    stack.records.gate.set()
    stack.low.wait(key(1), RECORD)
    stack.check()


def test_a_guess_that_turns_out_right_is_promoted_on_both_ways(stacked: Callable[..., Stack]) -> None:
    stack = stacked(4, 4)
    stack.records.gate.clear()
    assert stack.high.want(key(1), "speculative")
    up, read = stack.high.load_of(key(1)), stack.low.load_of(key(1))
    assert up is not None and read is not None and (up.urgency, read.urgency) == (AHEAD, AHEAD)
    stack.begin(1)
    assert (up.urgency, read.urgency) == (DEMAND, DEMAND)


@pytest.mark.parametrize("fenced", [True, False])
def test_work_that_is_late_still_reads_the_record_that_it_was_given(fenced: bool,
                                                                    stacked: Callable[..., Stack]) -> None:
    """Without the fence it reads the next one's bytes, so the test can fail."""
    stack = stacked(2, 4)
    high, device, saw = stack.high, stack.device, list[bytes]()
    stack.bring(0, 1)
    slot = high.bytes_of(key(0))
    stack.gates.let(compute=0)
    device.compute.run(lambda: saw.append(bytes(memory(slot))))
    done = device.compute.record()
    if fenced:
        high.used([key(0)], done)
    stack.begin(2)
    assert high.bytes_of(key(2)).data_ptr() == slot.data_ptr()
    if fenced:
        load = high.load_of(key(2))
        assert load is not None and stays(lambda: load.arrived == 0)
    else:
        high.wait(key(2), RECORD)
    stack.gates.let(compute=OPEN)
    done.wait()
    assert saw == [content(key(0) if fenced else key(2))]
    high.wait(key(2), RECORD)
    stack.check()


def test_the_fence_outlives_a_guess_that_was_given_up(stacked: Callable[..., Stack]) -> None:
    stack = stacked(1, 4)
    high, saw = stack.high, list[bytes]()
    stack.bring(0)
    slot = high.bytes_of(key(0))
    stack.gates.let(compute=0)
    stack.device.compute.run(lambda: saw.append(bytes(memory(slot))))
    high.used([key(0)], stack.device.compute.record())
    for number in (1, 2, 3):
        high.drop(next(iter(high)))
        stack.records.gate.clear()
        assert high.want(key(number), "speculative")
    stack.records.gate.set()
    load = high.load_of(key(3))
    assert load is not None and stays(lambda: load.arrived == 0)
    stack.gates.let(compute=OPEN)
    high.wait(key(3), RECORD)
    assert saw == [content(key(0))]


def broken() -> None:
    raise RuntimeError("unspecified launch failure")


class Failing(StandIn):
    """The copies of one of its streams fail from a certain one on: 0 is up, 1 down."""

    def __init__(self, which: int, after: int):
        super().__init__()
        self._which, self._after = which, after
        self._copies: list[object] = []

    def stream(self):  # type: ignore[no-untyped-def]
        stream = super().stream()
        self._copies.append(stream)
        if len(self._copies) - 1 == self._which:
            run, count = stream.run, iter(range(10**9))

            def failing(work: Work) -> None:
                run(work if next(count) < self._after else broken)

            stream.run = failing  # type: ignore[method-assign]
        return stream


def test_an_error_on_the_way_up_is_told_and_what_is_below_stays(stacked: Callable[..., Stack]) -> None:
    stack = stacked(3, 3, device=Failing(0, 12))
    stack.bring(0)
    for number in (1, 2, 1):
        stack.begin(number)
        with pytest.raises(QmixError, match=f"layer 0 expert {number}: could not be copied up: the device failed"):
            stack.high.wait(key(number), RECORD)
        assert key(number) not in stack.high and stack.low.ready(key(number))
        stack.check()


def test_an_error_on_the_way_down_costs_the_copy_and_no_more(stacked: Callable[..., Stack]) -> None:
    stack = stacked(2, 2, device=Failing(1, 3))
    for _ in range(2):
        stack.bring(0, 1, 2, 3, 4)
        stack.settle()
        stack.check()
    assert stack.copies.bytes_down <= 3 * CHUNK
    assert len(stack.records.seen) > 5 * RECORD // CHUNK, "what did not come down is read again"


def test_a_failed_compute_fails_what_waits_for_it(stacked: Callable[..., Stack]) -> None:
    stack = stacked(1, 2)
    stack.bring(0)
    stack.device.compute.run(broken)
    stack.high.used([key(0)], stack.device.compute.record())
    stack.begin(1)
    with pytest.raises(QmixError, match="layer 0 expert 1: could not be copied up: the device failed"):
        stack.high.wait(key(1), RECORD)


def test_a_read_that_fails_is_told_above_and_frees_both_slots(stacked: Callable[..., Stack]) -> None:
    failing = {key(1)}

    def fault(k: ExpertKey, start: int) -> None:
        if k in failing:
            raise OSError(5, "unlucky")

    stack = stacked(2, 2, FakeRecords(fault=fault))
    for _ in range(3):
        stack.begin(1)
        with pytest.raises(QmixError, match="layer 0 expert 1"):
            stack.high.wait(key(1), RECORD)
        assert key(1) not in stack.high and key(1) not in stack.low
        stack.check()
    failing.clear()
    stack.bring(1)
    stack.check()


@pytest.mark.parametrize("seed", range(4))
def test_close_while_records_are_on_their_way_in_both_directions(seed: int) -> None:
    dice = random.Random(seed)
    stack = Stack(3, 3, gates=Gates(dice, 0.001))
    stack.bring(*range(5))
    stack.records.gate.clear()
    stack.gates.let(up=2, down=1)
    stack.high.want(key(2 + dice.randrange(2)), "demand")
    stack.high.want(key(9), "demand")
    stack.high.want(key(10), "speculative")
    threading.Timer(0.02, lambda: stack.gates.let(up=OPEN, down=OPEN)).start()
    stack.copies.close()
    for tier in (stack.high, stack.low):
        for k in list(tier):
            load = tier.load_of(k)
            assert load is None or load.over or tier is stack.low
    assert stack.high.want(key(11), "demand")
    with pytest.raises(QmixError, match="qmix is closing"):
        stack.high.wait(key(11), RECORD)
    stack.close()


def test_readers_that_are_gone_leave_no_trip_waiting(stacked: Callable[..., Stack]) -> None:
    stack = stacked(2, 3)
    stack.records.gate.clear()
    for number in (0, 1):
        stack.begin(number)
    closing = threading.Thread(target=stack.readers.close)
    closing.start()
    time.sleep(0.01)
    stack.records.gate.set()
    closing.join()
    for number in (0, 1):
        with pytest.raises(QmixError, match=f"layer 0 expert {number}"):
            stack.high.wait(key(number), RECORD)


def test_figures_count_bytes_and_time_of_both_ways(stacked: Callable[..., Stack]) -> None:
    stack = stacked(2, 2)
    stack.bring(*range(4))
    stack.high.want(key(5), "speculative")
    stack.settle()
    copies = stack.copies
    assert copies.bytes_up == [4 * RECORD, RECORD, 0]
    assert copies.bytes_down % RECORD == 0
    assert copies.busy_seconds > 0 and (copies.busy_seconds_down > 0) == (copies.bytes_down > 0)
