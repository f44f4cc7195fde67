"""The map of the experts: where each one is, and how often the last tokens chose it."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from device_engines import bring_up, run, stores

from qmix.config import ExpertKey, SamplingParams
from qmix.demo import demo_store
from qmix.engine import Engine, load
from qmix.offload.expert_map import HALF_LIFE, ExpertMap, Heat
from qmix.offload.plan import RESERVE, Needs, TierPlan
from qmix.offload.router_stats import RouterStats
from qmix.store import Store


def test_shares_are_those_of_the_recent_tokens() -> None:
    """Against the sum over all tokens, written out: a token of a look counts whole, each later look of n tokens makes
    it 0.5 ** (n / HALF_LIFE) of that."""
    dice, stats, heat = random.Random(0), RouterStats(2, 5), Heat(2, 5)
    looks: list[list[list[list[int]]]] = []  # by look, by token, by layer
    for tokens in (3, 0, 40, 1, 7):
        chosen = [[dice.sample(range(5), 2) for _ in range(2)] for _ in range(tokens)]
        for token in chosen:
            stats.add_token("decode", token)
        looks.append(chosen)
        got = heat.shares(*stats.counted())
        weights = []
        for n, look in enumerate(looks):
            later = sum(len(one) for one in looks[n + 1:])
            weights += [(token, 0.5 ** (later / HALF_LIFE)) for token in look]
        whole = sum(weight for _, weight in weights)
        for layer in range(2):
            for expert in range(5):
                want = sum(weight for token, weight in weights if expert in token[layer]) / whole
                assert got[layer][expert] == pytest.approx(want, rel=1e-12)


def test_both_phases_count_and_saved_statistics_begin_anew() -> None:
    stats, heat = RouterStats(2, 2), Heat(2, 2)
    assert heat.shares(*stats.counted()) == [[0, 0], [0, 0]]
    stats.add_counts("prefill", 3, [[3, 0], [0, 3]], [[[0, 3], [0, 0]]])
    assert stats.counted() == (3, [[3, 0], [0, 3]])
    assert heat.shares(*stats.counted()) == [[1, 0], [0, 1]]
    stats.saved()
    assert stats.counted() == (0, [[0, 0], [0, 0]])
    before = heat.shares(*stats.counted())
    assert before == [[1, 0], [0, 1]]  # nothing new: what was recent still is
    stats.add_token("decode", [[1], [1]])
    assert heat.shares(*stats.counted())[0][1] > 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_store(tmp_path_factory.mktemp("demo") / "demo", lambda line: None)


def paged(store: Path, slots: int) -> Engine:
    """With so many slots for its 48 experts."""
    base = 2**28
    with Store.open(store) as opened:
        needs = Needs.of(opened.model, opened.quant, 128, "bf16")
    ram = base + RESERVE + needs.dense + needs.kv + needs.workspace + slots * needs.record
    return load(store, threads=1, context=128, ram=ram, base=base, prefetch="ahead")


def settled(engine: Engine) -> dict[str, Any]:
    """The map once nothing is on its way."""
    end = time.monotonic() + 60
    while "+" in "".join((found := engine.expert_map())["held"]):
        assert time.monotonic() < end, "what was asked for does not come"
        time.sleep(0.002)
    return found


def test_a_paged_engine_shows_what_is_in_its_slots(store: Path) -> None:
    with paged(store, 20) as engine:
        before = settled(engine)
        assert before["layers"] == [0, 1, 2, 3, 4, 5] and before["experts"] == 8 and before["tokens"] == 0
        assert "".join(before["held"]).count("r") == before["tiers"][0]["held"] == 20
        assert not any(map(any, before["heat"]))
        (tier,) = before["tiers"]
        assert (tier["name"], tier["slots"], tier["budget"]) == ("RAM", 20, engine.plan.ram.budget)
        assert sum(tier["parts"].values()) == tier["planned"] <= tier["budget"]
        list(engine.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=30)))
        after = settled(engine)
        held = "".join(after["held"]).count("r")  # a guess that was given up leaves its slot empty
        assert after["held"] != before["held"] and 0 < held == after["tiers"][0]["held"] <= 20
        for layer, row in enumerate(after["held"]):
            for expert, place in enumerate(row):
                assert (place == "r") == engine._offload.tier.ready(ExpertKey(layer, expert))
        # Each token chose 2 of 8; each of the 8 shares is rounded by at most half a percent.
        assert all(abs(sum(row) - 200) <= 4 for row in after["heat"])
        json.dumps(after)


def test_layers_are_told_while_a_pass_runs(store: Path) -> None:
    """So the map moves in long prompts too."""
    for slots in (20, 48):
        with paged(store, slots) as engine:
            session, seen = engine.session(), []
            engine.on_layer(lambda engine=engine, seen=seen: seen.append(engine.expert_map()["tokens"]))
            session.prefill([5, 6, 7, 8])
            assert len(seen) == 6
            session.decode(9)
            assert len(seen) == 12 and seen[-1] == 4  # a pass counts when it is over
            assert engine.expert_map()["tokens"] == 5


def test_two_tiers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a record in both the fastest one is shown."""
    folder = stores(tmp_path_factory)["int4"]
    with bring_up(monkeypatch, folder, 9, 16) as engine:
        run(engine)
        found = settled(engine)
        fast, slow = engine._offload.tiers
        held = "".join(found["held"])
        assert [tier["name"] for tier in found["tiers"]] == ["VRAM", "RAM"]
        assert held.count("v") == found["tiers"][0]["held"] == sum(map(fast.ready, fast))
        both = {key for key in slow if fast.ready(key)}
        assert held.count("r") == found["tiers"][1]["held"] - len(both)
        assert held.count(".") == len(held) - held.count("v") - held.count("r") > 0


def test_the_layer_of_a_head_has_places_and_no_heat() -> None:
    """A multi-token-prediction head's records live in the slots too; its choices are no part of the statistics."""
    model = SimpleNamespace(paged_layers=(1, 2, 3), experts_in=lambda layer: 2)
    plan = TierPlan("RAM", 10, 0, 0, 0, 0, 0, ((1, 4),))
    tier = StubTier({ExpertKey(2, 1): True, ExpertKey(0, 0): False})
    found = ExpertMap(model, [plan], RouterStats(2, 2)).look([tier])  # type: ignore[arg-type, list-item]
    assert found["held"] == ["+.", "..", ".r"] and found["layers"] == [1, 2, 3]
    assert found["heat"] == [[0, 0], [0, 0], None]


class StubTier(dict[ExpertKey, bool]):
    """{record: whether it is ready}."""

    ready = dict.__getitem__
