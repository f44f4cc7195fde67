"""The figures of a router that chooses at random, as a level of comparison.

E experts, K different ones chosen per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

ROUNDS = 200  # of the fit; 5 to 30 are usual
CLOSE = 1e-9


def repeat_any(experts: int, chosen: int) -> float:
    """P(two tokens have an expert in common), each choosing K of E at random: 1 - C(E - K, K) / C(E, K).

    E = 8, K = 2: 1 - 6/8 * 5/7 = 0.464, the 46 % of table 5."""
    return 1 - comb(experts - chosen, chosen) / comb(experts, chosen)


def hits(experts: int, chosen: int, in_turn: bool) -> list[float | None]:
    """The hit rate of an LRU cache of 1..E slots under random choices. A token's K experts are looked up together, and
    then nothing less than K slots is a cache; or in turn, each after the one before has taken a slot."""
    if not in_turn:
        return [slots / experts if slots >= chosen else None for slots in range(1, experts + 1)]
    # The k experts before it in the same token are at the top of the stack, and are not chosen again.
    return [sum(max(0, slots - k) / (experts - k) for k in range(chosen)) / chosen for slots in range(1, experts + 1)]


def together(used: Sequence[int], tokens: int, chosen: int) -> list[list[float]]:
    """[E][E]: how many of `tokens` would choose both a and b if nothing but their popularity mattered. used [E]: how
    many chose each; a token chooses K different ones.

    The products of the two shares would be wrong, since K different ones are drawn: with 2 of 8 an even router has
    every pair in 1/28 of its tokens, not in 1/16. It is instead the distribution over sets of K with P(set)
    proportional to the product of a weight for each expert in it, the weights such that every expert is used as often
    as it was (conditional Poisson sampling: Chen, Dempster, Liu 1994). Of all with these shares it has the largest
    entropy.
    """
    expected = [[0.0] * len(used) for _ in used]
    always = [e for e, count in enumerate(used) if count == tokens]
    inner = [e for e, count in enumerate(used) if 0 < count < tokens]
    for a in always:
        for b, count in enumerate(used):
            expected[a][b] = expected[b][a] = float(count)
    left = chosen - len(always)
    if left >= 2:
        pairs = _pairs(_weights([used[e] / tokens for e in inner], left), left)
        for i, a in enumerate(inner):
            for j, b in enumerate(inner):
                expected[a][b] = tokens * pairs[i][j]
    for e in range(len(used)):
        expected[e][e] = float(used[e])
    return expected


def _weights(shares: Sequence[float], chosen: int) -> list[float]:
    """The weights for which each is in a set as often as `shares` has it. They sum to 1."""
    weights = [share / chosen for share in shares]
    for _ in range(ROUNDS):
        without = _without(weights, chosen)
        whole = weights[0] * without[0][chosen - 1] + without[0][chosen]
        found = [weight * rest[chosen - 1] / whole for weight, rest in zip(weights, without, strict=True)]
        if max(abs(a - b) for a, b in zip(found, shares, strict=True)) < CLOSE:
            break
        weights = [share / rest[chosen - 1] for share, rest in zip(shares, without, strict=True)]
        total = sum(weights)
        weights = [weight / total for weight in weights]
    return weights


def _pairs(weights: Sequence[float], chosen: int) -> list[list[float]]:
    """P(both are in the set)."""
    without = _without(weights, chosen)
    whole = weights[0] * without[0][chosen - 1] + without[0][chosen]
    rows = []
    for a, weight in enumerate(weights):
        others = [*weights[:a], *weights[a + 1:]]
        row = [weight * w * rest[chosen - 2] / whole for w, rest in
               zip(others, _without(others, chosen - 1), strict=True)]
        rows.append([*row[:a], 0.0, *row[a:]])
    return rows


def _without(weights: Sequence[float], most: int) -> list[list[float]]:
    """For each weight, the sums of products of 0..`most` different others (elementary symmetric polynomials)."""
    before, after = [[1.0] + [0.0] * most], [[1.0] + [0.0] * most]
    for weight in weights:
        before.append(_with(before[-1], weight))
    for weight in reversed(weights):
        after.append(_with(after[-1], weight))
    return [[sum(left[j] * right[k - j] for j in range(k + 1)) for k in range(most + 1)]
            for left, right in zip(before, reversed(after[:-1]), strict=False)]


def _with(sums: Sequence[float], weight: float) -> list[float]:
    return [1.0, *(sums[k] + weight * sums[k - 1] for k in range(1, len(sums)))]
