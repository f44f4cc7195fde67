"""What matrices were given when a model read a text: the sums that gptq chooses codes by.

    products = Products(rows)
    for each batch of sequences:
        for each sequence, in any thread:  energy = products.keep(begin, names, x, outs), product by product
        products.add_batch(rows, pool)
    products.inputs() -> {"layers.3.attention.q": Inputs, ...}

Sums are taken of a batch at once, so their bits depend on the batch's size, never on the order in which its sequences
were computed.

n inputs, N rows and K columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from threading import Lock

import torch
from torch import Tensor

from qmix.quantize.gptq import Factor, Moments


class Sums:
    """Moments until the first one asks for their factor."""

    def __init__(self, moments: Moments):
        self._now: Moments | Factor = moments

    def factor(self, pool: Executor | None) -> Factor:
        if isinstance(self._now, Moments):
            self._now = self._now.factor(pool)
        return self._now


class Inputs:
    """What a matrix was given. count: inputs, n; energy: sum of its squared outputs, |X W^T|^2. Those of matrices that
    read the same share `sums`."""

    def __init__(self, sums: Sums, count: int, energy: float):
        self._sums = sums
        self.count = count
        self.energy = energy

    def factor(self, pool: Executor | None) -> Factor:
        """S of the inputs, damped and factored, in the memory of their sums; DegenerateInputs where all were zero."""
        return self._sums.factor(pool)


class Products:
    """The inputs of every product of a run of Ops over all sequences, a batch of at most `rows` tokens at a time.
    Matrices that are multiplied in one call read the same, and share their sums."""

    def __init__(self, rows: int):
        self._rows = rows
        self._batch: dict[tuple[str, ...], Tensor] = {}  # what the sequences of this batch read, fp32 [rows, K]
        self._moments: dict[tuple[str, ...], Moments] = {}
        self._energy: dict[str, float] = {}
        self._count = 0
        self._lock = Lock()

    def keep(self, begin: int, names: tuple[str, ...], x: Tensor, outs: Sequence[Tensor]) -> dict[str, float]:
        """x [n, K] fp32, rows begin, begin + 1, ... of the batch, was multiplied by the matrices `names`; the energy of
        each result, which the caller gives to add_batch."""
        with self._lock:
            batch = self._batch.get(names)
            if batch is None:
                batch = self._batch[names] = torch.empty(self._rows, x.shape[1])
                self._moments[names] = Moments(x.shape[1])
        batch[begin:begin + len(x)] = x
        return {name: squares(out) for name, out in zip(names, outs, strict=True)}

    def add_batch(self, rows: int, energies: Sequence[Mapping[str, float]], pool: Executor | None) -> None:
        """Sum up a batch of so many tokens; energies: of its sequences, in order."""
        for found in energies:
            for name, value in found.items():
                self._energy[name] = self._energy.get(name, 0.0) + value
        for names, batch in self._batch.items():
            self._moments[names].add(batch[:rows], pool)
        self._count += rows

    def inputs(self) -> dict[str, Inputs]:
        """By canonical name, after the last batch."""
        found: dict[str, Inputs] = {}
        for names, moments in self._moments.items():
            sums = Sums(moments)
            found |= {name: Inputs(sums, self._count, self._energy[name]) for name in names}
        return found


def squares(x: Tensor) -> float:
    """The sum of all squares, in fp64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2
