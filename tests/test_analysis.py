"""The figures of the routing analysis, each against a naive one, a simulation, or a cache that is really run."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations, pairwise
from math import comb, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmix.analysis import chance
from qmix.analysis.measures import Foretold, Load, Repeats, Reuse, Together
from qmix.analysis.recorder import SHOWN, Collector, TextFigures
from qmix.analysis.report import COLUMNS, Subject, document, people, slot_rows, tidy
from qmix.config import ExpertKey
from qmix.offload.cache import Cache, make_policy
from qmix.offload.replay import Visit, simulate
from qmix.render import document as printed

E = 6
tokens = st.lists(st.permutations(range(E)).map(lambda order: list(order[:2])), min_size=1, max_size=60)


def random_tokens(count: int, experts: int = 8, chosen: int = 2, seed: int = 0) -> list[list[int]]:
    dice = random.Random(seed)
    return [dice.sample(range(experts), chosen) for _ in range(count)]


@given(tokens)
def test_load_is_what_counting_gives(rows: list[list[int]]) -> None:
    load = Load(E)
    for ids in rows:
        load.note(ids)
    flat = Counter(e for ids in rows for e in ids)
    shares = [flat[e] / (2 * len(rows)) for e in range(E)]
    assert load.shares() == pytest.approx(shares)
    assert load.first_shares() == pytest.approx([sum(ids[0] == e for ids in rows) / len(rows) for e in range(E)])
    assert load.imbalance() == pytest.approx(max(shares) * E)
    assert load.variation() == pytest.approx((sum((s * E - 1) ** 2 for s in shares) / E) ** 0.5)
    assert load.entropy() == pytest.approx(-sum(s * log2(s) for s in shares if s))


@given(tokens)
def test_repeats_are_what_comparing_gives(rows: list[list[int]]) -> None:
    repeats = Repeats()
    for before, ids in pairwise(rows):
        repeats.note(before, ids)
    assert repeats.pairs == len(rows) - 1
    assert repeats.first == sum(a[0] == b[0] for a, b in pairwise(rows))
    assert repeats.any == sum(bool(set(a) & set(b)) for a, b in pairwise(rows))


@given(tokens)
def test_pairs_are_what_counting_gives(rows: list[list[int]]) -> None:
    both = Together(E)
    for ids in rows:
        both.note(ids)
    counted = Counter(tuple(sorted(ids)) for ids in rows)
    assert all(both.both[a][b] == counted[a, b] for a, b in combinations(range(E), 2))


def lru_hits(rows: list[list[int]], slots: int, at_once: bool) -> int:
    """An LRU list that really holds `slots` experts."""
    held: list[int] = []
    hits = 0
    for ids in rows:
        if at_once:
            hits += sum(e in held for e in ids)
        for e in ids:
            hits += not at_once and e in held
            held = ([other for other in held if other != e] + [e])[-slots:]
    return hits


@given(tokens)
def test_reuse_distances_give_the_hits_of_lru_caches(rows: list[list[int]]) -> None:
    reuse = Reuse(E)
    for ids in rows:
        reuse.note(ids)
    uses = 2 * len(rows)
    assert sum(reuse.at_once) == sum(reuse.in_turn) == uses
    for slots in range(1, E + 1):
        assert reuse.hits_in_turn()[slots - 1] * uses == pytest.approx(lru_hits(rows, slots, at_once=False))
        together = reuse.hits(2)[slots - 1]
        if slots < 2:
            assert together is None
        else:
            assert together is not None and together * uses == pytest.approx(lru_hits(rows, slots, at_once=True))


def cache_hits(rows: list[list[int]], slots: int, experts: int) -> tuple[float | None, float]:
    """(what the distances say, what qmix's cache really did)."""
    reuse = Reuse(experts)
    for ids in rows:
        reuse.note(ids)
    visits = [Visit(True, 1, (tuple(ExpertKey(0, e) for e in ids),)) for ids in rows]
    cache = Cache(slots, 1, make_policy("lru", {}), quotas=True)
    return reuse.hits(len(rows[0]))[slots - 1], simulate(visits, cache).hit_rate


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, E - 1).map(lambda e: [e]), min_size=1, max_size=60), st.integers(1, E))
def test_hits_at_once_are_those_of_the_cache_that_qmix_has(rows: list[list[int]], slots: int) -> None:
    found, done = cache_hits(rows, slots, E)
    assert found == pytest.approx(done)


@pytest.mark.parametrize("slots", [2, 4, 7])
def test_and_nearly_so_where_it_has_ties(slots: int) -> None:
    """To the cache all experts of a token are used at one time; which of them leaves first is another order."""
    dice, rows = random.Random(1), [[0, 1]]
    for _ in range(2500):
        rows.append(rows[-1] if dice.random() < 0.3 else dice.sample(range(8), 2))
    found, done = cache_hits(rows, slots, 8)
    assert found == pytest.approx(done, abs=0.015)


def test_the_example_of_reuse_holds() -> None:
    reuse = Reuse(4)
    for ids in ([0, 1], [2, 3], [0, 2]):
        reuse.note(ids)
    assert reuse.at_once == [0, 1, 0, 1, 4] and reuse.in_turn == [0, 0, 1, 1, 4]
    assert reuse.mean() == 2


@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (6, 3), (4, 1)])
def test_chance_is_what_a_simulation_gives(experts: int, chosen: int) -> None:
    rows = random_tokens(12_000, experts, chosen)
    repeats, reuse = Repeats(), Reuse(experts)
    for before, ids in pairwise(rows):
        repeats.note(before, ids)
    for ids in rows:
        reuse.note(ids)
    assert repeats.first / repeats.pairs == pytest.approx(1 / experts, abs=0.012)
    assert repeats.any / repeats.pairs == pytest.approx(chance.repeat_any(experts, chosen), abs=0.015)
    for found, level in ((reuse.hits(chosen), chance.hits(experts, chosen, in_turn=False)),
                         (reuse.hits_in_turn(), chance.hits(experts, chosen, in_turn=True))):
        assert [h is None for h in found] == [h is None for h in level]
        assert [h for h in found if h is not None] == pytest.approx([h for h in level if h is not None], abs=0.012)


def test_chance_of_table_5() -> None:
    assert chance.repeat_any(8, 2) == pytest.approx(1 - 6 / 8 * 5 / 7)


@pytest.mark.parametrize(("experts", "chosen"), [(5, 2), (6, 3), (5, 4)])
def test_pairs_by_popularity_are_those_of_the_sets_weighted_by_products(experts: int, chosen: int) -> None:
    """Weights that are known, every set of K enumerated: the fit has to find the same pairs from the shares alone."""
    weights = [2.0 ** -e for e in range(experts)]
    chances = {}
    for members in combinations(range(experts), chosen):
        product = 1.0
        for e in members:
            product *= weights[e]
        chances[members] = product
    scale = 1_000_000 / sum(chances.values())
    used = [round(sum(p for members, p in chances.items() if e in members) * scale) for e in range(experts)]
    found = chance.together(used, 1_000_000, chosen)
    for a, b in combinations(range(experts), 2):
        wanted = sum(p for members, p in chances.items() if a in members and b in members) * scale
        assert found[a][b] == pytest.approx(wanted, abs=10) and found[b][a] == pytest.approx(wanted, abs=10)
    assert [found[e][e] for e in range(experts)] == used


def test_pairs_of_an_even_router_and_of_experts_that_all_or_none_choose() -> None:
    assert chance.together([100] * 8, 400, 2)[3][5] == pytest.approx(400 / comb(8, 2))
    found = chance.together([400, 200, 100, 100, 0], 400, 2)
    assert found[0][1:] == [200, 100, 100, 0] and found[1][2] == found[2][4] == 0


def test_pairing_is_nothing_where_experts_are_independent_and_a_lot_where_they_are_not() -> None:
    rows = random_tokens(20_000)
    load, both = Load(8), Together(8)
    for ids in rows:
        load.note(ids)
        both.note(ids)
    assert both.pairing(both.expected(load, 2)) == pytest.approx(0, abs=0.03)
    load, both = Load(4), Together(4)
    for ids in [[0, 1], [3, 2]] * 50:
        load.note(ids)
        both.note(ids)
    assert both.pairing(both.expected(load, 2)) == pytest.approx(2 / 3)  # an even router has a third of them in these


def test_what_the_layer_before_decides_is_foretold_by_transitions_but_not_by_popularity() -> None:
    foretold, dice = Foretold(8, 2), random.Random(3)
    for _ in range(3000):
        before = dice.sample(range(8), 2)
        foretold.note(before, [(e + 3) % 8 for e in before], None)
    right = foretold.recall("transitions")
    assert right is not None and right > 0.97
    assert foretold.recall("popular") == pytest.approx(0.25, abs=0.03)
    assert foretold.recall("ahead") is None


def test_a_token_is_not_foretold_from_itself() -> None:
    foretold = Foretold(8, 2)
    foretold.note([6, 7], [6, 7], [7, 6])
    assert foretold.recall("transitions") == 0 and foretold.recall("ahead") == 1
    assert foretold.guess([6, 7]) == [6, 7]


def fed(rows_by_layer: list[list[list[int]]], passes: int = 1, experts: int = 8) -> TextFigures:
    """The same tokens, cut into passes, with the right guess for every layer but the last."""
    figures = TextFigures(len(rows_by_layer), experts, len(rows_by_layer[0][0]))
    size = -(-len(rows_by_layer[0]) // passes)
    collector = Collector()
    collector.text = figures
    for start in range(0, len(rows_by_layer[0]), size):
        collector.add(0, [[0, 1]], [[0.5, 0.5]], None)
        collector.drop_pass()  # an interrupted pass leaves nothing
        parts = [rows[start:start + size] for rows in rows_by_layer]
        for layer, rows in enumerate(parts):
            later = parts[layer + 1] if layer + 1 < len(parts) else None
            collector.add(layer, rows, [[0.5, 0.5]] * len(rows), later)
        collector.end_pass("prefill", [0] * len(parts[0]))
    return figures


SUBJECT = Subject("model", 3, 8, 2, 512, 1000)


def test_how_a_text_is_cut_into_passes_changes_nothing() -> None:
    rows = [random_tokens(50, seed=layer) for layer in range(3)]
    assert document(SUBJECT, [("a", fed(rows))]) == document(SUBJECT, [("a", fed(rows, passes=7))])


def test_windows_share_nothing_but_the_cache() -> None:
    figures = TextFigures(1, 8, 2)
    figures.add([[[0, 1], [0, 2]]], [None])
    figures.begin_window()
    figures.add([[[0, 2]]], [None])
    assert figures.layers[0].repeats.pairs == 1
    assert figures.layers[0].reuse.at_once[:3] == [1, 2, 0]  # 0 behind 0 1; then 0 and 2 behind 0 2


def test_only_counts_and_the_first_tokens_are_kept() -> None:
    rows = [random_tokens(SHOWN + 500, seed=layer) for layer in range(2)]
    figures = fed(rows, passes=3)
    assert figures.tokens == SHOWN + 500
    assert figures.firsts == [(rows[0][t][0], rows[1][t][0]) for t in range(SHOWN)]
    assert figures.layers[1].foretold.recall("ahead") == 1


def test_the_tidy_rows_hold_every_figure_once() -> None:
    report = document(SUBJECT, [("a", fed([random_tokens(200, seed=layer) for layer in range(3)])),
                                ("b", fed([random_tokens(1, seed=layer) for layer in range(3)]))])
    rows = list(tidy(report))
    assert all(tuple(row) == COLUMNS for row in rows)
    keys = [(row["text"], row["layer"], row["metric"], row["key"]) for row in rows]
    assert len(set(keys)) == len(keys)
    values = dict(zip(keys, (row["value"] for row in rows), strict=True))
    layer = report["texts"][0]["by_layer"][1]
    assert values["a", 1, "share", "3"] == layer["share"][3]
    assert values["a", 1, "lru_hit", "4"] == layer["lru_hit"][3]
    assert values["a", 1, "recall", "ahead"] == 1 and ("a", 0, "recall", "ahead") not in values
    assert values["a", 2, "together", "0+1"] == report["texts"][0]["by_layer"][2]["together"][0]["tokens"]
    assert values["chance", "", "repeat_any", ""] == pytest.approx(13 / 28)
    assert ("b", 0, "repeat_first", "") not in values  # one token follows nothing


@pytest.mark.parametrize("count", [1, 300])
def test_people_get_tables(count: int) -> None:
    report = document(SUBJECT, [("a", fed([random_tokens(count, seed=layer) for layer in range(3)]))])
    assert "first repeats" in printed(people(report), as_json=False)


def test_what_misses_cost_follows_from_the_hits() -> None:
    report = document(SUBJECT, [("a", fed([random_tokens(400, seed=layer) for layer in range(3)]))])
    rows = slot_rows(report, report["texts"])
    assert [row["slots"] for row in rows] == list(range(2, 9))
    for row in rows:
        assert row["misses/token"] == pytest.approx((1 - row["hit %"] / 100) * 2 * 3)
        assert row["MB/token"] == pytest.approx(row["misses/token"] * 1000 / 1e6)
    assert rows[-1]["MB of slots"] == pytest.approx(8 * 3 * 1000 / 1e6)


def test_a_router_with_one_choice_has_no_pairs() -> None:
    subject = Subject("model", 2, 8, 1, 512, 1000)
    report = document(subject, [("a", fed([random_tokens(50, chosen=1, seed=layer) for layer in range(2)]))])
    assert report["texts"][0]["by_layer"][0]["together"] == []
    assert report["texts"][0]["by_layer"][0]["pairing"] is None
    assert printed(people(report), as_json=False) and list(tidy(report))
