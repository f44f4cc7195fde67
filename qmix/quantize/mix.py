"""Chooses the format of each matrix of each expert, so that all fit into a number of bytes with the least damage.

The damage that a format does to a matrix is measured elsewhere (sensitivity.py) and adds up. Every record then has a
curve of bytes against damage, of which only the corners of the lower convex hull matter. The choice starts with the
smallest kind for all records. Again and again it takes the step that saves the most damage a byte, as long as it fits.
This is optimal, except for the bytes left over at the end (Sinha & Zoltners 1979, the multiple-choice knapsack's linear
bound).

A store has at most MOST_KINDS kinds, so that slots sized by kind do not lie idle. The kinds that the fewest records use
are given up one by one. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qmix.config import KIND_LETTERS, ExpertKey
from qmix.spec import Model

Kind = tuple[str, str]  # formats of w13 and w2
Damages = Mapping[ExpertKey, Mapping[str, Mapping[str, float]]]  # {expert: {"w13" | "w2": {format: damage}}}

# 2.5 to 5 bits a weight. int2 in groups of 128 is of no use, and beyond int4g32 there is little left to gain.
FORMATS = ("int2g64", "int2g32", "int3g128", "int3g64", "int4g128", "int4g64", "int4g32")
MOST_KINDS = 6


@dataclass(frozen=True, slots=True)
class Choice:
    """kinds: those in use, the largest first; of: each record's; nbytes: of all records; damage: the sum."""

    kinds: tuple[Kind, ...]
    of: Mapping[ExpertKey, Kind]
    nbytes: int
    damage: float

    def lines(self, model: Model) -> tuple[str, ...]:
        """As QuantConfig.mix has it."""
        letters = dict(zip(self.kinds, KIND_LETTERS, strict=False))
        return tuple("".join(letters[self.of[ExpertKey(layer, expert)]] for expert in range(model.experts_in(layer)))
                     for layer in range(model.num_layers))


def one_kind(model: Model) -> tuple[str, ...]:
    """QuantConfig.mix where all records are of the first kind."""
    return tuple("0" * model.experts_in(layer) for layer in range(model.num_layers))


def choose(damages: Damages, sizes: Mapping[Kind, int], room: int, most: int = MOST_KINDS) -> Choice | None:
    """The least damage within `room` bytes; sizes: of a record of each kind that may be used. None where not even
    the smallest kind for all fits."""
    allowed = set(sizes)
    while True:
        found = _solve(damages, {kind: sizes[kind] for kind in sizes if kind in allowed}, room)
        if found is None or len(found.kinds) <= most:
            return found
        counts = Counter(found.of.values())
        smallest = min(found.kinds, key=lambda kind: (sizes[kind], kind))  # without it all might not fit
        dropped = min((kind for kind in found.kinds if kind != smallest), key=lambda kind: (counts[kind], kind))
        allowed = set(found.kinds) - {dropped}


def _solve(damages: Damages, sizes: Mapping[Kind, int], room: int) -> Choice | None:
    corners = {key: _hull([(sizes[kind], damage["w13"][kind[0]] + damage["w2"][kind[1]], kind) for kind in sizes])
               for key, damage in damages.items()}
    at = dict.fromkeys(corners, 0)
    left = room - sum(hull[0][0] for hull in corners.values())
    if left < 0:
        return None
    steps = sorted((-(low[1] - high[1]) / (high[0] - low[0]), key, i, high[0] - low[0])
                   for key, hull in corners.items() for i, (low, high) in enumerate(pairwise(hull)))
    for _, key, i, more in steps:
        if at[key] == i and more <= left:  # a record whose step did not fit takes no later one
            at[key] = i + 1
            left -= more
    chosen = {key: corners[key][i] for key, i in at.items()}
    of = {key: kind for key, (_, _, kind) in chosen.items()}
    kinds = sorted(set(of.values()), key=lambda kind: (-sizes[kind], kind))
    return Choice(tuple(kinds), of, room - left, sum(damage for _, damage, _ in chosen.values()))


def _hull(points: Iterable[tuple[int, float, Kind]]) -> Sequence[tuple[int, float, Kind]]:
    """The corners of the lower convex hull from the smallest size to the least damage, each cheaper in damage than
    the one before: [(1, 9, a), (2, 8, b), (3, 1, c), (4, 2, d)] -> [(1, 9, a), (3, 1, c)]."""
    hull: list[tuple[int, float, Kind]] = []
    for point in sorted(points):
        if hull and (point[0] == hull[-1][0] or point[1] >= hull[-1][1]):
            continue
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float, Kind], b: tuple[int, float, Kind]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
