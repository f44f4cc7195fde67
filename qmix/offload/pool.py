"""Memory for a tier's slots: allocated once, touched at once, on page boundaries.

Anonymous private memory with huge pages where the kernel gives them: one page-table entry then covers 2 MiB
of weights that a kernel streams through. Every page is touched here, so that a budget that cannot be kept
fails now and not in the middle of an answer.
"""

from __future__ import annotations

import errno
import mmap

import torch
from torch import Tensor

from qmix.errors import DoesNotFit
from qmix.hardware.memory import anonymous_memory
from qmix.sizes import format_bytes

MADV_POPULATE_WRITE = 23  # Linux 5.14: fault all pages in, without a loop of ours
PAGE = 4096


def slot_pool(slots: int, nbytes: int) -> Tensor:
    """[slots, nbytes] uint8, the first byte on a 4096-byte boundary (torch.empty aligns to 64 only).
    DoesNotFit where the system does not give that much memory."""
    size = max(PAGE, slots * nbytes)
    try:
        memory = anonymous_memory(size)
        pool = torch.frombuffer(memory, dtype=torch.uint8)
        _touch(memory, pool)
    except (OSError, MemoryError) as e:
        raise DoesNotFit(f"the system gave no {format_bytes(size)} for {slots} expert slots ({e})",
                         "choose a smaller --ram, or close other programs") from None
    return pool[:slots * nbytes].view(slots, nbytes)


def _touch(memory: mmap.mmap, pool: Tensor) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(MADV_POPULATE_WRITE)
            return
        except OSError as e:
            if e.errno == errno.ENOMEM:  # not to be had, and a loop that touches page by page would be killed
                raise
    pool[::PAGE] = 0
