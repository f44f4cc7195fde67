"""How fast this machine could go: its bandwidths and its rate of products, measured now, and what they allow.

Measured at every run and not taken from `qmix doctor`'s notes, since on a machine that others use too they move by
half within the hour: a share of the roofline means something only within the minute.

GB/s are decimal, GFLOP/s are 1e9 operations a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qmix.hardware import memory, physical_cores, resident_bytes
from qmix.hardware.bandwidth import measure_ram
from qmix.hardware.cores import last_level_cache
from qmix.hardware.disk import DiskEffort, measure_disk
from qmix.kernels.native import Native
from qmix.sizes import MIB, RECORD_ALIGN

SIDE = 1024  # of the square matrices: 2 GFLOP a product, 2 MiB each in bf16
CHUNK = 4 * MIB  # bytes of one read of the expert tier
EXPLAINS = 1 / 3  # share of the time from which a bound is what limits
WAITING = 1 / 2  # share of the time from which waiting for the disk is, whatever its bandwidth would allow


@dataclass(frozen=True, slots=True)
class Peaks:
    """ram_gbps: all physical cores reading; disk_gbps: reading the store's own files, None where nothing is read
    while running; gflops: of `products` on all physical cores."""

    ram_gbps: float
    gflops: float
    products: str
    disk_gbps: float | None = None

    def columns(self) -> dict[str, float | None]:
        """As a row of the report has them."""
        return {"peak_ram_gbps": float(f"{self.ram_gbps:.4g}"), "peak_gflops": float(f"{self.gflops:.4g}"),
                "peak_disk_gbps": None if self.disk_gbps is None else float(f"{self.disk_gbps:.4g}")}

    def line(self) -> str:
        found = (f"measured beside it: RAM {self.ram_gbps:.1f} GB/s, products {self.gflops:.0f} GFLOP/s "
                 f"({self.products})")
        return found if self.disk_gbps is None else f"{found}, disk {self.disk_gbps:.2f} GB/s"


@dataclass(frozen=True, slots=True)
class Work:
    """What something took from memory and disk in bytes, how many floating point operations, and the seconds that it
    took, `stalled` of them waiting for the disk."""

    ram_bytes: int
    disk_bytes: int
    operations: int
    seconds: float
    stalled: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """share: of the roofline that was reached; limit: "memory" | "disk" | "compute" | "overhead"."""

    share: float
    limit: str
    bounds: dict[str, float]  # seconds that each of the three must take


def judge(work: Work, peaks: Peaks) -> Judgement:
    """Reading overlaps computing, so nothing can be faster than the longest of the three, and the share is that
    bound over the time it took. "overhead" where not even that explains a third of the time."""
    bounds = {"memory": work.ram_bytes / peaks.ram_gbps / 1e9, "compute": work.operations / peaks.gflops / 1e9,
              "disk": work.disk_bytes / peaks.disk_gbps / 1e9 if peaks.disk_gbps else 0.0}
    longest = max(bounds, key=lambda name: bounds[name])
    share = bounds[longest] / work.seconds
    if work.stalled >= WAITING * work.seconds:
        limit = "disk"
    else:
        limit = longest if share >= EXPLAINS else "overhead"
    return Judgement(share, limit, bounds)


def measure(dtype: torch.dtype, budget: int | None, say: Callable[[str], None]) -> Peaks:
    """RAM and products, in two seconds or less, before anything is loaded; within `budget` bytes for the process."""
    nbytes = None
    if budget is not None:
        room = max(0, min(budget - resident_bytes(), memory().available))
        nbytes = min(room // 2, max(512 * MIB, 4 * last_level_cache()))
    name = str(dtype).removeprefix("torch.")
    return Peaks(measure_ram(nbytes=nbytes, seconds=1.0, say=say), measure_products(dtype),
                 f"torch matmul, {name}, {SIDE} x {SIDE}")


def with_native(peaks: Peaks, native: Native) -> Peaks:
    """`peaks` with the bare dot products of the native kernels, where these compute: torch's bf16 products are no limit
    to them."""
    return replace(peaks, gflops=native.peak(physical_cores()) / 1e9,
                   products=f"bare {native.activations} dots, {native.level}")


def with_disk(peaks: Peaks, folder: Path, say: Callable[[str], None]) -> Peaks:
    """`peaks` with the disk's bandwidth, read off the store's expert files as the expert tier reads them, for a
    second."""
    files = sorted(folder.glob("experts-*.safetensors"))
    largest = max(file.stat().st_size for file in files)
    chunk = min(CHUNK, largest // RECORD_ALIGN * RECORD_ALIGN)
    effort = DiskEffort(seconds=0.5, rounds=1, depths=(4, 8), chunks=(chunk,))
    return replace(peaks, disk_gbps=measure_disk(files, effort, say=say).best.gbps)


def measure_products(dtype: torch.dtype, seconds: float = 0.5,
                     clock: Callable[[], float] = time.perf_counter) -> float:
    """GFLOP/s of the fastest of several torch products on all physical cores, within `seconds`."""
    before = torch.get_num_threads()
    torch.set_num_threads(physical_cores())
    try:
        left, right = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
        torch.mm(left, right)  # the first one starts the threads
        best, start = float("inf"), clock()
        while best == float("inf") or clock() - start < seconds:
            begin = clock()
            torch.mm(left, right)
            best = min(best, max(clock() - begin, 1e-9))
    finally:
        torch.set_num_threads(before)
    return 2 * SIDE**3 / best / 1e9
