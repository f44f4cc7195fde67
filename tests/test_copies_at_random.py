"""Two tiers under any sequence of requests, with delays, faults and late work: the right bytes, nothing lost."""

from __future__ import annotations

import random
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reads import CHUNK, RECORD, FakeRecords
from test_tiers import LAYERS
from two_tiers import ALL, Gates, Stack, right

from qmix.config import ExpertKey
from qmix.device.device import Work
from qmix.errors import QmixError
from qmix.formats import memory

pytestmark = pytest.mark.usefixtures("no_thread_stays")


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
    device.synchronize()
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
    stack.wait_for_all()
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
    stack.wait_for_all()
    stack.check()
    assert sorted(stack.records.seen) == sorted((k, start) for k in ALL for start in range(0, RECORD, CHUNK))
    assert set(stack.high) | set(stack.low) == set(ALL)
    stack.close()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, len(ALL) - 1), st.booleans())
def test_where_the_tier_below_has_a_slot_for_every_record_nothing_comes_down(seed: int, above: int,
                                                                             mixed: bool) -> None:
    """And none of them ever leaves it, also where guesses are given up and records leave above at any time."""
    dice = random.Random(seed)
    stack = Stack(above, len(ALL), gates=Gates(dice, 0.0002), mixed=mixed)
    seen: set[ExpertKey] = set()
    for k in dice.sample(ALL, len(ALL)):
        assert stack.high.want(k, "demand")
        stack.high.wait(k, len(stack.high.bytes_of(k)))
        seen.add(k)
        assert seen <= set(stack.low)
    for _ in range(4):
        play(stack, dice, 10, faults=False)
        for k in dice.sample(sorted(stack.high), 2):
            stack.high.drop(k)
    stack.wait_for_all()
    stack.check()
    assert stack.copies.bytes_down == 0 and set(stack.low) == set(ALL)
    assert len(stack.records.seen) == len(set(stack.records.seen)), "a record was read twice"
    stack.close()
