"""The kernel of last resort: decode a tile of rows, multiply, next tile. Correct for every format on every
machine, and what the others are tested against when a process starts; slow, because elementwise
decoding is.

T tokens, N padded rows, K padded columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.formats import tiles
from qmix.formats.packed import Packed, row_tiles

CHUNK = 16  # tokens multiplied at once


def packed_linear(x: Tensor, m: Packed) -> Tensor:
    """In place of torch's packed int4 and int8 products: operand and result rounded to bf16, as there."""
    return linear(x.to(torch.bfloat16), m).to(x.dtype)


def linear(x: Tensor, m: Packed) -> Tensor:
    """x [T, cols] -> [T, padded_rows] in x's dtype: products and sums in fp32, gaps of the padding zero.

    Tokens go in chunks of a fixed 16 (the last one filled up), so that a row's bits do not
    depend on how many tokens came with it: BLAS picks another order for one row than for many.
    """
    tokens = len(x)
    padded = -(-tokens // CHUNK) * CHUNK
    wide = torch.zeros(padded, m.spec.cols)
    wide[:tokens] = x
    y = torch.zeros(padded, m.spec.padded_rows)
    for (_, row, rows), (_, tile) in zip(row_tiles(m.spec), tiles(m), strict=True):
        weight = tile.T
        for start in range(0, padded, CHUNK):
            y[start:start + CHUNK, row:row + rows] = wide[start:start + CHUNK] @ weight
    return y[:tokens].to(x.dtype)
