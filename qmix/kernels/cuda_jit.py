"""The device code of cuda.py, in Triton. Importing this needs Triton; only cuda.py does, when a kernel is called.

Every kernel reads the bytes of formats/grouped.py, or with E2M1 those of formats/mxfp4.py, as they are stored, in slot
`slot` of a slab or in its own matrix (slot 0). A byte of the low bits holds `8 / PLACE` codes, PLACE 4 bits apart for
int4 and E2M1 and 2 for int3 and int2; code s of byte i is that of row i + s * STEP of the block,
STEP = BLOCK * PLACE / 8. The third bits of int3 lie so that the byte i % (STEP / 2), shifted by i / (STEP / 2), has
those of byte i at the same distance from each other as the low bits.

The codes of a word are laid beside each other by joins, so that code c of the new last dimension is the one c * PLACE
bits up; a joined dimension lies within a thread. A code becomes a float without a conversion:

- In gemv one mask does it. Bits below 2^24, read as an fp32, are that multiple of its smallest number, 2^-149. So a
  code that the mask leaves where it is, `up` bits up, is q * 2^(up - 149), a subnormal number or nearly, which NVIDIA's
  cards multiply at full speed. x is multiplied by 2^64 first, so that products are not subnormal. Both factors are
  powers of two, hence exact, and are undone with the scale. q counts from 0, so m times the sum of x is subtracted.
  x must be below 2^64, where the squares of a norm overflow too; below 2^-41 a product loses bits of fp32, but is
  never wrong by more than 2^-65.
- In matmul and decode a code, or-ed into the mantissa of 2^23, is 2^23 + q, from which 2^23 + m is subtracted.

An E2M1 code has the bits of an fp32 but for the length of its exponent: two bits of exponent and one of mantissa, put
at bit 22, and its sign at bit 31, are the number times 2^-126. It has no zero point, and its scale is one byte.

Of a (scale, zero) pair, one 32-bit word, the scale is the low half and the zero the high one, and a bf16 is the high
half of an fp32.

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
LIFT = tl.constexpr(2.0**64)  # what gemv multiplies x by
UNIT = tl.constexpr((127 + 149 - 64) << 23)  # the bits of 2^149 / LIFT as fp32
E2M1_LIFT = tl.constexpr(2.0**126)  # what makes E2M1's bits its number


@triton.jit
def parted(bits, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """The codes under each mask beside each other, where they are. The masks of calls in a row become one mask."""
    return tl.join(bits & LOWER, bits & UPPER)


@triton.jit
def e2m1(codes):
    """The numbers of E2M1 codes, int32, in fp32."""
    return (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True) * E2M1_LIFT


@triton.jit
def e8m0(scales):
    """2^(s - 127) of bytes s; 2^-127 is subnormal."""
    return tl.maximum(scales.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def gemv(x, qweight, qparams, slots, rows, partial, slot_words, x_stride, cols, groups, n,
         M: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
         UNROLL: tl.constexpr, RAGGED: tl.constexpr, E2M1: tl.constexpr = False):
    """A block of rows, LANES groups of columns, all M tokens of one expert, in fp32.

    A lane is one group and one 32-bit word of the low bits: it walks the columns of its group, and no lane needs
    another until the groups are summed at the end. Each word is read once for all tokens. A lane beyond the last group
    reads that one, and a token without a row reads the first: so the loop has no conditions, and their results are left
    out at the end.
    x [., cols]; qweight, qparams: int32 words; slots [E], -1 where there is nothing to do; rows [E, M]: which of x, -1
    for none; partial fp32 [E, M, splits, N]. RAGGED: `cols` ends within a group. Grid: blocks, splits, E.
    """
    PLACE: tl.constexpr = 4 if BITS == 4 else 2
    CODES: tl.constexpr = 32 // PLACE
    PER_BYTE: tl.constexpr = 8 // PLACE
    STEP: tl.constexpr = BLOCK // PER_BYTE
    WORDS: tl.constexpr = STEP // 4
    COLUMN: tl.constexpr = BLOCK * BITS // 32
    MIDDLE: tl.constexpr = 2**(BITS - 1)
    # Numbers of x that a thread loads at once. A tile of fewer than the program has threads, which is LANES * WORDS:
    # Triton then loads it where it is multiplied, else once, and moves it between threads.
    VECTOR: tl.constexpr = min(4, UNROLL, max(1, WORDS // 2))
    block = tl.program_id(0)
    split = tl.program_id(1)
    expert = tl.program_id(2)
    slot = tl.load(slots + expert)
    if slot < 0:
        return
    start = slot.to(tl.int64) * slot_words
    lane = split * LANES + tl.arange(0, LANES)
    group = tl.minimum(lane, groups - 1)
    word = tl.arange(0, WORDS)
    column = ((block * groups + group) * GROUP * COLUMN)[:, None]
    low = qweight + start + (column + word[None, :])
    if BITS == 3:
        third = qweight + start + (column + (WORDS + word % (WORDS // 2))[None, :])
        aside = (word // (WORDS // 2))[None, :]

    own = ()
    dots = ()
    for m in tl.static_range(M):
        row_of = tl.maximum(tl.load(rows + expert * M + m), 0).to(tl.int64)
        own += (x + row_of * x_stride,)
        dots += (tl.zeros((LANES, WORDS, CODES), tl.float32),)

    near = tl.arange(0, VECTOR)
    for first in range(0, GROUP, UNROLL):
        for piece in tl.static_range(UNROLL // VECTOR):
            at = group[:, None] * GROUP + first + piece * VECTOR + near[None, :]
            values = ()
            for m in tl.static_range(M):
                if RAGGED:
                    value = tl.load(own[m] + at, mask=at < cols, other=0.0).to(tl.float32) * LIFT
                else:
                    value = tl.load(own[m] + at).to(tl.float32) * LIFT
                if VECTOR == 4:
                    even, odd = tl.split(tl.reshape(value, (LANES, 2, 2)))
                    value0, value2 = tl.split(even)
                    value1, value3 = tl.split(odd)
                    values += (value0, value1, value2, value3)
                elif VECTOR == 2:
                    value0, value1 = tl.split(value)
                    values += (value0, value1)
                else:
                    values += (tl.reshape(value, (LANES,)),)
            for step in tl.static_range(VECTOR):
                inside = first + piece * VECTOR + step
                bits = tl.load(low + inside * COLUMN).to(tl.uint32, bitcast=True)
                if BITS == 3:
                    high = tl.load(third + inside * COLUMN).to(tl.uint32, bitcast=True) >> aside
                    bits = tl.join((bits & 0x33333333) | ((high << 2) & 0x44444444),
                                   ((bits >> 2) & 0x33333333) | (high & 0x44444444))
                bits = tl.join(bits, bits >> 16)
                bits = parted(parted(bits, 0x00FF, 0xFF00), 0x0F0F, 0xF0F0)
                if BITS == 2:
                    bits = parted(bits, 0x3333, 0xCCCC)
                if E2M1:  # the sign to bit 31, the others to bits 22 to 24
                    bits = tl.reshape(bits, (LANES, WORDS, CODES)) << (28 - tl.arange(0, CODES) % 4 * 4)[None, None, :]
                    bits = (bits & 0x80000000) | ((bits >> 6) & 0x01C00000)
                numbers = tl.reshape(bits.to(tl.float32, bitcast=True), (LANES, WORDS, CODES))
                new_dots = ()
                for m in tl.static_range(M):
                    new_dots += (dots[m] + numbers * values[m * VECTOR + step][:, None, None],)
                dots = new_dots

    code = tl.arange(0, CODES)
    up = code % 4 * 4
    if BITS == 3:
        code = code % 8 * 2 + code // 8
    elif BITS == 2:
        up = code % 8 * 2
    unit = (up * -2**23 + UNIT).to(tl.float32, bitcast=True)[None, None, :]
    row = block * BLOCK + word[:, None] * 4 + (code // PER_BYTE + code % PER_BYTE * STEP)[None, :]
    here = (lane < groups)[:, None, None]
    place = (group * n)[:, None, None] + row[None, :, :]
    if E2M1:
        scale = e8m0(tl.load(qparams + start * 4 + place)) * (E2M1_LIFT / LIFT)
    else:
        pair = tl.load(qparams + start + place)
        scale = (pair << 16).to(tl.float32, bitcast=True)
        zero = (pair & HIGH).to(tl.float32, bitcast=True)
    splits = tl.num_programs(1)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for m in tl.static_range(M):
        if E2M1:
            total = dots[m] * scale
        else:
            values = tl.load(own[m] + at, mask=at < cols, other=0.0).to(tl.float32)
            sums = tl.sum(values, axis=1)[:, None, None]
            total = (dots[m] * unit - sums * MIDDLE) * scale + sums * zero
        total = tl.sum(tl.where(here, total, 0.0), axis=0)
        out = partial + ((expert * M + m) * splits + split).to(tl.int64) * n + row
        tl.store(out, total, mask=row < tl.where(tl.load(rows + expert * M + m) >= 0, n, 0))


@triton.jit
def activated(gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """What joins gate and up (spec.Activation). Clamped by comparisons, which a NaN survives."""
    if KIND == "swiglu":
        value = gate / (1.0 + tl.exp(-gate)) * up
    elif KIND == "geglu":  # x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u))
        value = gate / (1.0 + tl.exp(-1.5957691216 * (gate + 0.044715 * gate * gate * gate))) * up
    else:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, up)
        up = tl.where(up < -LIMIT, -LIMIT, up)
        value = gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
    return value


@triton.jit
def finish(partial, out_rows, y, y_stride, n, out, splits, bias, slots, slot_words, rows,
           GATED: tl.constexpr, ADD: tl.constexpr, SIZE: tl.constexpr, BIASED: tl.constexpr, WIDTH: tl.constexpr,
           KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Sum the splits in their order, add the bias where BIASED, join gate and up where GATED, cast once, put in place
    or, where ADD, added to what is there.

    partial fp32 [P, splits, N]; out_rows [P]: the row of y, -1 for none; y [., out]; of gate and up each begins a half
    of N. bias fp32 [rows], without padding, that of slot 0; slots [P / WIDTH]: of each expert. Grid: P, pieces of
    `out`.
    """
    pair = tl.program_id(0)
    out_row = tl.load(out_rows + pair).to(tl.int64)
    if out_row < 0:
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
    if BIASED:
        own = bias + tl.load(slots + pair // WIDTH).to(tl.int64) * slot_words + at
        value += tl.load(own, mask=at < tl.minimum(out, rows), other=0.0)
        if GATED:
            other += tl.load(own + out, mask=mask, other=0.0)
    if GATED:
        value = activated(value, other, KIND, ALPHA, LIMIT)
    if ADD:
        value += tl.load(y + out_row * y_stride + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + out_row * y_stride + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def numbers(low, third, aside, at, exists, BITS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
            DOT: tl.constexpr, E2M1: tl.constexpr = False):
    """A tile of codes as the numbers q - m [CHUNK, ROWS], or those of E2M1, exact in DOT.

    low: of each byte of a column its address; third: of int3 that of its third bits, which lie `aside` bits up; at
    [CHUNK, 1]: offsets of the columns; exists: whether a byte is there. A byte's codes come to lie beside each other.
    """
    PLACE: tl.constexpr = 4 if BITS == 4 else 2
    MIDDLE: tl.constexpr = 2**(BITS - 1)
    bits = tl.load(low + at, mask=exists, other=0).to(tl.int32)
    bits = tl.join(bits, bits >> 4)
    if BITS != 4:
        bits = tl.join(bits, bits >> 2)
    codes = bits & (2**PLACE - 1)
    if BITS == 3:
        high = tl.load(third + at, mask=exists, other=0).to(tl.int32) >> aside
        high = tl.join(high, high >> 4)
        high = tl.join(high, high >> 2)
        codes = codes | ((high & 1) << 2)
    codes = tl.reshape(codes, (CHUNK, ROWS))
    if E2M1:
        found = e2m1(codes)
    elif tl.float16 == DOT:
        found = (codes.to(tl.int16) | MAGIC_HALF).to(tl.float16, bitcast=True) - (1024.0 + MIDDLE)
    else:
        found = (codes | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE)
    return found.to(DOT)


@triton.jit(do_not_specialize=["slot", "tokens"])  # else compiled anew for some prompts
def matmul(x, qweight, qparams, y, slot, tokens, slot_bytes, x_stride, y_stride, cols, groups, n, blocks,
           GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
           E2M1: tl.constexpr = False):
    """BLOCK_M of `tokens` rows times BLOCKS blocks of rows: each piece of codes is made a tile of numbers once and
    multiplied as DOT, exact in it; scale and zero are applied to the fp32 product of each CHUNK of columns.

    A tile's columns are a byte's codes beside each other; their rows are found for parameters and result alike.
    x [., cols]; qweight bytes, qparams int32 words, those of slot 0; y [., N] rows as x's. Grid: tiles of tokens,
    pieces of the blocks.
    """
    PLACE: tl.constexpr = 4 if BITS == 4 else 2
    PER_BYTE: tl.constexpr = 8 // PLACE
    STEP: tl.constexpr = BLOCK // PER_BYTE
    COLUMN: tl.constexpr = BLOCK * BITS // 8
    piece = tl.program_id(1)
    start = slot.to(tl.int64) * slot_bytes
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    given = token < tokens
    token = token.to(tl.int64)

    byte = tl.arange(0, BLOCKS * STEP)
    block = piece * BLOCKS + byte // STEP
    exists = (block < blocks)[None, :]
    column = block * groups * GROUP * COLUMN
    low = qweight + start + (column + byte % STEP)[None, :]
    third, aside = low, 0
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
        weights = numbers(low, third, aside, (at * COLUMN)[:, None], exists, BITS, CHUNK, BLOCKS * BLOCK, DOT, E2M1)
        values = tl.load(x + token[:, None] * x_stride + at[None, :], mask=given[:, None] & (at < cols)[None, :],
                         other=0.0).to(DOT)
        product = tl.dot(values, weights, input_precision="ieee")
        group = chunk // (GROUP // CHUNK)
        if E2M1:
            total += product * e8m0(tl.load(qparams + start + (group * n + row), mask=real, other=0))[None, :]
        else:
            pair = tl.load(qparams + start // 4 + (group * n + row), mask=real, other=0)
            scale = (pair << 16).to(tl.float32, bitcast=True)
            zero = (pair & HIGH).to(tl.float32, bitcast=True)
            total += product * scale[None, :] + tl.sum(values.to(tl.float32), axis=1)[:, None] * zero[None, :]
    tl.store(y + token[:, None] * y_stride + row[None, :], total.to(y.dtype.element_ty),
             mask=given[:, None] & real[None, :])


@triton.jit(do_not_specialize=["first"])  # else compiled anew for some tiles
def decode(qweight, qparams, out, first, groups, n, out_stride,
           GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
           E2M1: tl.constexpr = False):
    """Blocks `first` and on as numbers, w = (q - m) * scale + zero in fp32, rounded to out's dtype.

    qweight bytes, qparams int32 words; out [groups * GROUP, rows], out[k, r] of column k and row r of those blocks.
    Grid: blocks, pieces of CHUNK columns, which divides a group.
    """
    PLACE: tl.constexpr = 4 if BITS == 4 else 2
    PER_BYTE: tl.constexpr = 8 // PLACE
    STEP: tl.constexpr = BLOCK // PER_BYTE
    COLUMN: tl.constexpr = BLOCK * BITS // 8
    MIDDLE: tl.constexpr = 2**(BITS - 1)
    block = tl.program_id(0)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    column = ((first + block).to(tl.int64) * groups * GROUP + at) * COLUMN
    byte = tl.arange(0, STEP)
    bits = tl.load(qweight + (column[:, None] + byte[None, :])).to(tl.int32)
    bits = tl.join(bits, bits >> 4)
    if BITS != 4:
        bits = tl.join(bits, bits >> 2)
    codes = bits & (2**PLACE - 1)
    if BITS == 3:
        high = tl.load(qweight + (column[:, None] + STEP + (byte % (STEP // 2))[None, :])).to(tl.int32)
        high = high >> (byte // (STEP // 2))[None, :]
        high = tl.join(high, high >> 4)
        high = tl.join(high, high >> 2)
        codes = codes | ((high & 1) << 2)
    codes = tl.reshape(codes, (CHUNK, BLOCK))
    code = tl.arange(0, BLOCK)
    row = code // PER_BYTE + code % PER_BYTE * STEP
    group = (tl.program_id(1) * CHUNK // GROUP).to(tl.int64)
    pair = tl.load(qparams + (group * n + (first + block) * BLOCK + row))
    if E2M1:
        value = e2m1(codes) * e8m0(pair)[None, :]
    else:
        numbers = (codes | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE)
        scale = (pair << 16).to(tl.float32, bitcast=True)
        zero = (pair & HIGH).to(tl.float32, bitcast=True)
        value = numbers * scale[None, :] + zero[None, :]
    place = out + at.to(tl.int64)[:, None] * out_stride + (block * BLOCK + row)[None, :]
    tl.store(place, value.to(out.dtype.element_ty))
