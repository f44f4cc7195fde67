"""int4, int3 and int2: weights of 4, 3 or 2 bits in groups along the input dimension, asymmetric. qmix's own byte
contract.

Formula   w = (q - m) * scale + zero, q in 0..2^bits - 1, m = 2^(bits - 1); scale and zero bf16, one pair per row and
          group
qweight   uint8 [N/B, K, bits * B/8]: for each block of B output rows and each input column k,
          int4   byte j holds row j (low nibble) and row j + B/2 (high nibble)
          int2   byte i holds row i + s B/4 in bits 2s and 2s + 1
          int3   the low two bits of all codes as in int2, then B/8 bytes of third bits: byte i holds that of row
                 i + b B/8 in bit b
qparams   bf16 [K/g, N, 2]: (scale, zero)
Sizes     N * K * bits / 8 bytes and 4 * N * K / g bytes; N is padded to B, K to g
Padding   padded rows and whole padded groups have scale = zero = 0 and q = m; a padded column inside
          a real group has q = m, and the kernels give it x = 0
Source    B = 64 is what torch's `_weight_int4pack_mm_for_cpu` reads on AVX-512, B = 32 what it reads on
          AVX2 (aten/src/ATen/native/cpu/int4mm_kernel.cpp; checked at start, since the op is private)

N padded rows, K padded columns, B rows per block, g group size, R rows of a tile.
Example: B = 64, row 3, column 5 is the low nibble of qweight[0, 5, 3]; row 35 is its high nibble.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.formats.narrow import narrow, widen
from qmix.formats.packed import Packed, gather, pad, row_tiles
from qmix.sizes import MatrixSpec

_NIBBLES = 0x0F0F0F0F0F0F0F0F


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix of symmetric 4-bit codes, as checkpoints may have it: codes uint8 [rows, cols] in 0..15, scales bf16
    [rows, cols/group, rounded up]; w = (q - 8) scale."""

    codes: Tensor
    scales: Tensor
    group: int

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """[rows, cols], rounded to `dtype`."""
        scales = self.scales.float().repeat_interleave(self.group, 1)[:, :self.codes.shape[1]]
        return self.codes.float().sub_(8).mul_(scales).to(dtype)


def carry(blocks: Blocks, spec: MatrixSpec) -> Packed:
    """The same codes and scales in qmix's layout. blocks: of spec's shape and group size."""
    assert blocks.group == spec.group_size and spec.bits == 4
    groups = spec.padded_cols // spec.group_size
    scale = torch.zeros(spec.padded_rows, groups, dtype=torch.bfloat16)
    inner = scale.view(spec.parts, -1, groups)[:, :spec.rows // spec.parts]
    inner.copy_(blocks.scales.reshape(spec.parts, -1, groups))
    return pack(pad(blocks.codes, spec, 8), scale, torch.zeros_like(scale), spec)


def pack(q: Tensor, scale: Tensor, zero: Tensor, spec: MatrixSpec) -> Packed:
    """q uint8 [N, K] in 0..2^bits - 1, scale and zero bf16 [N, K/g], all padded (see `pad`) -> Packed."""
    n, k = spec.padded_rows, spec.padded_cols
    qweight = torch.empty(n // spec.block, k, spec.block * spec.bits // 8, dtype=torch.uint8)
    for _, row, rows in row_tiles(spec):
        rows = -(-rows // spec.block) * spec.block
        codes = q[row:row + rows].T.float().sub_(2**(spec.bits - 1)).contiguous()
        store_codes(codes, qweight[row // spec.block:(row + rows) // spec.block])
    qparams = torch.stack((scale.T, zero.T), dim=-1)
    return Packed.of(spec, {"qweight": qweight, "qparams": qparams}, "grouped.pack")


def store_codes(codes: Tensor, out: Tensor) -> None:
    """Write codes into a piece of qweight: codes fp32 [C, R], values q - m, R a multiple of B;
    out uint8 [R/B, C, bits * B/8], a slice of blocks and columns of qweight, whose shape tells the bits."""
    blocks, columns, nbytes = out.shape
    half = codes.shape[1] // blocks // 2
    nibbles = codes.view(columns, blocks, 2, half)
    low, high = nibbles[:, :, 0], nibbles[:, :, 1]
    both = torch.add(low, high, alpha=16).add_(8 + 16 * 8).transpose(0, 1)
    out.copy_(both if nbytes == half else narrow(both.to(torch.uint8), 4 * nbytes // half))


def load_codes(qweight: Tensor, out: Tensor) -> None:
    """The way back: a piece of qweight uint8 [R/B, C, bits * B/8] into out fp32 [C, R], values q - m."""
    blocks, columns, nbytes = qweight.shape
    half = out.shape[1] // blocks // 2
    nibbles = out.view(columns, blocks, 2, half)
    codes = widen(qweight, 4 * nbytes // half).transpose(0, 1)
    nibbles[:, :, 0] = codes & 15
    nibbles[:, :, 1] = codes >> 4
    out.sub_(8)


def tiles(packed: Packed) -> Iterator[tuple[int, Tensor]]:
    """Decode tile by tile: (first logical row, fp32 [n, cols]), padding removed, the columns in
    Fortran order. One product and one sum per weight, each rounded once."""
    spec, qweight = packed.spec, packed["qweight"]
    k, block = spec.padded_cols, spec.block
    for start, row, rows in row_tiles(spec):
        blocks = slice(row // block, -(-(row + rows) // block))
        padded = (blocks.stop - blocks.start) * block
        w = torch.empty(k, padded)
        load_codes(qweight[blocks], w)
        scale, zero = packed["qparams"][:, row:row + padded].float().unsqueeze(1).unbind(-1)
        w.view(-1, spec.group_size, padded).mul_(scale).add_(zero)
        yield start, w.T[:rows, :spec.cols]


def unpack(packed: Packed) -> Tensor:
    """The whole matrix, fp32 [rows, cols]."""
    return gather(packed.spec, tiles(packed))


def to_block(qweight: Tensor, block: int) -> Tensor:
    """`qweight` uint8 [N/B, K, B/2] in blocks of 64 or 32 rows, rewritten in blocks of `block` (32 or
    64): a permutation of nibbles, exact and its own way back. The parameters stay as they are.

    From 64 to 32 a byte's two rows part: bytes 0..31 hold rows j | j+32; rows 0..15 | 16..31 are the
    low nibbles of bytes j | j+16, rows 32..47 | 48..63 their high nibbles; and back.
    Needs an even number of 32-row blocks on the way to 64 (ValueError). Callers cut large matrices
    into tiles of blocks.
    """
    blocks, columns, half = qweight.shape
    if 2 * half == block:
        return qweight
    if block == 64 and blocks % 2:
        raise ValueError(f"{blocks} blocks of 32 rows do not make whole blocks of 64")
    if block == 32:
        source = _lanes(qweight)  # [N/64, K, 4]
        low, high = source[..., :2], source[..., 2:]
        out = torch.empty(blocks, 2, columns, 2, dtype=torch.int64)
    else:
        source = _lanes(qweight).view(blocks // 2, 2, columns, 2)
        low, high = source[:, 0], source[:, 1]
        out = torch.empty(blocks // 2, columns, 2, 2, dtype=torch.int64).transpose(1, 2)
    for lane in (0, 1):  # one strided pass over all blocks and columns, eight bytes at a time
        a, b = low[..., lane], high[..., lane]
        out[:, 0, :, lane] = (a & _NIBBLES).bitwise_or_((b & _NIBBLES).bitwise_left_shift_(4))
        out[:, 1, :, lane] = (a >> 4).bitwise_and_(_NIBBLES).bitwise_or_(b & ~_NIBBLES)
    if block == 64:
        out = out.transpose(1, 2)
    return out.view(torch.uint8).view(-1, columns, block // 2)


def _lanes(qweight: Tensor) -> Tensor:
    """The last dimension as int64 lanes; copied first where its bytes do not start on one."""
    if qweight.storage_offset() % 8:
        qweight = qweight.clone()
    return qweight.contiguous().view(torch.int64)
