"""What leaves, found by looking at every slot: the rule of cache.py without its order, to hold Cache to, answer by
answer. A twin of the choice alone; test_cache.py has a model of everything a cache does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from qmix.config import ExpertKey
from qmix.offload.cache import Policy, score


class ScanningCache:
    """As Cache, over a policy of its own."""

    def __init__(self, slots: list[int], layers: int, policy: Policy, quotas: bool, guard: int, probation: int,
                 kind_of: Callable[[ExpertKey], int]):
        self.free, self.layers, self.policy, self.kind_of = list(slots), layers, policy, kind_of
        self.guard, self.probation = guard, probation
        total = sum(slots)
        self.quota = [len(range(i, total, layers)) for i in range(layers)] if quotas and total >= layers else None
        self.held: dict[ExpertKey, None] = {}  # in the order in which they came
        self.spares: dict[ExpertKey, None] = {}
        self.unproven: set[ExpertKey] = set()
        self.tokens: list[set[ExpertKey]] = [set()]
        self.now, self.at, self.clocks = 0, 0, [0] * layers

    def begin_token(self) -> None:
        self.now += 1
        self.tokens.append(set())

    def begin_prefill(self, tokens: int) -> None:
        self.now += tokens

    def use(self, key: ExpertKey) -> None:
        self.at, self.clocks[key.layer] = key.layer, self.now
        self.policy.use(key, self.now)
        self.tokens[-1].add(key)
        self.unproven.discard(key)

    def seed(self, layer: int, choices: list[set[int]]) -> None:
        self.at, self.clocks[layer] = layer, self.now
        for token, experts in enumerate(choices):
            for expert in experts:
                self.policy.use(ExpertKey(layer, expert), self.now - len(choices) + 1 + token)
        self.end_layer(layer)

    def end_layer(self, layer: int) -> None:
        self.unproven = {key for key in self.unproven if key.layer != layer}

    def mark_spare(self, key: ExpertKey) -> None:
        self.spares[key] = None
        self.unproven.discard(key)

    def unmark_spare(self, key: ExpertKey) -> None:
        self.spares.pop(key, None)

    def remove(self, key: ExpertKey) -> None:
        del self.held[key]
        self.spares.pop(key, None)
        self.unproven.discard(key)
        self.free[self.kind_of(key)] += 1

    def admit(self, key: ExpertKey, reason: str, busy: set[ExpertKey]) -> ExpertKey | bool:
        leaves: ExpertKey | bool | None = True
        if not self.free[self.kind_of(key)]:
            alike = [k for k in self.spares if self.kind_of(k) == self.kind_of(key) and k not in busy]
            leaves = self._surest(alike)
            if leaves is None:
                leaves = self._victim(key, reason, busy)
                if leaves is None or (reason == "warm" and self._score(leaves) > self._score(key)):
                    return False
            self.remove(leaves)
        self.held[key] = None
        self.free[self.kind_of(key)] -= 1
        if reason == "speculative":
            self.unproven.add(key)
        return leaves

    def _distance(self, layer: int) -> int:
        return (layer - self.at - 1) % self.layers

    def _score(self, key: ExpertKey) -> float:
        return score(self.policy, key, self.clocks[key.layer], self._distance(key.layer) / self.layers)

    def _by_layer(self, keys: Iterable[ExpertKey]) -> list[list[ExpertKey]]:
        found: dict[int, list[ExpertKey]] = {}
        for key in keys:
            found.setdefault(key.layer, []).append(key)
        return list(found.values())

    def _surest(self, spares: Collection[ExpertKey]) -> ExpertKey | None:
        best = [max(keys, key=self.policy.rank) for keys in self._by_layer(spares)]  # of equals the first
        return max(best, key=lambda key: (self._score(key), -self._distance(key.layer)), default=None)

    def _victim(self, key: ExpertKey, reason: str, busy: set[ExpertKey]) -> ExpertKey | None:
        recent = set().union(*self.tokens[len(self.tokens) - self.guard:]) if self.guard else set()
        spared = {"demand": [self.unproven, set()], "prefill": [self.unproven | recent, self.unproven, set()],
                  "warm": [self.unproven | recent], "speculative": [self.unproven | recent]}[reason]
        if reason == "speculative" and len(self.unproven) < self.probation:
            spared.append(self.unproven)
        for stays in spared:
            free = [k for k in self.held if k not in busy and k not in stays and self._may_leave(k, key)]
            lowest = [min(keys, key=self.policy.rank) for keys in self._by_layer(free)]
            if lowest:
                return min(lowest, key=lambda k: (self._score(k), -self._distance(k.layer)))
        return None

    def _may_leave(self, key: ExpertKey, comes: ExpertKey) -> bool:
        if self.quota is None:
            return self.kind_of(key) == self.kind_of(comes)
        held = [sum(k.layer == layer for k in self.held) for layer in (key.layer, comes.layer)]
        if held[1] >= self.quota[comes.layer]:
            return key.layer == comes.layer
        return held[0] > self.quota[key.layer]
