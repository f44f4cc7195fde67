"""How many bytes a model needs and how many there are, before anything is loaded."""

from __future__ import annotations

from qmix import hardware, process
from qmix.errors import DoesNotFit, UsageError
from qmix.offload.needs import Needs, choose_context
from qmix.offload.plan import margin_of
from qmix.sizes import format_bytes
from qmix.spec import Model
from qmix.store import Store


def needs_without_head(store: Store, needs: Needs) -> Needs:
    """`needs` once the store's multi-token-prediction head is left out."""
    return Needs.of(store.model.trunk, store.quant, needs.context, needs.kv_cache, needs.scoring)


def needs_of(store: Store, context: int = 0, kv: str = "bf16", scoring: bool = False) -> Needs:
    """What `load` with these arguments plans for."""
    return Needs.of(store.model, store.quant, _context(store.model, context), kv, scoring)


def budget(ram: int | None, margin: int | None, base: int | None = None) -> tuple[int, int]:
    """(bytes for the whole process, bytes it has taken already). DoesNotFit where `ram` is more than there is, or more
    than the limit of the address space (ulimit -v) allows."""
    available, cure = hardware.memory().available, "name a smaller budget, or close other programs"
    if mapping_limits():
        available, cure = hardware.address_space_left() or 0, mapping_limits()
    base = hardware.resident_bytes() if base is None else base
    if ram is None and margin is not None and margin >= available:
        raise DoesNotFit(f"--margin {format_bytes(margin)}: only {format_bytes(available)} is free",
                         "name a smaller one")
    if ram is None:
        return base + available - margin_of(available, margin), base
    if margin is not None:
        raise UsageError("--margin: only has an effect with --ram auto", "drop one of --ram and --margin")
    if ram > base + available:
        raise DoesNotFit(f"--ram {format_bytes(ram)}: only {format_bytes(base + available)} is available, short of "
                         f"{format_bytes(ram - base - available)}", cure)
    return ram, base


def mapping_limits() -> str:
    """What to do about a limit of the address space that is tighter than memory; "" where there is none."""
    left, limit = hardware.address_space_left(), process.address_space_limit()
    if left is None or limit is None or left >= hardware.memory().available:
        return ""
    return (f"raise the limit of the address space, ulimit -v {limit // 1024} ({format_bytes(limit)}), or name a "
            "smaller budget or context")


def _context(model: Model, asked: int) -> int:
    if asked > model.max_positions:
        raise UsageError(f"--ctx-size {asked}: the model was trained for {model.max_positions} positions",
                         f"choose at most {model.max_positions}")
    return choose_context(model, asked)
