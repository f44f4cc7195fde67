"""The device code of cuda_grouped.py, in Triton: the experts of many tokens, all experts of a layer in one launch.

`sort` puts the pairs of a token and one of its experts in order of expert, each expert's padded to whole tiles.
`gate_up` and `down` take a tile each, look up the slot of its expert and multiply as cuda_jit.matmul does, with the
same numbers. What lies between them is in the order of the tiles. `combine` adds up each token's results.

T tokens, K experts per token, P = T * K pairs, E experts, N padded rows, F expert inner, H hidden.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from qmix.kernels.cuda_jit import HIGH, numbers


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


@triton.jit(do_not_specialize=["table", "first", "slot", "base", "slots"])
def gate_up(x, qweight, qparams, inner, order, expert_of, table, first, slot, base, slots, slot_bytes, x_stride, cols,
            groups, n, out, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
            TILE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, RAGGED: tl.constexpr):
    """silu(gate(x)) * up(x) of the tiles from `first` on: of each ROWS rows of gate and those of up.

    x [T, H]; inner [tiles of the launch * TILE, F = out], tiles in their order; in padding is what another token gives.
    Gate and up have half of the N rows each. RAGGED: `cols` ends within a group. Grid: tiles, pieces of a half.
    """
    COLUMN: tl.constexpr = BLOCK * BITS // 8
    tile = first + tl.program_id(0)
    own = slot_of(expert_of, table, tile, slot, base, slots)
    if own < 0:
        return
    start = own.to(tl.int64) * slot_bytes
    within = tl.arange(0, TILE)
    token = (tl.maximum(tl.load(order + (tile * TILE + within)), 0) // K).to(tl.int64)  # padding: the first one
    blocks = n // BLOCK // 2
    other = blocks * groups * GROUP * COLUMN  # bytes from a row of gate to that of up
    low, third, aside, exists, row = piece_of(qweight + start, blocks, groups, ROWS, GROUP, BLOCK, BITS)
    real = row < n // 2

    inside = tl.arange(0, CHUNK)
    gate = tl.zeros((TILE, ROWS), tl.float32)
    up = tl.zeros((TILE, ROWS), tl.float32)
    for chunk in range(0, groups * (GROUP // CHUNK)):
        at = chunk * CHUNK + inside
        offset = (at * COLUMN)[:, None]
        source = x + token[:, None] * x_stride + at[None, :]
        values = (tl.load(source, mask=(at < cols)[None, :], other=0.0) if RAGGED else tl.load(source)).to(DOT)
        sums = tl.sum(values.to(tl.float32), axis=1)[:, None]
        pair_at = qparams + start // 4 + (chunk // (GROUP // CHUNK) * n + row)
        weights = numbers(low, third, aside, offset, exists, BITS, CHUNK, ROWS, DOT)
        product = tl.dot(values, weights, input_precision="ieee")
        both = tl.load(pair_at, mask=real, other=0)
        scale = (both << 16).to(tl.float32, bitcast=True)
        zero = (both & HIGH).to(tl.float32, bitcast=True)
        gate += product * scale[None, :] + sums * zero[None, :]
        weights = numbers(low + other, third + other, aside, offset, exists, BITS, CHUNK, ROWS, DOT)
        product = tl.dot(values, weights, input_precision="ieee")
        both = tl.load(pair_at + n // 2, mask=real, other=0)
        scale = (both << 16).to(tl.float32, bitcast=True)
        zero = (both & HIGH).to(tl.float32, bitcast=True)
        up += product * scale[None, :] + sums * zero[None, :]
    result = gate / (1.0 + tl.exp(-gate)) * up
    line = (tl.program_id(0) * TILE + within).to(tl.int64) * out
    tl.store(inner + line[:, None] + row[None, :], result.to(inner.dtype.element_ty),
             mask=(row < out)[None, :])


@triton.jit(do_not_specialize=["table", "first", "slot", "base", "slots"])
def down(inner, qweight, qparams, rows, order, expert_of, table, first, slot, base, slots, slot_bytes, cols, groups, n,
         out, GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
         CHUNK: tl.constexpr, DOT: tl.constexpr, RAGGED: tl.constexpr):
    """The second product, of what `gate_up` made of the same tiles [., F = cols], into rows [P, H = out] fp32, each at
    its pair. Grid: tiles, pieces of the N rows."""
    COLUMN: tl.constexpr = BLOCK * BITS // 8
    tile = first + tl.program_id(0)
    own = slot_of(expert_of, table, tile, slot, base, slots)
    if own < 0:
        return
    start = own.to(tl.int64) * slot_bytes
    within = tl.arange(0, TILE)
    line = (tl.program_id(0) * TILE + within).to(tl.int64) * cols
    low, third, aside, exists, row = piece_of(qweight + start, n // BLOCK, groups, ROWS, GROUP, BLOCK, BITS)
    real = row < n

    inside = tl.arange(0, CHUNK)
    total = tl.zeros((TILE, ROWS), tl.float32)
    for chunk in range(0, groups * (GROUP // CHUNK)):
        at = chunk * CHUNK + inside
        weights = numbers(low, third, aside, (at * COLUMN)[:, None], exists, BITS, CHUNK, ROWS, DOT)
        source = inner + line[:, None] + at[None, :]
        values = (tl.load(source, mask=(at < cols)[None, :], other=0.0) if RAGGED else tl.load(source)).to(DOT)
        product = tl.dot(values, weights, input_precision="ieee")
        both = tl.load(qparams + start // 4 + (chunk // (GROUP // CHUNK) * n + row), mask=real, other=0)
        scale = (both << 16).to(tl.float32, bitcast=True)
        zero = (both & HIGH).to(tl.float32, bitcast=True)
        total += product * scale[None, :] + tl.sum(values.to(tl.float32), axis=1)[:, None] * zero[None, :]
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
