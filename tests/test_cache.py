"""The cache against a naive model that keeps every event and works each decision out from scratch."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cache import HALF_LIVES, KEYS, LAYERS, REASONS, Naive, Walk, experts, shares, walk_through, walks
from scanning_cache import ScanningCache

from qmix.config import ExpertKey
from qmix.errors import UsageError
from qmix.offload.cache import NEAR, SEED, Cache, Lfu, Lru, make_policy, score, warm_order


@settings(max_examples=250, deadline=None)
@given(passes=st.lists(walks, max_size=12), slots=st.integers(1, len(KEYS)), prior=shares, quotas=st.booleans(),
       policy=st.sampled_from(["lru", "static", *HALF_LIVES]), guard=st.integers(0, 3), probation=st.integers(0, 2))
def test_every_decision_is_the_naive_models(passes: list[Walk], slots: int, prior: dict[ExpertKey, float], quotas: bool,
                                            policy: str, guard: int, probation: int) -> None:
    cache = Cache(slots, LAYERS, make_policy(policy, prior), quotas=quotas, guard=guard, probation=probation)
    naive = Naive(slots, policy, prior, quotas, guard, probation)
    for walk in passes:
        walk_through(cache, naive, walk)
    for key in KEYS:
        assert cache.score(key) == pytest.approx(naive.score(key), rel=1e-9, abs=1e-12)
        assert (key in cache) == (key in naive.keys)
    assert set(cache.spares) == naive.spares


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), layers=st.integers(1, 7), experts=st.integers(2, 9), share=st.floats(0.05, 0.95),
       policy=st.sampled_from(["lru", "static", *HALF_LIVES]), quotas=st.booleans(), kinds=st.integers(1, 3),
       guard=st.integers(0, 3), probation=st.integers(0, 3))
def test_what_leaves_is_what_a_scan_of_all_slots_finds(seed: int, layers: int, experts: int, share: float, policy: str,
                                                       quotas: bool, kinds: int, guard: int, probation: int) -> None:
    """Key for key, equal scores included: few shares, so that many records tie."""
    dice = random.Random(seed)
    keys = [ExpertKey(layer, e) for layer in range(layers) for e in range(experts)]
    kinds = 1 if quotas else min(kinds, experts)
    slots = [max(1, round(share * len(keys) / kinds)) for _ in range(kinds)]
    prior = {key: dice.choice([0.0, 0.1, 0.5]) for key in keys if dice.random() < 0.5}

    def kind_of(key: ExpertKey) -> int:
        return key.expert % kinds

    how: dict[str, Any] = {"quotas": quotas, "guard": guard, "probation": probation, "kind_of": kind_of}
    cache, twin = (make(slots, layers, make_policy(policy, prior), **how) for make in (Cache, ScanningCache))

    def admit(key: ExpertKey, reason: Any) -> None:
        if key not in cache:
            busy = set(dice.sample(keys, dice.randrange(len(keys)) // 2))
            assert cache.admit(key, reason, busy) == twin.admit(key, reason, busy), (reason, key)

    for _ in range(12):
        prompt = dice.random() < 0.2
        tokens = dice.randint(1, 6) if prompt else 1
        for both in (cache, twin):
            both.begin_prefill(tokens) if prompt else both.begin_token()
        for layer in range(layers):
            choices = [set(dice.sample(range(experts), min(2, experts))) for _ in range(tokens)]
            chosen = [ExpertKey(layer, e) for e in sorted(set().union(*choices))]
            for both in (cache, twin):
                if prompt:
                    both.seed(layer, choices)
                else:
                    for key in chosen:
                        both.use(key)
                    both.end_layer(layer)
            for key in chosen:
                admit(key, "prefill" if prompt else "demand")
            for _ in range(dice.randrange(4)):
                key, what = dice.choice(keys), dice.choice([*REASONS, "remove"])
                if what in ("speculative", "warm"):
                    admit(key, what)
                elif key in cache:
                    for both in (cache, twin):
                        getattr(both, what)(key)
        assert set(cache) == set(twin.held) and set(cache.spares) == set(twin.spares)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.lists(experts, min_size=LAYERS, max_size=LAYERS), min_size=1, max_size=20), prior=shares,
       policy=st.sampled_from(["lru", "static", *HALF_LIVES]))
def test_a_seeded_history_is_a_decoded_one(tokens: list[list[set[int]]], prior: dict[ExpertKey, float],
                                           policy: str) -> None:
    seeded, decoded = (Cache(4, LAYERS, make_policy(policy, prior)) for _ in range(2))
    seeded.begin_prefill(len(tokens))
    for layer in range(LAYERS):
        seeded.seed(layer, [token[layer] for token in tokens])
    for token in tokens:
        decoded.begin_token()
        for layer in range(LAYERS):
            for expert in token[layer]:
                decoded.use(ExpertKey(layer, expert))
    assert [seeded.score(key) for key in KEYS] == pytest.approx([decoded.score(key) for key in KEYS], rel=1e-9)


def test_a_long_prompt_counts_as_its_last_tokens() -> None:
    cache = Cache(4, 1, make_policy("lfu", {}))
    cache.begin_token()
    cache.use(ExpertKey(0, 0))
    before = cache.score(ExpertKey(0, 0))
    cache.begin_prefill(100_000)
    cache.seed(0, [{1}] * SEED)
    assert cache.score(ExpertKey(0, 0)) == pytest.approx(before * 0.5 ** (SEED / 32))
    assert cache.score(ExpertKey(0, 1)) > 30 * cache.score(ExpertKey(0, 0))


def test_a_use_loses_half_its_weight_in_a_half_life() -> None:
    policy, key = Lfu({}, half_life=10), ExpertKey(0, 0)
    policy.use(key, 5)
    policy.use(key, 5)
    assert [score(policy, key, now, 0.0) for now in (5, 15, 25)] == pytest.approx([2.0, 1.0, 0.5])
    assert score(policy, key, 5, 1.0) == pytest.approx(2 * (1 - NEAR))


def test_lfu_keeps_its_precision_over_a_billion_tokens() -> None:
    policy, often, once = Lfu({}, half_life=32), ExpertKey(0, 0), ExpertKey(0, 1)
    for now in range(10**9, 10**9 + 100):
        policy.use(often, now)
    policy.use(once, 10**9 + 99)
    hundred = (1 - 0.5 ** (100 / 32)) / (1 - 0.5 ** (1 / 32))
    assert score(policy, often, 10**9 + 99, 0.0) == pytest.approx(hundred, rel=1e-5)
    assert score(policy, once, 10**9 + 99, 0.0) == pytest.approx(1, rel=1e-5)
    assert score(policy, ExpertKey(0, 2), 10**9, 0.0) < 1e-200


def test_a_prior_share_is_a_history_that_fades() -> None:
    policy, half, never = Lfu({ExpertKey(0, 0): 0.5}, half_life=8), ExpertKey(0, 0), ExpertKey(0, 1)
    assert score(policy, half, 0, 0.0) == pytest.approx(0.5 / (1 - 0.5 ** (1 / 8)))
    assert score(policy, half, 8, 0.0) == pytest.approx(0.25 / (1 - 0.5 ** (1 / 8)))
    assert policy.rank(half) > policy.rank(never)


def test_lru_falls_back_on_the_prior_for_what_was_not_used_yet() -> None:
    policy = Lru({ExpertKey(0, 0): 0.2, ExpertKey(0, 1): 0.9})
    policy.use(ExpertKey(0, 2), 1)
    ranked = sorted([ExpertKey(0, e) for e in range(4)], key=lambda key: score(policy, key, 1000, 0.0))
    assert [key.expert for key in ranked] == [3, 0, 1, 2]


@pytest.mark.parametrize("policy", ["lru", "lfu", "static"])
def test_of_records_used_by_the_same_token_the_one_that_is_wanted_last_leaves(policy: str) -> None:
    cache = Cache(LAYERS, LAYERS, make_policy(policy, dict.fromkeys(KEYS, 0.5)))
    cache.begin_token()
    for layer in range(LAYERS):
        cache.use(ExpertKey(layer, 0))
        cache.admit(ExpertKey(layer, 0), "demand")
    cache.begin_token()
    for layer in range(LAYERS):  # in a cycle, where plain LRU would throw out the next layer's each time
        cache.use(ExpertKey(layer, 0))
        assert ExpertKey((layer + 1) % LAYERS, 0) in cache
        assert cache.admit(ExpertKey(layer, 1), "demand", {ExpertKey(layer, 0)}) == ExpertKey((layer - 1) % LAYERS, 0)
        cache.remove(ExpertKey(layer, 1))
        cache.admit(ExpertKey((layer - 1) % LAYERS, 0), "demand")


@pytest.mark.parametrize("reason", ["demand", "prefill", "speculative", "warm"])
def test_a_spare_leaves_first_whatever_comes_and_the_surest_one_first_of_all(reason: Any) -> None:
    prior = {ExpertKey(0, 0): 0.9, ExpertKey(0, 1): 0.8, ExpertKey(1, 0): 0.7, ExpertKey(1, 1): 0.0}
    cache = Cache(4, LAYERS, make_policy("static", prior))
    cache.begin_token()
    for key in prior:
        cache.admit(key, "demand")
        cache.use(key)
    for key in (ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(1, 0)):
        cache.mark_spare(key)
    cache.unmark_spare(ExpertKey(0, 1))
    new = [ExpertKey(2, e) for e in range(3)]
    assert cache.admit(new[0], reason, {ExpertKey(0, 0)}) == ExpertKey(1, 0), "the other one is busy"
    assert cache.admit(new[1], reason) == ExpertKey(0, 0)
    assert not cache.spares and cache.admit(new[2], reason) in {False, ExpertKey(1, 1), *new[:2]}


def test_only_a_spare_of_the_same_kind_makes_room() -> None:
    cache = Cache([1, 2], LAYERS, make_policy("lfu", {}), kind_of=lambda key: key.expert % 2)
    for expert in (0, 1, 3):
        assert cache.admit(ExpertKey(0, expert), "demand") is True
    cache.mark_spare(ExpertKey(0, 0))
    cache.mark_spare(ExpertKey(0, 3))
    assert cache.admit(ExpertKey(1, 1), "warm") == ExpertKey(0, 3)
    assert cache.admit(ExpertKey(1, 3), "demand") in {ExpertKey(0, 1), ExpertKey(1, 1)}
    assert set(cache.spares) == {ExpertKey(0, 0)}


def test_quotas_need_a_slot_for_each_layer() -> None:
    cache = Cache(LAYERS - 1, LAYERS, make_policy("lru", {}), quotas=True)
    for layer in range(LAYERS):
        assert cache.admit(ExpertKey(layer, 0), "demand") is not False


def test_warm_records_displace_only_what_scores_lower() -> None:
    prior = {key: 0.1 * (key.expert + 1) for key in KEYS}
    cache = Cache(2, LAYERS, make_policy("static", prior))
    for expert in (1, 2):
        assert cache.admit(ExpertKey(0, expert), "warm") is True
    assert cache.admit(ExpertKey(0, 0), "warm") is False
    assert cache.admit(ExpertKey(0, 3), "warm") == ExpertKey(0, 1)


def test_warm_order_gives_each_layer_its_share_of_the_most_frequent() -> None:
    prior = {ExpertKey(0, 3): 0.9, ExpertKey(0, 1): 0.5, ExpertKey(2, 2): 0.1}
    assert warm_order(3, 4, 5, prior) == [(0, 3), (0, 1), (1, 0), (1, 1), (2, 2)]
    assert warm_order(3, 4, 12, {}) == KEYS


@pytest.mark.parametrize("name", ["", "fifo", "lru:4", "lfu:", "lfu:0", "lfu:-3", "lfu:nan", "lfu:x", "static:1"])
def test_an_unknown_policy_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"--cache-policy {name}: want "):
        make_policy(name, {})


def test_a_cache_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="slots"):
        Cache(0, 1, make_policy("lru", {}))
