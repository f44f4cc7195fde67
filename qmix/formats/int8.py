"""int8: 8-bit weights with one scale per output row, symmetric; for dense matrices.

Formula   w = q * scale, q in -127..127; scale = max|w| / 127 of the row, rounded to bf16 before q is chosen
qweight   int8 [N, K], row after row
scale     bf16 [N]
Sizes     N * K bytes and 2 * N bytes
Padding   K is padded to 64 with q = 0: torch's `_weight_int8pack_mm` crashes at K = 17, 33 or 100

N rows, K padded columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qmix.formats.packed import Packed, gather, refuse_nonfinite, row_tiles
from qmix.sizes import MatrixSpec


def pack(weight: Tensor, spec: MatrixSpec) -> Packed:
    """Quantize `weight` [rows, cols], any float dtype, in tiles of rows; QmixError for inf and NaN."""
    qweight = torch.zeros(spec.padded_rows, spec.padded_cols, dtype=torch.int8)
    scale = torch.empty(spec.padded_rows, dtype=torch.bfloat16)
    for start, row, rows in row_tiles(spec):
        w = weight[start:start + rows].float()
        peak = w.abs().amax(1)
        if not torch.isfinite(peak).all():
            refuse_nonfinite(w, start)
        scale[row:row + rows] = peak.div_(127)
        step = scale[row:row + rows].float().unsqueeze(1)
        q = torch.where(step > 0, w / step, 0.0).round_().clamp_(-127, 127)
        qweight[row:row + rows, :spec.cols] = q.to(torch.int8)
    return Packed.of(spec, {"qweight": qweight, "scale": scale}, "int8.pack")


def tiles(packed: Packed) -> Iterator[tuple[int, Tensor]]:
    """Decode tile by tile: (first logical row, fp32 [n, cols]), padding removed; exact to fp32."""
    spec = packed.spec
    for start, row, rows in row_tiles(spec):
        q = packed["qweight"][row:row + rows, :spec.cols].float()
        yield start, q.mul_(packed["scale"][row:row + rows].float().unsqueeze(1))


def unpack(packed: Packed) -> Tensor:
    """The whole matrix, fp32 [rows, cols]."""
    return gather(packed.spec, tiles(packed))
