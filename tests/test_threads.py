"""How many threads compute by default, and what is said of it."""

from __future__ import annotations

import pytest

from qmix import hardware
from qmix.engine.threads import SMALL, Threads
from qmix.errors import UsageError


@pytest.mark.parametrize(("cores", "alone", "beside"), [(1, 1, 1), (2, 2, 1), (8, 8, 7)])
def test_the_default_leaves_a_core_beside_a_gpu_where_there_is_more_than_one(
        cores: int, alone: int, beside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "compute_cores", lambda: cores)
    found = Threads(None, SMALL)
    assert (found.count(False), found.count(True)) == (alone, beside)
    assert ("one core left" in found.line(True)) == (cores > 1) and "left" not in found.line(False)
    assert Threads(cores, SMALL).count(True) == cores
    assert ("no core left" in Threads(cores, SMALL).line(True)) == (cores > 1)
    tiny = Threads(None, SMALL - 1)
    assert tiny.count(False) == tiny.count(True) == 1 and tiny.line(False) == "1 compute thread"


def test_a_number_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="--threads: got 0"):
        Threads(0, SMALL).count(False)
