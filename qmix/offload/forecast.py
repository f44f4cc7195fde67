"""How fast a plan should run: bytes a token moves, divided by bandwidths. Pure.

Decode reads every dense weight and K experts a layer, once each. Reading from memory takes bytes / bandwidth; a record
that is not in memory is read from the disk first. Reading and computing may overlap or not, so the forecast is a range:
at best the longer of the two, at worst their sum. It is an estimate, not a promise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qmix.config import ExpertKey
from qmix.offload.plan import Plan
from qmix.offload.router_stats import RouterStats

ENOUGH = 256  # tokens from which router statistics say more than "all alike"


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bandwidths in decimal GB/s; vram and pcie only where there is a GPU."""

    ram: float
    disk: float
    pcie: float | None = None
    vram: float | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens a second, decoding. hit: share of choices found in some memory; disk_bytes a token; bottleneck:
    what the longest part of a token waits for."""

    least: float
    most: float
    hit: float
    disk_bytes: int
    bottleneck: str

    def line(self) -> str:
        return (f"forecast: {self.least:.1f} to {self.most:.1f} tok/s, limited by the {self.bottleneck}; "
                f"{100 * self.hit:.0f} % of experts found in memory, {self.disk_bytes / 1e9:.2f} GB a token from disk")


def known_shares(stats: RouterStats) -> dict[ExpertKey, float]:
    """What is known of how often each expert is chosen: while decoding, else in prompts; {} for too few tokens."""
    for phase in ("decode", "prefill"):
        if stats.total(phase).tokens >= ENOUGH:
            return stats.share(phase)
    return {}


def forecast(plan: Plan, speeds: Speeds, shares: Mapping[ExpertKey, float] | None = None) -> Forecast:
    """shares: of tokens that chose each expert, from router statistics; None counts all experts as equally
    likely, the worst case for a cache."""
    needs = plan.needs
    chosen = needs.layers * needs.top_k
    hits = [_hit(tier_slots, needs.records, shares) for tier_slots in _cumulative(plan)]
    seconds = {}
    if len(plan.tiers) == 1:
        seconds["memory"] = (needs.dense + chosen * needs.record) / 1e9 / speeds.ram
    else:
        fast = hits[0] * chosen * needs.record
        seconds["GPU memory"] = (needs.dense + chosen * needs.record) / 1e9 / (speeds.vram or speeds.ram)
        seconds["PCIe"] = (chosen * needs.record - fast) / 1e9 / (speeds.pcie or speeds.ram)
    missed = round((1 - hits[-1]) * chosen * needs.record)
    seconds["disk"] = missed / 1e9 / speeds.disk
    slowest = max(seconds, key=lambda name: seconds[name])
    return Forecast(1 / sum(seconds.values()), 1 / seconds[slowest], hits[-1], missed, slowest)


def _cumulative(plan: Plan) -> list[int]:
    """Records found in the fastest tier, then in it or the next: [vram, vram + ram] or [ram]."""
    return [plan.slots] if len(plan.tiers) == 1 else [plan.tiers[0].slots, plan.slots]


def _hit(slots: int, records: int, shares: Mapping[ExpertKey, float] | None) -> float:
    """Share of choices that fall on the `slots` most frequent records."""
    if slots >= records:
        return 1.0
    if not shares or not any(shares.values()):
        return slots / records
    return _top(shares.values(), slots) / sum(shares.values())


def _top(values: Iterable[float], count: int) -> float:
    return sum(sorted(values, reverse=True)[:count])
