"""What the C library does with memory that is freed: here, it keeps some for the next layer.

A prompt's pass takes and frees a few MiB for each operation of each layer, at its largest 32 MiB. glibc gives such
memory back to the system at once, which clears each page again before the next operation may have it: a fifth of the
time of a prompt of Qwen3's shapes (512 tokens, 2 threads). What is kept was in the process's budget while it was used.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

LARGEST = 64 * 2**20  # bytes of an allocation that may be kept; larger ones are mapped and unmapped each
KEPT = 128 * 2**20  # bytes that may lie free at the end of the heap

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
BY_HAND = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


@cache
def keep_freed_memory() -> bool:
    """Let malloc keep up to KEPT bytes of what is freed. Once a process; False, and nothing is changed, where the C
    library is not glibc or the environment sets this (mallopt(3))."""
    if any(name in os.environ for name in BY_HAND) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - an AttributeError says that this is another C library
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
