"""Two models in one budget: how much of it the reference gets, before anything is loaded. Integers, no torch.

Each gets what it cannot do without. Where the rest does not hold all experts of both, it is shared in proportion
to what each still wants, so that about the same share of either one's experts is in memory.
"""

from __future__ import annotations

from qmix.errors import DoesNotFit
from qmix.offload.plan import RESERVE, Needs, TierPlan
from qmix.sizes import format_bytes


def share(reference: Needs, model: Needs, budget: int, base: int) -> int:
    """Bytes of `budget` within which to load the reference first, `base` being taken; the model then has the rest.
    DoesNotFit says how much is missing."""
    least = [_fixed(needs) + needs.least_bytes for needs in (reference, model)]
    wanted = [needs.expert_bytes - needs.least_bytes for needs in (reference, model)]
    spare = budget - base - max(RESERVE, budget // 50) - sum(least)
    if spare < 0:
        raise DoesNotFit(f"both models need {format_bytes(budget - spare)} of RAM at least, have "
                         f"{format_bytes(budget)}: short of {format_bytes(-spare)} (reference "
                         f"{format_bytes(least[0])}, model {format_bytes(least[1])}, program and reserve the rest)",
                         "give it more --ram, choose a smaller -c/--ctx-size, or close other programs")
    granted = wanted[0] if spare >= sum(wanted) else spare * wanted[0] // sum(wanted)
    return _with_reserve(base + least[0] + granted)


def taken(plan: TierPlan) -> int:
    """Bytes that a loaded model counts for, in the plan of the next: the reserve is the process's, not each one's."""
    return plan.total - plan.reserve


def _fixed(needs: Needs) -> int:
    return needs.dense + needs.kv + needs.workspace


def _with_reserve(nbytes: int) -> int:
    """The budget of which `nbytes` are left once the plan has set its reserve aside: 256 MiB or 2 %."""
    return max(nbytes + RESERVE, -(-nbytes * 50 // 49))
