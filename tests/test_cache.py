"""The cache against a naive model that keeps every event and works each decision out from scratch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scanning_cache import ScanningCache

from qmix.config import ExpertKey
from qmix.errors import UsageError
from qmix.offload.cache import NEAR, SEED, Cache, Lfu, Lru, make_policy, score, warm_order

LAYERS, EXPERTS = 3, 4
KEYS = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
HALF_LIVES = {"lfu:4": 4.0, "lfu": 32.0, "lfu:0.5": 0.5}


@dataclass
class Walk:
    """One pass. chosen: by layer, the experts; extra: (reason, key) to admit after each layer's demand, or to mark
    as a spare or unmark if it is there; gone: a key that is dropped at the end if it is there."""

    prefill: list[list[set[int]]] | None  # by layer, by token
    chosen: list[set[int]]
    extra: list[list[tuple[str, ExpertKey]]]
    gone: ExpertKey | None


class Naive:
    """Everything that was ever done, and the decisions that follow."""

    def __init__(self, slots: int, policy: str, prior: dict[ExpertKey, float], quotas: bool, guard: int,
                 probation: int):
        self.slots, self.policy, self.prior, self.guard, self.probation = slots, policy, prior, guard, probation
        self.quotas = quotas and slots >= LAYERS
        self.keys: list[ExpertKey] = []
        self.used: list[tuple[ExpertKey, int]] = []  # for the histories
        self.decoded: list[set[ExpertKey]] = [set()]
        self.unproven: set[ExpertKey] = set()
        self.spares: set[ExpertKey] = set()
        self.now, self.clock, self.layer = 0, dict.fromkeys(range(LAYERS), 0), 0

    def quota(self, layer: int) -> int:
        return len(range(layer, self.slots, LAYERS))

    def held(self, layer: int) -> int:
        return sum(key.layer == layer for key in self.keys)

    def distance(self, layer: int) -> int:
        steps, at = 0, (self.layer + 1) % LAYERS
        while at != layer:
            steps, at = steps + 1, (at + 1) % LAYERS
        return steps

    def score(self, key: ExpertKey) -> float:
        now, wait, prior = self.clock[key.layer], self.distance(key.layer) / LAYERS, self.prior.get(key, 0.0)
        times = [time for used, time in self.used if used == key]
        if self.policy == "lru":
            return (max(times) if times else prior - 1) - now - wait
        if self.policy == "static":
            return prior * (1 - NEAR * wait)
        decay = 0.5 ** (1 / HALF_LIVES[self.policy])
        total = prior / (1 - decay) * decay ** now + sum(decay ** (now - time) for time in times)
        return total * (1 - NEAR * wait)

    def recent(self) -> set[ExpertKey]:
        return set().union(*self.decoded[len(self.decoded) - self.guard:]) if self.guard else set()

    def may_leave(self, key: ExpertKey, comes: ExpertKey) -> bool:
        if not self.quotas:
            return True
        if self.held(comes.layer) >= self.quota(comes.layer):
            return key.layer == comes.layer
        return self.held(key.layer) > self.quota(key.layer)

    def candidates(self, comes: ExpertKey, reason: str, busy: set[ExpertKey]) -> list[ExpertKey]:
        """Those of the best class that has any."""
        free = [key for key in self.keys if key not in busy and self.may_leave(key, comes)]
        recent = self.recent()
        plain = [key for key in free if key not in self.unproven]
        stale = [key for key in plain if key not in recent]
        if reason == "demand":
            return plain or free
        if reason == "prefill":
            return stale or plain or free
        if reason == "speculative" and len(self.unproven) < self.probation:
            return stale or plain
        return stale

    def check(self, comes: ExpertKey, reason: str, busy: set[ExpertKey], answer: ExpertKey | bool) -> None:
        """Whether `answer` is right; then it is followed."""
        spares = {key: self.score(key) for key in self.spares - busy}
        if len(self.keys) < self.slots:
            assert answer is True
        elif spares:
            highest = max(spares.values())
            assert isinstance(answer, ExpertKey) and spares[answer] >= highest - 1e-9 * max(1e-9, abs(highest))
            if highest == 0:
                assert self.distance(answer.layer) == min(self.distance(k.layer) for k in spares)
            self.drop(answer)
        else:
            candidates = self.candidates(comes, reason, busy)
            scores = {key: self.score(key) for key in candidates}
            lowest = min(scores.values(), default=0.0)
            near = 1e-9 * max(1e-9, abs(lowest))
            if answer is False:
                assert not candidates or (reason == "warm" and lowest >= self.score(comes) - near)
                return
            assert isinstance(answer, ExpertKey) and answer in candidates
            assert scores[answer] <= lowest + near
            if lowest == 0:
                assert self.distance(answer.layer) == max(self.distance(k.layer) for k in scores if scores[k] == 0)
            if reason == "warm":
                assert scores[answer] <= self.score(comes) + near
            self.drop(answer)
        self.keys.append(comes)
        if reason == "speculative":
            self.unproven.add(comes)

    def drop(self, key: ExpertKey) -> None:
        self.keys.remove(key)
        self.unproven.discard(key)
        self.spares.discard(key)

    def mark_spare(self, key: ExpertKey) -> None:
        self.spares.add(key)
        self.unproven.discard(key)


experts = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=2)
REASONS = ["speculative", "warm", "mark_spare", "unmark_spare"]
extras = st.lists(st.tuples(st.sampled_from(REASONS), st.sampled_from(KEYS)), max_size=4)
walks = st.builds(
    Walk, st.none() | st.none() | st.lists(experts, min_size=1, max_size=5).map(lambda tokens: [tokens] * LAYERS),
    st.lists(experts, min_size=LAYERS, max_size=LAYERS), st.lists(extras, min_size=LAYERS, max_size=LAYERS),
    st.none() | st.sampled_from(KEYS))
shares = st.dictionaries(st.sampled_from(KEYS), st.sampled_from([0.0, 0.1, 0.3, 0.7]))


def admit(cache: Cache, naive: Naive, key: ExpertKey, reason: Any, busy: set[ExpertKey]) -> None:
    before, unproven, recent, spares = set(naive.keys), set(naive.unproven), naive.recent(), set(naive.spares)
    held = [naive.held(layer) for layer in range(LAYERS)]
    answer = cache.admit(key, reason, busy)
    naive.check(key, reason, busy, answer)
    assert set(cache) == set(naive.keys) and len(cache) == len(naive.keys) <= cache.slots
    if answer is False and reason == "demand":
        assert all(k in busy or naive.quotas for k in before)
    if isinstance(answer, ExpertKey):
        assert answer in before and answer not in busy and answer not in cache
        if answer in spares:
            return
        if reason == "warm" or (reason == "speculative" and len(unproven) >= naive.probation):
            assert answer not in recent
        if naive.quotas and answer.layer != key.layer:
            assert held[answer.layer] > naive.quota(answer.layer)


def walk_through(cache: Cache, naive: Naive, walk: Walk) -> None:
    if walk.prefill is None:
        cache.begin_token()
        naive.now += 1
        naive.decoded.append(set())
    else:
        cache.begin_prefill(len(walk.prefill[0]))
        naive.now += len(walk.prefill[0])
    for layer in range(LAYERS):
        naive.layer, naive.clock[layer] = layer, naive.now
        if walk.prefill is None:
            chosen = {ExpertKey(layer, e) for e in walk.chosen[layer]}
            for key in chosen:
                cache.use(key)
                naive.used.append((key, naive.now))
                naive.unproven.discard(key)
            naive.decoded[-1] |= chosen
            cache.end_layer(layer)
        else:
            tokens = walk.prefill[layer]
            cache.seed(layer, tokens)
            for ago, token in enumerate(reversed(tokens)):
                naive.used += [(ExpertKey(layer, e), naive.now - ago) for e in token]
            chosen = {ExpertKey(layer, e) for e in set().union(*tokens)}
        naive.unproven = {key for key in naive.unproven if key.layer != layer}
        for key in sorted(chosen):
            if key not in cache:
                admit(cache, naive, key, "demand" if walk.prefill is None else "prefill", chosen)
        for reason, key in walk.extra[layer]:
            if reason in ("mark_spare", "unmark_spare"):
                if key in cache and reason == "mark_spare":
                    cache.mark_spare(key)
                    naive.mark_spare(key)
                elif reason == "unmark_spare":
                    cache.unmark_spare(key)
                    naive.spares.discard(key)
            elif key not in cache:
                admit(cache, naive, key, reason, chosen)
    if walk.gone is not None and walk.gone in cache:
        cache.remove(walk.gone)
        naive.drop(walk.gone)


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
