"""What an expert in a slot gives for the tokens that chose it.

T tokens, K experts per token, H hidden, F expert inner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from qmix.config import ExpertKey
from qmix.formats import Packed
from qmix.kernels.native import NativeProducts, Product
from qmix.kernels.table import KernelTable
from qmix.offload.groups import Group, Piece
from qmix.offload.tiers import Tier


class ExpertProducts:
    """views: (w13, w2) of each slot of `tier`; native: what computes them, None for the torch kernels of `kernels`."""

    def __init__(self, kernels: KernelTable, native: NativeProducts | None, tier: Tier,
                 views: Sequence[tuple[Packed, Packed]]):
        self._kernels, self._native, self._tier, self._views = kernels, native, tier, views

    def one(self, key: ExpertKey, x: Tensor, group: Group, rows: Tensor, arrived: Callable[[], None]) -> None:
        """One expert for its tokens, x [T, H], into its rows [T, K, H] fp32. w13 is there; `arrived` waits for w2."""
        w13, w2 = self._views[self._tier.slot(key)]
        flat = rows.view(-1, rows.shape[2])
        for tokens, places in group.chunks():
            if self._native is None:
                hidden = self._kernels.gated(x if tokens is None else x[tokens], w13)
                arrived()
                flat[places] = self._kernels.linear(hidden, w2).float()
            else:  # which picks the tokens' rows and puts the results in their places
                between = torch.empty(len(x) if tokens is None else len(tokens), w13.spec.rows // 2)
                self._native.run([Product(x, w13, between, x_rows=tokens, gated=True)])
                arrived()
                self._native.run([Product(between, w2, flat, y_rows=places)])

    def several(self, layer: int, x: Tensor, pieces: Iterable[Piece], rows: Tensor) -> None:
        """Experts that are here, each for its tokens, by one call of the native kernels for each half. Where they are
        small the threads would else wait for each other as long as they compute."""
        assert self._native is not None
        run_together(self._native, x, [(self._views[self._tier.slot(ExpertKey(layer, expert))], tokens, places)
                                       for expert, tokens, places in pieces], rows)


def run_together(native: NativeProducts, x: Tensor, some: Iterable[tuple[tuple[Packed, Packed], Tensor | None, Tensor]],
                 rows: Tensor) -> None:
    """Experts, each (w13, w2) for some rows of x (None: the only one), into their places among the T * K of `rows`
    [T, K, H] fp32: one call for each half."""
    flat = rows.view(-1, rows.shape[2])
    first, second = [], []
    for (w13, w2), tokens, places in some:
        between = torch.empty(len(places), w13.spec.rows // 2)
        first.append(Product(x, w13, between, x_rows=tokens, gated=True))
        second.append(Product(between, w2, flat, y_rows=places))
    native.run(first)
    native.run(second)
