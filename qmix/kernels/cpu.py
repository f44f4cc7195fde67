"""CPU kernels of PyTorch: int4 (int3 and int2 as int4) and int8 through its packed matrix products,
plain weights through linear.

torch's packed ops check little, so only what `Packed.of` has checked may come here. They compute in
bf16 with fp32 sums, and give the same bits for a row whatever the number of rows. `linear` does not:
up to FEW rows are multiplied one by one, so that those of a pass with drafts have the bits that they have alone.

All take x [T, cols] and return [T, padded_rows], gaps between parts included, in x's dtype; but for `decoded_linear`.
T tokens, N padded rows, K padded columns, B rows per block, g group size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.formats import carried, grouped, mxfp4, plain
from qmix.formats.narrow import widen
from qmix.formats.packed import TILE_BYTES, Packed, row_tiles
from qmix.kernels.op import FEW as FEW  # rows that are kept apart

Kernel = Callable[[Tensor, Packed], Tensor]
Tiles = Callable[[Packed, torch.dtype], Iterator[tuple[int, Tensor]]]


def int4_linear(x: Tensor, m: Packed) -> Tensor:
    """torch's int4 product, straight on the stored bytes; for blocks of the size this torch reads."""
    qweight, qparams = m.tensors["qweight"], m.tensors["qparams"]
    n, k = qparams.shape[1], qweight.shape[1]
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(_operand(x, k), qweight.view(n, k // 2), m.spec.group_size,
                                                   qparams)
    return y if x.dtype == torch.bfloat16 else y.to(x.dtype)


def int4_converted(block: int) -> Kernel:
    """torch's int4 product for int3, int2 and stores in the other block size: every call rewrites the codes as
    int4 in blocks of `block` rows, a tile of at most 4 MiB at a time."""

    def linear(x: Tensor, m: Packed) -> Tensor:
        qweight, qparams = m.tensors["qweight"], m.tensors["qparams"]
        blocks, k, _ = qweight.shape
        half, bits = m.spec.block // 2, m.spec.bits
        group, operand = m.spec.group_size, _operand(x, k)
        y = torch.empty(len(x), qparams.shape[1], dtype=torch.bfloat16)
        step = max(1, TILE_BYTES // (k * half))
        step += step % 2
        for start in range(0, blocks, step):
            first, codes = start * 2 * half, widen(qweight[start:start + step], bits)
            params = qparams[:, first:first + len(codes) * 2 * half]
            rows = params.shape[1]
            if rows % block:  # an odd number of 32-row blocks for a torch that reads 64
                codes = torch.cat((codes, codes.new_zeros(1, k, half)))
                params = F.pad(params, (0, 0, 0, rows % block))
            codes = grouped.to_block(codes, block).view(-1, k // 2)
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(operand, codes, group, params.contiguous())
            y[:, first:first + rows] = product[:, :rows]
        return y.to(x.dtype)

    return linear


def int8_linear(x: Tensor, m: Packed) -> Tensor:
    """torch's int8 product with one scale per row."""
    qweight = m.tensors["qweight"]
    y = torch.ops.aten._weight_int8pack_mm(_operand(x, qweight.shape[1]), qweight, m.tensors["scale"])
    return y if x.dtype == torch.bfloat16 else y.to(x.dtype)


def plain_linear(x: Tensor, m: Packed) -> Tensor:
    """bf16 when x and the weights are; else fp32, weights of 16 bits widened tile by tile."""
    weight = m.tensors["weight"]
    if weight.dtype == x.dtype and x.dtype != torch.float16:
        return few_rows(x, weight) if len(x) <= FEW else F.linear(x, weight)
    wide = x.float()
    if weight.dtype == torch.float32:
        return (few_rows(wide, weight) if len(x) <= FEW else F.linear(wide, weight)).to(x.dtype)
    y = torch.empty(len(x), len(weight))
    for (_, row, rows), (_, tile) in zip(row_tiles(m.spec), plain.tiles(m), strict=True):
        y[:, row:row + rows] = few_rows(wide, tile) if len(x) <= FEW else F.linear(wide, tile)
    return y.to(x.dtype)


def decoded_linear(x: Tensor, m: Packed, tiles: Tiles | None = None) -> Tensor:
    """x [T, cols] -> [T, rows], without gaps: for a format without a product of its own, which `tiles` decodes, by
    default that of mxfp4 and of ggml's formats, whose numbers bf16 does not have: products with these are in fp32."""
    if tiles is None and m.spec.format != "mxfp4":
        return decoded_linear(x.float(), m, carried.tiles).to(x.dtype)
    tiles = tiles or mxfp4.tiles
    y = torch.empty(len(x), m.spec.rows, dtype=x.dtype)
    for start, tile in tiles(m, x.dtype):
        y[:, start:start + len(tile)] = few_rows(x, tile) if len(x) <= FEW else F.linear(x, tile)
    return y


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear whose rows do not depend on each other: x [T, K], weight [N, K] -> [T, N]. Tile by tile of the
    weights, so that they come from memory once; the tiles depend on the weights alone."""
    step = max(1, TILE_BYTES // (weight.shape[1] * weight.itemsize))
    rows = [x] if len(x) == 1 else [row.clone() for row in x.split(1)]  # each aligned as one alone is
    if len(weight) <= step:
        return F.linear(rows[0], weight) if len(rows) == 1 else torch.cat([F.linear(row, weight) for row in rows])
    y = x.new_empty(len(x), len(weight))
    for start in range(0, len(weight), step):
        tile = weight[start:start + step]
        for row, out in zip(rows, y, strict=True):
            out[start:start + step] = F.linear(row, tile)[0]
    return y


def _operand(x: Tensor, k: int) -> Tensor:
    """x as the packed ops want it: bf16, contiguous, `k` columns (zeros for padded ones)."""
    if x.dtype != torch.bfloat16:
        x = x.to(torch.bfloat16)
    return F.pad(x, (0, k - x.shape[1])) if x.shape[1] != k else x.contiguous()
