"""How fast a kernel is here: the rate at which it takes weights from memory for one token, and its operations a second
for the tokens of a prompt. For a report of a second or two; benchmarks/cpu_kernels.py measures with more care.

GB/s are decimal, GFLOP/s are 1e9 operations a second; a product and a sum are two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from qmix.config import GROUPED_BITS
from qmix.formats.packed import TORCH_DTYPES, Packed
from qmix.kernels.table import KernelTable
from qmix.sizes import CARRIED, MatrixSpec, with_layout

ROWS, COLS, GROUP = 1024, 4096, 64  # of each matrix
TOKENS = 128  # of a prompt


@dataclass(frozen=True, slots=True)
class Rate:
    """gbps: of weights and their parameters, one token; gflops: with TOKENS tokens."""

    gbps: float
    gflops: float


def measure(table: KernelTable, name: str, block: int, buffer: Tensor, seconds: float = 0.1,
            clock: Callable[[], float] = time.perf_counter) -> Rate:
    """The kernel that `table` has for a format and block (0 for none), twice `seconds` long.

    buffer: random bytes, uint8, the weights of all matrices; several times the last cache, so that they come from
    memory.
    """
    matrices = matrices_in(name, block, buffer)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, COLS, generator=random).bfloat16()
    table.linear(x[:1], matrices[0])  # starts threads
    done, start, turns = 0, clock(), cycle(matrices)
    while not done or clock() - start < seconds:
        table.linear(x[:1], next(turns))
        done += matrices[0].spec.nbytes
    gbps = done / max(clock() - start, 1e-9) / 1e9
    best, start = float("inf"), clock()
    while best == float("inf") or clock() - start < seconds:
        begin = clock()
        table.linear(x, matrices[0])
        best = min(best, max(clock() - begin, 1e-9))
    return Rate(gbps, 2 * TOKENS * ROWS * COLS / best / 1e9)


def matrices_in(name: str, block: int, buffer: Tensor) -> list[Packed]:
    """As many as `buffer` has bytes for, at least one; they share their scales."""
    spec = MatrixSpec(name, ROWS, COLS, group_size=GROUP, block=block) if name in GROUPED_BITS else \
        MatrixSpec(rows=ROWS, cols=COLS, **with_layout(name))
    codes, scales = spec.tensors
    random = torch.Generator().manual_seed(0)
    shared = torch.randint(20, 40, scales.shape, dtype=torch.uint8, generator=random) if name in CARRIED else \
        torch.randint(120, 128, scales.shape, dtype=torch.uint8, generator=random) if name == "mxfp4" else \
        torch.randn(scales.shape, generator=random).bfloat16()
    pieces = buffer[:buffer.numel() // codes.nbytes * codes.nbytes].view(TORCH_DTYPES[codes.dtype])
    return [Packed.of(spec, {codes.name: piece.view(codes.shape), scales.name: shared})
            for piece in pieces.split(codes.nbytes)]
