"""A cache of records as docs/cache-policy.md has it, by plain searches; and walks of passes through both caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from qmix.config import ExpertKey
from qmix.offload.cache import NEAR, Cache

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
