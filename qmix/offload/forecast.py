"""How fast a plan should run: bytes a token moves, divided by bandwidths. Pure.

Decode reads every dense weight and K experts a layer, once each. Reading from memory takes bytes / bandwidth; a record
that is not in memory is read from the disk first. Reading and computing may overlap or not, so the forecast is a range:
at best the longer of the two, at worst their sum. It is an estimate, not a promise.

With a GPU, the experts that VRAM lacks are divided between the bus and the CPU. At best the RAM feeds both at full
speed: a layer waits for the side that takes longer, divided as Split divides. At worst they share the bandwidth of the
RAM. Every missing record is read from RAM once, whichever side reads it, so the bus then saves nothing, and the CPU
counts as computing them all. With `exact` all missing records go over the bus, which is no faster than the RAM that it
reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import comb

from qmix.config import ExpertKey
from qmix.offload.plan import Plan
from qmix.offload.router_stats import RouterStats
from qmix.offload.split import Split

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


def forecast(plan: Plan, speeds: Speeds, shares: Mapping[ExpertKey, float] | None = None,
             exact: bool = False) -> Forecast:
    """shares: of tokens that chose each expert, from router statistics; None counts all experts as equally
    likely, the worst case for a cache. exact: the CPU computes no expert that belongs on the GPU."""
    needs = plan.needs
    chosen = needs.layers * needs.top_k * needs.record
    hits = [_hit(tier_slots, needs.records, shares) for tier_slots in _cumulative(plan)]
    if len(plan.tiers) == 1:
        best = worst = {"memory": (needs.dense - needs.embedding + chosen) / 1e9 / speeds.ram}
    else:
        best, worst = _on_gpu(plan, speeds, hits[0], exact)
    missed = round((1 - hits[-1]) * chosen)
    disk = {"disk": missed / 1e9 / speeds.disk}
    best, worst = best | disk, worst | disk
    slowest = max(best, key=lambda name: best[name])
    total = sum(worst.values())  # less than best[slowest] only where VRAM is slower than RAM
    return Forecast(1 / total, 1 / min(best[slowest], total), hits[-1], missed, slowest)


def _on_gpu(plan: Plan, speeds: Speeds, hit: float, exact: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds a token of the GPU and of the experts that VRAM lacks, at best and at worst, by what they wait for; hit:
    share of choices found in VRAM."""
    needs = plan.needs
    dense = (needs.dense - needs.embedding) / 1e9
    gigabytes = needs.layers * needs.record / 1e9
    found, missing = hit * needs.top_k * gigabytes, (1 - hit) * needs.top_k * gigabytes
    vram, bus = speeds.vram or speeds.ram, min(speeds.pcie or speeds.ram, speeds.ram)
    everything = {"GPU memory": (dense + found + missing) / vram}
    if exact:
        both = everything | {"PCIe": missing / bus}
        return both, both
    waited, copying, computing = (part * gigabytes for part in divided(needs.top_k, 1 - hit, bus, speeds.ram))
    side = "PCIe" if copying >= computing else "RAM"
    apart = {"GPU memory": (dense + found) / vram, "RAM": missing / speeds.ram}
    return everything | {side: waited}, apart


def divided(top_k: int, miss: float, bus: float, host: float) -> tuple[float, float, float]:
    """What a layer does about the experts that VRAM lacks: expected seconds that it waits, that the bus copies and that
    the CPU computes, for records of 1 GB at GB/s. Each of the top_k choices misses with probability `miss`."""
    split = Split(bus, host)
    waited = copying = computing = 0.0
    for lacking in range(1, top_k + 1):
        likely = comb(top_k, lacking) * miss**lacking * (1 - miss)**(top_k - lacking)
        computed = split.on_host([(1, 1)] * lacking)
        sides = (lacking - computed) / bus, computed / host
        waited += likely * max(sides)
        copying += likely * sides[0]
        computing += likely * sides[1]
    return waited, copying, computing


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
