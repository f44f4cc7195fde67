"""The processor: cores that this process may use, what limits them, caches and instruction sets.

`root` stands for / in tests.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
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


# A core is fast from this part of the fastest one's speed on: Zen 4c has 0.7 of Zen 4's clock, the small cores of ARM
# at most 0.6 of the largest capacity, and cores of one kind, of which some are favoured, differ by a tenth.
FAST = 0.75


def physical_cores(root: Path = Path("/")) -> int:
    """Cores this process may run on, hyper-threads counted once; at least 1."""
    return len(_cores(root))


def compute_cores(root: Path = Path("/")) -> int:
    """How many threads compute by default: the fast ones of physical_cores, and no more than the cgroup's quota gives
    time for; at least 1. Beside fast cores, slow ones bring little where memory is the limit, and a loop that torch
    divides equally waits for them."""
    cores, quota = _cores(root), cpu_quota(root)
    fast = _fast(cores, root)
    return max(1, len(fast) if quota is None else min(len(fast), int(quota)))


def _allowed() -> list[int]:
    """Logical processors that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _cores(root: Path) -> list[int]:
    """The first logical processor of each core that this process may run on."""
    first: dict[object, int] = {}
    for cpu in _allowed():
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        names = ("core_cpus_list", "thread_siblings_list")  # the older name
        siblings = next(filter(None, (read_text(topology / name).strip() for name in names)), "")
        first.setdefault(siblings or cpu, cpu)
    found = list(first.values())
    known = any(isinstance(siblings, str) for siblings in first)
    return found if known else found[:psutil.cpu_count(logical=False) or len(found)]


def _fast(cores: list[int], root: Path) -> list[int]:
    """Those of `cores` that are no efficiency cores, by the first source that tells: Intel's list of performance cores,
    the capacities of ARM, the highest clocks. All of them where the system does not tell."""
    performance, efficient = (_numbers(read_text(root / f"sys/devices/cpu_{kind}/cpus")) for kind in ("core", "atom"))
    if performance and efficient:
        return [cpu for cpu in cores if cpu in performance] or cores
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        words = [read_text(root / f"sys/devices/system/cpu/cpu{cpu}" / name).strip() for cpu in cores]
        if all(word.isdigit() for word in words):
            speeds = list(map(int, words))
            return [cpu for cpu, speed in zip(cores, speeds, strict=True) if speed >= FAST * max(speeds)]
    return cores


def _numbers(text: str) -> set[int]:
    """"0-3,8" -> {0, 1, 2, 3, 8}"""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return found


def check_threads(asked: int) -> int:
    """`asked`, unless it is so many threads that they could only stand in each other's way, or crash the
    libraries that start them: UsageError above 4 for each logical processor, and at least 16."""
    limit = max(16, 4 * (os.cpu_count() or 1))
    if not 1 <= asked <= limit:
        raise UsageError(f"--threads: got {asked}, want 1 to {limit}",
                         f"drop it: the default here is {compute_cores()}")
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
