"""Device code, in Triton: rows of an embedding in one of ggml's formats, for a few tokens. See cuda_carried.py.

V rows, H columns, T tokens. A program has SIZE neighbouring columns of one token's row.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from qmix.kernels.cuda_carried_jit import looked_up, params


@triton.jit
def rows(tokens, qweight, scales, halves, out, factor, hidden, groups, out_stride, GROUP: tl.constexpr,
         BITS: tl.constexpr, TABLE: tl.constexpr, MIDDLE: tl.constexpr, ZERO: tl.constexpr, PARAMS: tl.constexpr,
         SIZE: tl.constexpr):
    """Row tokens[t] with ggml's roundings to fp32, times factor, into out fp32 [T, H]. qweight, scales: bytes, halves:
    scales as fp16, as formats/carried.py lays them out; groups: of a padded row. Grid: T, pieces of H."""
    HALF: tl.constexpr = 256 if BITS == 8 else 192 if BITS == 6 else 128  # bytes of four columns of a block
    token = tl.program_id(0)
    number = tl.load(tokens + token).to(tl.int64)
    block, row = number // 64, (number % 64).to(tl.int32)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    exists = column < hidden
    column = tl.minimum(column, hidden - 1)
    inside, second = column % 4, column // 4 % 2
    at = qweight + ((block * (groups * (GROUP // 8)) + column // 8) * (64 * BITS))
    if BITS == 8:
        code = tl.load(at + (second * HALF + 4 * row + inside)).to(tl.int8, bitcast=True).to(tl.int32)
    else:
        code = (tl.load(at + (second * HALF + 4 * (row % 32) + inside)).to(tl.int32) >> (row // 32 * 4)) & 15
    if BITS == 5:
        upper = tl.load(at + (256 + 4 * (row % 16) + inside)).to(tl.int32) >> (row // 16 + 4 * second)
        code = code | ((upper & 1) << 4)
    if BITS == 6:
        upper = tl.load(at + (second * HALF + 128 + 4 * (row % 16) + inside)).to(tl.int32) >> (row // 16 * 2)
        code = code | ((upper & 3) << 4)
    if TABLE:
        code = looked_up(code) - 128
    scale, zero = params(scales, halves, block, column // GROUP, row, groups, ZERO, PARAMS)
    value = (code - MIDDLE).to(tl.float32) * scale
    if ZERO:
        value += zero
    tl.store(out + token * out_stride + column, value * factor, mask=exists)
