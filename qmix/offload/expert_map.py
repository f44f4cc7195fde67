"""Which experts are in memory now, and which of them the last tokens chose: a picture for people, layer by expert.

A look at 48 layers of 128 experts takes a few milliseconds and makes 25 kB of JSON. So it is taken when somebody
asks, at most once a second, and not for each token.

L layers that have records, E experts in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmix.offload.plan import TierPlan
from qmix.offload.router_stats import RouterStats
from qmix.offload.tiers import Tier
from qmix.spec import Model

HALF_LIFE = 32.0  # tokens after which a choice counts for half
ON_DISK, COMING = ".", "+"


class Heat:
    """How often each expert was chosen lately: of the tokens of the last look all, of earlier ones less and less."""

    def __init__(self, layers: int, experts: int):
        self._seen = 0, [[0] * experts for _ in range(layers)]
        self._tokens = 0.0
        self._counts = [[0.0] * experts for _ in range(layers)]

    def shares(self, tokens: int, counts: Sequence[Sequence[int]]) -> list[list[float]]:
        """[L][E], 0 to 1: share of the recent tokens that chose each expert. tokens, counts [L][E]: all so far; fewer
        than at the last look, they were counted from the start again.

        Example: 32 tokens of which all chose expert 0, then 32 of which none did: (0.5 * 32 + 0) / (0.5 * 32 + 32).
        """
        before, rows = self._seen if tokens >= self._seen[0] else (0, [[0] * len(row) for row in counts])
        if new := tokens - before:
            decay = 0.5 ** (new / HALF_LIFE)
            self._tokens = decay * self._tokens + new
            self._counts = [[decay * heat + now - then for heat, now, then in zip(heats, row, old, strict=True)]
                            for heats, row, old in zip(self._counts, counts, rows, strict=True)]
        self._seen = tokens, [list(row) for row in counts]
        return [[heat / max(self._tokens, 1.0) for heat in row] for row in self._counts]


class ExpertMap:
    """Of a model whose tiers the plan describes, fastest first."""

    def __init__(self, model: Model, plans: Sequence[TierPlan], stats: RouterStats):
        self._layers = model.paged_layers  # the last one may be a multi-token-prediction head's, which is not counted
        self._experts = [model.experts_in(layer) for layer in self._layers]
        self._plans = plans
        self._stats = stats
        self._heat = Heat(stats.layers, stats.experts)

    def look(self, tiers: Sequence[Tier]) -> dict[str, Any]:
        """tiers: in the order of the plan.

            layers   numbers of the model's layers
            experts  in each layer
            tokens   that were counted so far, in the prompt or in an answer
            tiers    name, letter, budget and planned bytes, slots, and records that are in them
            held     of each layer a text with a letter an expert: the fastest tier that has it, "+" where it is on its
                     way, "." where it is on the disk alone
            heat     of each layer E numbers, percent of the last tokens that chose the expert; null: not counted
        """
        letters = [plan.name[0].lower() for plan in self._plans]
        tokens, counts = self._stats.counted()
        heat: list[list[int] | None] = [[round(100 * share) for share in row]
                                        for row in self._heat.shares(tokens, counts)]
        heat += [None] * (len(self._layers) - len(heat))
        rows = [[ON_DISK] * experts for experts in self._experts]
        held = []
        for tier, letter in reversed(list(zip(tiers, letters, strict=True))):
            held.append(_enter(rows, tier, letter))
        return {"layers": list(self._layers), "experts": max(self._experts), "tokens": tokens,
                "tiers": [{"name": plan.name, "letter": letter, "budget": plan.budget, "planned": plan.total,
                           "slots": plan.slots, "held": count, "parts": dict(plan.parts())}
                          for plan, letter, count in zip(self._plans, letters, reversed(held), strict=True)],
                "held": ["".join(row) for row in rows], "heat": heat}


def _enter(rows: Sequence[list[str]], tier: Tier, letter: str) -> int:
    """Write a tier's letter where its records are; how many there are."""
    count = 0
    for key in list(tier):
        if tier.ready(key):
            rows[key.layer][key.expert] = letter
            count += 1
        elif rows[key.layer][key.expert] == ON_DISK:
            rows[key.layer][key.expert] = COMING
    return count
