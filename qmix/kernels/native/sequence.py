"""Several calls of the library as one: what a layer does to a token is a dozen of them, and between two calls the
interpreter, whose memory the weights have just driven out of the caches, takes longer than most of the calls.

A sequence is put together once, over tensors that stay, and run for every token. What changes is patched in.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from qmix.kernels.native import jobs
from qmix.kernels.native.loader import levels, library

PRODUCTS, ATTEND, NORM, ROUTE, ROTATE, ROPE_COS_SIN, COMBINE, ADD, EXPERTS, JOIN, BIAS, EXACT, \
    GATE, CONV, DELTA, SCALE = range(16)  # native.h's kinds
_STATE = struct.Struct("@2P")      # what a qmix_conv and a qmix_delta begin with
_ADDRESS = struct.Struct("@P")    # what an addition and a norm begin with: of what they read
# Of a qmix_attention, behind three pointers: keys, values, their scales; behind five more: capacity, begin, end.
_CACHE, _CACHE_AT = struct.Struct("@4P"), struct.calcsize("@3P")
_RANGE, _RANGE_AT = struct.Struct("@3q"), struct.calcsize("@8P")


class CallSequence:
    """Calls in order. activations: native.h's number of what products see; threads: at most so many compute."""

    def __init__(self, level: str, activations: int, threads: int, calls: Sequence[tuple[int, Sequence[bytes] | bytes]],
                 tokens: int = 1):
        """calls: (kind, its jobs, packed: several of a product, else one for all `tokens`; attention takes one token).
        Whoever makes a sequence keeps the tensors that its jobs point to."""
        opened = library()
        assert opened is not None, "no library"
        packed = [(kind, [given] if isinstance(given, bytes) else list(given)) for kind, given in calls]
        sizes = [sum(map(len, parts)) for _, parts in packed]
        self._offsets = [0, *accumulate(sizes)]
        memory = ctypes.create_string_buffer(b"".join(b"".join(parts) for _, parts in packed), self._offsets[-1])
        self._jobs = memoryview(memory).cast("B")
        start = ctypes.addressof(memory)
        listed = [jobs.CALL.pack(start + at, kind, len(parts) if kind == PRODUCTS else tokens)
                  for at, (kind, parts) in zip(self._offsets, packed, strict=False)]
        self._calls = ctypes.create_string_buffer(b"".join(listed))
        self._first, self._count = ctypes.addressof(self._calls), len(listed)
        self._level, self._activations, self._threads = levels()[level], activations, threads
        self._run = opened.qmix_sequence

    def patch(self, call: int, job: bytes) -> None:
        """Another job for a call that has one, or for the first of several."""
        at = self._offsets[call]
        self._jobs[at:at + len(job)] = job

    def patch_source(self, call: int, address: int) -> None:
        """What an addition adds, or a norm norms."""
        _ADDRESS.pack_into(self._jobs, self._offsets[call], address)

    def patch_cache(self, call: int, addresses: tuple[int, int, int, int], capacity: int, begin: int, end: int) -> None:
        """Which cache attention keeps its new vectors in and reads, and which positions of it."""
        at = self._offsets[call]
        _CACHE.pack_into(self._jobs, at + _CACHE_AT, *addresses)
        _RANGE.pack_into(self._jobs, at + _RANGE_AT, capacity, begin, end)

    def patch_state(self, call: int, now: int, after: int) -> None:
        """Where a convolution or a delta rule reads its state, and where it writes the next one."""
        _STATE.pack_into(self._jobs, self._offsets[call], now, after)

    def run(self, begin: int = 0, end: int | None = None) -> int | None:
        """Calls [begin, end), all of them if not said otherwise. None; or the number of the first call whose experts
        have records that are not in memory: neither it nor those after it were made."""
        last = self._count if end is None else end
        code = self._run(self._level, self._activations, self._first + begin * jobs.CALL.size, last - begin,
                         self._threads)
        if code < 0:
            raise MemoryError("no memory for the activations of a layer")
        return begin + code - 1 if code else None


def addition(x: Tensor, y: Tensor) -> bytes:
    """y += x, both [1, H] fp32, contiguous."""
    return jobs.ADDITION.pack(x.data_ptr(), y.data_ptr(), y.shape[1])
