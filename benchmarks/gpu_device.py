"""The device that gpu.py measures, or the CPU in its place; how long the host waits for it; how fast it moves bytes.

With the stand-in everything runs and no figure means anything: streams are threads, and VRAM is RAM.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qmix.config import QuantConfig
from qmix.device import Device, StandIn
from qmix.device.cuda import open_cuda
from qmix.device.device import Event
from qmix.errors import DoesNotFit
from qmix.offload.needs import Needs
from qmix.offload.plan import RESERVE, UNMEASURED, plan
from qmix.sizes import GIB, format_bytes
from qmix.spec import Model

TOLERATED = 0.1  # of a budget: a "24 GB" card has less than 24 GiB
# What part of Mixtral's records fits into so many GiB of VRAM, for the stand-in, whose store is small.
LIKE = {8: 0.16, 12: 0.33, 16: 0.49, 24: 0.82}


class Watched:
    """A device, with the seconds in which the host waited for it: `waited`."""

    def __init__(self, device: Device):
        self._device = device
        self.waited = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def wait(self, event: Event) -> None:
        start = time.perf_counter()
        self._device.wait(event)
        self.waited += time.perf_counter() - start


def open_device(stand_in: bool) -> Watched:
    """A card, or the CPU in its place. UsageError where there is no card."""
    return Watched(StandIn() if stand_in else open_cuda(0))


def vram_budget(device: Device, model: Model, quant: QuantConfig, context: int, gib: int | None) -> int | None:
    """`gib` of VRAM in bytes, or a little less where the card has not quite as much; None, for all that is free, stays
    None. On the stand-in, what holds the same share of the records. DoesNotFit where the card is smaller."""
    if isinstance(getattr(device, "_device", device), StandIn):
        return budget_for(Needs.of(model, quant, context), device, 1.0 if gib is None else LIKE[gib])
    if gib is None:
        return None
    there = device.memory()[0] + device.taken()
    if there < (1 - TOLERATED) * gib * GIB:
        raise DoesNotFit(f"{gib} GiB of VRAM: {device.name} has {format_bytes(there)} free")
    return min(gib * GIB, there)


def budget_for(needs: Needs, device: Device, share: float) -> int:
    """The VRAM, in bytes, in which a share of the records of a small model fits, and not more."""
    slots = max(needs.least_slots, round(share * needs.records))
    # What the plan takes besides, its reserve at its least: any budget up to 50 of these shows it.
    beside = UNMEASURED if device.torch_device.type == "cuda" else None
    fixed = plan(needs, 2**50, 0, 50 * RESERVE, device.taken(), vram_beside=beside).tiers[0].fixed
    return fixed + slots * needs.record


def per_call(device: Device, run: Callable[[int], object], calls: int, repeat: int = 5, captured: bool = True) -> float:
    """Seconds of run(i): the median over `repeat` launches of run(0), ..., run(calls - 1) in a row. captured: as one
    launch where the device has graphs, so that what a call costs the host does not count."""
    def work() -> None:
        for i in range(calls):
            run(i)

    def launch() -> None:
        device.compute.run(work)

    launch()  # compiles, and takes what memory it needs
    device.wait(device.compute.record())
    repeated = device.capture(work) if captured else launch
    took = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        repeated()
        device.wait(device.compute.record())
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:]) / calls


def memory_bandwidth(device: Device, nbytes: int) -> dict[str, float]:
    """{"copy": GB/s read and written by copying `nbytes`, "read": GB/s of summing them up}."""
    source = torch.ones(min(nbytes, device.memory()[0] // 4) // 4, device=device.torch_device)
    target = torch.empty_like(source)
    total = torch.empty((), device=device.torch_device)
    copied = per_call(device, lambda i: target.copy_(source), 4, captured=False)
    read = per_call(device, lambda i: torch.sum(source, dim=0, out=total), 4, captured=False)
    return {"copy": 2 * source.nbytes / 1e9 / copied, "read": source.nbytes / 1e9 / read}


def bus_bandwidth(device: Device, nbytes: int) -> dict[str, float]:
    """GB/s of copies of `nbytes` from page-locked memory up, down, and of both at once, each way."""
    here = torch.zeros(nbytes, dtype=torch.uint8, device=device.torch_device)
    there = device.host(nbytes, dtype=torch.uint8)
    here2, there2 = torch.zeros_like(here), device.host(nbytes, dtype=torch.uint8)
    up, down = device.stream(), device.stream()

    def seconds(*jobs: tuple[Any, Tensor, Tensor]) -> float:
        took = []
        for _ in range(6):
            start = time.perf_counter()
            for stream, target, source in jobs:
                stream.run(lambda target=target, source=source: target.copy_(source, non_blocking=True))
            for event in [stream.record() for stream, _, _ in jobs]:
                event.wait()
            took.append(time.perf_counter() - start)
        return statistics.median(took[1:])

    return {"up": nbytes / 1e9 / seconds((up, here, there)), "down": nbytes / 1e9 / seconds((down, there2, here2)),
            "both": nbytes / 1e9 / seconds((up, here, there), (down, there2, here2))}
