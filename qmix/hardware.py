"""What this machine has: memory that may be used, and cores.

Bytes are what the process may really take: the smaller of the machine's memory and every cgroup
limit (v1 and v2) above it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from qmix.errors import UsageError


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: total that may be used, and what is available now."""

    total: int
    available: int


def memory(root: Path = Path("/")) -> Memory:
    """Memory of this machine within the cgroup's limits. `root` stands for / in tests."""
    system = psutil.virtual_memory()
    limits = [limit for limit in cgroup_limits(root) if limit[0] < system.total]
    total = min([system.total, *(limit for limit, _ in limits)])
    available = min([system.available, *(max(0, limit - used) for limit, used in limits)])
    return Memory(total, available)


def cgroup_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, used) bytes of this process's memory cgroup and each one above it.

    used excludes page cache that the kernel would drop (inactive_file). Unlimited levels are left out.
    """
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        v2 = controllers == ""
        if not v2 and "memory" not in controllers.split(","):
            continue
        base = root / ("sys/fs/cgroup" if v2 else "sys/fs/cgroup/memory")
        names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(base):
                break
            limit, used = _read(level / names[0]).strip(), _read(level / names[1]).strip()
            if limit.isdigit() and used.isdigit():
                stat = dict(row.split() for row in _read(level / "memory.stat").splitlines())
                cache = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
                found.append((int(limit), max(0, int(used) - cache)))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def physical_cores() -> int:
    """Cores this process may run on, hyper-threads counted once; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def check_threads(asked: int) -> int:
    """`asked`, unless it is so many threads that they could only stand in each other's way, or crash the
    libraries that start them: UsageError above 4 for each logical processor, and at least 16."""
    limit = max(16, 4 * (os.cpu_count() or 1))
    if not 1 <= asked <= limit:
        raise UsageError(f"--threads: got {asked}, want 1 to {limit}",
                         f"drop it: this machine's {physical_cores()} cores are the default")
    return asked
