"""Whether a plan for the CPU has room for a model's multi-token-prediction head."""

from __future__ import annotations

from qmix.errors import DoesNotFit
from qmix.offload.needs import Needs
from qmix.offload.plan import Plan, plan


def plan_with_head(whole: Needs, trunk: Needs, ram: int, base: int) -> tuple[Plan, str]:
    """(a plan for `whole`, ""), or (one for `trunk`, the same model without its head, and a line that says why): where
    the head does not fit, or without it all experts would be in memory. ram, base, DoesNotFit: as of `plan`."""
    try:
        found, reason = plan(whole, ram, base), "without it all experts are in memory"
    except DoesNotFit:
        found, reason = None, "there is no room for it"
    if found is not None and found.resident:
        return found, ""
    other = plan(trunk, ram, base)
    if found is not None and not other.resident:
        return found, ""
    return other, f"the multi-token-prediction head is left out: {reason}"
