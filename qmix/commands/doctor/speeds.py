"""How fast the kernels are, beside the rate at which memory can be read: a second or two, so that a report shows a slow
processor at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from qmix.errors import QmixError
from qmix.hardware import compute_cores, memory
from qmix.hardware.bandwidth import measure_ram
from qmix.hardware.cores import last_level_cache
from qmix.kernels import rates
from qmix.kernels.table import KernelTable
from qmix.sizes import MIB

LEAST, MOST = 64 * MIB, 512 * MIB  # bytes of weights
SECONDS = 0.08  # each of two measurements of a kernel


class Speeds:
    """Measures kernels one after the other, all with the same bytes as weights, by as many threads as compute
    by default."""

    def __init__(self, nbytes: int | None = None, seconds: float = SECONDS):
        """nbytes: of weights; by default four times the last cache, within LEAST, MOST and an eighth of the memory
        that is available."""
        if nbytes is None:
            nbytes = min(max(LEAST, 4 * last_level_cache()), MOST, memory().available // 8)
        self._seconds, self._threads = seconds, compute_cores()
        words = torch.empty(max(nbytes, 8 * MIB) // 8, dtype=torch.int64)
        self._buffer = words.random_(generator=torch.Generator().manual_seed(0)).view(torch.uint8)

    def memory(self) -> float | None:
        """GB/s of a bare read of as many bytes; None where there is no memory to measure with."""
        ignored: Callable[[str], None] = lambda line: None  # noqa: E731
        with suppress(QmixError):
            return float(f"{measure_ram(self._threads, nbytes=self._buffer.numel(), seconds=0.3, say=ignored):.3g}")
        return None

    def kernel(self, table: KernelTable, name: str, block: int) -> dict[str, Any]:
        """Columns of the doctor's table of kernels."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        if table.native is not None:
            table.native.threads = self._threads
        try:
            found = rates.measure(table, name, block, self._buffer, self._seconds)
        finally:
            torch.set_num_threads(before)
        return {"gbps_one_token": float(f"{found.gbps:.3g}"),
                f"gflops_{rates.TOKENS}_tokens": float(f"{found.gflops:.3g}")}
