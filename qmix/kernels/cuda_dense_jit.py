"""Device code, in Triton: a few tokens times a matrix that is stored row after row, int8 or plain. See cuda_ops.py.

N rows, M tokens.
"""

# mypy: disable-error-code="assignment"
# (tuples of tensors grow here, which is how Triton has a number of them that is known when it compiles)

from __future__ import annotations

import triton
import triton.language as tl

SIGNED = tl.constexpr(0x4B000080)  # the bits of 2^23 + 128 as fp32


@triton.jit
def gemv(x, weight, scale, y, x_stride, y_stride, tokens, cols, width, n, M: tl.constexpr, ROWS: tl.constexpr,
         COLS: tl.constexpr, UNROLL: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr):
    """ROWS rows times all tokens, in fp32; each weight is read once.

    Sums stay in place, one for each row, column of a tile and token, until the end, so that their order depends on
    neither M nor `tokens`. COLS must be less than a program has threads: Triton then loads x where it is multiplied.
    A code q becomes a float as the last bits of 2^23 + 128 + q, exactly, without the slow conversion.
    x fp32 [., cols]; weight [N, width], int8 with bf16 `scale` [N] where SCALED; y fp32 [., N], added to where ADD.
    Grid: pieces of the rows.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < n
    inside = tl.arange(0, COLS)
    line = weight + row.to(tl.int64)[:, None] * width
    sums = ()
    ends = ()
    for m in tl.static_range(M):
        sums += (tl.zeros((ROWS, COLS), tl.float32),)
        ends += (tl.where(m < tokens, cols, 0),)
    for first in range(0, width, COLS * UNROLL):
        for step in tl.static_range(UNROLL):
            at = first + step * COLS + inside
            numbers = tl.load(line + at[None, :], mask=real[:, None] & (at < width)[None, :], other=0)
            if SCALED:
                numbers = (numbers.to(tl.int32) + SIGNED).to(tl.float32, bitcast=True) - 8388736.0
            else:
                numbers = numbers.to(tl.float32)
            new_sums = ()
            for m in tl.static_range(M):
                value = tl.load(x + m * x_stride + at, mask=at < ends[m], other=0.0)
                new_sums += (sums[m] + numbers * value[None, :],)
            sums = new_sums
    for m in tl.static_range(M):
        total = tl.sum(sums[m], axis=1)
        if SCALED:
            total *= tl.load(scale + row, mask=real, other=0.0).to(tl.float32)
        out = y + m * y_stride + row
        given = row < tl.where(m < tokens, n, 0)
        if ADD:
            total += tl.load(out, mask=given, other=0.0)
        tl.store(out, total, mask=given)
