"""levels.py: the runs cover every value."""

from hypothesis import given
from hypothesis import strategies as st
from levels import THREADS, runs, torch_levels


@given(st.lists(st.text("abc", min_size=1), min_size=1, max_size=8, unique=True),
       st.lists(st.text("xyz", min_size=1), min_size=1, max_size=3, unique=True))
def test_each_level_and_number_of_threads_is_in_a_run(native: list[str], aten: list[str]) -> None:
    found = runs(native, aten)
    assert {run.native for run in found} == set(native)
    assert {run.aten for run in found} == set(aten)
    assert {run.threads for run in found} == set(THREADS)
    assert len(found) == max(len(native), len(aten), len(THREADS))


def test_torch_has_its_least_level_everywhere() -> None:
    assert torch_levels()[-1] == "default"
