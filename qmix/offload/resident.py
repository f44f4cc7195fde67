"""One token through its K experts, where all experts are in memory: one call of the native kernels.

H hidden, F expert inner, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

import torch
from torch import Tensor

from qmix.formats import Packed
from qmix.kernels.native import Native, Product, jobs
from qmix.kernels.native.sequence import COMBINE, PRODUCTS, Sequence

BOTH, DOWN, SUM = range(3)  # the calls: gate and up of all, down of all, their weighted sum


class ResidentToken:
    """views: (w13, w2) of each slot. What is said of an expert is put together once for each rank."""

    def __init__(self, native: Native, views: Several[tuple[Packed, Packed]], top_k: int):
        self._native = native
        self._views = views
        self._x = torch.empty(0)
        self._known: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        w13, w2 = views[0]
        self._between = torch.empty(top_k, w13.spec.rows // 2)
        self._rows = torch.empty(1, top_k, w2.spec.rows)
        empty = [bytes(jobs.PRODUCT.size)] * top_k
        self._sequence = Sequence(native.level, native.code, native.threads,
                                  [(PRODUCTS, empty), (PRODUCTS, empty), (COMBINE, bytes(jobs.COMBINE.size))])

    def __call__(self, slots: Several[int], x: Tensor, weights: Tensor) -> Tensor:
        """x [1, H], weights [1, K] fp32 contiguous, slots of the K experts by rank -> [1, H] fp32. The jobs are kept as
        long as x is the same tensor."""
        if x is not self._x:
            self._x = x
            self._known.clear()
        pairs = [self._known.get(key) or self._jobs(*key) for key in zip(slots, range(len(slots)), strict=True)]
        out = torch.empty(1, self._rows.shape[2])
        self._sequence.patch(BOTH, b"".join([first for first, _ in pairs]))
        self._sequence.patch(DOWN, b"".join([second for _, second in pairs]))
        self._sequence.patch(SUM, jobs.combine(self._rows, weights, out))
        self._sequence.run()
        return out

    def _jobs(self, slot: int, rank: int) -> tuple[bytes, bytes]:
        w13, w2 = self._views[slot]
        between = self._between[rank:rank + 1]
        pair = (self._native.job(Product(self._x, w13, between, gated=True)),
                self._native.job(Product(between, w2, self._rows[:, rank])))
        self._known[slot, rank] = pair
        return pair
