"""The experts of a prompt's tokens on a device, many experts a call: what each operation does, in torch.

The pairs of a token and one of its experts are sorted by expert and cut into tiles of one expert each, once a layer
(prompt_tiles.py). Then the tiles are computed, those of all experts that are in slots at once, those of others when
their record has come. A tile is always the same tile, so a row has the same bits whenever it is computed.

T tokens, K experts per token, P = T * K pairs, E experts, H hidden, F expert inner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from qmix.kernels.device_ops import ExpertSlots
from qmix.kernels.layer import TORCH
from qmix.kernels.prompt_tiles import SIZES, most_tiles, tile_of, tiles_of_launch
from qmix.kernels.table import KernelTable
from qmix.sizes import RecordLayout


@dataclass(frozen=True, slots=True)
class Tiles:
    """order int32 [count * size]: pairs, in order of expert, -1 for padding; expert_of int32 [count]: of each tile, -1
    for tiles that are not needed, the last ones. Pair p is token p // top_k at rank p % top_k."""

    order: Tensor
    expert_of: Tensor
    size: int
    top_k: int

    @property
    def count(self) -> int:
        return len(self.expert_of)

    def launches(self, slots: ExpertSlots, itemsize: int, among: range | None = None) -> Iterator[range]:
        """The tiles `among`, or all, as many at a time as there is room for between the two products."""
        most = tiles_of_launch(slots.record.w2.cols, itemsize, self.size)
        wanted = range(self.count) if among is None else among
        for first in range(wanted.start, wanted.stop, most):
            yield range(first, min(wanted.stop, first + most))


def computed_many(record: RecordLayout) -> bool:
    """Whether the tiles have its formats: those in blocks of rows. Activations and biases they have all."""
    return record.w13.in_blocks and record.w2.in_blocks


def tiles_by_expert(counts: Sequence[int], size: int) -> list[range]:
    """Of each expert its tiles, where counts [E] are its pairs."""
    ends = list(accumulate(-(-count // size) for count in counts))
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


class PromptExperts(Protocol):
    """TorchPromptExperts has the meaning of each. Nothing asks the host, nor tells it anything."""

    def handles(self, slots: ExpertSlots, dtype: torch.dtype) -> bool: ...

    def sizes(self, device: torch.device) -> tuple[int, ...]: ...

    def sort(self, ids: Tensor, experts: int, size: int = 0) -> Tiles: ...

    def gate_up(self, x: Tensor, slots: ExpertSlots, tiles: Tiles, part: range, table: Tensor,
                slot: int = -1) -> Tensor: ...

    def down(self, inner: Tensor, slots: ExpertSlots, tiles: Tiles, part: range, table: Tensor, rows: Tensor,
             slot: int = -1) -> None: ...

    def combine(self, rows: Tensor, topk_weights: Tensor) -> Tensor: ...


class TorchPromptExperts:
    """Through `kernels`, the CPU's, which must compute rows independently. For the CPU in a device's place."""

    def __init__(self, kernels: KernelTable):
        self._kernels = kernels

    def handles(self, slots: ExpertSlots, dtype: torch.dtype) -> bool:
        """Whether the others have the format of these records, and compute in `dtype`."""
        return computed_many(slots.record)

    def sizes(self, device: torch.device) -> tuple[int, ...]:
        """Tokens of a tile: what `sort` chooses from."""
        return SIZES

    def sort(self, ids: Tensor, experts: int, size: int = 0) -> Tiles:
        """ids [T, K] int64, of `experts` in all; a token has no expert twice. size: tokens of a tile, 0 for what suits
        so many."""
        flat = ids.reshape(-1)
        size = size or tile_of(len(flat), experts)
        found = torch.full((most_tiles(len(flat), experts, size), size), -1, dtype=torch.int32)
        expert_of, by_expert = torch.full((len(found),), -1, dtype=torch.int32), torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=experts).tolist()
        for expert, (own, pairs) in enumerate(zip(tiles_by_expert(counts, size), by_expert.split(counts), strict=True)):
            found[own.start:own.stop].view(-1)[:len(pairs)] = pairs.int()
            expert_of[own.start:own.stop] = expert
        return Tiles(found.view(-1), expert_of, size, ids.shape[1])

    def gate_up(self, x: Tensor, slots: ExpertSlots, tiles: Tiles, part: range, table: Tensor,
                slot: int = -1) -> Tensor:
        """activation(gate(x), up(x)) of the tiles `part`, x [T, H]: [len(part) * size, F] in x's dtype or fp32, for
        `down`. table [E] int32: the slot of each expert in its tier, -1 where it is in none. slot: where it is not -1,
        all of `part` is of the expert in that slot of the tier. Tiles of experts that are in no slot of this slab are
        left out."""
        if slots.views and self._kernels.computes_natively(slots.views[0][0]):
            x = x.float()  # as the native kernels do, which round nothing between the two products
        inner = x.new_empty(len(part) * tiles.size, slots.record.w2.cols)
        for at, pairs, index in self._there(slots, tiles, part, table, slot):
            inner[at:at + len(pairs)] = self._kernels.gated(x[pairs // tiles.top_k], slots.views[index][0])
        return inner

    def down(self, inner: Tensor, slots: ExpertSlots, tiles: Tiles, part: range, table: Tensor, rows: Tensor,
             slot: int = -1) -> None:
        """The second product of the same tiles, into rows [T, K, H] fp32; rows of tiles that are left out stay."""
        flat = rows.view(-1, rows.shape[2])
        for at, pairs, index in self._there(slots, tiles, part, table, slot):
            flat[pairs] = self._kernels.linear(inner[at:at + len(pairs)], slots.views[index][1]).float()

    def combine(self, rows: Tensor, topk_weights: Tensor) -> Tensor:
        """layer.TorchLayerOps.combine, with its bits."""
        return TORCH.combine(rows, topk_weights)

    @staticmethod
    def _there(slots: ExpertSlots, tiles: Tiles, part: range, table: Tensor,
               slot: int) -> Iterator[tuple[int, Tensor, int]]:
        """(its first row in what lies between, its pairs, its slot in the slab) of each tile that is computed."""
        for number, expert in zip(part, tiles.expert_of[part.start:part.stop].tolist(), strict=True):
            index = -1 if expert < 0 else (int(table[expert]) if slot < 0 else slot) - slots.first
            if 0 <= index < len(slots.views):
                pairs = tiles.order[number * tiles.size:(number + 1) * tiles.size].long()
                yield (number - part.start) * tiles.size, pairs[pairs >= 0], index
