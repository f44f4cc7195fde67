"""Router statistics: counted, merged, saved by several processes, killed, and faced with files that are not theirs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from warm_python import WarmPython

from qmix.config import ExpertKey
from qmix.offload import router_stats
from qmix.offload.router_stats import LIMIT, RouterStats, load, save, stats_file

LAYERS, EXPERTS = 3, 4
STORE = "0123456789abcdef" * 2

token = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=2, max_size=2).map(sorted), min_size=LAYERS,
                 max_size=LAYERS)
tokens = st.lists(st.tuples(st.sampled_from(["prefill", "decode"]), token), max_size=12)


def counted(seen: list[tuple[str, list[list[int]]]]) -> RouterStats:
    stats = RouterStats(LAYERS, EXPERTS)
    for phase, choices in seen:
        stats.add_token(phase, choices)
    return stats


def filled(count: int = 10) -> RouterStats:
    return counted([("decode", [[0, 1], [1, 2], [2, 3]])] * count)


def decoded(stats: RouterStats) -> int:
    return stats.total("decode").tokens


@given(seen=tokens)
def test_counts_recency_and_transitions_are_those_of_a_naive_count(seen: list[tuple[str, list[list[int]]]]) -> None:
    stats = counted(seen)
    for phase in ("prefill", "decode"):
        own = [choices for p, choices in seen if p == phase]
        total = stats.total(phase)
        assert total.tokens == len(own)
        for layer in range(LAYERS):
            for a in range(EXPERTS):
                users = [n for n, choices in enumerate(own, 1) if a in choices[layer]]
                assert total.counts[layer][a] == len(users)
                assert total.last[layer][a] == (users[-1] if users else 0)
                if layer + 1 < LAYERS:
                    assert total.transitions[layer][a] == [
                        sum(a in choices[layer] and b in choices[layer + 1] for choices in own) for b in range(EXPERTS)]
        share = {ExpertKey(layer, e): total.counts[layer][e] / len(own) for layer in range(LAYERS)
                 for e in range(EXPERTS)} if own else {}
        assert stats.share(phase) == share
    if seen:
        assert sum(stats.share().values()) == pytest.approx(2 * LAYERS)


@given(seen=tokens)
def test_counting_in_bulk_is_counting_one_by_one(seen: list[tuple[str, list[list[int]]]]) -> None:
    one_by_one, bulk = counted(seen).total("decode"), RouterStats(LAYERS, EXPERTS)
    bulk.add_counts("decode", one_by_one.tokens, one_by_one.counts, one_by_one.transitions)
    found = bulk.total("decode")
    assert (found.tokens, found.counts, found.transitions) == (
        one_by_one.tokens, one_by_one.counts, one_by_one.transitions)
    # Which of the tokens used an expert last is not known; that one of them did is.
    assert found.last == [[found.tokens if count else 0 for count in row] for row in found.counts]


@given(first=tokens, second=tokens)
def test_merging_is_counting_on(first: list[tuple[str, list[list[int]]]],
                                second: list[tuple[str, list[list[int]]]]) -> None:
    merged = counted(first)
    merged.merge(counted(second))
    assert merged.to_json() == counted(first + second).to_json()


def test_only_statistics_of_the_same_shape_are_merged() -> None:
    with pytest.raises(ValueError, match="2 x 4 experts, want 3 x 4"):
        RouterStats(3, 4).merge(RouterStats(2, 4))


@given(seen=tokens)
def test_json_gives_back_what_it_got(seen: list[tuple[str, list[list[int]]]]) -> None:
    stats = counted(seen)
    again = RouterStats.from_json(json.loads(json.dumps(stats.to_json())), LAYERS, EXPERTS)
    assert again.to_json() == stats.to_json()
    assert again.fresh() is None  # what was loaded is not saved a second time


def test_the_next_layer_is_foretold_by_conditional_frequencies() -> None:
    stats = RouterStats(2, 4)
    assert stats.next_probabilities(0, [1]) == [0.0] * 4
    stats.add_counts("prefill", 400, [[100, 100, 100, 100], [100, 100, 100, 100]],
                     [[[80, 20, 0, 0], [0, 100, 0, 0], [10, 10, 40, 40], [10, 10, 40, 40]]])
    assert stats.next_probabilities(0, [0]) == pytest.approx([(n + 16 * 0.25) / 116 for n in (80, 20, 0, 0)])
    both = stats.next_probabilities(0, [0, 1])
    assert both == pytest.approx([(n + 16 * 0.25) / 116 for n in (40, 60, 0, 0)])
    assert stats.next_probabilities(0, []) == [0.25] * 4


@settings(deadline=None)
@given(seen=tokens, chosen=st.sets(st.integers(0, EXPERTS - 1), max_size=EXPERTS))
def test_what_is_foretold_are_probabilities_of_k_experts(seen: list[tuple[str, list[list[int]]]],
                                                         chosen: set[int]) -> None:
    shares = counted(seen).next_probabilities(1, sorted(chosen))
    assert all(0 <= p <= 1 + 1e-9 for p in shares)
    if seen:
        assert sum(shares) == pytest.approx(2)


def test_saved_statistics_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "routing"
    assert decoded(load(folder, STORE, LAYERS, EXPERTS, pytest.fail)) == 0
    assert decoded(load(None, STORE, LAYERS, EXPERTS, pytest.fail)) == 0
    stats = filled()
    save(folder, STORE, stats, pytest.fail)
    save(folder, STORE, stats, pytest.fail)  # nothing new: nothing is added
    again = load(folder, STORE, LAYERS, EXPERTS, pytest.fail)
    assert again.to_json() == filled().to_json()
    again.add_token("decode", [[0, 1]] * LAYERS)
    save(folder, STORE, again, pytest.fail)
    save(folder, "another store/..", filled(3), pytest.fail)
    assert decoded(load(folder, STORE, LAYERS, EXPERTS, pytest.fail)) == 11
    assert decoded(load(folder, "another store/..", LAYERS, EXPERTS, pytest.fail)) == 3
    assert stats_file(folder, "another store/..").parent == folder


def test_what_another_process_saved_meanwhile_is_kept(tmp_path: Path) -> None:
    mine, theirs = (load(tmp_path, STORE, LAYERS, EXPERTS, pytest.fail) for _ in range(2))
    mine.merge(filled(5))
    theirs.merge(filled(7))
    save(tmp_path, STORE, mine, pytest.fail)
    save(tmp_path, STORE, theirs, pytest.fail)
    mine.merge(filled(1))
    save(tmp_path, STORE, mine, pytest.fail)
    assert decoded(load(tmp_path, STORE, LAYERS, EXPERTS, pytest.fail)) == 13


def save_often(folder: Path, times: int) -> None:
    stats = load(folder, STORE, LAYERS, EXPERTS, print)
    for _ in range(times):
        stats.merge(filled(1))
        save(folder, STORE, stats, print, patience=60)


def test_processes_that_save_at_once_lose_nothing(tmp_path: Path, warm_python: WarmPython) -> None:
    code = ("import sys; from pathlib import Path; from test_router_stats import save_often\n"
            "save_often(Path(sys.argv[1]), 40)")
    processes = [warm_python.start("-c", code, tmp_path, cwd=Path(__file__).parent) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert decoded(load(tmp_path, STORE, LAYERS, EXPERTS, pytest.fail)) == 120


KILLED = """
import sys
from pathlib import Path
from test_router_stats import *
stats = load(Path(sys.argv[1]), STORE, LAYERS, EXPERTS, print)
while True:
    stats.merge(filled(1))
    save(Path(sys.argv[1]), STORE, stats, print, patience=60)
    print("saved", flush=True)
"""


def test_a_process_killed_while_it_saves_harms_nothing(tmp_path: Path, warm_python: WarmPython) -> None:
    before = 0
    for turn in range(4):
        process = warm_python.start("-c", KILLED, tmp_path, stdout=PIPE, cwd=Path(__file__).parent)
        assert process.stdout is not None and process.stdout.readline() == "saved\n"
        time.sleep(0.05 + 0.013 * turn)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = decoded(load(tmp_path, STORE, LAYERS, EXPERTS, pytest.fail))
        assert now > before
        before = now
    save(tmp_path, STORE, filled(1), pytest.fail)  # the lock went with its process; what it left is cleared
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{STORE}.json", f"{STORE}.lock"]
    assert decoded(load(tmp_path, STORE, LAYERS, EXPERTS, pytest.fail)) == before + 1


def good() -> dict[str, Any]:
    return {"qmix_router_stats": 1, "store": STORE, **filled().to_json()}


def changed(**values: Any) -> bytes:
    return json.dumps({**good(), **values}).encode()


def with_phase(**values: Any) -> bytes:
    document = good()
    document["phases"]["decode"].update(values)
    return json.dumps(document).encode()


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, changed()[:-40], changed(store="another"),
    changed(qmix_router_stats=2), changed(layers=2), changed(experts=8), changed(phases=[]), changed(phases={}),
    with_phase(tokens=-1), with_phase(tokens=2**90), with_phase(tokens=1.5), with_phase(tokens=True),
    with_phase(counts=[[1] * 4] * 2), with_phase(counts=[[1] * 5] * 3), with_phase(counts=[[-1] * 4] * 3),
    with_phase(counts=[[11] * 4] * 3), with_phase(last=[[0.5] * 4] * 3), with_phase(transitions=[[[1] * 4] * 4] * 3),
    with_phase(transitions=[[["1"] * 4] * 4] * 2), with_phase(last=None),
])
def test_a_file_that_is_not_ours_costs_one_line_and_is_replaced(tmp_path: Path, raw: bytes) -> None:
    path = stats_file(tmp_path, STORE)
    path.write_bytes(raw)
    said: list[str] = []
    stats = load(tmp_path, STORE, LAYERS, EXPERTS, said.append)
    assert decoded(stats) == 0
    assert len(said) == 1 and said[0].startswith(f"{path}: ignored (") and "\n" not in said[0] and len(said[0]) < 500
    stats.merge(filled(2))
    save(tmp_path, STORE, stats, pytest.fail)
    assert decoded(load(tmp_path, STORE, LAYERS, EXPERTS, pytest.fail)) == 2


def test_a_pipe_or_folder_in_its_place_costs_a_line(tmp_path: Path) -> None:
    path = stats_file(tmp_path, STORE)
    for make in (os.mkfifo, os.mkdir):
        make(path)
        said: list[str] = []
        assert decoded(load(tmp_path, STORE, LAYERS, EXPERTS, said.append)) == 0
        assert len(said) == 1
        if make is os.mkdir:
            save(tmp_path, STORE, filled(), said.append)
            assert len(said) == 2 and "were not saved" in said[1] and not list(tmp_path.glob(".*.tmp"))
        else:
            path.unlink()


def test_a_folder_that_cannot_be_made_costs_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    stats = filled()
    save(tmp_path / "file" / "routing", STORE, stats, said.append)
    assert len(said) == 1 and "router statistics were not saved" in said[0]
    save(tmp_path / "routing", STORE, stats, pytest.fail)
    assert decoded(load(tmp_path / "routing", STORE, LAYERS, EXPERTS, pytest.fail)) == 10


def test_a_full_disk_costs_a_line_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, STORE, filled(3), pytest.fail)
    stats, said = load(tmp_path, STORE, LAYERS, EXPERTS, pytest.fail), []
    stats.merge(filled(4))

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(router_stats.os, "fsync", full)
        save(tmp_path, STORE, stats, said.append)
    assert len(said) == 1 and "No space left on device" in said[0]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".lock"]
    assert decoded(load(tmp_path, STORE, LAYERS, EXPERTS, pytest.fail)) == 3
    save(tmp_path, STORE, stats, pytest.fail)  # nothing was lost
    assert decoded(load(tmp_path, STORE, LAYERS, EXPERTS, pytest.fail)) == 7


def test_a_lock_that_is_not_let_go_costs_a_line(tmp_path: Path) -> None:
    lock = stats_file(tmp_path, STORE).with_suffix(".lock")
    said: list[str] = []
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save(tmp_path, STORE, filled(), said.append, patience=0.05)
    assert len(said) == 1 and "is locked by another process" in said[0]
    assert not stats_file(tmp_path, STORE).exists()


def test_without_locks_it_saves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: object, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(router_stats.fcntl, "flock", none)
    said: list[str] = []
    save(tmp_path, STORE, filled(), said.append)
    assert len(said) == 1 and "cannot be locked (Function not implemented)" in said[0]
    assert decoded(load(tmp_path, STORE, LAYERS, EXPERTS, pytest.fail)) == 10


def test_huge_counts_are_halved_and_shares_stay(tmp_path: Path) -> None:
    most = LIMIT + 2
    stats = RouterStats(2, 2)
    stats.add_counts("decode", most, [[most, most // 2], [most // 4, 0]], [[[most // 4, 0], [0, 0]]])
    share = stats.share("decode")
    save(tmp_path, STORE, stats, pytest.fail)
    again = load(tmp_path, STORE, 2, 2, pytest.fail)
    assert decoded(again) == most // 2
    assert again.share("decode") == pytest.approx(share, rel=1e-9)
    assert again.total("decode").last == [[most // 2, most // 2], [most // 2, 0]]


def test_the_file_is_the_owners(tmp_path: Path) -> None:
    save(tmp_path / "routing", STORE, filled(), pytest.fail)
    assert (tmp_path / "routing").stat().st_mode & 0o077 == 0
    assert stats_file(tmp_path / "routing", STORE).stat().st_mode & 0o077 == 0
    with contextlib.suppress(FileNotFoundError):
        stats_file(tmp_path / "routing", STORE).unlink()
