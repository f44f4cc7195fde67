"""How missing experts are divided between the bus and the CPU."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmix.offload.split import Split

speeds = st.floats(0.1, 200)


@given(st.lists(st.integers(1, 10**9), max_size=12), st.integers(0, 10**9), speeds, speeds)
def test_neither_side_could_do_better(sizes: list[int], coming: int, copy: float, host: float) -> None:
    """Of all ways to give the last ones to the CPU, the one whose longer side is the shortest; ties to copying."""
    def longest(count: int) -> float:
        first = len(sizes) - count
        return max((coming + sum(sizes[:first])) / copy, sum(sizes[first:]) / host)

    count = Split(copy, host).on_host(sizes, coming)
    assert 0 <= count <= len(sizes)
    assert longest(count) <= min(map(longest, range(len(sizes) + 1))) * (1 + 1e-9)


def test_ties_are_copied() -> None:
    assert Split(10, 10).on_host([100, 100]) == 1 and Split(10, 1e9).on_host([]) == 0
    assert Split(10, 10).on_host([100]) == 0 and Split(10, 10.1).on_host([100]) == 1


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
