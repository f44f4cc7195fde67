"""Page-locks a pool of slots, so that copies to the GPU run at the bus's full rate while the host works on.

CUDA registers memory that exists already (torch's own pinned allocator would round each slot up to a power of two).
The pool is registered in pieces, each some whole slots of at most PIECE bytes. A system with a limit, such as WSL near
half of the RAM or far earlier, then refuses one piece and not everything. A copy from memory that is not page-locked
still works: the driver copies through a buffer of its own, at a fraction of the rate.

torch.cuda.cudart().cudaHostRegister returns an error code and does not raise. The CUDA runtime keeps such an error
until somebody asks for the last one. The next kernel launch does ask, and would fail with it. So after a refusal a
kernel is launched only to clear the error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from qmix.sizes import format_bytes

PIECE = 2**30  # bytes of a piece, at most, but for a slot that is larger
PAGE = 4096

Register = Callable[[int, int], None]
Unregister = Callable[[int], None]


def _register(address: int, nbytes: int) -> None:
    """Page-lock that memory for the current GPU. RuntimeError where the driver refuses."""
    code = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
    try:
        torch.cuda.check_error(code)
    except RuntimeError:
        with suppress(RuntimeError):  # the same error again; taken note of now, it is over
            torch.zeros(1, device="cuda").add_(1)
        raise


def _unregister(address: int) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


class Pinned:
    """What of a pool is page-locked: its first `slots` slots, `nbytes` bytes. Close it when no copy is on its way and
    before the pool's memory goes."""

    def __init__(self, pool: Tensor, unregister: Unregister):
        self._pool: Tensor | None = pool  # its memory stays while it is registered
        self._unregister = unregister
        self._pieces: list[int] = []  # addresses
        self.slots = self.nbytes = 0

    def add(self, address: int, slots: int, nbytes: int) -> None:
        self._pieces.append(address)
        self.slots += slots
        self.nbytes += nbytes

    def close(self) -> None:
        """Give the pages back to the system's paging, the last ones first."""
        while self._pieces:
            with suppress(RuntimeError):  # of a GPU that has failed: its context goes, and this with it
                self._unregister(self._pieces.pop())
        self._pool = None
        self.slots = self.nbytes = 0


def pin_pool(pool: Tensor, limit: int, say: Callable[[str], None] = lambda line: None, register: Register = _register,
             unregister: Unregister = _unregister) -> Pinned:
    """Page-lock the slots of pool [S, bytes] uint8, contiguous, from the first one on, as many as fit in `limit` bytes.
    After a refusal half as much is tried, down to a slot, whose refusal ends it and is said. register(address, bytes)
    and unregister(address) raise RuntimeError.

    Slots are whole pages, so that no page is in two pieces. Example: slots of 99 MB and a limit of 2.5 GB: pieces of
    10, 10 and 5 slots."""
    count, nbytes = pool.shape
    pinned = Pinned(pool, unregister)
    if not pool.is_contiguous() or nbytes % PAGE or pool.data_ptr() % PAGE:
        raise ValueError("pin_pool: want contiguous slots of whole pages")
    left, step = min(count, limit // max(1, nbytes)), max(1, PIECE // max(1, nbytes))
    while left:
        slots = min(left, step)
        address = pool.data_ptr() + pinned.nbytes
        try:
            register(address, slots * nbytes)
        except RuntimeError as e:
            if slots > 1:  # WSL may allow some hundred MB where it does not allow a GB
                step = slots // 2
                continue
            say(f"page-locked {format_bytes(pinned.nbytes)} of {format_bytes(count * nbytes)} of RAM for the GPU; the "
                f"system refused more ({e}), so copies from the rest are slower")
            break
        pinned.add(address, slots, slots * nbytes)
        left -= slots
    return pinned
