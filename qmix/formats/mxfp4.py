"""mxfp4: OCP microscaling, blocks of 32 4-bit floats with one power of two each. gpt-oss's experts are published so
and kept bit for bit: `carry` moves codes and scales, and changes none.

Formula   w = e2m1[code] * 2^(s - 127), s in 0..252; e2m1: sign, two bits of exponent, one of mantissa, the numbers
          0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (code 8 is -0)
qweight   uint8 [N/64, K, 32], the layout of int4 in blocks of 64 rows (grouped.py): for each block of output rows and
          each input column k, byte j holds the code of row j (low nibble) and of row j + 32 (high nibble)
scale     uint8 [K/32, N], s (E8M0)
Sizes     N * K / 2 bytes and N * K / 32 bytes: 4.25 bits a weight; N is padded to 64, K to 32
Padding   code 0 (zero) and s = 0
Source    OCP Microscaling Formats (MX) v1.0, sections 5.3.3 (E2M1), 5.4.1 (E8M0) and 6.3 (how `pack` chooses a scale).
          s = 255 is NaN there; above 252 a code of 6 is beyond fp32, which no weight of a model is: a checkpoint with
          such a scale is refused

Checkpoints have blocks uint8 [N, K/32, 16], rows as they are: byte i of a block holds the code of column 2i (low
nibble) and of column 2i + 1 (high nibble); and scales uint8 [N, K/32].

N padded rows, K padded columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.formats.packed import Packed, gather, refuse_nonfinite, row_tiles
from qmix.sizes import MX_GROUP, MatrixSpec

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LARGEST = 252  # a scale's byte
BIAS = 127  # of a scale's exponent
# Between two neighbouring numbers, and whether the middle rounds up: to the code whose last bit is 0.
MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix as checkpoints have it: codes uint8 [rows, cols/32, 16], scales uint8 [rows, cols/32]."""

    codes: Tensor
    scales: Tensor

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """[rows, cols]; exact in bf16 and fp32."""
        rows, groups, _ = self.codes.shape
        w = _numbers(self.columns(0, rows)).view(rows, groups, MX_GROUP)
        return w.mul_(powers(self.scales).unsqueeze(-1)).to(dtype).view(rows, -1)

    def columns(self, start: int, end: int) -> Tensor:
        """The codes of rows `start` to `end`, one a byte, in the order of the columns: uint8 [n, cols]."""
        codes = self.codes[start:end]
        return torch.stack((codes & 15, codes >> 4), -1).view(len(codes), -1)


def carry(blocks: Blocks, spec: MatrixSpec) -> Packed:
    """The same codes and scales in qmix's layout. blocks: of spec's shape, scales up to LARGEST."""
    packed = _blank(spec)
    for start, row, rows in row_tiles(spec):
        _store(packed, row, blocks.columns(start, start + rows), blocks.scales[start:start + rows])
    return packed


def pack(weight: Tensor, spec: MatrixSpec) -> Packed:
    """Quantize `weight` [rows, cols], any float dtype, in tiles of rows; QmixError for inf and NaN.

    A block's scale is the largest power of two that is not above its largest number, divided by 4, which is that of
    E2M1's largest number; numbers are rounded to the nearest, ties to the even code, and at most to 6.
    """
    packed = _blank(spec)
    for start, row, rows in row_tiles(spec):
        w = weight[start:start + rows].float()
        refuse_nonfinite(w, start)
        w = torch.nn.functional.pad(w, (0, spec.padded_cols - spec.cols)).view(rows, -1, MX_GROUP)
        peak = w.abs().amax(-1)
        exponent = torch.frexp(peak).exponent.sub_(3).clamp_(min=-BIAS)  # peak = m * 2^e, m from 0.5 to 1
        scales = torch.where(peak > 0, exponent + BIAS, 0).to(torch.uint8)
        codes = _nearest(w.div_(powers(scales).unsqueeze(-1))).view(rows, -1)
        _store(packed, row, codes[:, :spec.cols], scales)
    return packed


def tiles(packed: Packed, dtype: torch.dtype = torch.float32, tile_bytes: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Decode tile by tile: (first logical row, `dtype` [n, cols]), padding removed, the columns in Fortran order.
    Exact in fp32 and bf16. tile_bytes: see `row_tiles`."""
    spec, qweight = packed.spec, packed["qweight"]
    k, block = spec.padded_cols, spec.block
    for start, row, rows in row_tiles(spec, 4, tile_bytes):
        blocks = slice(row // block, -(-(row + rows) // block))
        n = (blocks.stop - blocks.start) * block
        nibbles = qweight[blocks].transpose(0, 1)  # [K, n / 64, 32]
        codes = torch.stack((nibbles & 15, nibbles >> 4), 2).view(k, n)
        w = _numbers(codes).view(-1, MX_GROUP, n)
        w.mul_(powers(packed["scale"][:, row:row + n]).unsqueeze(1))
        yield start, w.view(k, n).to(dtype).T[:rows, :spec.cols]


def unpack(packed: Packed) -> Tensor:
    """The whole matrix, fp32 [rows, cols]."""
    return gather(packed.spec, tiles(packed))


def powers(scales: Tensor) -> Tensor:
    """2^(s - 127) of scales uint8 [...], fp32: s is its exponent; 2^-127 is subnormal."""
    return (scales.to(torch.int32) << 23).clamp_(min=1 << 22).view(torch.float32)


def _blank(spec: MatrixSpec) -> Packed:
    """Room for a matrix, all of it padding."""
    found = {t.name: torch.zeros(t.shape, dtype=torch.uint8) for t in spec.without_bias.tensors}
    return Packed.of(spec, found, "mxfp4")


def _store(packed: Packed, row: int, codes: Tensor, scales: Tensor) -> None:
    """Codes uint8 [n, cols] and scales uint8 [n, cols / 32] into their place from padded row `row` on."""
    block, (n, cols) = packed.spec.block, codes.shape
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -n % block)).view(-1, 2, block // 2, cols)
    both = packed["qweight"][row // block:row // block + len(padded), :cols]
    both.copy_((padded[:, 0] | padded[:, 1] << 4).transpose(1, 2))
    packed["scale"][:scales.shape[1], row:row + n] = scales.T


def _numbers(codes: Tensor) -> Tensor:
    """e2m1 of codes uint8 [...], fp32."""
    table = torch.tensor(E2M1)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def _nearest(x: Tensor) -> Tensor:
    """The codes nearest to x, uint8."""
    size = x.abs()
    codes = torch.where(x.signbit(), 8, 0).to(torch.uint8)
    for middle, up in MIDDLES:
        codes += size >= middle if up else size > middle
    return codes
