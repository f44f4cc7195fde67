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
    granted = divide((least(reference), more(reference)), model, budget, base)
    return _with_reserve(base + granted)


def divide(reference: tuple[int, int], model: Needs, budget: int, base: int) -> int:
    """Bytes for a reference that cannot do without the first number and has use for the second beyond it."""
    needed = reference[0] + least(model)
    spare = budget - base - max(RESERVE, budget // 50) - needed
    if spare < 0:
        raise DoesNotFit(f"both models need {format_bytes(budget - spare)} of RAM at least, have "
                         f"{format_bytes(budget)}: short of {format_bytes(-spare)} (reference "
                         f"{format_bytes(reference[0])}, model {format_bytes(least(model))}, program and reserve the "
                         "rest)", "give it more --ram, choose a smaller -c/--ctx-size, or close other programs")
    wanted = reference[1] + more(model)
    return reference[0] + (reference[1] if spare >= wanted else spare * reference[1] // wanted)


def least(needs: Needs) -> int:
    """Bytes that a model cannot do without."""
    return needs.dense + needs.kv + needs.workspace + needs.least_bytes


def more(needs: Needs) -> int:
    """Bytes beyond the least that hold experts."""
    return needs.expert_bytes - needs.least_bytes


def taken(plan: TierPlan) -> int:
    """Bytes that a loaded model counts for, in the plan of the next: the reserve is the process's, not each one's."""
    return plan.total - plan.reserve


def _with_reserve(nbytes: int) -> int:
    """The budget of which `nbytes` are left once the plan has set its reserve aside: 256 MiB or 2 %."""
    return max(nbytes + RESERVE, -(-nbytes * 50 // 49))
