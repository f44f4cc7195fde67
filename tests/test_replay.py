"""Replay against brute force and naive models, and on traces made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as remember
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmix.config import ExpertKey
from qmix.errors import UsageError
from qmix.offload.cache import Cache, make_policy
from qmix.offload.replay import belady, check_alike, gather, prediction_rows, rows, simulate, visits
from qmix.offload.trace import Pass, Trace, TraceHeader

Token = Sequence[Sequence[int]]  # by layer, the experts in order of rank


def decoded(token: Token, ahead: Sequence[Sequence[int] | None] | None = None) -> Pass:
    guesses = tuple(None if a is None else bytes(a) for a in ahead or [None] * len(token))
    weights = tuple(bytes([153, 102][:len(choice)]) for choice in token)
    return Pass("decode", ((0, 1),), tuple(map(bytes, token)), weights, guesses)


def prompt(tokens: Sequence[Token]) -> Pass:
    layers = [bytes(e for token in tokens for e in token[layer]) for layer in range(len(tokens[0]))]
    weights = tuple(bytes(len(ids)) for ids in layers)
    return Pass("prefill", ((0, len(tokens)),), tuple(layers), weights, (None,) * len(layers))


def trace_of(passes: Sequence[Pass], experts: int = 4, **header: Any) -> Trace:
    layers, k = len(passes[0].ids), len(passes[0].choices(0)[0])
    values: dict[str, Any] = {"layers": layers, "experts": experts, "top_k": k, "ahead": k, "store": "s", "source": "n"}
    return Trace(Path("made"), TraceHeader(**{**values, **header}), list(passes))


def walk(layers: int, experts: int, k: int, least: int, most: int) -> st.SearchStrategy[list[list[list[int]]]]:
    choice = st.permutations(range(experts)).map(lambda order: list(order[:k]))
    return st.lists(st.lists(choice, min_size=layers, max_size=layers), min_size=least, max_size=most)


def brute_force(tokens: Sequence[Token], slots: int, keys: Sequence[ExpertKey]) -> int:
    """The fewest misses over every start and every way to evict."""
    steps = [frozenset(ExpertKey(layer, e) for e in choice) for token in tokens for layer, choice in enumerate(token)]

    @remember
    def best(at: int, held: frozenset[ExpertKey]) -> int:
        if at == len(steps):
            return 0
        wanted, missing = steps[at], steps[at] - held
        over = max(0, len(held) + len(missing) - slots)
        ways = combinations(sorted(held - wanted), over)
        return len(missing) + min(best(at + 1, (held - set(out)) | missing) for out in ways)

    return min(best(0, frozenset(start)) for start in combinations(keys, slots))


@settings(max_examples=60, deadline=None)
@given(tokens=walk(2, 3, 1, 1, 6), slots=st.integers(1, 4))
def test_beladys_optimum_is_that_of_brute_force(tokens: list[Token], slots: int) -> None:
    keys = [ExpertKey(layer, e) for layer in range(2) for e in range(3)]
    tally = belady(visits(trace_of([decoded(token) for token in tokens])), slots)
    assert tally.misses == brute_force(tokens, slots, keys)
    assert (tally.tokens, tally.chosen) == (len(tokens), 2 * len(tokens))


@settings(max_examples=30, deadline=None)
@given(tokens=walk(2, 3, 2, 1, 4), slots=st.integers(2, 4))
def test_beladys_optimum_holds_for_two_experts_at_once(tokens: list[Token], slots: int) -> None:
    keys = [ExpertKey(layer, e) for layer in range(2) for e in range(3)]
    tally = belady(visits(trace_of([decoded(token) for token in tokens])), slots)
    assert tally.misses == brute_force(tokens, slots, keys)


@settings(max_examples=60, deadline=None)
@given(tokens=walk(3, 4, 2, 1, 20), first=walk(3, 4, 2, 1, 4), slots=st.integers(2, 12), quotas=st.booleans(),
       policy=st.sampled_from(["lru", "lfu", "lfu:2", "static"]))
def test_no_policy_beats_the_optimum(tokens: list[Token], first: list[Token], slots: int, quotas: bool,
                                     policy: str) -> None:
    trace = trace_of([*map(decoded, tokens), prompt(first), *map(decoded, tokens[:7])])
    # A layer with a quota of one slot computes its two experts in turn, which the optimum does not.
    best, *others = rows([trace], [], [slots], [policy], [quotas and slots >= 6])[::-1]
    assert best["policy"] == "belady" and best["x optimum"] == 1
    assert all(row["misses/token"] >= best["misses/token"] for row in others)
    assert all(row["hit %"] == pytest.approx(100 - 100 * row["misses/token"] / 6) for row in [best, *others])


def naive_lru(tokens: Sequence[Token], slots: int) -> int:
    """Misses of a plain LRU over one layer."""
    held: list[int] = []
    misses = 0
    for token in tokens:
        for expert in token[0]:
            misses += expert not in held
        for expert in token[0]:
            if expert in held:
                held.remove(expert)
            held.append(expert)
        del held[:-slots]
    return misses


@settings(max_examples=100, deadline=None)
@given(tokens=walk(1, 5, 1, 1, 40), slots=st.integers(1, 5))
def test_one_layer_of_lru_is_the_textbooks(tokens: list[Token], slots: int) -> None:
    passes = visits(trace_of([decoded(token) for token in tokens], experts=5))
    assert simulate(passes, Cache(slots, 1, make_policy("lru", {}))).misses == naive_lru(tokens, slots)


def test_a_trace_made_by_hand() -> None:
    """One layer, two slots. 0 1 | 0 2 | 0 1: LRU misses 0 1, then 2 (out goes 1), then 1; the optimum starts with
    0 and 1 and misses only 2 and then 1, for 2 takes the place of 1."""
    trace = trace_of([decoded([[0, 1]]), decoded([[0, 2]]), decoded([[0, 1]])])
    tally = simulate(visits(trace), Cache(2, 1, make_policy("lru", {})))
    assert (tally.tokens, tally.chosen, tally.misses) == (3, 6, 4)
    found = rows([trace], [], [2], ["lru"], record=3_000_000)
    # In rows the cache starts warm: without statistics with experts 0 and 1.
    assert found == [
        {"slots": 2, "policy": "lru", "quotas": "no", "hit %": pytest.approx(100 * 4 / 6),
         "misses/token": pytest.approx(2 / 3), "x optimum": 1.0, "MB/token": pytest.approx(2.0)},
        {"slots": 2, "policy": "belady", "quotas": "no", "hit %": pytest.approx(100 * 4 / 6),
         "misses/token": pytest.approx(2 / 3), "x optimum": 1.0, "MB/token": pytest.approx(2.0)}]


def test_a_prefill_seeds_the_histories_and_is_not_counted() -> None:
    trace = trace_of([prompt([[[2]], [[3]], [[3]]]), decoded([[3]])])
    tally = simulate(visits(trace), Cache(1, 1, make_policy("lfu", {})))
    assert (tally.tokens, tally.chosen, tally.misses) == (1, 1, 0)
    # Two slots, three records: what the prompt used most stays.
    seen = prompt([[[0]], [[1]], [[1]], [[2]], [[2]]])
    for expert, misses in ((0, 1), (1, 0), (2, 0)):
        trace = trace_of([seen, decoded([[expert]])])
        assert simulate(visits(trace), Cache(2, 1, make_policy("lfu", {}))).misses == misses


def test_only_the_last_tokens_of_a_long_prompt_are_seeded() -> None:
    trace = trace_of([prompt([[[0]]] * 300 + [[[1]]] * 256)])
    (visit,) = visits(trace)
    assert visit.tokens == 556 and [list(c) for c in visit.last[0]] == [[1]] * 256
    assert visit.wanted == (((0, 0), (0, 1)),)


def test_a_pass_of_several_sessions_wants_each_record_once() -> None:
    two = Pass("decode", ((0, 1), (1, 1)), (bytes([0, 1, 1, 2]),), (bytes(4),), (None,))
    tally = simulate(visits(trace_of([two])), Cache(3, 1, make_policy("lru", {})))
    assert (tally.tokens, tally.chosen, tally.misses) == (2, 3, 3)
    assert simulate(visits(trace_of([two])), Cache(2, 1, make_policy("lru", {}))).misses == 3
    assert belady(visits(trace_of([two, two])), 2).misses > 0


def test_training_traces_warm_the_static_cache() -> None:
    train = trace_of([decoded([[3, 2]])] * 5)
    test = trace_of([decoded([[3, 2]])] * 4)
    (cold, _), (warm, _) = (rows([test], trains, [2], ["static"]) for trains in ([], [train]))
    assert cold["misses/token"] == 0.5 and warm["misses/token"] == 0
    assert gather([train], 1, 4).share("decode")[ExpertKey(0, 3)] == 1


def test_traces_of_different_models_and_no_trace_are_refused() -> None:
    one = trace_of([decoded([[0]])])
    with pytest.raises(UsageError, match=r"made: store t, but made has s"):
        rows([one], [trace_of([decoded([[0]])], store="t")], [1], ["lru"])
    with pytest.raises(UsageError, match="no trace"):
        check_alike([])
    with pytest.raises(UsageError, match="--slots 1: a token uses 2 experts"):
        rows([trace_of([decoded([[0, 1]])])], [], [1], ["lru"])
    with pytest.raises(UsageError, match="--cache-policy fifo"):
        rows([one], [], [1], ["fifo"])


def test_predictions_made_by_hand() -> None:
    """Layer 0 chooses 0 1, layer 1 chooses 2 3 and then 2 0. `ahead` guesses 2 1; in training 2 3 followed."""
    train = trace_of([decoded([[0, 1], [2, 3]], [[2, 1], None])] * 50)
    test = trace_of([decoded([[0, 1], [2, 3]], [[2, 1], None]), decoded([[0, 1], [2, 0]], [[2, 1], None])])
    found = {(row["layer"], row["source"]): row for row in prediction_rows([test], [train])}
    assert set(found) == {(where, source) for where in (1, "all") for source in ("ahead", "transitions", "both")}
    assert found[1, "ahead"] == {"layer": 1, "source": "ahead", "recall %": 50, "by weight %": pytest.approx(60),
                                 "choice 1 %": 100, "choice 2 %": 0}
    # In training the second guess of ahead was never right, and 3 always.
    for source in ("transitions", "both"):
        assert found["all", source]["recall %"] == 75 and found["all", source]["choice 2 %"] == 50
    one = {row["source"]: row["recall %"] for row in prediction_rows([test], [train], guesses=1)}
    assert one == {"ahead": 50, "transitions": 50, "both": 50}


def test_without_guesses_in_the_trace_there_is_no_row_for_them() -> None:
    test = trace_of([decoded([[0], [1]])])
    assert [row["source"] for row in prediction_rows([test], [test])] == ["transitions", "transitions"]
