"""Memory: how much this process may take, and how much it has taken.

The limit is the smallest of the machine's memory and the limits of every cgroup above the process (version 1, or 2 with
memory.high). Page cache counts as free memory, in a cgroup as on the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


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

    limit: in version 2 the lower of memory.max and memory.high, above which the kernel throttles a process instead
    of killing it. used excludes page cache of files, active or not: the kernel drops both lists before it refuses
    memory, and a file that was read twice is on the active one. Levels without a limit are left out.
    """
    found = []
    for v2, level in cgroup_levels("memory", root):
        bounds = ("memory.max", "memory.high") if v2 else ("memory.limit_in_bytes",)
        limits = [int(text) for name in bounds if (text := read_text(level / name).strip()).isdigit()]
        used = read_text(level / ("memory.current" if v2 else "memory.usage_in_bytes")).strip()
        if limits and used.isdigit():
            found.append((min(limits), max(0, int(used) - _file_cache(level))))
    return found


def _file_cache(level: Path) -> int:
    """Bytes of page cache on both lists, with the groups below (which version 1 counts apart, as total_)."""
    rows = (line.split() for line in read_text(level / "memory.stat").splitlines())
    stat = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file"))


def cgroup_levels(controller: str, root: Path = Path("/")) -> Iterator[tuple[bool, Path]]:
    """(whether it is version 2, folder) of this process's cgroup for `controller` and each one above it."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        v2 = controllers == ""
        if not v2 and controller not in controllers.split(","):
            continue
        base = root / ("sys/fs/cgroup" if v2 else f"sys/fs/cgroup/{controller}")
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(base):
                break
            yield v2, level


def resident_bytes(root: Path = Path("/")) -> int:
    """Bytes of RAM this process holds now (VmRSS; Linux counts it per core, give or take 2 MiB)."""
    return _status("VmRSS", root) or psutil.Process().memory_info().rss


def peak_bytes(root: Path = Path("/")) -> int:
    """The most bytes of RAM this process has held so far (VmHWM). Elsewhere than Linux what psutil knows:
    the peak on Windows, the bytes held now on macOS."""
    info = psutil.Process().memory_info
    return _status("VmHWM", root) or getattr(info(), "peak_wset", info().rss)


def reset_peak(root: Path = Path("/")) -> None:
    """Let peak_bytes start anew from what is held now; where the system cannot, it goes on as it was."""
    with contextlib.suppress(OSError):
        (root / "proc/self/clear_refs").write_text("5")  # proc(5): 5 resets VmHWM, and nothing else


def _status(key: str, root: Path) -> int:
    """Bytes of a line of /proc/self/status, as in "VmRSS:   1234 kB"; 0 where there is none."""
    found = re.search(rf"^{key}:\s*(\d+) kB$", read_text(root / "proc/self/status"), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def is_wsl(root: Path = Path("/")) -> bool:
    """Whether Windows runs this Linux."""
    return "microsoft" in read_text(root / "proc/sys/kernel/osrelease").lower()


def hugepages(root: Path = Path("/")) -> str:
    """Transparent huge pages: "always", "madvise" or "never"; "unknown" where the system has no such setting."""
    found = re.search(r"\[(\w+)\]", read_text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return found[1] if found else "unknown"


def anonymous_memory(nbytes: int) -> mmap.mmap:
    """`nbytes` of page-aligned memory, in huge pages where the system has them (others refuse, and small ones
    will do); not touched yet. OSError where there is none left.

    Private, which Python's default for mmap is not: shared memory gets no huge pages from MADV_HUGEPAGE, and a
    direct read into small ones is cut into requests of half a MiB, at half the speed.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, nbytes)
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def prefer_huge_pages(address: int, nbytes: int) -> None:
    """Ask for huge pages for memory of this process that has not been touched yet: with small ones, a long read waits
    for addresses (here a fifth of the time). Where the system has none, small ones will do."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (address + nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), mmap.MADV_HUGEPAGE)


def memlock_limit() -> int | None:
    """Bytes this process may lock in RAM (ulimit -l); None where there is no limit."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def read_text(path: Path) -> str:
    """A small text file of the system's; "" where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
