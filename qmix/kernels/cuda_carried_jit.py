"""The device code of cuda_carried.py, in Triton: ggml's formats on the bytes of formats/carried.py.

A 32-bit word has four columns of a row, a byte each; of the formats with fewer than 8 bits the low nibbles are those of
row r of a block, the high ones those of row r + 32, r = 0..31. Further bits of a code lie in words of their own.

A code becomes a float as in cuda_jit.py. In gemv a mask leaves it where it is in its word, and the power of two is
undone in x and, once a group, in the sums; codes with a sign, and those that are places in the table, are
or-ed into the mantissa of 2^23.

M tokens of an expert, N padded rows, K columns, G groups in K.
"""

# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from qmix.formats.ggml.tables import VALUES
from qmix.kernels.cuda_jit import LIFT, MAGIC, MAGIC_HALF


def _word(first: int) -> int:
    """Four numbers of the table, each 128 more, as the bytes of an int32."""
    return int.from_bytes(bytes(v + 128 for v in VALUES[first:first + 4]), "little", signed=True)


TABLE0, TABLE1, TABLE2, TABLE3 = (tl.constexpr(_word(first)) for first in range(0, 16, 4))
SIGNED = tl.constexpr(8388608.0 + 128)  # 2^23, and what a byte is more than its number
UNIT = tl.constexpr(2.0**149 / 2.0**64)  # 1 over the smallest fp32, and over LIFT
SIGN_BITS = tl.constexpr(0x80808080)


@triton.jit
def looked_up(codes):
    """128 more than what the table has at `codes`, int32."""
    four = tl.where((codes & 8) != 0, tl.where((codes & 4) != 0, TABLE3, TABLE2),
                    tl.where((codes & 4) != 0, TABLE1, TABLE0))
    return (four >> ((codes & 3) << 3)) & 255


@triton.jit
def words_at(place, exists):
    """uint32, 0 where they do not exist; None: all do."""
    if exists is None:
        found = tl.load(place)
    else:
        found = tl.load(place, mask=exists, other=0)
    return found.to(tl.uint32, bitcast=True)


@triton.jit
def four_columns(at, second, word, exists, BITS: tl.constexpr):
    """The codes of rows `word` and 32 further in four columns, uint32, a byte each; with 8 bits 128 more than they are.
    at: addresses of the words of eight columns, of which these are the first four or (second = 1) the others."""
    HALF: tl.constexpr = 64 if BITS == 8 else 48 if BITS == 6 else 32
    first = at + second * HALF + word
    bits = words_at(first, exists)
    if BITS == 8:
        low = bits ^ SIGN_BITS
        high = words_at(first + 32, exists) ^ SIGN_BITS
    else:
        low = bits & 0x0F0F0F0F
        high = (bits >> 4) & 0x0F0F0F0F
    if BITS == 5:
        upper = words_at(at + (64 + word % 16), exists)
        upper = upper >> (word // 16 + 4 * second)
        low = low | ((upper & 0x01010101) << 4)
        high = high | ((upper << 2) & 0x10101010)
    if BITS == 6:
        upper = words_at(at + (second * HALF + 32 + word % 16), exists)
        upper = upper >> (word // 16 * 2)
        low = low | ((upper & 0x03030303) << 4)
        high = high | (upper & 0x30303030)
    return low, high


@triton.jit
def params(scales, halves, block, group, row, groups, ZERO: tl.constexpr, PARAMS: tl.constexpr):
    """Scale and zero of a group in rows 0..63 of a block, fp32. scales: bytes, halves: the same as fp16. PARAMS: how
    scales are made, "half": of one fp16, "k": of q4_k and q5_k, "q6_k", "iq4_xs"; ZERO: whether there is a zero."""
    EACH: tl.constexpr = 16 if PARAMS == "k" else 18 if PARAMS == "q6_k" else 8 if PARAMS == "iq4_xs" else \
        4 if ZERO else 2
    MANY: tl.constexpr = 1 if PARAMS == "half" else 16 if PARAMS == "q6_k" else 8  # groups with these parameters
    place = (block * (groups // MANY) + group // MANY) * (64 * EACH)
    inside = group % MANY
    scale = tl.load(halves + (place // 2 + row)).to(tl.float32)
    zero = 0.0
    if ZERO:
        zero = tl.load(halves + (place // 2 + 64 + row)).to(tl.float32)
    own = scales + (place + row)
    if PARAMS == "k":
        low = tl.load(own + (256 + 64 * inside)).to(tl.int32)
        upper = tl.load(own + (768 + 64 * (inside // 2))).to(tl.int32) >> (inside % 2 * 4)
        scale = scale * ((low & 15) | ((upper & 3) << 4)).to(tl.float32)
        zero = -(zero * ((low >> 4) | ((upper & 12) << 2)).to(tl.float32))
    if PARAMS == "q6_k":
        scale = scale * tl.load(own + (128 + 64 * inside)).to(tl.int8, bitcast=True).to(tl.float32)
    if PARAMS == "iq4_xs":
        low = tl.load(own + (128 + 64 * (inside // 2))).to(tl.int32) >> (inside % 2 * 4)
        upper = tl.load(own + (384 + 64 * (inside // 4))).to(tl.int32) >> (inside % 4 * 2)
        scale = scale * (((low & 15) | ((upper & 3) << 4)) - 32).to(tl.float32)
    return scale, zero


@triton.jit
def gemv(x, qweight, scales, halves, slots, rows, partial, slot_words, x_stride, cols, groups, n,
         M: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr, MIDDLE: tl.constexpr,
         ZERO: tl.constexpr, PARAMS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr):
    """A block of rows, LANES groups of columns, all M tokens of one expert, in fp32.

    A lane is one group and one word of 8, and has that word, and those 8, 16 and 24 further, of each four columns: 8
    rows. It walks the columns of its group, STEPS eights at a time, and no lane needs another until the groups are
    summed at the end. Lanes beyond the last group are as in cuda_jit.gemv. x [., cols]; qweight: int32 words, scales,
    halves: see params; the others as there. Grid: blocks, splits, E.
    """
    EIGHT: tl.constexpr = 16 * BITS  # words of eight columns of a block
    BARE: tl.constexpr = BITS < 8 and not TABLE  # codes stay where they are in their words
    block = tl.program_id(0)
    split = tl.program_id(1)
    expert = tl.program_id(2)
    slot = tl.load(slots + expert)
    if slot < 0:
        return
    start = slot.to(tl.int64) * slot_words
    word = tl.arange(0, 8)[None, :]
    near = tl.arange(0, 4)
    lane = split * LANES + tl.arange(0, LANES)
    group = tl.minimum(lane, groups - 1)
    at = qweight + start + ((block * groups + group) * (GROUP // 8 * EIGHT))[:, None]

    own = ()
    dots = ()
    for m in tl.static_range(M):
        row_of = tl.maximum(tl.load(rows + expert * M + m), 0).to(tl.int64)
        own += (x + row_of * x_stride,)
        for _ in tl.static_range(4):
            dots += (tl.zeros((LANES, 8, 2), tl.float32),)

    for first in range(0, GROUP // 8, STEPS):
        for step in tl.static_range(2 * STEPS):
            column = group[:, None] * GROUP + first * 8 + step * 4 + near[None, :]
            values = ()
            for m in tl.static_range(M):
                if RAGGED:
                    value = tl.load(own[m] + column, mask=column < cols, other=0.0).to(tl.float32)
                else:
                    value = tl.load(own[m] + column).to(tl.float32)
                even, odd = tl.split(tl.reshape(value, (LANES, 2, 2)))
                value0, value2 = tl.split(even)
                value1, value3 = tl.split(odd)
                if BARE:  # a code of column j counts 2^(8 j - 149), of the last one as of the third
                    values += (value0 * LIFT, value1 * (LIFT / 2**8), value2 * (LIFT / 2**16),
                               value3 * (LIFT / 2**16))
                else:
                    values += (value0, value1, value2, value3)
            new_dots = ()
            for part in tl.static_range(4):
                low, high = four_columns(at + (first + step // 2) * EIGHT, step % 2, word + 8 * part, None, BITS)
                codes = tl.join(low, high)
                numbers = ()
                for j in tl.static_range(4):
                    if BARE:
                        bits = (codes & (255 << 8 * j)) if j < 3 else ((codes >> 8) & 0xFF0000)
                        numbers += (bits.to(tl.float32, bitcast=True),)
                    else:
                        bits = ((codes >> 8 * j) & 255).to(tl.int32, bitcast=True)
                        if TABLE:
                            bits = looked_up(bits)
                        numbers += ((bits | MAGIC).to(tl.float32, bitcast=True) - SIGNED,)
                for m in tl.static_range(M):
                    dot = dots[part * M + m]
                    for j in tl.static_range(4):
                        dot += numbers[j] * values[4 * m + j][:, None, None]
                    new_dots += (dot,)
            dots = new_dots

    here = (lane < groups)[:, None, None]
    splits = tl.num_programs(1)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    row = tl.arange(0, 8)[:, None] + tl.arange(0, 2)[None, :] * 32  # of the first part
    sums = ()
    for m in tl.static_range(M):
        if MIDDLE or ZERO:
            value = tl.load(own[m] + column, mask=column < cols, other=0.0).to(tl.float32)
            sums += (tl.sum(value, axis=1)[:, None, None],)
        else:
            sums += (0.0,)
    for part in tl.static_range(4):
        scale, zero = params(scales + start * 4, halves + start * 2, block, group[:, None, None],
                             (row + 8 * part)[None, :, :], groups, ZERO, PARAMS)
        for m in tl.static_range(M):
            dot = dots[part * M + m]
            if BARE:
                dot = dot * UNIT
            if MIDDLE:
                dot -= sums[m] * MIDDLE
            value = dot * scale
            if ZERO:
                value += sums[m] * zero
            out = partial + ((expert * M + m) * splits + split).to(tl.int64) * n + (block * 64 + row + 8 * part)
            tl.store(out, tl.sum(tl.where(here, value, 0.0), axis=0),
                     mask=row < tl.where(tl.load(rows + expert * M + m) >= 0, 64, 0))


@triton.jit
def tile_of(at, word, exists, GROUP: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr, MIDDLE: tl.constexpr,
            WORDS: tl.constexpr, DOT: tl.constexpr):
    """A group of columns as the numbers that a scale multiplies, [GROUP, 2 WORDS], exact in DOT: rows word and word +
    32 lie beside each other. at [1, WORDS]: addresses of each row's first eight columns; word, exists [1, WORDS]."""
    fours = tl.arange(0, GROUP // 4)[:, None]
    low, high = four_columns(at + fours // 2 * (16 * BITS), fours % 2, word, exists, BITS)
    codes = tl.join(low, high)
    codes = tl.join(codes, codes >> 16)
    codes = tl.join(codes, codes >> 8)  # [fours, words, side, 2, 2]: of column 2 i + j of four
    codes = (tl.permute(codes, (0, 3, 4, 1, 2)) & 255).to(tl.int32, bitcast=True)
    codes = tl.reshape(codes, (GROUP, 2 * WORDS))
    if TABLE:
        codes = looked_up(codes)
    OFF: tl.constexpr = 128 if TABLE or BITS == 8 else MIDDLE
    if tl.float16 == DOT:
        found = (codes.to(tl.int16) | MAGIC_HALF).to(tl.float16, bitcast=True) - (1024.0 + OFF)
    else:
        found = (codes | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + OFF)
    return found.to(DOT)


@triton.jit
def piece_of(qweight, piece, blocks, groups, GROUP: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Of the ROWS rows number `piece` of so many blocks, which may be a part of a block: for `tile_of` at, word and
    exists [1, ROWS / 2], and the row of each number, [ROWS]."""
    index = piece * (ROWS // 2) + tl.arange(0, ROWS // 2)
    block = index // 32
    at = qweight + (block * groups * (GROUP * 2 * BITS))[None, :]
    place = tl.arange(0, ROWS)
    of = piece * (ROWS // 2) + place // 2
    return at, (index % 32)[None, :], (block < blocks)[None, :], of // 32 * 64 + of % 32 + place % 2 * 32


@triton.jit
def added(values, sums, at, word, exists, scales, halves, row, group, groups, GROUP: tl.constexpr, BITS: tl.constexpr,
          TABLE: tl.constexpr, MIDDLE: tl.constexpr, ZERO: tl.constexpr, PARAMS: tl.constexpr, ROWS: tl.constexpr,
          DOT: tl.constexpr):
    """values [T, GROUP] times a group of columns of ROWS rows, fp32 [T, ROWS]. sums: of each row of values."""
    weights = tile_of(at + group * (GROUP * 2 * BITS), word, exists, GROUP, BITS, TABLE, MIDDLE, ROWS // 2, DOT)
    scale, zero = params(scales, halves, row // 64, group, row % 64, groups, ZERO, PARAMS)
    result = tl.dot(values, weights, input_precision="ieee") * scale[None, :]
    if ZERO:
        result += sums * zero[None, :]
    return result


@triton.jit
def products(lines, given, at, word, exists, scales, halves, row, other, half, cols, groups, GATED: tl.constexpr,
             GROUP: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr, MIDDLE: tl.constexpr, ZERO: tl.constexpr,
             PARAMS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr):
    """The rows that begin at `lines` [TILE], where `given`, times ROWS rows of a matrix and, where GATED, those that
    lie `other` words and `half` rows further on: (fp32 [TILE, ROWS], the same or zeros). Rows beyond the last one must
    be rows of the matrix."""
    inside = tl.arange(0, GROUP)
    one = tl.zeros((TILE, ROWS), tl.float32)
    two = tl.zeros((TILE, ROWS), tl.float32)
    for group in range(0, groups):
        column = group * GROUP + inside
        values = tl.load(lines[:, None] + column[None, :], mask=given[:, None] & (column < cols)[None, :],
                         other=0.0).to(DOT)
        sums = tl.sum(values.to(tl.float32), axis=1)[:, None]
        one += added(values, sums, at, word, exists, scales, halves, row, group, groups, GROUP, BITS, TABLE, MIDDLE,
                     ZERO, PARAMS, ROWS, DOT)
        if GATED:
            two += added(values, sums, at + other, word, exists, scales, halves, row + half, group, groups, GROUP, BITS,
                         TABLE, MIDDLE, ZERO, PARAMS, ROWS, DOT)
    return one, two


@triton.jit(do_not_specialize=["slot", "tokens"])  # else compiled anew for some prompts
def matmul(x, qweight, scales, halves, y, slot, tokens, slot_words, x_stride, y_stride, cols, groups, n, blocks,
           GROUP: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr, MIDDLE: tl.constexpr, ZERO: tl.constexpr,
           PARAMS: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr):
    """As cuda_jit.matmul: BLOCK_M of `tokens` rows times ROWS rows, each group multiplied as DOT, exact in it, then
    scale and zero applied to the fp32 product. Grid: tiles of tokens, pieces of the rows."""
    start = slot.to(tl.int64) * slot_words
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    given = token < tokens
    token = token.to(tl.int64)
    at, word, exists, row = piece_of(qweight + start, tl.program_id(1), blocks, groups, GROUP, BITS, ROWS)
    total, _ = products(x + token * x_stride, given, at, word, exists, scales + start * 4, halves + start * 2,
                        tl.minimum(row, n - 1), 0, 0, cols, groups, False, GROUP, BITS, TABLE, MIDDLE, ZERO, PARAMS,
                        BLOCK_M, ROWS, DOT)
    tl.store(y + token[:, None] * y_stride + row[None, :], total.to(y.dtype.element_ty),
             mask=given[:, None] & (row < n)[None, :])


@triton.jit(do_not_specialize=["first"])  # else compiled anew for some tiles
def decode(qweight, scales, halves, out, first, groups, out_stride, GROUP: tl.constexpr, BITS: tl.constexpr,
           TABLE: tl.constexpr, MIDDLE: tl.constexpr, ZERO: tl.constexpr, PARAMS: tl.constexpr):
    """Blocks `first` and on as numbers, with ggml's roundings to fp32, rounded to out's dtype: out [groups * GROUP,
    rows], out[k, r] of column k and row r of those blocks. Grid: blocks, groups."""
    block = first + tl.program_id(0)
    group = tl.program_id(1)
    at, word, _, row = piece_of(qweight, block, block + 1, groups, GROUP, BITS, 64)
    found = tile_of(at + group * (GROUP * 2 * BITS), word, None, GROUP, BITS, TABLE, MIDDLE, 32, tl.float32)
    scale, zero = params(scales, halves, block, group, row % 64, groups, ZERO, PARAMS)
    value = found * scale[None, :]
    if ZERO:
        value += zero[None, :]
    column = (group * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    place = out + column[:, None] * out_stride + (tl.program_id(0) * 64 + row % 64)[None, :]
    tl.store(place, value.to(out.dtype.element_ty))
