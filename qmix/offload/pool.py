"""Memory for a tier's slots: allocated once, touched at once, on page boundaries.

The memory is anonymous and private, with huge pages if the kernel gives them: one page-table entry then covers 2 MiB of
weights that a kernel streams through. Every page is touched here, so that a budget that cannot be kept fails now and
not in the middle of an answer. Touching takes from a tenth of a second to seconds for a GB, in a virtual machine that
must get its pages from the host. So all cores do it, and reads into the slots may begin meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from qmix.errors import DoesNotFit
from qmix.hardware import physical_cores
from qmix.hardware.memory import anonymous_memory
from qmix.sizes import format_bytes

MADV_POPULATE_WRITE = 23  # Linux 5.14: fault all pages in, without a loop of ours
PAGE = 4096
PIECE = 8 * 2**20  # bytes that a thread touches at a time; whoever maps memory, as a new thread does, waits so long


def slot_pool(slots: int, nbytes: int) -> Tensor:
    """[slots, nbytes] uint8, the first byte on a 4096-byte boundary (torch.empty aligns to 64 only).
    DoesNotFit where the system does not give that much memory."""
    pool, touching = begin_pool(slots, nbytes)
    touching.wait()
    return pool


class Touching:
    """Threads that touch the rest of a pool: they change nothing there, so readers may fill slots meanwhile, which
    belong to them. They hold the memory. Wait, or close, which drops what has not begun."""

    def __init__(self, what: str, workers: ThreadPoolExecutor, parts: list[Future[None]]):
        self._what = what
        self._workers = workers
        self._parts = parts

    def wait(self) -> None:
        """Until every page has been touched; DoesNotFit where one could not be had."""
        try:
            for part in self._parts:
                part.result()
        except (OSError, MemoryError) as e:
            raise _no_memory(self._what, e) from None
        finally:
            self.close()

    def close(self) -> None:
        self._workers.shutdown(wait=True, cancel_futures=True)


def begin_pool(slots: int, nbytes: int) -> tuple[Tensor, Touching]:
    """slot_pool's tensor, which may be written to already, and what still touches it. DoesNotFit as soon as it is
    known."""
    size = max(PAGE, slots * nbytes)
    what = f"{format_bytes(size)} for {slots} expert slots"
    try:
        memory = anonymous_memory(size)
        pool = torch.frombuffer(memory, dtype=torch.uint8)
        workers, parts = _touch(memory, pool)
    except (OSError, MemoryError) as e:
        raise _no_memory(what, e) from None
    return pool[:slots * nbytes].view(slots, nbytes), Touching(what, workers, parts)


def _no_memory(what: str, why: object) -> DoesNotFit:
    return DoesNotFit(f"the system did not allocate {what} ({why})", "choose a smaller --ram, or close other programs")


def _touch(memory: mmap.mmap, pool: Tensor) -> tuple[ThreadPoolExecutor, list[Future[None]]]:
    """Touch the first piece, and have the others touched: without changing what has been written there meanwhile."""
    start, populate, workers = pool.data_ptr(), _populate(), ThreadPoolExecutor(physical_cores(), "qmix-touch")
    try:
        if populate is None:
            raise OSError(errno.EINVAL, "")
        populate(start, min(PIECE, len(pool)))
    except OSError as e:
        if e.errno == errno.ENOMEM:  # not to be had, and a loop that touches page by page would be killed
            raise
        pool[::PAGE] = 0
        return workers, []
    assert populate is not None
    parts = [workers.submit(_keeping, memory, populate, start + at, min(PIECE, len(pool) - at))
             for at in range(PIECE, len(pool), PIECE)]
    workers.shutdown(wait=False)
    return workers, parts


def _keeping(memory: mmap.mmap, populate: Callable[[int, int], None], start: int, nbytes: int) -> None:
    """populate, with a hold on the memory: whoever asked for it may have given up by now."""
    populate(start, nbytes)


def _populate() -> Callable[[int, int], None] | None:
    """Fault pages in: (address, bytes), OSError. Through ctypes: Python's own madvise keeps the interpreter's lock."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def populate(start: int, nbytes: int) -> None:
        if madvise(start, nbytes, MADV_POPULATE_WRITE):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    return populate
