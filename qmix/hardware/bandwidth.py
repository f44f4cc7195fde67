"""How fast bytes move in this machine: out of RAM, off the disk, over to a GPU, within it.

These figures decide what paging can reach: tokens/s is at most bandwidth / bytes a token needs. They are measured once
(`qmix doctor --bandwidth`), kept in a small JSON file, and shown with their date, because they change with the load of
the machine.

GB/s are decimal: 1e9 bytes a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch

from qmix import json_cache
from qmix.errors import ConfigError, DoesNotFit
from qmix.hardware.cores import compute_cores, last_level_cache
from qmix.hardware.disk import DiskReport
from qmix.hardware.memory import anonymous_memory, memory
from qmix.sizes import GIB, MIB, RECORD_ALIGN, format_bytes

FORMAT, VERSION = "qmix_bandwidths", 1
MIN_GBPS, MAX_GBPS = 1e-6, 1e5
COPIES = 8


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """GB/s of this machine; checks itself (ConfigError).

    ram_gbps: reading, all physical cores. disk_gbps: the best of disk_depth threads reading disk_chunk bytes
    at a time, disk_direct with O_DIRECT; None, 0, 0 and False where no disk was measured. h2d_gbps: from
    pinned memory to the GPU, h2d_pageable_gbps from any; vram_gbps: what a copy within the GPU's memory reads and
    writes; None without a GPU. measured: "YYYY-MM-DD".
    """

    ram_gbps: float
    disk_gbps: float | None
    disk_chunk: int
    disk_depth: int
    disk_direct: bool
    h2d_gbps: float | None
    h2d_pageable_gbps: float | None
    measured: str
    vram_gbps: float | None = None

    def __post_init__(self) -> None:
        disk = self.disk_gbps is not None
        for name, optional in (("ram_gbps", False), ("disk_gbps", True), ("h2d_gbps", True),
                               ("h2d_pageable_gbps", True), ("vram_gbps", True)):
            _check(name, getattr(self, name), f"{MIN_GBPS:g} to {MAX_GBPS:g} GB/s", lambda v, o=optional: (
                (v is None and o) or (type(v) in (int, float) and MIN_GBPS <= v <= MAX_GBPS)))
        _check("disk_chunk", self.disk_chunk, f"a multiple of {RECORD_ALIGN} bytes up to 1 GiB, 0 without a disk",
               lambda v: type(v) is int and 0 <= v <= GIB and v % RECORD_ALIGN == 0 and bool(v) == disk)
        _check("disk_depth", self.disk_depth, "1 to 1024 threads, 0 without a disk",
               lambda v: type(v) is int and 0 <= v <= 1024 and bool(v) == disk)
        _check("disk_direct", self.disk_direct, "true or false", lambda v: type(v) is bool and (disk or not v))
        _check("measured", self.measured, "YYYY-MM-DD", json_cache.is_date)


def _check(name: str, value: object, want: str, fits: Callable[..., bool]) -> None:
    if not fits(value):
        raise ConfigError(f"{name}: got {value!r:.40}, want {want}")


def measure(disk: DiskReport | None, *, today: date, ram_bytes: int | None = None, seconds: float = 2.0,
            say: Callable[[str], None]) -> Bandwidths:
    """RAM and GPU measured now, for at most `seconds` each, joined with what measure_disk found."""
    ram = _rounded(measure_ram(nbytes=ram_bytes, seconds=seconds, say=say))
    copies = measure_h2d(seconds=seconds, say=say)
    pinned, pageable = (_rounded(copies[0]), _rounded(copies[1])) if copies else (None, None)
    within = measure_vram(seconds=seconds, say=say)
    vram = None if within is None else _rounded(within)
    if disk is None:
        return Bandwidths(ram, None, 0, 0, False, pinned, pageable, today.isoformat(), vram)
    return Bandwidths(ram, _rounded(disk.best.gbps), disk.best.chunk, disk.best.depth, disk.direct, pinned, pageable,
                      today.isoformat(), vram)


def measure_ram(threads: int | None = None, *, nbytes: int | None = None, repeats: int = 7, seconds: float = 2.0,
                say: Callable[[str], None], clock: Callable[[], float] = time.perf_counter) -> float:
    """GB/s at which `threads` (default: the physical cores) read a buffer of `nbytes`, the median of at most
    `repeats` passes within `seconds`.

    The buffer defaults to 512 MiB, or 4 times the last-level cache where that is more, and to a quarter of
    the available memory where that is less; a buffer of less than 4 caches is said to be so. A pass is
    torch's sum of 64-bit floats, one addition for 8 bytes: as fast as a C loop that only reads (31 to 34
    GB/s in the same minute on two Zen 4 cores), where integer sums are 20 times slower. DoesNotFit
    where the memory is not there.
    """
    cache = last_level_cache()
    if nbytes is None:
        nbytes = min(max(512 * MIB, 4 * cache), memory().available // 4)
    nbytes = max(MIB, nbytes // MIB * MIB)
    if nbytes < 4 * cache:
        say(f"RAM measured over {format_bytes(nbytes)} with {format_bytes(cache)} of cache: the figure is too high")
    try:
        buffer = anonymous_memory(nbytes)
    except OSError as e:
        raise DoesNotFit(f"{format_bytes(nbytes)} cannot be allocated to measure RAM: {e.strerror}",
                         "free some memory") from None
    numbers = torch.frombuffer(buffer, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or compute_cores())
    try:
        numbers.fill_(1.0)  # written, or every page would be the one page of zeros, which is in the cache
        return nbytes / _median_seconds(numbers.sum, repeats, seconds, clock) / 1e9
    finally:
        torch.set_num_threads(before)


def measure_h2d(*, nbytes: int = 256 * MIB, repeats: int = 7, seconds: float = 2.0, say: Callable[[str], None],
                clock: Callable[[], float] = time.perf_counter) -> tuple[float, float] | None:
    """GB/s of copies of `nbytes` to the current GPU from (pinned, pageable) memory; None without a GPU, or,
    said, where it or the RAM has no room."""
    if not torch.cuda.is_available():
        return None
    found = []
    try:
        target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        for pinned in (True, False):
            source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).fill_(1)
            found.append(measure_copies(source, target, repeats=repeats, seconds=seconds, clock=clock))
    except RuntimeError as e:  # torch's out-of-memory errors are RuntimeErrors
        say(f"copies to the GPU were not measured: {str(e).splitlines()[0]}")
        return None
    return found[0], found[1]


def measure_copies(source: torch.Tensor, target: torch.Tensor, *, repeats: int = 7, seconds: float = 2.0,
                   clock: Callable[[], float] = time.perf_counter) -> float:
    """GB/s of copies of `source` to `target`, equal in shape and dtype, wherever each is: the bytes of one of them over
    the median time."""

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        if target.is_cuda:
            torch.cuda.synchronize(target.device)

    return source.nbytes / _median_seconds(copy, repeats, seconds, clock) / 1e9


def measure_vram(*, nbytes: int = 512 * MIB, repeats: int = 7, seconds: float = 2.0, say: Callable[[str], None],
                 clock: Callable[[], float] = time.perf_counter) -> float | None:
    """GB/s that copies of `nbytes`, larger than any cache, within the current GPU's memory read and write, COPIES to
    each time the host waits, so that the launch does not count; None without a GPU, or, said, where it has no room."""
    if not torch.cuda.is_available():
        return None
    try:
        source, target = (torch.empty(nbytes, dtype=torch.uint8, device="cuda").fill_(1) for _ in range(2))

        def copy() -> None:
            for _ in range(COPIES):
                target.copy_(source)
            torch.cuda.synchronize()

        return 2 * COPIES * nbytes / _median_seconds(copy, repeats, seconds, clock) / 1e9
    except RuntimeError as e:
        say(f"the GPU's memory was not measured: {str(e).splitlines()[0]}")
        return None


def _median_seconds(work: Callable[[], object], repeats: int, seconds: float, clock: Callable[[], float]) -> float:
    """Of at least one call after a first that does not count, until `repeats` or `seconds` are used up."""
    work()
    took: list[float] = []
    start = clock()
    while len(took) < repeats and (not took or clock() - start < seconds):
        before = clock()
        work()
        took.append(max(clock() - before, 1e-9))
    return statistics.median(took)


def _rounded(gbps: float) -> float:
    """To three digits: more would claim what a measurement of seconds does not know."""
    return float(f"{gbps:.3g}")


def save(bandwidths: Bandwidths, path: Path) -> None:
    """Write `path`, whole or not at all; QmixError where that fails."""
    json_cache.save(path, FORMAT, VERSION, asdict(bandwidths))


def load(path: Path, say: Callable[[str], None]) -> Bandwidths | None:
    """What save wrote; None where there is no such file, or, said in one line, where it is not one of ours."""
    return json_cache.load(path, FORMAT, VERSION, _made, "qmix doctor --bandwidth", say)


def _made(values: dict[str, Any]) -> Bandwidths:
    """vram_gbps is younger than the rest: files of before lack it."""
    if {"vram_gbps": None, **values}.keys() != {field.name for field in fields(Bandwidths)}:
        raise ValueError("its fields are not those of this version")
    return Bandwidths(**values)
