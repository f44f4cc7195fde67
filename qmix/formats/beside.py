"""q4_k+q6_k and the like: gate and up of an expert side by side, each in a format of ggml's of its own
(qmix/formats/carried.py).

Tensors   gate.qweight, gate.scales, up.qweight, up.scales: of a [F, K] matrix of that format each
Sizes     those of both

F expert inner, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.formats import carried
from qmix.formats.packed import Packed, gather
from qmix.sizes import HALVES, MatrixSpec


@dataclass(frozen=True, slots=True)
class Blocks:
    """Gate and up as a GGUF file has them, of two types."""

    gate: carried.Blocks
    up: carried.Blocks

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """[2F, K], decoded as ggml does it, gate above up."""
        return torch.cat((self.gate.numbers(dtype), self.up.numbers(dtype)))


def carry(blocks: Blocks, spec: MatrixSpec) -> Packed:
    """The same numbers in qmix's layout, without the bias. blocks: of the formats and shapes of spec's halves."""
    halves = [carried.carry(part, half) for part, half in zip((blocks.gate, blocks.up), spec.halves, strict=True)]
    return Packed.of(spec.without_bias, {f"{part}.{name}": tensor for part, half in zip(HALVES, halves, strict=True)
                                         for name, tensor in half.tensors.items()}, spec.format)


def tiles(packed: Packed) -> Iterator[tuple[int, Tensor]]:
    """Decode tile by tile: (first logical row, fp32 [n, K]), padding removed, gate before up."""
    first = 0
    for half in packed.halves:
        for start, tile in carried.tiles(half):
            yield first + start, tile
        first += half.spec.rows


def unpack(packed: Packed) -> Tensor:
    """The whole matrix, fp32 [2F, K]."""
    return gather(packed.spec, tiles(packed))
