"""The figures of one layer's routing, counted token by token; only counts are kept.

`ids` are the K different experts of a token, best choice first. All results are fractions, None if nothing was seen.

E experts, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations
from math import log2, sqrt

from qmix.analysis import chance

Ids = Sequence[int]

SMOOTHING = 16  # tokens' worth of "as often as at large" in a conditional frequency
SOURCES = ("ahead", "transitions", "popular")


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


class Load:
    """How evenly experts are used. chosen, first [E]: tokens that chose each, and that chose it first."""

    def __init__(self, experts: int):
        self.chosen = [0] * experts
        self.first = [0] * experts

    def note(self, ids: Ids) -> None:
        self.first[ids[0]] += 1
        for expert in ids:
            self.chosen[expert] += 1

    def shares(self) -> list[float]:
        """Of all choices, first or later, those that fell on each expert (figure 7); an even router gives 1 / E."""
        whole = sum(self.chosen)
        return [count / whole for count in self.chosen]

    def first_shares(self) -> list[float]:
        """The same of first choices (figure 9)."""
        whole = sum(self.first)
        return [count / whole for count in self.first]

    def imbalance(self) -> float:
        """The largest share over the mean one: 1 where all are used alike, E where one does all."""
        return max(self.chosen) * len(self.chosen) / sum(self.chosen)

    def variation(self) -> float:
        """The standard deviation of the shares over their mean."""
        mean = sum(self.chosen) / len(self.chosen)
        return sqrt(sum((count - mean) ** 2 for count in self.chosen) / len(self.chosen)) / mean

    def entropy(self) -> float:
        """Of the shares, in bits; an even router has log2(E)."""
        return -sum(share * log2(share) for share in self.shares() if share)


class Repeats:
    """How often a token and the next one choose alike (table 5). first: the same first choice; any: at least one of
    their K choices in common, whichever rank: with K = 2 what the paper calls first or second choice, and what its
    chance level 1 - 6/8 * 5/7 belongs to."""

    def __init__(self) -> None:
        self.pairs = self.first = self.any = 0

    def note(self, before: Ids, ids: Ids) -> None:
        self.pairs += 1
        self.first += before[0] == ids[0]
        self.any += any(expert in before for expert in ids)


class Together:
    """Which experts a token chooses together. both [E][E], a < b: tokens that chose a and b."""

    def __init__(self, experts: int):
        self.tokens = 0
        self.both = [[0] * experts for _ in range(experts)]

    def note(self, ids: Ids) -> None:
        self.tokens += 1
        for a, b in combinations(sorted(ids), 2):
            self.both[a][b] += 1

    def expected(self, load: Load, chosen: int) -> list[list[float]]:
        """[E][E], by the popularity of the experts alone; see chance.together."""
        return chance.together(load.chosen, self.tokens, chosen)

    def pairing(self, expected: Sequence[Sequence[float]]) -> float | None:
        """The share of pairs that would have to be others for none to be more frequent than popularity explains: 0
        where experts are chosen independently (total variation distance)."""
        pairs = list(combinations(range(len(self.both)), 2))
        whole = sum(self.both[a][b] for a, b in pairs)
        return ratio(sum(abs(self.both[a][b] - expected[a][b]) for a, b in pairs) / 2, whole)


class Reuse:
    """How many other experts of the layer come between two uses of one, and with that the hit rate of an LRU cache
    of any size: with S slots a use is a hit where fewer than S others came between (Mattson et al. 1970).

    at_once, in_turn [E + 1]: uses by that distance, the last entry those of an expert never used before. At once, as
    qmix's cache has it: a token's K experts are looked up before any of them takes a slot, so that distances count from
    the end of the token before. In turn: they are looked up one after the other, in order of rank. Either way the last
    rank counts as used last; qmix's cache, to which a token's experts are equally recent, may let another go.

    Example, K = 2: after (a b) and (c d) the token (a c) finds the stack d c b a: at once a is at distance 3 and c at
    1; in turn a is at 3, and c, behind a and d, at 2.
    """

    def __init__(self, experts: int):
        self.at_once = [0] * (experts + 1)
        self.in_turn = [0] * (experts + 1)
        self._stack: list[int] = []  # latest first

    def note(self, ids: Ids) -> None:
        stack, new = self._stack, len(self.at_once) - 1
        for expert in ids:
            self.at_once[stack.index(expert) if expert in stack else new] += 1
        for expert in ids:
            at = new
            if expert in stack:
                at = stack.index(expert)
                del stack[at]
            self.in_turn[at] += 1
            stack.insert(0, expert)

    def hits(self, chosen: int) -> list[float | None]:
        """At once, with 1..E slots; None for less than the K that a token needs."""
        found = _cumulated(self.at_once)
        return [None if slots < chosen else share for slots, share in enumerate(found, 1)]

    def hits_in_turn(self) -> list[float]:
        """In turn, with 1..E slots."""
        return _cumulated(self.in_turn)

    def mean(self) -> float | None:
        """The mean distance at once, first uses left out."""
        return ratio(sum(at * uses for at, uses in enumerate(self.at_once[:-1])), sum(self.at_once[:-1]))


def _cumulated(uses: Sequence[int]) -> list[float]:
    whole = sum(uses)
    return [hits / whole for hits in accumulate(uses[:-1])]


class Foretold:
    """Of this layer's choices, how many are among K guesses made one layer before: by `ahead`, the layer's own router
    asked early; by `transitions`, what tokens that chose as this one did in the layer before went on to; and by
    `popular`, the experts used most. The last two learn as they go: a token is guessed from those before it."""

    def __init__(self, experts: int, chosen: int):
        self._chosen = chosen
        self._tokens = 0
        self._used = [0] * experts
        self._before = [0] * experts
        self._table = [[0] * experts for _ in range(experts)]
        self.seen = dict.fromkeys(SOURCES, 0)
        self.right = dict.fromkeys(SOURCES, 0)

    def note(self, before: Ids, ids: Ids, ahead: Ids | None) -> None:
        """before: the choices of the layer before; ahead: its guesses for this one, best first."""
        guesses = {"transitions": self.guess(before), "popular": self._best(self._used)}
        if ahead is not None:
            guesses["ahead"] = list(ahead[:self._chosen])
        for source, guessed in guesses.items():
            self.seen[source] += len(ids)
            self.right[source] += sum(expert in guessed for expert in ids)
        self._tokens += 1
        for expert in ids:
            self._used[expert] += 1
        for expert in before:
            self._before[expert] += 1
            row = self._table[expert]
            for following in ids:
                row[following] += 1

    def guess(self, before: Ids) -> list[int]:
        """The K experts likeliest after `before`: the mean of the conditional frequencies, those seen seldom drawn
        towards the frequency at large."""
        at_large = [SMOOTHING * count / max(1, self._tokens) for count in self._used]
        rows = [(self._table[expert], 1 / (SMOOTHING + self._before[expert])) for expert in before]
        return self._best([sum((row[e] + base) * weight for row, weight in rows) for e, base in enumerate(at_large)])

    def _best(self, worth: Sequence[float]) -> list[int]:
        return sorted(range(len(worth)), key=worth.__getitem__, reverse=True)[:self._chosen]

    def recall(self, source: str) -> float | None:
        return ratio(self.right[source], self.seen[source])
