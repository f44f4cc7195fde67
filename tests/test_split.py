"""How missing experts are divided between the bus and the CPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hypothesis import given
from hypothesis import strategies as st

from qmix.offload.split import Split

speeds = st.floats(0.1, 200)


missing = st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 10**9)).map(lambda two: (min(two), max(two))),
                   max_size=12)


def longest(computed: Collection[int], records: Sequence[tuple[int, int]], coming: int, copy: float,
            host: float) -> float:
    """How long a layer waits where the CPU computes the records of these indices, the others being copied."""
    copied = [left for i, (left, _) in enumerate(records) if i not in computed]
    return max((coming + sum(copied)) / copy, sum(records[i][1] for i in computed) / host)


@given(missing, st.integers(0, 10**9), speeds, speeds)
def test_neither_side_could_do_better(records: list[tuple[int, int]], coming: int, copy: float, host: float) -> None:
    """Of all ways to give the last ones to the CPU, the one whose longer side is the shortest; ties to copying."""
    ends = [range(first, len(records)) for first in range(len(records), -1, -1)]
    count = Split(copy, host).on_host(records, coming)
    assert 0 <= count <= len(records)
    found = longest(ends[count], records, coming, copy, host)
    assert all(found <= longest(end, records, coming, copy, host) * (1 + 1e-9) for end in ends)
    assert all(found < longest(end, records, coming, copy, host) * (1 + 1e-9) for end in ends[:count])


@given(st.lists(st.integers(0, 100), max_size=7), st.integers(0, 300), speeds, speeds)
def test_records_of_one_size_by_what_is_left_of_them(lefts: list[int], coming: int, copy: float, host: float) -> None:
    """Those nearest to their arrival first: no choice of any of them does better."""
    records = [(left, 100) for left in sorted(lefts)]
    count = Split(copy, host).on_host(records, coming)
    found = longest(range(len(records) - count, len(records)), records, coming, copy, host)
    for some in range(2 ** len(records)):
        chosen = [i for i in range(len(records)) if some >> i & 1]
        assert found <= longest(chosen, records, coming, copy, host) * (1 + 1e-9)


@given(st.integers(0, 10**9), st.integers(1, 10**9), speeds, speeds)
def test_one_that_is_on_its_way_is_computed_where_its_rest_takes_longer(left: int, whole: int, copy: float,
                                                                        host: float) -> None:
    left = min(left, whole)
    if abs(left / copy - whole / host) > 1e-9 * whole / host:
        assert Split(copy, host).on_host([(left, whole)]) == (left / copy > whole / host)


def test_ties_are_copied() -> None:
    one = (100, 100)
    assert Split(10, 10).on_host([one, one]) == 1 and Split(10, 1e9).on_host([]) == 0
    assert Split(10, 10).on_host([one]) == 0 and Split(10, 10.1).on_host([one]) == 1


def test_the_example_of_its_docstring() -> None:
    """8 ms a copy, 10 or 1 ms a product."""
    half, whole = (4, 8), (8, 8)
    assert Split(1.0, 0.8).on_host([half, whole]) == 1 and Split(1.0, 0.8).on_host([half]) == 0
    assert Split(1.0, 8.0).on_host([half, whole]) == 2


@given(speeds, speeds)
def test_what_is_measured_is_learnt_and_nothing_measured_changes_nothing(real: float, guess: float) -> None:
    split = Split(guess, guess)
    split.copied(0, 1.0)
    split.computed(10, 0.0)
    assert abs(split.copy_gbps / guess - 1) < 1e-9 and abs(split.host_gbps / guess - 1) < 1e-9
    for _ in range(150):
        split.copied(10**8, 0.1 / real)
        split.computed(10**8, 0.2 / real)
    assert abs(split.copy_gbps / real - 1) < 1e-2 and abs(split.host_gbps * 2 / real - 1) < 1e-2
