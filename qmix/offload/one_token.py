"""One token through some of its K experts at a time, by the native kernels. Where records are small, making tensors for
each of them takes as long as reading it from memory: so a layer's rows lie in memory that stays, and what the library
is told of a product is put together from addresses.

H hidden, F expert inner, K experts per token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from qmix.formats import Packed
from qmix.kernels.native import NativeProducts, jobs
from qmix.kernels.native.products import Layout, layout_of

_FP32 = jobs.TYPES[torch.float32]


class OneToken:
    """views: (w13, w2) of each slot, which stay where they are. rows [1, K, H] fp32: what the experts give, in order of
    rank; those of the token before are overwritten."""

    def __init__(self, native: NativeProducts, views: Sequence[tuple[Packed, Packed]], top_k: int,
                 rows: Tensor | None = None):
        self._native = native
        self._views = views
        self._matrices: list[tuple[Layout, Layout] | None] = [None] * len(views)
        w13, w2 = views[0]
        self._inner, self._hidden = w13.spec.rows // 2, w2.spec.rows
        self._between = torch.empty(top_k, self._inner)
        self.rows = torch.empty(1, top_k, self._hidden) if rows is None else rows
        self._between_at, self._rows_at = self._between.data_ptr(), self.rows.data_ptr()

    def gate_up(self, x: Tensor, some: Collection[tuple[int, int]]) -> None:
        """The first half for some (slot, rank) whose w13 is there. x [1, H] fp32 or bf16, contiguous."""
        at, stride, kind = x.data_ptr(), x.shape[1], jobs.TYPES[x.dtype]
        packed = []
        for slot, rank in some:
            w = self._of(slot)[0]
            packed.append(jobs.PRODUCT.pack(
                w.weight, w.params, w.bias, at, 0, self._between_at + 4 * self._inner * rank, 0, stride, self._inner, 1,
                *w.sizes, *w.layout, True, kind, _FP32, False, *w.activation, *w.up))
        self._native.run_jobs(packed)

    def down(self, some: Collection[tuple[int, int]]) -> None:
        """The second half for those whose first is done: into `rows`."""
        packed = []
        for slot, rank in some:
            w = self._of(slot)[1]
            packed.append(jobs.PRODUCT.pack(
                w.weight, w.params, w.bias, self._between_at + 4 * self._inner * rank, 0,
                self._rows_at + 4 * self._hidden * rank, 0, self._inner, self._hidden, 1, *w.sizes, *w.layout, False,
                _FP32, _FP32, False, *w.activation, *w.up))
        self._native.run_jobs(packed)

    def _of(self, slot: int) -> tuple[Layout, Layout]:
        """What a job says of the matrices in a slot."""
        found = self._matrices[slot]
        if found is None:
            w13, w2 = self._views[slot]
            found = self._matrices[slot] = layout_of(w13), layout_of(w2)
        return found
