"""How many threads compute. This is decided before anything is loaded, by configuration alone, never by a budget or by
what fits, because with some kernels bits depend on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qmix import hardware
from qmix.sizes import MIB

GRAIN = 32768  # elements that torch gives to one thread at least (at::internal::GRAIN_SIZE)
SMALL = MIB // 8  # bytes of a record below which one thread computes


@dataclass(frozen=True, slots=True)
class Threads:
    """asked: of `--threads`, None for the default; record: bytes of one of the store's."""

    asked: int | None
    record: int

    def count(self, beside: bool) -> int:
        """By default hardware.compute_cores. beside: the CPU computes experts beside a GPU: then a core less, at least
        1, since the threads that copy to the GPU must not wait for one. UsageError for a number that makes no sense.

        With experts as small as the demo's, handing out the work costs more than a second thread brings (a prompt:
        5,700 tok/s with two, 10,900 with one), and many times more on a busy machine."""
        if self.asked is not None:
            return hardware.check_threads(self.asked)
        if self.record < SMALL:
            return 1
        return max(1, hardware.compute_cores() - beside)

    def line(self, beside: bool) -> str:
        """What is said of it."""
        count, cores = self.count(beside), hardware.compute_cores()
        found = f"{count} compute thread{'s' if count > 1 else ''}"
        if not beside or cores == 1:
            return found
        if self.asked is None:
            return found + (", one core left for copies to the GPU" if count == cores - 1 else "")
        return found + (", as asked: no core left for copies to the GPU" if count >= cores else "")


def parallel_loop(threads: int) -> None:
    """A loop that torch divides among `threads` threads, of some microseconds."""
    torch.set_num_threads(threads)
    torch.ones(2 * GRAIN * threads).neg_()
