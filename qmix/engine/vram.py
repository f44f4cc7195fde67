"""GPU memory that torch does not count: how much the plan leaves for it, and whether that was enough.

Code, graphs and libraries take it, most of them while the engine warms up. Only then can it be measured, and the next
plan uses the measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

import torch

from qmix.device import Device
from qmix.engine.machine import Placement
from qmix.errors import QmixError
from qmix.hardware import gpu_memory
from qmix.hardware.gpu_memory import GpuMemory
from qmix.offload.plan import TierPlan
from qmix.sizes import MIB, format_bytes

STEP = 16 * MIB  # a difference that is worth a new file


def known(placement: Placement, device: Device, say: Callable[[str], None]) -> GpuMemory | None:
    """What an earlier run measured of this card, with this torch."""
    found = None if placement.memory is None else gpu_memory.load(placement.memory, say)
    return found if found is not None and (found.card, found.torch) == (device.name, torch.__version__) else None


def check(placement: Placement, device: Device, fast: TierPlan, say: Callable[[str], None],
          today: date | None = None) -> None:
    """Compare what lies beside torch's tensors on the warm device with what the plan left for it; a line where that is
    less. Kept for the next plan, where it has changed."""
    beside = device.beside()
    kept = False
    if placement.memory is not None and placement.base is None:
        before = known(placement, device, lambda line: None)
        if before is None or abs(before.beside - beside) >= STEP or abs(before.context - fast.base) >= STEP:
            kept = _keep(placement, GpuMemory(device.name, torch.__version__, fast.base, beside,
                                              (today or date.today()).isoformat()), say)
    if beside > fast.beside:
        say(f"qmix, or another program meanwhile, has taken {format_bytes(beside)} of {device.name}'s memory beside "
            f"tensors, and the plan left {format_bytes(fast.beside)} for that: --vram may be exceeded by "
            f"{format_bytes(beside - fast.beside)} (" + (
                "the next start plans for it)" if kept else "choose a smaller --vram)"))


def _keep(placement: Placement, found: GpuMemory, say: Callable[[str], None]) -> bool:
    assert placement.memory is not None
    try:
        gpu_memory.save(found, placement.memory)
    except QmixError as e:
        say(f"the measured use of the GPU's memory was not saved: {e.message}")
        return False
    return True
