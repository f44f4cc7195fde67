"""The records of a tier in order of rank, so that the next one to evict is found without looking at all of them. Pure.

A record's rank changes only when the router of its layer chooses it, and never falls. So every layer keeps its records
sorted by the ranks that they had when last looked at; the true ranks are the same or higher. A search for the lowest
looks at the first record of each layer whose router has spoken since, and moves it back if its rank has risen. The
first record of the other layers is known. The search continues inside a layer only if the first record may not leave. A
search for the highest needs the true ranks, so records that were chosen are moved to their place before it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Sequence
from itertools import count
from math import inf
from typing import Protocol

from qmix.config import ExpertKey

Keys = set[ExpertKey] | frozenset[ExpertKey]
_Entry = tuple[float, int, ExpertKey]  # signed rank, how many came before, key


class Scores(Protocol):
    """What a policy makes of records. Times are counted in tokens."""

    def rank(self, key: ExpertKey) -> float:
        """Orders the records of one layer at any time: the lowest leaves first. Only a use of the key changes it, and
        never makes it lower."""

    def worth(self, rank: float, now: int) -> float:
        """What a record of that rank is worth where its layer comes at once, never less for a higher rank. now: the
        last token that its layer knows of."""

    def scores(self, worths: Sequence[float], waits: Sequence[float]) -> list[float]:
        """Orders records of different layers, and those of one layer as rank does: what they are worth given the part
        of a token, 0 to 1, until their layer comes next."""


class Ranking:
    """Of the records that were added: the one with the lowest score, the farthest from the walk through the layers
    among equals; or, with `highest`, the one with the highest score, the nearest among equals. Within a layer rank
    decides, then who came first."""

    def __init__(self, policy: Scores, layers: int, highest: bool = False):
        self._policy = policy
        self._sign = -1 if highest else 1
        self._layers = layers
        self._number = count()
        self._entries: dict[ExpertKey, _Entry] = {}  # as they are in _order
        self._order: list[list[_Entry]] = [[] for _ in range(layers)]
        self._chosen: set[ExpertKey] = set()  # with `highest`: of another rank than in _order, maybe
        self._stale: set[int] = set()  # layers of which the following two are not up to date
        self._first: list[ExpertKey | None] = [None] * layers
        self._worth = [self._sign * inf] * layers  # of the first ones
        # As `best` puts the layers: the farthest first, or the nearest.
        self._waits = [distance / layers for distance in range(layers)][::1 if highest else -1]

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def keys(self) -> Collection[ExpertKey]:
        """All of them, in the order in which they came."""
        return self._entries.keys()

    def add(self, key: ExpertKey) -> None:
        """Nothing where it is there."""
        if key not in self._entries:
            entry = self._entries[key] = self._sign * self._policy.rank(key), next(self._number), key
            insort(self._order[key.layer], entry)
            self._stale.add(key.layer)

    def remove(self, key: ExpertKey) -> None:
        """Nothing where it is not there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._delete(entry)
            self._chosen.discard(key)
            self._stale.add(key.layer)

    def used(self, layer: int, keys: Iterable[ExpertKey]) -> None:
        """The router of `layer` has chosen `keys`, whether they are here or not: the layer's clock and their ranks are
        other ones."""
        self._stale.add(layer)
        if self._sign < 0 and self._entries:
            self._chosen.update(self._entries.keys() & keys)

    def best(self, at: int, clocks: Sequence[int], stays: Sequence[Keys],
             among: Collection[int] | None = None) -> ExpertKey | None:
        """Of those that are in none of `stays`. at: the layer whose router spoke last; clocks: of each layer, the last
        token that it knows of; among: layers, None for all."""
        if not self._entries:
            return None
        for key in self._chosen:
            self._put(self._entries[key], self._sign * self._policy.rank(key))
        self._chosen.clear()
        for layer in self._stale:
            self._first[layer], self._worth[layer] = self._search(layer, clocks[layer], ())
        self._stale.clear()
        first, worth = self._first, self._worth
        held_back = self._held_back(stays)
        if held_back or among is not None:
            first, worth = first.copy(), worth.copy()
            for layer in held_back:
                first[layer], worth[layer] = self._search(layer, clocks[layer], stays)
            for layer in () if among is None else set(range(self._layers)).difference(among):
                first[layer], worth[layer] = None, self._sign * inf
        if self._sign > 0:  # layers at, at - 1, ..., at + 1
            scores = self._policy.scores(worth[at::-1] + worth[:at:-1], self._waits)
            return first[(at - scores.index(min(scores))) % self._layers]
        scores = self._policy.scores(worth[at + 1:] + worth[:at + 1], self._waits)
        return first[(at + 1 + scores.index(max(scores))) % self._layers]

    def _held_back(self, stays: Sequence[Keys]) -> set[int]:
        """Layers whose first record is in one of `stays`."""
        first = self._first
        return {key.layer for some in stays
                for key in (some if len(some) < self._layers else some.intersection(first))
                if first[key.layer] == key}

    def _search(self, layer: int, now: int, stays: Sequence[Keys]) -> tuple[ExpertKey | None, float]:
        """(the first one that is in none of `stays`, what it is worth)."""
        order, index = self._order[layer], 0
        while index < len(order):
            old, _, key = order[index]
            if any(key in some for some in stays):
                index += 1
                continue
            rank = self._policy.rank(key)
            if self._sign * rank == old:
                return key, self._policy.worth(rank, now)
            self._put(order[index], self._sign * rank)  # further back; the next one is at `index` now
        return None, self._sign * inf

    def _put(self, entry: _Entry, rank: float) -> None:
        """Where it belongs with that signed rank."""
        if rank != entry[0]:
            self._delete(entry)
            self._entries[entry[2]] = new = rank, entry[1], entry[2]
            insort(self._order[entry[2].layer], new)

    def _delete(self, entry: _Entry) -> None:
        order = self._order[entry[2].layer]
        del order[bisect_left(order, entry)]
