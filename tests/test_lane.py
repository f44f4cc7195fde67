"""A lane of the bus, its stream moved by hand: how much is on its way, in what order, and what each chunk waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from test_reads import CHUNK, RECORD, content, key

from qmix.device import Event
from qmix.device.device import Work
from qmix.errors import QmixError
from qmix.formats import memory
from qmix.offload.lane import Lane, Trip
from qmix.offload.reads import AHEAD, DEMAND, WARM, Load

pytestmark = pytest.mark.usefixtures("no_thread_stays")


class HandEvent:
    def __init__(self) -> None:
        self.over = threading.Event()
        self.error: QmixError | None = None

    def done(self) -> bool:
        return self.over.is_set()

    def wait(self) -> None:
        assert self.over.wait(20)
        if self.error is not None:
            raise self.error


class HandStream:
    """Does nothing until the test says `go`. given: (what was given, its event), in order."""

    def __init__(self) -> None:
        self.given: list[tuple[Work | Event, HandEvent]] = []
        self.gone = 0
        self.free = False
        self.lock = threading.RLock()

    def run(self, work: Work) -> None:
        self.given.append((work, HandEvent()))

    def enter(self) -> None:
        pass

    def after(self, event: Event) -> None:
        self.given.append((event, HandEvent()))

    def record(self) -> HandEvent:
        event = self.given[-1][1]
        if self.free:
            self.go_on()
        return event

    def go(self, count: int = 1, error: QmixError | None = None) -> None:
        with self.lock:
            for work, event in self.given[self.gone:self.gone + count]:
                if callable(work):
                    work()
                event.error = error
                event.over.set()
                self.gone += 1

    def go_on(self) -> None:
        """From now on without the test."""
        self.free = True
        self.go(10**9)


class Line:
    """A lane on a stream moved by hand."""

    def __init__(self, large: int = 0) -> None:
        self.stream, self.bell, self.now = HandStream(), threading.Condition(), 0.0
        self.lane = Lane("up", self.stream, self.bell, CHUNK, large, lambda: self.now)

    def send(self, number: int, urgency: int = DEMAND, after: Load | None = None, fence: Event | None = None,
             feed: Load | None = None, leaving: Load | None = None) -> Load:
        load = Load(key(number), torch.zeros(RECORD, dtype=torch.uint8), urgency, after, fence)
        source = torch.frombuffer(bytearray(content(key(number))), dtype=torch.uint8)
        self.lane.submit(Trip(load, source, feed, leaving))
        return load

    def ring(self) -> None:
        with self.bell:
            self.bell.notify_all()

    def finish(self, *loads: Load) -> None:
        """Let the stream run by itself until these are over."""
        self.stream.go_on()
        until(lambda: all(load.over and not load.reading for load in loads))


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.0005)


def stays(what: Callable[[], bool]) -> bool:
    """It is so, and is still so when the lane has had the time to change it."""
    time.sleep(0.02)
    return what()


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.stream.go_on()
    line.lane.close()


def right(load: Load) -> bool:
    return bytes(memory(load.slot)) == content(load.key)


def test_two_chunks_are_on_their_way_and_count_when_their_event_is_over(line: Line) -> None:
    load = line.send(1)
    until(lambda: len(line.stream.given) == 2)
    assert stays(lambda: len(line.stream.given) == 2 and load.arrived == 0 and load.reading == 2)
    line.stream.go()
    until(lambda: load.arrived == CHUNK and len(line.stream.given) == 3)
    line.stream.go(2)
    until(lambda: load.arrived == 3 * CHUNK and len(line.stream.given) == 5)
    assert bytes(memory(load.slot))[:3 * CHUNK] == content(load.key)[:3 * CHUNK] and not load.done
    line.finish(load)
    assert load.done and right(load) and line.lane.bytes == [RECORD, 0, 0]


def test_a_demanded_record_goes_in_large_chunks_where_all_their_bytes_are_there() -> None:
    line = Line(large=3 * CHUNK)
    try:
        guess = line.send(1, WARM)
        until(lambda: len(line.stream.given) == 2)
        feed = Load(key(2), torch.zeros(RECORD, dtype=torch.uint8), DEMAND, None)
        feed.arrived = 2 * CHUNK  # of a record that the disk still reads: small chunks, as they come
        load, other = line.send(2, feed=feed), line.send(3)
        line.stream.go(2)
        until(lambda: guess.arrived == 2 * CHUNK and len(line.stream.given) == 4)
        assert (load.taken, other.taken) == (2 * CHUNK, 0)
        line.stream.go(2)
        until(lambda: load.arrived == 2 * CHUNK and other.taken == 6 * CHUNK)
        feed.arrived, feed.done = RECORD, True
        line.finish(guess, load, other)
        assert all(map(right, (guess, load, other))) and line.lane.bytes == [2 * RECORD, 0, RECORD]
    finally:
        line.stream.go_on()
        line.lane.close()


def test_a_demanded_record_overtakes_after_two_chunks(line: Line) -> None:
    warm = line.send(1, WARM)
    until(lambda: len(line.stream.given) == 2)
    guess, demanded = line.send(2, AHEAD), line.send(3, DEMAND)
    line.stream.go()
    until(lambda: len(line.stream.given) == 3)
    assert (warm.taken, guess.taken, demanded.taken) == (2 * CHUNK, 0, CHUNK)
    line.stream.go_on()
    until(lambda: demanded.done)
    line.finish(warm, guess)
    assert right(warm) and right(guess) and right(demanded)
    assert line.lane.bytes == [RECORD, RECORD, RECORD]


def test_chunks_follow_those_that_bring_the_record_and_those_that_take_the_old_one_away(line: Line) -> None:
    feed, leaving = (Load(key(1), torch.zeros(RECORD), WARM, None) for _ in range(2))
    load = line.send(1, feed=feed, leaving=leaving)
    line.stream.go_on()
    assert stays(lambda: load.taken == 0)
    feed.arrived = 3 * CHUNK
    line.ring()
    assert stays(lambda: load.taken == 0)
    leaving.arrived = 2 * CHUNK
    line.ring()
    until(lambda: load.arrived == 2 * CHUNK)
    leaving.cancelled, leaving.reading = True, 1  # given up, but a chunk is still being copied out of the slot
    line.ring()
    assert stays(lambda: load.taken == 2 * CHUNK)
    leaving.reading = 0
    line.ring()
    until(lambda: load.arrived == 3 * CHUNK)
    feed.arrived, feed.done = RECORD, True
    line.ring()
    until(lambda: load.done)
    assert right(load)


def test_a_trip_waits_for_what_still_lands_in_its_slot(line: Line) -> None:
    given_up = Load(key(0), torch.zeros(RECORD), WARM, None)
    given_up.cancelled, given_up.reading = True, 1
    load = line.send(1, after=given_up)
    line.stream.go_on()
    assert stays(lambda: load.taken == 0)
    given_up.reading = 0
    line.ring()
    until(lambda: load.done)


def test_the_stream_waits_for_the_fence_once_before_the_first_chunk(line: Line) -> None:
    fence = HandEvent()
    load = line.send(1, fence=fence)
    until(lambda: len(line.stream.given) == 3)
    assert [what is fence for what, _ in line.stream.given] == [True, False, False]
    line.finish(load)
    assert sum(what is fence for what, _ in line.stream.given) == 1 and right(load)


def test_a_record_that_does_not_come_fails_its_trip_with_that_error(line: Line) -> None:
    feed = Load(key(1), torch.zeros(RECORD), WARM, None)
    load, other = line.send(1, feed=feed), line.send(2)
    feed.error = QmixError("layer 0 expert 1: the disk is broken")
    line.finish(load, other)
    assert load.error is feed.error and right(other)


def test_an_error_of_the_device_names_the_record_and_the_way(line: Line) -> None:
    load = line.send(1)
    until(lambda: len(line.stream.given) == 2)
    line.stream.go(error=QmixError("the GPU failed", "restart"))
    until(lambda: load.error is not None)
    assert str(load.error).startswith("layer 0 expert 1: could not be copied up: the GPU failed")
    assert load.error.cure == "restart"  # type: ignore[union-attr]
    line.finish(load)
    assert load.arrived == 0


def test_a_trip_given_up_sends_no_more(line: Line) -> None:
    load = line.send(1)
    until(lambda: len(line.stream.given) == 2)
    with line.bell:
        load.cancelled = True
    other = line.send(2)
    line.finish(load, other)
    assert load.taken == 2 * CHUNK and not load.done and right(other)


def test_busy_seconds_are_those_with_something_on_its_way(line: Line) -> None:
    first = line.send(1)
    until(lambda: len(line.stream.given) == 2)
    line.now = 2.0
    assert line.lane.busy_seconds == 2.0
    line.finish(first)
    line.now = 10.0
    assert line.lane.busy_seconds == 2.0
    second = line.send(2)
    line.finish(second)
    assert line.lane.busy_seconds == 2.0


def test_a_wait_for_a_fence_is_not_busy_but_the_copy_before_it_is(line: Line) -> None:
    """Else the bus would seem slower the longer the device computes."""
    first, second = line.send(1), line.send(2, fence=HandEvent())
    for chunk in range(RECORD // CHUNK):
        until(lambda chunk=chunk: len(line.stream.given) > chunk)
        line.stream.go()
    until(lambda: first.done and len(line.stream.given) == RECORD // CHUNK + 3)
    until(lambda: line.lane._busy_since is None)
    line.now = 5.0
    assert line.lane.busy_seconds == 0.0
    line.stream.go()  # the fence is over
    until(lambda: line.lane._busy_since is not None)
    line.now = 7.0
    assert line.lane.busy_seconds == 2.0
    line.finish(second)
    assert line.lane.busy_seconds == 2.0 and right(second)
    line.now = 9.0
    assert line.lane.busy_seconds == 2.0


def test_a_closed_lane_fails_what_did_not_start_and_what_comes_later() -> None:
    line = Line()
    load, waiting = line.send(1), line.send(2, WARM)
    until(lambda: len(line.stream.given) == 2)
    threading.Timer(0.02, lambda: line.stream.go(2)).start()
    line.lane.close()
    later = line.send(3)
    for one in (load, waiting, later):
        assert "qmix is closing" in str(one.error) and not one.reading
    assert load.arrived == 2 * CHUNK and waiting.taken == 0


def test_a_lane_whose_thread_ends_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line()
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(Trip, "may_copy", lambda self, end: 1 // 0)
    loads = [line.send(1), line.send(2)]
    until(lambda: all(load.error is not None for load in loads))
    assert "could not be copied up: the thread that copies is gone" in str(loads[1].error)
    line.lane.close()
