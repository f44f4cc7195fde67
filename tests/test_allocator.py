"""What malloc keeps of freed memory, counted by the pages that the system gives to a real process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qmix.hardware import allocator

CHILD = """
import ctypes, resource, sys
from qmix.hardware import allocator
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def use(size):
    memory = libc.malloc(size)
    ctypes.memset(memory, 1, size)
    libc.free(memory)
def faults(size, times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        use(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(allocator.keep_freed_memory())
use(32 << 20)
print(faults(32 << 20, 8), faults(8 << 20, 8), faults(allocator.LARGEST + (1 << 20), 2))
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * resource.getpagesize())
"""


def child(**environment: str) -> list[str]:
    """What the child prints: [whether memory is kept, page faults of three series of allocations, resident bytes]."""
    names = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", CHILD], env=names, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_that_was_freed_is_used_again_and_large_pieces_go_back() -> None:
    kept, passes, small, large, resident = child()
    if kept == "False":
        pytest.skip("no glibc, or the environment sets malloc's thresholds")
    pages = (32 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(passes) < pages / 8, "pages of eight allocations of 32 MiB were new"
    assert int(small) < pages / 8
    assert int(large) > 0, "an allocation above LARGEST was kept"
    assert int(resident) < allocator.KEPT + allocator.LARGEST


def test_a_user_who_sets_the_thresholds_keeps_them() -> None:
    assert child(MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
    assert child(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=131072")[0] == "False"
