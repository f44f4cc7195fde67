"""plain: unquantized weights, bf16, fp16 or fp32 (`keep`): the quality reference.

Formula   w itself
weight    bf16 | fp16 | fp32 [N, K], row after row, no padding
Sizes     2 or 4 bytes a weight
Source    the checkpoint's own bytes where the dtype is the checkpoint's
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qmix.formats.packed import TORCH_DTYPES, Packed, gather, row_tiles
from qmix.sizes import MatrixSpec


def pack(weight: Tensor, spec: MatrixSpec) -> Packed:
    """`weight` [rows, cols] in the spec's dtype; shares memory with it where nothing has to change."""
    dtype = TORCH_DTYPES[spec.tensors[0].dtype]
    return Packed.of(spec, {"weight": weight.to(dtype).contiguous()}, "plain.pack")


def tiles(packed: Packed, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, Tensor]]:
    """Tile by tile: (first logical row, `dtype` [n, cols])."""
    for start, row, rows in row_tiles(packed.spec, dtype.itemsize):
        yield start, packed["weight"][row:row + rows].to(dtype)


def unpack(packed: Packed) -> Tensor:
    """The whole matrix, fp32 [rows, cols]."""
    return gather(packed.spec, tiles(packed))
