"""Two tiers when work is late, when copies, reads or the device fail, and when all is closed on their way."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from test_lane import stays, until
from test_reads import CHUNK, RECORD, FakeRecords, key
from two_tiers import OPEN, Gates, Stack, content, right, stacks

from qmix.config import ExpertKey
from qmix.device import StandIn
from qmix.device.device import Work
from qmix.errors import QmixError
from qmix.formats import memory

pytestmark = pytest.mark.usefixtures("no_thread_stays")


@pytest.fixture
def stacked() -> Iterator[Callable[..., Stack]]:
    yield from stacks()


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
        stack.wait_for_all()
        stack.check()
    assert stack.copies.bytes_down <= 3 * CHUNK
    assert len(stack.records.seen) > 5 * RECORD // CHUNK, "what did not come down is read again"


def test_what_failed_on_its_way_down_does_not_keep_its_slot(stacked: Callable[..., Stack]) -> None:
    stack = stacked(3, 2, device=Failing(1, 0))
    stack.bring(0, 1, 2)
    gone, = {key(i) for i in range(3)} - set(stack.low)
    stack.high.drop(gone)
    load = stack.low.load_of(gone)
    assert load is not None
    until(lambda: load.error is not None and not load.reading)
    stack.copies._sweep()
    assert gone not in stack.low
    stack.check()


def test_what_comes_down_takes_the_slot_of_what_could_not_be_read(stacked: Callable[..., Stack]) -> None:
    def fault(k: ExpertKey, start: int) -> None:
        if k != key(1):
            raise OSError(5, "unlucky")

    stack = stacked(1, 2, FakeRecords(fault=fault))
    stack.bring(1)
    for number in (5, 6):
        assert stack.low.want(key(number), "warm")
    until(lambda: all((load := stack.low.load_of(k)) is not None and load.error is not None for k in stack.low))
    stack.high.drop(key(1))
    assert key(1) in stack.low
    stack.low.wait(key(1), RECORD)
    assert right(stack.low.bytes_of(key(1)), key(1)) and stack.copies.bytes_down == RECORD


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


def test_a_record_that_leaves_while_reading_it_again_below_has_failed_comes_down(
        stacked: Callable[..., Stack]) -> None:
    failing = set[ExpertKey]()

    def fault(k: ExpertKey, start: int) -> None:
        if k in failing:
            raise OSError(5, "unlucky")

    stack = stacked(2, 2, FakeRecords(fault=fault))
    stack.bring(1)
    stack.wait_for_all()
    stack.low.drop(key(1))
    failing.add(key(1))
    assert stack.low.want(key(1), "warm")
    load = stack.low.load_of(key(1))
    assert load is not None
    until(lambda: load.error is not None)
    stack.high.drop(key(1))
    stack.low.wait(key(1), RECORD)
    assert stack.copies.bytes_down == RECORD
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
    opens = threading.Timer(0.02, lambda: stack.gates.let(up=OPEN, down=OPEN))
    opens.start()
    stack.copies.close()
    opens.join()
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
