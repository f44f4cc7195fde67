"""The device code of cuda.py, in Triton. Importing this needs Triton; only cuda.py does, when a kernel is called.

Every kernel reads the bytes of formats/int4.py as they are stored, in slot `slot` of a slab or in a matrix of its own
(slot 0). A byte of the low bits holds `8 / PLACE` codes, PLACE 4 bits apart for int4 and 2 for int3 and int2; code s of
byte i is that of row i + s * STEP of the block, STEP = BLOCK * PLACE / 8. The third bits of int3 lie so that the byte
i % (STEP / 2), shifted by i / (STEP / 2), has those of byte i at the same distance from each other as the low bits.

The codes of a word are laid beside each other by joins of the word and itself shifted, by half of it first, then by a
quarter, so that code c of the new last dimension is the one c * PLACE bits up; a joined dimension lies within a thread.
A code becomes a float without a conversion: or-ed into the mantissa of 2^23 it is 2^23 + q, from which 2^23 + m is
subtracted; both are exact. Of a (scale, zero) pair, one 32-bit word, the scale is the low half and the zero the high
one, and a bf16 is the high half of an fp32.

Only what Triton 3.6 and its interpreter both have is used: no autotune, no inline assembly, no atomics.

M tokens of an expert, N padded rows, K columns, G groups in K.
"""

# mypy: disable-error-code="assignment"
# (tuples of tensors grow here, which is how Triton has a number of them that is known when it compiles)

from __future__ import annotations

import triton
import triton.language as tl

# Literals of the kernels below, which may read no other globals.
MAGIC = tl.constexpr(0x4B000000)  # the bits of 2^23 as fp32
MAGIC_HALF = tl.constexpr(0x6400)  # the bits of 2^10 as fp16
HIGH = tl.constexpr(-65536)  # 0xFFFF0000


@triton.jit
def gemv(x, qweight, qparams, slots, rows, partial, slot_words, x_stride, cols, groups, n,
         M: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
         UNROLL: tl.constexpr):
    """A block of rows, LANES groups of columns, all M tokens of one expert, in fp32.

    A lane is one group and one 32-bit word of the low bits: it walks the columns of its group, and no lane needs
    another until the groups are summed at the end. Each word is read once for all tokens.
    x [., cols]; qweight, qparams: int32 words; slots [E], -1 where there is nothing to do; rows [E, M]: which of x, -1
    for none; partial fp32 [E, M, splits, N]. Grid: blocks, splits, E.
    """
    PLACE: tl.constexpr = 4 if BITS == 4 else 2
    CODES: tl.constexpr = 32 // PLACE
    PER_BYTE: tl.constexpr = 8 // PLACE
    STEP: tl.constexpr = BLOCK // PER_BYTE
    WORDS: tl.constexpr = STEP // 4
    COLUMN: tl.constexpr = BLOCK * BITS // 32
    MIDDLE: tl.constexpr = 2**(BITS - 1)
    block = tl.program_id(0)
    split = tl.program_id(1)
    expert = tl.program_id(2)
    slot = tl.load(slots + expert)
    if slot < 0:
        return
    start = slot.to(tl.int64) * slot_words
    group = split * LANES + tl.arange(0, LANES)
    word = tl.arange(0, WORDS)
    here = group < groups
    column = ((block * groups + group) * GROUP * COLUMN)[:, None]
    low = qweight + start + (column + word[None, :])
    if BITS == 3:
        third = qweight + start + (column + (WORDS + word % (WORDS // 2))[None, :])
        aside = (word // (WORDS // 2))[None, :]

    rows_of = ()
    ends = ()
    sums = ()
    dots = ()
    for m in tl.static_range(M):
        rows_of += (tl.load(rows + expert * M + m).to(tl.int64),)
        ends += (tl.where(rows_of[m] >= 0, cols, 0),)
        sums += (tl.zeros((LANES,), tl.float32),)
        dots += (tl.zeros((LANES, WORDS, CODES), tl.float32),)

    for first in range(0, GROUP, UNROLL):
        for step in tl.static_range(UNROLL):
            inside = first + step
            bits = tl.load(low + inside * COLUMN, mask=here[:, None], other=0)
            bits = tl.join(bits, bits >> 16)
            bits = tl.join(bits, bits >> 8)
            bits = tl.join(bits, bits >> 4)
            if BITS != 4:
                bits = tl.join(bits, bits >> 2)
            codes = bits & (2**PLACE - 1)
            if BITS == 3:
                high = tl.load(third + inside * COLUMN, mask=here[:, None], other=0) >> aside
                high = tl.join(high, high >> 16)
                high = tl.join(high, high >> 8)
                high = tl.join(high, high >> 4)
                high = tl.join(high, high >> 2)
                codes = codes | ((high & 1) << 2)
            numbers = (codes | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE)
            numbers = tl.reshape(numbers, (LANES, WORDS, CODES))
            at = group * GROUP + inside
            new_sums = ()
            new_dots = ()
            for m in tl.static_range(M):
                value = tl.load(x + rows_of[m] * x_stride + at, mask=at < ends[m], other=0.0)
                value = value.to(tl.float32)
                new_sums += (sums[m] + value,)
                new_dots += (dots[m] + numbers * value[:, None, None],)
            sums = new_sums
            dots = new_dots

    code = tl.arange(0, CODES)
    row = block * BLOCK + word[:, None] * 4 + (code // PER_BYTE + code % PER_BYTE * STEP)[None, :]
    pair = tl.load(qparams + start + ((group * n)[:, None, None] + row[None, :, :]), mask=here[:, None, None], other=0)
    scale = (pair << 16).to(tl.float32, bitcast=True)
    zero = (pair & HIGH).to(tl.float32, bitcast=True)
    splits = tl.num_programs(1)
    for m in tl.static_range(M):
        total = tl.sum(dots[m] * scale + sums[m][:, None, None] * zero, axis=0)
        out = partial + ((expert * M + m) * splits + split).to(tl.int64) * n + row
        tl.store(out, total, mask=row < tl.where(rows_of[m] >= 0, n, 0))


@triton.jit
def finish(partial, places, y, y_stride, n, out, splits, GATED: tl.constexpr, ADD: tl.constexpr, SIZE: tl.constexpr):
    """Sum the splits in their order, then silu(gate) * up where GATED, cast once, put in place or, where ADD, added to
    what is there.

    partial fp32 [P, splits, N]; places [P]: the row of y, -1 for none; y [., out]; of gate and up each begins a half
    of N. Grid: P, pieces of `out`.
    """
    pair = tl.program_id(0)
    place = tl.load(places + pair).to(tl.int64)
    if place < 0:
        return
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    mask = at < out
    source = partial + pair.to(tl.int64) * splits * n + at
    value = tl.zeros((SIZE,), tl.float32)
    other = tl.zeros((SIZE,), tl.float32)
    for split in range(0, splits):
        value += tl.load(source + split * n, mask=mask, other=0.0)
        if GATED:
            other += tl.load(source + split * n + n // 2, mask=mask, other=0.0)
    if GATED:
        value = value / (1.0 + tl.exp(-value)) * other
    if ADD:
        value += tl.load(y + place * y_stride + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place * y_stride + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["slot", "tokens"])  # else compiled anew for some prompts
def matmul(x, qweight, qparams, tiles, y, slot, tokens, slot_bytes, x_stride, y_stride, cols, groups, n, blocks,
           SINGLE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr):
    """BLOCK_M tokens of one expert times BLOCKS blocks of rows: each piece of codes is made a tile of numbers once and
    multiplied as DOT, exact in it; scale and zero are applied to the fp32 product of each CHUNK of columns.

    A tile's columns are a byte's codes beside each other; their rows are found for parameters and result alike.
    x [., cols] sorted by expert; qweight bytes, qparams int32 words; tiles [., 3]: slot, first row of x, its end; where
    SINGLE they are not read: all `tokens` rows are for `slot`. y [., N] rows as x's. Grid: tiles, pieces of the blocks.
    """
    PLACE: tl.constexpr = 4 if BITS == 4 else 2
    PER_BYTE: tl.constexpr = 8 // PLACE
    STEP: tl.constexpr = BLOCK // PER_BYTE
    COLUMN: tl.constexpr = BLOCK * BITS // 8
    MIDDLE: tl.constexpr = 2**(BITS - 1)
    tile = tl.program_id(0)
    piece = tl.program_id(1)
    first = tile * BLOCK_M
    if not SINGLE:
        slot = tl.load(tiles + 3 * tile)
        first = tl.load(tiles + 3 * tile + 1)
        tokens = tl.load(tiles + 3 * tile + 2)
    start = slot.to(tl.int64) * slot_bytes
    token = first + tl.arange(0, BLOCK_M)
    given = token < tokens
    token = token.to(tl.int64)

    byte = tl.arange(0, BLOCKS * STEP)
    block = piece * BLOCKS + byte // STEP
    exists = (block < blocks)[None, :]
    column = block * groups * GROUP * COLUMN
    low = qweight + start + (column + byte % STEP)[None, :]
    if BITS == 3:
        third = qweight + start + (column + STEP + byte % (STEP // 2))[None, :]
        aside = (byte % STEP // (STEP // 2))[None, :]
    place = tl.arange(0, BLOCKS * BLOCK)
    of = place // PER_BYTE
    row = (piece * BLOCKS + of // STEP) * BLOCK + of % STEP + place % PER_BYTE * STEP
    real = row < n

    inside = tl.arange(0, CHUNK)
    total = tl.zeros((BLOCK_M, BLOCKS * BLOCK), tl.float32)
    for chunk in range(0, groups * (GROUP // CHUNK)):
        at = chunk * CHUNK + inside
        bits = tl.load(low + (at * COLUMN)[:, None], mask=exists, other=0).to(tl.int32)
        bits = tl.join(bits, bits >> 4)
        if BITS != 4:
            bits = tl.join(bits, bits >> 2)
        codes = bits & (2**PLACE - 1)
        if BITS == 3:
            high = tl.load(third + (at * COLUMN)[:, None], mask=exists, other=0).to(tl.int32) >> aside
            high = tl.join(high, high >> 4)
            high = tl.join(high, high >> 2)
            codes = codes | ((high & 1) << 2)
        codes = tl.reshape(codes, (CHUNK, BLOCKS * BLOCK))
        if tl.float16 == DOT:
            numbers = (codes.to(tl.int16) | MAGIC_HALF).to(tl.float16, bitcast=True) - (1024.0 + MIDDLE)
        else:
            numbers = (codes | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE)
        values = tl.load(x + token[:, None] * x_stride + at[None, :], mask=given[:, None] & (at < cols)[None, :],
                         other=0.0).to(DOT)
        product = tl.dot(values, numbers.to(DOT), input_precision="ieee")
        group = chunk // (GROUP // CHUNK)
        pair = tl.load(qparams + start // 4 + (group * n + row), mask=real, other=0)
        scale = (pair << 16).to(tl.float32, bitcast=True)
        zero = (pair & HIGH).to(tl.float32, bitcast=True)
        total += product * scale[None, :] + tl.sum(values.to(tl.float32), axis=1)[:, None] * zero[None, :]
    tl.store(y + token[:, None] * y_stride + row[None, :], total.to(y.dtype.element_ty),
             mask=given[:, None] & real[None, :])
