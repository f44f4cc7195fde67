"""The reports of `qmix stats` and `qmix replay`: figures against hand counts, and that they can be printed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qmix.commands.routing import default_slots, describe, replay_report
from qmix.errors import UsageError
from qmix.offload.router_stats import RouterStats
from qmix.offload.trace import TraceHeader, TraceWriter
from qmix.render import document

HEADER = TraceHeader(2, 4, 2, 1, "s", "tiny")


def gathered() -> RouterStats:
    """A prompt of 3 tokens and an answer of 3; layer 1 always chooses 3 0."""
    stats = RouterStats(2, 4)
    for phase, first in (("prefill", [0, 1]), ("prefill", [0, 2]), ("prefill", [1, 0]),
                         ("decode", [1, 3]), ("decode", [2, 0]), ("decode", [2, 0])):
        stats.add_token(phase, [first, [3, 0]])
    return stats


def record(path: Path, seed: int, tokens: int = 60) -> Path:
    dice = random.Random(seed)
    with TraceWriter(path, HEADER) as writer:
        for length in (5, *[1] * tokens):
            for layer in range(2):
                ids = [dice.sample(range(4), 2) for _ in range(length)]
                ahead = [[dice.randrange(4)] for _ in range(length)] if length == 1 and layer == 0 else None
                writer.add(layer, ids, [[0.7, 0.3]] * length, ahead)
            writer.end_pass("prefill" if length > 1 else "decode", [0] * length)
    return path


def test_figures_are_those_of_a_hand_count() -> None:
    report = describe(gathered())
    assert report["prefill"]["tokens"] == 3 and report["decode"]["tokens"] == 3
    assert report["decode"]["even share %"] == 50 and report["decode"]["entropy of an even router"] == 2
    first, second = report["prefill"]["by layer"]
    assert first == {"layer": 0, "top": 0, "share %": 100, "entropy": pytest.approx(1.459, abs=1e-3),
                     "counts": [3, 2, 1, 0]}
    assert second["entropy"] == 1
    assert report["decode"]["by layer"][0]["counts"] == [2, 1, 2, 1]


def test_top_transitions_are_those_far_from_chance() -> None:
    stats = RouterStats(2, 3)
    stats.add_counts("decode", 100, [[50, 45, 5], [50, 30, 20]], [[[45, 5, 0], [5, 25, 15], [0, 0, 5]]])
    top = describe(stats)["decode"]["top transitions"]
    assert top[0] == {"layer": 0, "expert": 0, "then": 0, "share %": 90, "at large %": 50}
    assert all(row["expert"] != 2 for row in top)  # five tokens show nothing
    assert describe(stats, full=True)["decode"]["transitions"] == [[[45, 5, 0], [5, 25, 15], [0, 0, 5]]]


def test_no_statistics_have_no_rows() -> None:
    assert describe(RouterStats(2, 4)) == {"layers": 2, "experts": 4, "prefill": {"tokens": 0}, "decode": {"tokens": 0}}


def test_many_experts_have_no_counts_in_the_short_form() -> None:
    stats = RouterStats(1, 64)
    stats.add_token("decode", [[5, 9]])
    assert "counts" not in describe(stats)["decode"]["by layer"][0]
    assert sum(describe(stats, full=True)["decode"]["by layer"][0]["counts"]) == 2


def test_reports_can_be_printed(tmp_path: Path) -> None:
    test, train = record(tmp_path / "a", 1), record(tmp_path / "b", 2)
    report = replay_report([test], [train], pytest.fail, quotas=True, record=4096)
    for one in (report, describe(gathered()), describe(gathered(), full=True)):
        assert json.loads(document(one, as_json=True)) == one
        assert document(one, as_json=False)
    assert report["decoded tokens"] == 60
    assert {row["slots"] for row in report["policies"]} == {2, 3, 4, 6}
    assert {(row["policy"], row["quotas"]) for row in report["policies"]} == {
        (policy, quotas) for policy in ("lru", "lfu", "static") for quotas in ("no", "yes")} | {("belady", "no")}
    assert all("MB/token" in row for row in report["policies"])
    assert {row["source"] for row in report["predictions"]} == {"ahead", "transitions", "both"}


def test_a_replay_without_training_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    report = replay_report([record(tmp_path / "a", 1)], [], said.append, slots=[3], policies=["lfu:8"])
    assert [(row["slots"], row["policy"]) for row in report["policies"]] == [(3, "lfu:8"), (3, "belady")]
    assert len(said) == 1 and "--train" in said[0]


def test_a_trace_without_an_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a: no token was decoded in it"):
        replay_report([record(tmp_path / "a", 1, tokens=0)], [], print)


def test_default_slots_are_shares_of_the_records() -> None:
    assert default_slots(TraceHeader(32, 8, 2, 2, "s", "n")) == [64, 96, 128, 192]
    assert default_slots(TraceHeader(1, 4, 3, 0, "s", "n")) == [3]
