"""What an engine's figures say to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmix.offload.plan import Plan


def tier_shares(plan: Plan, figures: Mapping[str, Any]) -> dict[str, float]:
    """Percent of the chosen experts by where they were; nothing chosen yet counts as all in the fastest."""
    fast = len(plan.tiers) > 1 and plan.tiers[0].slots < plan.needs.records
    chosen = figures["chosen"] or 1
    first = 100.0 * (figures["hits"] - figures["prefetched"]) / chosen if figures["chosen"] else 100.0
    if len(plan.tiers) == 1:
        return {"ram": 100.0} if plan.resident else {"ram": first, "disk": 100.0 - first}
    if not fast:
        return {"vram": 100.0}
    second = min(100.0 - first, 100.0 * figures["below"] / chosen)
    rest = {} if plan.resident else {"disk": 100.0 - first - second}
    return {"vram": first, "ram": 100.0 - first if plan.resident else second, **rest}
