"""Two tiers, one above the other: what goes up, what stays, what comes down, and who waits for whom."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest
from test_lane import stays, until
from test_reads import CHUNK, RECORD, FakeRecords, key
from two_tiers import OPEN, Gates, Stack, content, stacks

from qmix.config import Cancel, ExpertKey
from qmix.errors import Interrupted
from qmix.formats import memory
from qmix.offload.reads import AHEAD, DEMAND, WARM

pytestmark = pytest.mark.usefixtures("no_thread_stays")


@pytest.fixture
def stacked() -> Iterator[Callable[..., Stack]]:
    yield from stacks()


def test_what_is_above_stays_below_as_a_spare_and_is_ordinary_again_when_it_leaves(
        stacked: Callable[..., Stack]) -> None:
    stack = stacked(2, 3)
    stack.bring(0, 1)
    stack.wait_for_all()
    assert set(stack.low.cache.spares) == {key(0), key(1)}
    stack.check()
    stack.bring(2)
    stack.wait_for_all()
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
    until(lambda: load.reading == 2)
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
        stacked: Callable[..., Stack], monkeypatch: pytest.MonkeyPatch) -> None:
    """The readers wait for the chunks that still come down, and hear of it when they are there."""
    stack = stacked(3, 2)
    monkeypatch.setattr(stack.readers, "cancel", lambda load: pytest.fail("this load is not theirs"))
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
    stack.wait_for_all()
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


def test_a_guess_given_up_and_wanted_again_keeps_its_place_below_for_the_second_trip(
        stacked: Callable[..., Stack]) -> None:
    stack = stacked(2, 2)
    stack.gates.let(up=0)
    assert stack.high.want(key(1), "speculative")
    first = stack.high.load_of(key(1))
    assert first is not None
    until(lambda: first.reading == 2)
    stack.high.cancel_guess(key(1))
    stack.begin(1)
    stack.gates.let(up=2)
    until(lambda: first.reading == 0)
    stack.copies._sweep()
    assert key(1) in stack.low._pinned and not stack.low.cache.spares
    stack.gates.let(up=OPEN)
    stack.high.wait(key(1), RECORD)
    assert set(stack.low.cache.spares) == {key(1)} and not stack.low._pinned
    stack.check()


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


def test_a_guess_without_a_slot_below_is_refused(stacked: Callable[..., Stack]) -> None:
    stack = stacked(4, 2)
    stack.records.gate.clear()
    stack.begin(0)
    stack.begin(1)
    assert not stack.high.want(key(2), "speculative")
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


def test_figures_count_bytes_and_time_of_both_ways(stacked: Callable[..., Stack]) -> None:
    stack = stacked(2, 2)
    stack.bring(*range(4))
    stack.high.want(key(5), "speculative")
    stack.wait_for_all()
    copies = stack.copies
    assert copies.bytes_up == [4 * RECORD, RECORD, 0]
    assert copies.bytes_down % RECORD == 0
    assert copies.busy_seconds > 0 and (copies.busy_seconds_down > 0) == (copies.bytes_down > 0)
