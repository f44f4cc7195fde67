"""Divides a budget of RAM, and of a GPU's memory if the models are computed there, between two models: how much of it
the reference gets, before anything is loaded. Integers, no torch.

Each gets the least that it needs. If the rest does not hold all experts of both, it is divided in proportion to what
each could still hold, so that about the same share of either model's experts is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmix.errors import DoesNotFit
from qmix.offload.needs import Needs
from qmix.offload.plan import RESERVE, STAGING, Plan, TierPlan
from qmix.offload.plan import plan as make_plan
from qmix.sizes import format_bytes

UNBOUNDED = 2**60  # bytes of RAM, to see what a model would make use of
Budget = tuple[int, int]  # (bytes for the whole process, bytes of them that are taken already)


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that both models would be computed on. budget: of its memory, for both; chosen: whether the user named
    it, or its memory: then what keeps it from being used is an error. torch_device: torch's name of it ("cuda:0")."""

    name: str
    budget: Budget
    chosen: bool
    torch_device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Part:
    """With what one of two models is loaded; vram: None for the CPU."""

    ram: Budget
    vram: Budget | None = None


def reference_part(reference: Needs, model: Needs, ram: Budget, vram: Budget | None) -> Part:
    """The reference's part, which is loaded first. DoesNotFit says how much is missing."""
    if vram is None:
        return Part((share(reference, model, *ram), ram[1]))
    there = [needs.on_device for needs in (reference, model)]
    above = share(there[0], there[1], *vram, "VRAM")
    plans = [make_plan(reference, UNBOUNDED, 0, above, vram[1])]
    plans.append(make_plan(model, UNBOUNDED, 0, vram[0], taken(plans[0].tiers[0])))
    least = [STAGING * sum(nbytes for _, nbytes in needs.by_kind) for needs in (reference, model)]
    below = _divided(least, [one.ram.experts for one in plans], *ram, "RAM")
    return Part((below, ram[1]), (above, vram[1]))


def model_part(reference: Plan, ram: Budget, vram: Budget | None) -> Part:
    """The rest, for the model, once the reference is there."""
    return Part((ram[0], taken(reference.ram)), None if vram is None else (vram[0], taken(reference.tiers[0])))


def divide_on_gpu(reference: tuple[int, int], beside: int, model: Needs, ram: Budget,
                  vram: Budget) -> tuple[int, int]:
    """Bytes of (RAM, VRAM) for a reference that needs reference[0] of VRAM and `beside` of RAM, and holds reference[1]
    of weights, in VRAM as far as they fit. DoesNotFit says how much is missing."""
    above = divide(reference, model.on_device, *vram, "VRAM")
    below = make_plan(model, UNBOUNDED, 0, vram[0], vram[1] + above).ram.experts
    staging = STAGING * sum(nbytes for _, nbytes in model.by_kind)
    left_over = max(0, reference[0] + reference[1] - above)
    granted = _granted([beside, staging], [beside + left_over, max(staging, below)], *ram, "RAM")
    return granted, above


def tensors_beside(granted: int, model: Plan) -> int:
    """Bytes of a GPU that both may take once the model is loaded and before the reference is, which gets `granted`."""
    fast = model.tiers[0]
    return granted + fast.workspace + fast.budget - fast.total + fast.reserve - fast.beside


def tensors_to_come(reference: Plan, model: Plan) -> int:
    """Bytes of a GPU that both may take once both are loaded: their workspaces, and what is not planned for. (The
    model's load limited it to what it needs itself, beside what the reference held then.)"""
    fast = model.tiers[0]
    unused = fast.budget - fast.total + fast.reserve - fast.beside
    return reference.tiers[0].workspace + fast.workspace + unused


def share(reference: Needs, model: Needs, budget: int, base: int, memory: str = "RAM") -> int:
    """Bytes of `budget` within which to load the reference first, `base` being taken; the model then has the rest.
    DoesNotFit says how much is missing."""
    both = reference, model
    return _divided([_least(needs) for needs in both], [_most(needs) for needs in both], budget, base, memory)


def divide(reference: tuple[int, int], model: Needs, budget: int, base: int, memory: str = "RAM") -> int:
    """Bytes of `budget` for a reference that cannot do without the first number and has use for the second beyond it.
    DoesNotFit says how much is missing."""
    return _granted([reference[0], _least(model)], [sum(reference), _most(model)], budget, base, memory)


def taken(plan: TierPlan) -> int:
    """Bytes that a loaded model counts for, in the plan of the next: the reserve is the process's, not each one's."""
    return plan.total - plan.reserve


def _least(needs: Needs) -> int:
    """Bytes that a model cannot do without."""
    return needs.dense + needs.kv + needs.workspace + needs.least_bytes


def _most(needs: Needs) -> int:
    """Bytes that a model has use for."""
    return needs.dense + needs.kv + needs.workspace + needs.expert_bytes


def _divided(least: Sequence[int], most: Sequence[int], budget: int, base: int, memory: str) -> int:
    """`share`, of two that take `least` bytes each and can make use of `most`."""
    return _with_reserve(base + _granted(least, most, budget, base, memory))


def _granted(least: Sequence[int], most: Sequence[int], budget: int, base: int, memory: str) -> int:
    """Bytes for the first of the two, in proportion to what each wants beyond its least."""
    wanted = [top - low for top, low in zip(most, least, strict=True)]
    spare = budget - base - max(RESERVE, budget // 50) - sum(least)
    if spare < 0:
        raise DoesNotFit(f"both models need {format_bytes(budget - spare)} of {memory} at least, have "
                         f"{format_bytes(budget)}: short of {format_bytes(-spare)} (reference "
                         f"{format_bytes(least[0])}, model {format_bytes(least[1])}, program and reserve the rest)",
                         f"give it more --{memory.lower()}, choose a smaller -c/--ctx-size, or close other programs")
    return least[0] + (wanted[0] if spare >= sum(wanted) else spare * wanted[0] // sum(wanted))


def _with_reserve(nbytes: int) -> int:
    """The budget of which `nbytes` are left once the plan has set its reserve aside: 256 MiB or 2 %."""
    return max(nbytes + RESERVE, -(-nbytes * 50 // 49))
