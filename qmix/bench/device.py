"""The device's side: how fast its memory, its bus and its products are, and how much of them a repetition used.

The device is measured after a test, once the model has left it: there is no room for both. With the CPU in a GPU's
place, all of it is RAM.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qmix.bench.roofline import SIDE, Peaks, measure_products, room
from qmix.device.pinning import pin_pool
from qmix.errors import DoesNotFit
from qmix.hardware.bandwidth import measure_copies
from qmix.hardware.memory import anonymous_memory
from qmix.sizes import MIB, format_bytes

BUFFER = 256 * MIB  # bytes of a copy that is timed: several times what a card's cache holds
CARD_SIDE = 4096  # of the square matrices: 137 GFLOP a product, a few milliseconds of a card


@dataclass(frozen=True, slots=True)
class Moved:
    """What a repetition took of a device. vram_bytes: read from its memory, see work.Model; bus_bytes: copied there;
    of the records needed, below: not in its memory but in RAM, computed: by the CPU. launches, waits: see
    device.Device. disk_seconds, bus_seconds: how long each was busy."""

    vram_bytes: int
    bus_bytes: int
    below: int
    computed: int
    launches: int
    waits: int
    disk_seconds: float
    bus_seconds: float

    @classmethod
    def of(cls, vram_bytes: int, figures: Mapping[str, Any]) -> Moved:
        """figures: of the phase, as the engine's stats have them."""
        return cls(vram_bytes, figures["bytes_up"], figures["below"], figures["computed"], figures["launches"],
                   figures["waits"], figures["read_seconds"], figures["up_seconds"])


def with_device(peaks: Peaks, device: torch.device, dtype: torch.dtype, *, vram: int, ram: int | None, pin: int | None,
                say: Callable[[str], None]) -> Peaks:
    """`peaks` with those of `device`, whose prompts compute in `dtype`, in two seconds or less. Within
    `vram` bytes there, `ram` for the process and `pin` page-locked ones, None for as many as there are. DoesNotFit
    where the memory cannot be had."""
    products = f"torch matmul on the device, {str(dtype).removeprefix('torch.')}"
    nbytes = max(MIB, min(BUFFER, vram // 4, room(ram) // 4) // MIB * MIB)
    try:
        within, up = _copies(device, nbytes, pin, say)
        gflops = measure_products(dtype, device=device, side=CARD_SIDE if device.type == "cuda" else SIDE)
    except (OSError, torch.OutOfMemoryError):
        raise DoesNotFit(f"no {format_bytes(nbytes)} of memory are free to measure the device",
                         "close other programs that use the GPU or much memory") from None
    finally:
        let_go(device)
    return replace(peaks, vram_gbps=within, bus_gbps=up, gflops=gflops, products=products)


def let_go(device: torch.device) -> None:
    """Give back what nobody holds any more of a device's memory: a model's parts refer to each other, and torch keeps
    what it was given."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _copies(device: torch.device, nbytes: int, pin: int | None, say: Callable[[str], None]) -> tuple[float, float]:
    """GB/s of (the device's memory: copies within it, read and written; the bus: copies to it from page-locked
    memory)."""
    one, other = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    within = 2 * measure_copies(one, other, seconds=0.5)  # each byte is read and written
    some = nbytes if pin is None else max(MIB, min(nbytes, pin) // MIB * MIB)
    source = torch.frombuffer(anonymous_memory(some), dtype=torch.uint8).fill_(1)
    if device.type != "cuda":
        return within, measure_copies(source, other[:some], seconds=0.5)
    return within, _from_pinned(source, other[:some], some if pin is None else pin, say)


def _from_pinned(source: Tensor, target: Tensor, limit: int, say: Callable[[str], None]) -> float:
    """Not through torch's own page-locked memory, which it would keep."""
    pinned = pin_pool(source.view(1, -1), limit, say)
    try:
        return measure_copies(source, target, seconds=0.5)
    finally:
        pinned.close()
