"""How fast this machine could go: its bandwidths and its rate of products, measured now, and the speed that they allow.

They are measured at every run and not read from the file that `qmix doctor` keeps. On a machine that others use too,
they change by half within the hour, so a share of the roofline means something only within the minute. The rates of a
device are measured in device.py.

GB/s are decimal, GFLOP/s are 1e9 operations a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qmix.hardware import compute_cores, memory, resident_bytes
from qmix.hardware.bandwidth import measure_ram
from qmix.hardware.cores import last_level_cache
from qmix.hardware.disk import DiskEffort, measure_disk
from qmix.kernels.native import NativeProducts
from qmix.sizes import MIB, RECORD_ALIGN

SIDE = 1024  # of the square matrices: 2 GFLOP a product, 2 MiB each in bf16
CHUNK = 4 * MIB  # bytes of one read of the expert tier
EXPLAINS = 1 / 3  # share of the time from which a bound is what limits
WAITING = 1 / 2  # share of the time from which waiting for records is, whatever bandwidths would allow


@dataclass(frozen=True, slots=True)
class Peaks:
    """ram_gbps: all physical cores reading; disk_gbps: reading the store's own files, None where nothing is read
    while running; gflops: of `products` on all physical cores. With a device gflops are the device's; vram_gbps: its
    memory, read and written; bus_gbps: copies to it from page-locked memory. None without one."""

    ram_gbps: float
    gflops: float
    products: str
    disk_gbps: float | None = None
    vram_gbps: float | None = None
    bus_gbps: float | None = None

    def columns(self) -> dict[str, float | None]:
        """As a row of the report has them; those of a device only where there is one."""
        found = {"peak_ram_gbps": self.ram_gbps, "peak_gflops": self.gflops, "peak_disk_gbps": self.disk_gbps}
        if self.vram_gbps is not None:
            found |= {"peak_vram_gbps": self.vram_gbps, "peak_bus_gbps": self.bus_gbps}
        return {name: None if value is None else float(f"{value:.4g}") for name, value in found.items()}

    def line(self) -> str:
        device = "" if self.vram_gbps is None else (
            f"GPU memory {self.vram_gbps:.1f} GB/s, bus {self.bus_gbps:.1f} GB/s, ")
        found = (f"measured beside it: {device}RAM {self.ram_gbps:.1f} GB/s, products {self.gflops:.0f} GFLOP/s "
                 f"({self.products})")
        return found if self.disk_gbps is None else f"{found}, disk {self.disk_gbps:.2f} GB/s"


@dataclass(frozen=True, slots=True)
class Work:
    """What something took from memory and disk in bytes, how many floating point operations, and the seconds that it
    took, `stalled` of them waiting for records from the slower of their sources, `awaited`. On a device also the bytes
    read from its memory and those copied to it."""

    ram_bytes: int
    disk_bytes: int
    operations: int
    seconds: float
    stalled: float
    vram_bytes: int = 0
    bus_bytes: int = 0
    awaited: str = "disk"


@dataclass(frozen=True, slots=True)
class Judgement:
    """share: of the roofline that was reached; limit: "memory" | "disk" | "compute" | "gpu memory" | "bus" |
    "overhead"."""

    share: float
    limit: str
    bounds: dict[str, float]  # seconds that each of them must take


def judge(work: Work, peaks: Peaks) -> Judgement:
    """Reading and copying overlap computing, so nothing can be faster than the longest bound, and the share is that
    bound over the time it took. "overhead" where not even that explains a third of the time."""
    bounds = {"memory": work.ram_bytes / peaks.ram_gbps / 1e9, "compute": work.operations / peaks.gflops / 1e9,
              "disk": work.disk_bytes / peaks.disk_gbps / 1e9 if peaks.disk_gbps else 0.0}
    if peaks.vram_gbps and peaks.bus_gbps:
        bounds |= {"gpu memory": work.vram_bytes / peaks.vram_gbps / 1e9, "bus": work.bus_bytes / peaks.bus_gbps / 1e9}
    longest = max(bounds, key=lambda name: bounds[name])
    share = bounds[longest] / work.seconds
    if work.stalled >= WAITING * work.seconds:
        limit = work.awaited
    else:
        limit = longest if share >= EXPLAINS else "overhead"
    return Judgement(share, limit, bounds)


def measure(dtype: torch.dtype, budget: int | None, say: Callable[[str], None]) -> Peaks:
    """RAM and products, in two seconds or less, before anything is loaded; within `budget` bytes for the process."""
    nbytes = None
    if budget is not None:
        nbytes = min(room(budget) // 2, max(512 * MIB, 4 * last_level_cache()))
    name = str(dtype).removeprefix("torch.")
    return Peaks(measure_ram(nbytes=nbytes, seconds=1.0, say=say), measure_products(dtype),
                 f"torch matmul, {name}, {SIDE} x {SIDE}")


def room(budget: int | None) -> int:
    """Bytes that may be taken now, within `budget` for the process, None for all there is."""
    available = memory().available
    return available if budget is None else max(0, min(budget - resident_bytes(), available))


def with_native(peaks: Peaks, native: NativeProducts) -> Peaks:
    """`peaks` with the bare dot products of the native kernels, where these compute: torch's bf16 products are no limit
    to them."""
    return replace(peaks, gflops=native.peak(compute_cores()) / 1e9,
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
                     clock: Callable[[], float] = time.perf_counter, device: torch.device | None = None,
                     side: int = SIDE) -> float:
    """GFLOP/s of the fastest of several torch products of square matrices, within `seconds`: on `device`,
    or on as many cores as compute by default."""
    def multiply() -> None:
        torch.mm(left, right, out=result)
        if left.is_cuda:
            torch.cuda.synchronize(left.device)

    before = torch.get_num_threads()
    torch.set_num_threads(compute_cores())
    try:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        result = torch.empty_like(left)
        multiply()  # the first one starts the threads
        best, start = float("inf"), clock()
        while best == float("inf") or clock() - start < seconds:
            begin = clock()
            multiply()
            best = min(best, max(clock() - begin, 1e-9))
    finally:
        torch.set_num_threads(before)
    return 2 * side**3 / best / 1e9
