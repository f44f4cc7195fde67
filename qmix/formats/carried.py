"""q8_0, q4_k, q6_k and their kin: the formats of ggml that GGUF files have most, carried bit for bit. Numbers are as
ggml defines them (qmix/formats/ggml has its blocks); the bytes lie as qmix's kernels read them.

Formulas  q8_0   w = d q, q int8
          q4_0   w = d (q - 8), q 0..15               q5_0   w = d (q - 16), q 0..31
          q4_1   w = d q + m                          q5_1   the same, q 0..31
          q4_k   w = d s q - dmin m, q 0..15          q5_k   the same, q 0..31
          q6_k   w = d s (q - 32), q 0..63
          iq4_nl w = d table[q], q 0..15              iq4_xs w = d (s - 32) table[q], q 0..15
          table  -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113
          with one rounding to fp32 for each product and difference, in the order written. d, m of q4_1 and q5_1, and
          dmin are fp16; s and m of q4_k and q5_k, and s of iq4_xs, have 6 bits, s of q6_k is int8. One s and m for a
          group of 32 columns, of q6_k 16; one d and dmin for 256 columns, d and m of the others for 32
qweight   uint8 [N/64, K/8, 64 * bits]: for each block of 64 output rows, eight columns at a time; of these first the
          columns j = 0..3, then 4..7. Four columns of a row are neighbours, as dot products of bytes take them, so that
          kernels load and mask and move nothing. For each such half, r a row of the block:
          q8_0   byte 4 r + j                         the code
          others byte 4 (r mod 32) + j                its lower four bits: in the low nibble for r < 32
          q6_k   128 + byte 4 (r mod 16) + j          its upper two bits, at 2 (r div 16)
          and of q5_* behind both halves, byte 4 (r mod 16) + j: its upper bit, at r div 16, of the second half 4 on
scales    uint8 [N/64, K/256, 64 * 16] of q4_k and q5_k: fp16 d of 64 rows, fp16 dmin of 64 rows, then for each of
          8 groups the lower four bits of s (low nibble) and of m of each row, then for each two groups a byte a row: in
          its low nibble the upper bits of s, then of m, of the first group, in its high nibble those of the second
          uint8 [N/64, K/256, 64 * 18] of q6_k: fp16 d of 64 rows, then for each of 16 groups the int8 s of 64 rows
          uint8 [N/64, K/256, 64 * 8] of iq4_xs: fp16 d of 64 rows, then for each two of 8 groups a byte a row, the
          lower four bits of s, of the first group in the low nibble; then for each four groups a byte a row, the upper
          two bits of the s of group g at 2 (g mod 4)
          uint8 [N/64, K/32, 64 * 2 or 64 * 4] of the others: fp16 d of 64 rows, then fp16 m of 64 rows
Sizes     as ggml's blocks: 8.5 bits a weight of q8_0, 4.5 of q4_0 and q4_k, 5 of q4_1, 5.5 of q5_0 and q5_k, 6 of q5_1,
          6.5625 of q6_k, 4.5 of iq4_nl, 4.25 of iq4_xs; N is padded to 64, K to 256 or 32
Padding   all bytes 0, which is w = 0
Source    the structs and dequantize_row functions of ggml (ggml-common.h, ggml-quants.c); the table is kvalues_iq4nl of
          the first

N padded rows, K padded columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.formats import ggml
from qmix.formats.ggml.k_quants import planes, six_bits
from qmix.formats.ggml.simple import bits as bits_of
from qmix.formats.ggml.simple import nibbles
from qmix.formats.ggml.tables import VALUES, xs_scales
from qmix.formats.packed import Packed, gather, refuse_nonfinite, row_tiles
from qmix.sizes import CARRIED, CARRIED_BLOCK, MatrixSpec

FEW_ROWS = 64
# Where a block of ggml's has its fp16 numbers.
HALVES = {"q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2),
          "q6_k": (208,), "iq4_nl": (0,), "iq4_xs": (0,)}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix as GGUF files have it: raw uint8 [rows, blocks of a row, bytes of a block] of the type `kind`, in our
    spelling."""

    kind: str
    raw: Tensor

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """[rows, cols], decoded as ggml does it."""
        rows, blocks, _ = self.raw.shape
        out = torch.empty(rows, blocks * CARRIED[self.kind].columns, dtype=dtype)
        ggml.decode_into(self.kind.upper(), self.raw.reshape(-1), out.view(-1))
        return out

    def nonfinite(self) -> bool:
        """Whether a scale is inf or NaN, which no working model has."""
        return any(bool((self.raw[..., at + 1] & 0x7C == 0x7C).any()) for at in HALVES[self.kind])


def carry(blocks: Blocks, spec: MatrixSpec) -> Packed:
    """The same numbers in qmix's layout. blocks: of spec's format and shape, finite."""
    assert blocks.kind == spec.format and blocks.raw.shape[0] == spec.rows
    packed = _blank(spec)
    for start, row, rows in row_tiles(spec):
        _store(packed, row, blocks.raw[start:start + rows])
    return packed


def pack(weight: Tensor, spec: MatrixSpec) -> Packed:
    """Quantize `weight` [rows, cols], any float dtype, to q8_0 as ggml does it: d = max|w| / 127, q = w / d rounded,
    halves away from 0, by the d that is not rounded to fp16 yet. QmixError for inf and NaN."""
    assert spec.format == "q8_0", spec.format
    packed, columns = _blank(spec), CARRIED["q8_0"].columns
    for start, row, rows in row_tiles(spec):
        w = weight[start:start + rows].float()
        refuse_nonfinite(w, start)
        w = torch.nn.functional.pad(w, (0, spec.padded_cols - spec.cols)).view(rows, -1, columns)
        d = w.abs().amax(-1, keepdim=True).div_(127)
        refuse_nonfinite(d.half().view(rows, -1), start)
        q = torch.where(d > 0, w * torch.where(d > 0, 1 / d, 0.0), 0.0)
        q = (q.abs() + 0.5).floor_().mul_(q.sign()).to(torch.int8)
        _store(packed, row, torch.cat((d.half().view(torch.uint8), q.view(torch.uint8)), -1))
    return packed


def tiles(packed: Packed, dtype: torch.dtype = torch.float32, tile_bytes: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Decode tile by tile: (first logical row, `dtype` [n, cols]), padding removed; the bits of ggml's own decoding in
    fp32. tile_bytes: see `row_tiles`."""
    spec = packed.spec
    for start, row, rows in row_tiles(spec, 4, tile_bytes):
        blocks = slice(row // CARRIED_BLOCK, -(-(row + rows) // CARRIED_BLOCK))
        w = _numbers(spec.format, _codes(spec.format, packed["qweight"][blocks]), packed["scales"][blocks])
        yield start, w[:rows, :spec.cols].to(dtype)


def unpack(packed: Packed) -> Tensor:
    """The whole matrix, fp32 [rows, cols]."""
    return gather(packed.spec, tiles(packed), packed["qweight"].device)


def rows(packed: Packed, ids: Tensor) -> Tensor:
    """The rows `ids` int64 [n] of the whole matrix, fp32 [n, cols], as `unpack` has them. A few are decoded at a time,
    so that memory beside the result does not grow with their number."""
    kind, cols = packed.spec.format, packed.spec.cols
    found = torch.empty(len(ids), cols, device=ids.device)
    for some, place in zip(ids.split(FEW_ROWS), found.split(FEW_ROWS), strict=True):
        block, row = some // CARRIED_BLOCK, some % CARRIED_BLOCK
        codes = _codes_of_rows(kind, packed["qweight"], block, row)
        place.copy_(_numbers(kind, codes, packed["scales"][block], row)[:, :cols])
    return found


def _codes_of_rows(kind: str, qweight: Tensor, block: Tensor, row: Tensor) -> Tensor:
    """uint8 [n, K] of row `row` [n] of the 64 of block `block` [n]; qweight as `_codes` has it."""
    blocks, eights, _ = qweight.shape
    width = CARRIED[kind].bits
    if width == 8:
        return qweight.view(blocks, eights, 2, 64, 4)[block, :, :, row].flatten(1)
    halves = qweight[..., :256].unflatten(2, (2, 128)) if width < 6 else qweight.view(blocks, eights, 2, 192)[..., :128]

    def at(number: Tensor) -> Tensor:
        return number.to(torch.uint8).view(-1, 1, 1, 1)

    codes = halves.unflatten(3, (32, 4))[block, :, :, row % 32] >> at(row // 32 * 4) & 15
    if width == 6:
        pairs = qweight.view(blocks, eights, 2, 192)[..., 128:].unflatten(3, (16, 4))[block, :, :, row % 16]
        codes |= (pairs >> at(row // 16 * 2) & 3) << 4
    elif width == 5:
        fifths = qweight[..., 256:].unflatten(2, (16, 4))[block, :, row % 16].unsqueeze(2)
        upper = torch.arange(0, 8, 4, dtype=torch.uint8, device=qweight.device).view(1, 1, 2, 1)
        codes |= (fifths >> at(row // 16) + upper & 1) << 4
    return codes.flatten(1)


def _blank(spec: MatrixSpec) -> Packed:
    """Room for a matrix, all of it padding."""
    found = {t.name: torch.zeros(t.shape, dtype=torch.uint8) for t in spec.without_bias.tensors}
    return Packed.of(spec, found, spec.format)


def _store(packed: Packed, row: int, raw: Tensor) -> None:
    """ggml's blocks uint8 [n, blocks of a row, bytes] into their place from padded row `row` on."""
    kind, (n, count, _) = packed.spec.format, raw.shape
    block = row // CARRIED_BLOCK
    raw = torch.nn.functional.pad(raw, (0, 0, 0, 0, 0, -n % CARRIED_BLOCK))
    many = len(raw) // CARRIED_BLOCK
    codes = _codes_of_blocks(kind, raw.flatten(0, 1)).reshape(many, CARRIED_BLOCK, -1, 2, 4)
    packed["qweight"][block:block + many, :codes.shape[2]] = _in_fours(kind, codes)
    packed["scales"][block:block + many, :count] = _scales(kind, raw.view(many, CARRIED_BLOCK, count, -1))


def _codes_of_blocks(kind: str, raw: Tensor) -> Tensor:
    """The codes of blocks uint8 [n, bytes], one a byte, in the order of the columns: uint8 [n, columns]; ones of q8_0
    as they are, those of q6_k without their sign."""
    if kind == "q8_0":
        return raw[:, 2:]
    if kind in ("q4_0", "q4_1", "iq4_nl"):
        return nibbles(raw[:, -16:])
    if kind in ("q5_0", "q5_1"):
        return nibbles(raw[:, -16:]) | bits_of(raw[:, -20:-16]) << 4
    if kind == "q4_k":
        return planes(raw[:, 16:], 32, 4)
    if kind == "iq4_xs":
        return planes(raw[:, 8:], 16, 4)
    if kind == "q5_k":
        return planes(raw[:, 48:], 32, 4) | planes(raw[:, 16:48], 32, 1) << 4
    return planes(raw[:, :128], 64, 4) | planes(raw[:, 128:192], 32, 2) << 4


def _in_fours(kind: str, codes: Tensor) -> Tensor:
    """Codes uint8 [B, 64, K/8, 2, 4] of blocks of rows as qweight has them: [B, K/8, 64 * bits]."""
    codes = codes.permute(0, 2, 3, 1, 4)  # [B, K/8, 2, 64, 4]
    if kind == "q8_0":
        return codes.flatten(2)
    low = (codes[..., :32, :] & 15 | codes[..., 32:, :] << 4).flatten(3)
    width = CARRIED[kind].bits
    if width == 4:
        return low.flatten(2)
    quarters = (codes >> 4).unflatten(3, (4, 16))  # [B, K/8, 2, 4, 16, 4]
    if width == 6:
        pairs = quarters[:, :, :, 0] | quarters[:, :, :, 1] << 2 | quarters[:, :, :, 2] << 4 | quarters[:, :, :, 3] << 6
        return torch.cat((low, pairs.flatten(3)), 3).flatten(2)
    fifths = torch.zeros_like(quarters[:, :, 0, 0])
    for half in range(2):
        for quarter in range(4):
            fifths |= quarters[:, :, half, quarter] << quarter + 4 * half
    return torch.cat((low.flatten(2), fifths.flatten(2)), 2)


def _codes(kind: str, qweight: Tensor) -> Tensor:
    """The way back: uint8 [B, K/8, 64 * bits] -> uint8 [64 B, K]."""
    blocks, eights, _ = qweight.shape
    width = CARRIED[kind].bits
    if width == 8:
        codes = qweight.view(blocks, eights, 2, 64, 4)
    else:
        halves = qweight[..., :256].view(blocks, eights, 2, 128) if width < 6 else \
            qweight.view(blocks, eights, 2, 192)[..., :128]
        low = halves.unflatten(3, (32, 4))
        codes = torch.cat((low & 15, low >> 4), 3)
    if width == 6:
        pairs = qweight.view(blocks, eights, 2, 192)[..., 128:].unflatten(3, (16, 4))
        codes |= torch.cat([(pairs >> 2 * quarter & 3) << 4 for quarter in range(4)], 3)
    elif width == 5:
        fifths = qweight[..., 256:].view(blocks, eights, 1, 16, 4)
        codes |= torch.cat([torch.cat([(fifths >> quarter + 4 * half & 1) << 4 for quarter in range(4)], 3)
                            for half in range(2)], 2)
    return codes.permute(0, 3, 1, 2, 4).reshape(64 * blocks, 8 * eights)


def _scales(kind: str, raw: Tensor) -> Tensor:
    """The parameters of blocks uint8 [B, 64, count, bytes] as `scales` has them: [B, count, 64 * each]."""
    raw = raw.transpose(1, 2)  # [B, count, 64, bytes]
    halves = [raw[..., at:at + 2].flatten(2) for at in HALVES[kind]]
    if kind == "q6_k":
        return torch.cat((*halves, raw[..., 192:208].transpose(2, 3).flatten(2)), 2)
    if kind == "iq4_xs":
        s = xs_scales(raw.reshape(-1, raw.shape[3])).view(*raw.shape[:3], 8).transpose(2, 3)  # [B, count, 8, 64]
        upper = sum((s[:, :, i::4] >> 4 << 2 * i for i in range(4)), torch.zeros((), dtype=torch.uint8))
        return torch.cat((*halves, (s[:, :, 0::2] & 15 | s[:, :, 1::2] << 4).flatten(2), upper.flatten(2)), 2)
    if kind not in ("q4_k", "q5_k"):
        return torch.cat(halves, 2)
    s, m = (part.view(*raw.shape[:3], 8).transpose(2, 3) for part in six_bits(raw[..., 4:16].reshape(-1, 12)))
    upper = s >> 4 | m >> 4 << 2  # [B, count, 8, 64]
    return torch.cat((*halves, (s & 15 | m << 4).flatten(2), (upper[:, :, 0::2] | upper[:, :, 1::2] << 4).flatten(2)),
                     2)


def _numbers(kind: str, codes: Tensor, scales: Tensor, row: Tensor | None = None) -> Tensor:
    """fp32 [64 B, K] of codes uint8 [64 B, K] and scales uint8 [B, count, 64 * each], in ggml's order of roundings.
    row: of each block [B] the one that is wanted: then codes are those of it, [B, K]."""
    layout, rows = CARRIED[kind], len(codes)

    def numbers_of(part: Tensor, groups: int = 1) -> Tensor:
        """[B, count, groups * 64] as [rows, count * groups]."""
        of_blocks = part.unflatten(2, (groups, 64)).flatten(1, 2)  # [B, count * groups, 64]
        if row is not None:
            return of_blocks[torch.arange(rows, device=row.device), :, row]
        return of_blocks.transpose(1, 2).reshape(rows, -1)

    halves = [numbers_of(scales[..., 128 * i:128 * i + 128].contiguous().view(torch.float16).float())
              for i in range(len(HALVES[kind]))]
    if kind == "q8_0":
        q = codes.view(torch.int8).float()
    elif layout.table:
        q = torch.tensor(VALUES, dtype=torch.float32, device=codes.device).index_select(0, codes.reshape(-1).int())
    else:
        q = codes.float()
        if layout.middle:
            q.sub_(layout.middle)
    q = q.view(rows, -1, layout.group)
    if kind == "q6_k":
        s = numbers_of(scales[..., 128:].contiguous().view(torch.int8).float(), 16)
        return q.mul_((halves[0].repeat_interleave(16, 1) * s).unsqueeze(-1)).flatten(1)
    if kind == "iq4_xs":
        low, upper = numbers_of(scales[..., 128:384], 4), numbers_of(scales[..., 384:], 2)
        low = torch.stack((low & 15, low >> 4), 2).flatten(1)
        upper = torch.stack([upper >> 2 * i & 3 for i in range(4)], 2).flatten(1)
        s = (low | upper << 4).float().sub_(32)
        return q.mul_((halves[0].repeat_interleave(8, 1) * s).unsqueeze(-1)).flatten(1)
    if kind in ("q4_k", "q5_k"):
        low = numbers_of(scales[..., 256:768], 8)
        upper = numbers_of(scales[..., 768:], 4)
        upper = torch.stack((upper & 15, upper >> 4), 2).flatten(1)
        d, dmin = (half.repeat_interleave(8, 1) for half in halves)
        q.mul_((d * (low & 15 | (upper & 3) << 4).float()).unsqueeze(-1))
        return q.sub_((dmin * (low >> 4 | (upper & 12) << 2).float()).unsqueeze(-1)).flatten(1)
    q.mul_(halves[0].unsqueeze(-1))
    return (q.add_(halves[1].unsqueeze(-1)) if len(halves) > 1 else q).flatten(1)
