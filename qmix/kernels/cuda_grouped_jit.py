"""The device code of cuda_grouped.py, in Triton: the experts of many tokens, all experts of a layer in one launch.

`sort` puts the pairs of a token and one of its experts in order of expert, each expert's padded to whole tiles.
`gate_up` and `down` take a tile each, look up the slot of its expert and multiply as cuda_jit.matmul does, with the
same numbers; ggml's formats, where PARAMS is not "", as cuda_carried_jit.matmul does. What lies between them is in the
order of the tiles. `combine` adds up each token's results.

T tokens, K experts per token, P = T * K pairs, E experts, N padded rows, F expert inner, H hidden.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from qmix.kernels.cuda_carried_jit import piece_of as piece_of_carried
from qmix.kernels.cuda_carried_jit import products as products_of_carried
from qmix.kernels.cuda_jit import HIGH, activated, e8m0, numbers


@triton.jit(do_not_specialize=["pairs", "tiles"])  # else compiled anew for some prompts
def sort(ids, order, expert_of, pairs, tiles, TILE: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr):
    """ids [P] int64 -> order [tiles * TILE]: pairs by expert, each expert's in their order and from a tile's begin on,
    -1 for padding; expert_of [tiles], -1 for tiles that are not needed. Both int32.

    Every program counts all pairs, and so knows where its expert's tiles begin. Grid: E.
    """
    own = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, pairs, SIZE):
        at = first + tl.arange(0, SIZE)
        given = at < pairs
        counts += tl.histogram(tl.load(ids + at, mask=given, other=0).to(tl.int32), BINS, mask=given)
    needed = (counts + (TILE - 1)) // TILE
    begin = tl.sum(tl.where(bins < own, needed, 0))
    end = begin + tl.sum(tl.where(bins == own, needed, 0))
    place = begin * TILE
    for first in range(0, pairs, SIZE):
        at = first + tl.arange(0, SIZE)
        mine = (tl.load(ids + at, mask=at < pairs, other=-1).to(tl.int32) == own).to(tl.int32)
        tl.store(order + (place + tl.cumsum(mine, 0) - 1), at, mask=mine != 0)
        place += tl.sum(mine)
    rest = place + tl.arange(0, TILE)
    tl.store(order + rest, -1, mask=rest < end * TILE)
    for first in range(begin, end, SIZE):
        tile = first + tl.arange(0, SIZE)
        tl.store(expert_of + tile, own, mask=tile < end)
    if own == tl.num_programs(0) - 1:
        for first in range(end, tiles, SIZE):
            tile = first + tl.arange(0, SIZE)
            tl.store(expert_of + tile, -1, mask=tile < tiles)


@triton.jit
def slot_of(expert_of, table, tile, slot, base, slots):
    """The slot, in its slab, of a tile's expert: `slot` where the host names it, else as `table` [E] has it; -1 for
    none. The slab's first slot is number `base` in the table."""
    expert = tl.load(expert_of + tile)
    found = tl.load(table + tl.maximum(expert, 0)) if slot < 0 else slot
    found = found - base
    return tl.where((expert >= 0) & (found >= 0) & (found < slots), found, -1)


@triton.jit
def piece_of(qweight, blocks, groups, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
             BITS: tl.constexpr):
    """Of ROWS rows of a matrix of so many blocks, which may be a part of a block: the addresses of the bytes with their
    codes, for `numbers` (low, third, aside, exists), and the row of each code [ROWS]. Which rows: program_id(1)."""
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 4
    STEP: tl.constexpr = BLOCK // PER_BYTE
    byte = tl.program_id(1) * (ROWS // PER_BYTE) + tl.arange(0, ROWS // PER_BYTE)
    block = byte // STEP
    column = block * groups * GROUP * (BLOCK * BITS // 8)
    low = qweight + (column + byte % STEP)[None, :]
    third, aside = low, 0
    if BITS == 3:
        third = qweight + (column + STEP + byte % (STEP // 2))[None, :]
        aside = (byte % STEP // (STEP // 2))[None, :]
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    of = place // PER_BYTE
    return low, third, aside, (block < blocks)[None, :], of // STEP * BLOCK + of % STEP + place % PER_BYTE * STEP


@triton.jit
def added(values, sums, low, third, aside, offset, exists, qparams, start, at, real, BITS: tl.constexpr,
          CHUNK: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, E2M1: tl.constexpr):
    """values [TILE, CHUNK] times a chunk of columns of ROWS rows, fp32 [TILE, ROWS]. sums: of each row of values, not
    read where E2M1; qparams: see gate_up; at [ROWS]: where the chunk's lie, behind `start` bytes."""
    weights = numbers(low, third, aside, offset, exists, BITS, CHUNK, ROWS, DOT, E2M1)
    product = tl.dot(values, weights, input_precision="ieee")
    if E2M1:
        result = product * e8m0(tl.load(qparams + start + at, mask=real, other=0))[None, :]
    else:
        both = tl.load(qparams + start // 4 + at, mask=real, other=0)
        scale = (both << 16).to(tl.float32, bitcast=True)
        zero = (both & HIGH).to(tl.float32, bitcast=True)
        result = product * scale[None, :] + sums * zero[None, :]
    return result


@triton.jit
def products(lines, low, third, aside, exists, qparams, start, row, real, other, half, cols, groups, n,
             GATED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
             ROWS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, RAGGED: tl.constexpr, E2M1: tl.constexpr):
    """The rows that begin at `lines` [TILE] times ROWS rows of a matrix and, where GATED, those that lie `other` bytes
    and `half` rows further on: (fp32 [TILE, ROWS], the same or zeros)."""
    COLUMN: tl.constexpr = BLOCK * BITS // 8
    inside = tl.arange(0, CHUNK)
    one = tl.zeros((TILE, ROWS), tl.float32)
    two = tl.zeros((TILE, ROWS), tl.float32)
    for chunk in range(0, groups * (GROUP // CHUNK)):
        at = chunk * CHUNK + inside
        offset = (at * COLUMN)[:, None]
        source = lines[:, None] + at[None, :]
        values = (tl.load(source, mask=(at < cols)[None, :], other=0.0) if RAGGED else tl.load(source)).to(DOT)
        sums = tl.sum(values.to(tl.float32), axis=1)[:, None]
        place = chunk // (GROUP // CHUNK) * n + row
        one += added(values, sums, low, third, aside, offset, exists, qparams, start, place, real, BITS, CHUNK, ROWS,
                     DOT, E2M1)
        if GATED:
            two += added(values, sums, low + other, third + other, aside, offset, exists, qparams, start, place + half,
                         real, BITS, CHUNK, ROWS, DOT, E2M1)
    return one, two


@triton.jit(do_not_specialize=["table", "first", "slot", "base", "slots"])
def gate_up(x, qweight, qparams, halves, bias, inner, order, expert_of, table, first, slot, base, slots, slot_bytes,
            x_stride, cols, groups, n, out, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
            BITS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
            RAGGED: tl.constexpr, E2M1: tl.constexpr, BIASED: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr,
            LIMIT: tl.constexpr, TABLE: tl.constexpr = False, MIDDLE: tl.constexpr = 0, ZERO: tl.constexpr = False,
            PARAMS: tl.constexpr = ""):
    """activated(gate(x), up(x)) of the tiles from `first` on: of each ROWS rows of gate and those of up.

    x [T, H]; qparams: pairs, int32 words, or where E2M1 or PARAMS scales, bytes; halves: with PARAMS the same as fp16,
    and qweight are words; bias, where BIASED: fp32 [2 F] of slot 0; inner
    [tiles of the launch * TILE, F = out], tiles in their order; in padding is what another token gives. Gate and up
    have half of the N rows each. RAGGED: `cols` ends within a group. Grid: tiles, pieces of a half.
    """
    tile = first + tl.program_id(0)
    own = slot_of(expert_of, table, tile, slot, base, slots)
    if own < 0:
        return
    start = own.to(tl.int64) * slot_bytes
    within = tl.arange(0, TILE)
    token = (tl.maximum(tl.load(order + (tile * TILE + within)), 0) // K).to(tl.int64)  # padding: the first one
    blocks = n // BLOCK // 2
    other = blocks * groups * GROUP * (BLOCK * BITS // 8)  # bytes from a row of gate to that of up
    if PARAMS != "":
        at, word, exists, row = piece_of_carried(qweight + start // 4, tl.program_id(1), blocks, groups, GROUP, BITS,
                                                 ROWS)
        gate, up = products_of_carried(x + token * x_stride, within >= 0, at, word, exists, qparams + start,
                                       halves + start // 2, tl.minimum(row, n // 2 - 1), other // 4, n // 2, cols,
                                       groups, True, GROUP, BITS, TABLE, MIDDLE, ZERO, PARAMS, TILE, ROWS, DOT)
    else:
        low, third, aside, exists, row = piece_of(qweight + start, blocks, groups, ROWS, GROUP, BLOCK, BITS)
        gate, up = products(x + token * x_stride, low, third, aside, exists, qparams, start, row, row < n // 2, other,
                            n // 2, cols, groups, n, True, GROUP, BLOCK, BITS, TILE, ROWS, CHUNK, DOT, RAGGED, E2M1)
    if BIASED:
        own_bias = bias + start // 4 + row
        gate += tl.load(own_bias, mask=row < out, other=0.0)[None, :]
        up += tl.load(own_bias + out, mask=row < out, other=0.0)[None, :]
    result = activated(gate, up, KIND, ALPHA, LIMIT)
    line = (tl.program_id(0) * TILE + within).to(tl.int64) * out
    tl.store(inner + line[:, None] + row[None, :], result.to(inner.dtype.element_ty),
             mask=(row < out)[None, :])


@triton.jit(do_not_specialize=["table", "first", "slot", "base", "slots"])
def down(inner, qweight, qparams, halves, bias, rows, order, expert_of, table, first, slot, base, slots, slot_bytes,
         cols, groups, n, out, GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
         ROWS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, RAGGED: tl.constexpr, E2M1: tl.constexpr,
         BIASED: tl.constexpr, TABLE: tl.constexpr = False, MIDDLE: tl.constexpr = 0, ZERO: tl.constexpr = False,
         PARAMS: tl.constexpr = ""):
    """The second product, of what `gate_up` made of the same tiles [., F = cols], into rows [P, H = out] fp32, each at
    its pair. bias: fp32 [H] of slot 0. Grid: tiles, pieces of the N rows."""
    tile = first + tl.program_id(0)
    own = slot_of(expert_of, table, tile, slot, base, slots)
    if own < 0:
        return
    start = own.to(tl.int64) * slot_bytes
    within = tl.arange(0, TILE)
    line = (tl.program_id(0) * TILE + within).to(tl.int64) * cols
    if PARAMS != "":
        at, word, exists, row = piece_of_carried(qweight + start // 4, tl.program_id(1), n // BLOCK, groups, GROUP,
                                                 BITS, ROWS)
        total, _ = products_of_carried(inner + line, within >= 0, at, word, exists, qparams + start,
                                       halves + start // 2, tl.minimum(row, n - 1), 0, 0, cols, groups, False, GROUP,
                                       BITS, TABLE, MIDDLE, ZERO, PARAMS, TILE, ROWS, DOT)
    else:
        low, third, aside, exists, row = piece_of(qweight + start, n // BLOCK, groups, ROWS, GROUP, BLOCK, BITS)
        total, _ = products(inner + line, low, third, aside, exists, qparams, start, row, row < n, 0, 0, cols, groups,
                            n, False, GROUP, BLOCK, BITS, TILE, ROWS, CHUNK, DOT, RAGGED, E2M1)
    if BIASED:
        total += tl.load(bias + start // 4 + row, mask=row < out, other=0.0)[None, :]
    pair = tl.load(order + (tile * TILE + within))
    target = pair.to(tl.int64) * out
    tl.store(rows + target[:, None] + row[None, :], total, mask=(pair >= 0)[:, None] & (row < out)[None, :])


@triton.jit
def combine(rows, topk_weights, out, weight_stride, hidden, K: tl.constexpr, SIZE: tl.constexpr):
    """sum_k topk_weights[:, k] * rows[:, k], in that order, each product and sum rounded: rows [T, K, H] and out [T, H]
    fp32. Grid: T, pieces of H."""
    token = tl.program_id(0).to(tl.int64)
    weight = topk_weights + token * weight_stride
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    mask = at < hidden
    total = tl.load(rows + token * K * hidden + at, mask=mask, other=0.0) * tl.load(weight)
    for k in tl.static_range(1, K):
        total += tl.load(rows + (token * K + k) * hidden + at, mask=mask, other=0.0) * tl.load(weight + k)
    tl.store(out + token * hidden + at, total, mask=mask)
