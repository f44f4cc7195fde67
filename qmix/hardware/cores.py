"""The processor: cores that this process may use, what limits them, caches and instruction sets.

`root` stands for / in tests.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Set
from pathlib import Path
from types import MappingProxyType

import psutil

from qmix.errors import UsageError
from qmix.hardware.memory import cgroup_levels, read_text

# What /proc/cpuinfo calls the instructions that decide which kernels run, on x86 and on ARM.
INSTRUCTIONS: Mapping[str, frozenset[str]] = MappingProxyType({
    "avx2": frozenset({"avx2"}),
    "avx512": frozenset({"avx512f"}),
    "vnni": frozenset({"avx512_vnni", "avx_vnni"}),
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "dotprod": frozenset({"asimddp"}),
    "i8mm": frozenset({"i8mm"}),
})


def physical_cores(root: Path = Path("/"), allowed: Set[int] | None = None) -> int:
    """Cores this process may run on, hyper-threads counted once; at least 1. Of a processor with two kinds of cores
    (Intel's since Alder Lake) only the performance cores: with them memory is read as fast as it can be, and they would
    wait for the slow ones. allowed: numbers of the logical processors, by default those of this process."""
    if allowed is None and hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    if allowed and (fast := allowed & _numbers(read_text(root / "sys/devices/cpu_core/cpus"))):
        topology = root / "sys/devices/system/cpu"
        return len({tuple(read_text(topology / f"cpu{i}/topology" / name).strip() or str(i)
                          for name in ("physical_package_id", "core_id")) for i in fast})
    count = len(allowed) if allowed else os.cpu_count() or 1
    return max(1, min(count, psutil.cpu_count(logical=False) or count))


def _numbers(text: str) -> set[int]:
    """A list of processors as Linux writes it: "0-3,8\\n" -> {0, 1, 2, 3, 8}; empty where it is none."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            return set()
        found |= set(range(int(first), int(last or first) + 1))
    return found


def check_threads(asked: int) -> int:
    """`asked`, unless it is so many threads that they could only stand in each other's way, or crash the
    libraries that start them: UsageError above 4 for each logical processor, and at least 16."""
    limit = max(16, 4 * (os.cpu_count() or 1))
    if not 1 <= asked <= limit:
        raise UsageError(f"--threads: got {asked}, want 1 to {limit}",
                         f"drop it: this machine's {physical_cores()} cores are the default")
    return asked


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the tightest cgroup above this process grants (1.5 = one and a half);
    None where there is no limit."""
    found = []
    for v2, level in cgroup_levels("cpu", root):
        if v2:
            words = read_text(level / "cpu.max").split()
        else:
            words = [read_text(level / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):  # not "max", "-1" or ""
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def last_level_cache(root: Path = Path("/")) -> int:
    """Bytes of the largest cache level, all its parts together; 0 where the system does not tell."""
    levels: dict[int, dict[str, int]] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, size, shared = (read_text(folder / name).strip() for name in ("level", "size", "shared_cpu_list"))
        if level.isdigit() and re.fullmatch(r"\d+K", size):
            levels.setdefault(int(level), {})[shared] = 1024 * int(size[:-1])
    return sum(levels[max(levels)].values()) if levels else 0


def cpu_model(root: Path = Path("/")) -> str:
    """The processor's name as the system gives it."""
    found = re.search(r"^model name\s*:\s*(\S.*)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown"


def cpu_instructions(root: Path = Path("/")) -> dict[str, bool]:
    """Which of INSTRUCTIONS the processor has; all False where the system does not tell."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return {name: bool(flags & wanted) for name, wanted in INSTRUCTIONS.items()}
