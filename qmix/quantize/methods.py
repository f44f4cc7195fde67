"""How the codes of int4, int3 and int2 are chosen: rtn (rounding to nearest between a group's extremes) and hqq
(half-quadratic quantization, hqq.py), and how far the result is from the original.

A matrix is cut into strips, and a strip into tiles. A tile's working copies are about the size of a core's L2 cache. A
tile is also large enough that the threads of the pool spend their time in torch, which releases the interpreter lock,
and not waiting for that lock: with tiles a quarter as large, two threads are as slow as one. Each strip writes its own
piece of the result, and the cut depends on shapes only: the bytes are the same for every number of threads.

Within a strip weights lie transposed: reductions over a group then run along whole vectors, and codes come out in the
order in which they are stored.

N padded rows, K padded columns, B rows per block, g group size. A strip has R rows and C columns in
G groups of W columns (W = g, or less in the last group of a matrix whose columns are no multiple of g);
"steps" are units of the group's scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix import formats
from qmix.config import CALIBRATED, METHODS
from qmix.errors import UsageError
from qmix.formats import Packed
from qmix.formats.grouped import load_codes, store_codes
from qmix.formats.narrow import narrow
from qmix.formats.packed import refuse_nonfinite
from qmix.quantize import hqq
from qmix.sizes import MatrixSpec, round_up

TILE = 131072  # weights, of which a worker holds three copies in fp32, 512 KiB each
EMPTY = 0x88  # two codes of 8: what padding holds, as int4
BF16_MAX = 3.3895313892515355e38
KEPT = {4: (1.0,), 3: (1.0, 0.9, 0.8, 0.7), 2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)}  # of a group's range, by bits
SMALLEST = 2.0**-126  # a scale below this is taken as zero: its inverse would not be finite


@dataclass(frozen=True, slots=True)
class Error:
    """Squared error and squared weights, summed in float64; those of several matrices add up."""

    sum_sq_err: float
    sum_sq_weight: float

    @property
    def rms(self) -> float:
        """sqrt(sum((w - wq)^2) / sum(w^2)); 0 where all weights are 0."""
        return (self.sum_sq_err / self.sum_sq_weight) ** 0.5 if self.sum_sq_weight else 0.0

    def __add__(self, other: Error) -> Error:
        return Error(self.sum_sq_err + other.sum_sq_err, self.sum_sq_weight + other.sum_sq_weight)


@dataclass(frozen=True, slots=True)
class Strip:
    """A rectangle of whole groups. row, rows, col, cols are logical; padded_row is where the row lands;
    padded_rows is `rows` rounded up to a block; width counts columns of a group, tile groups of a tile."""

    row: int
    padded_row: int
    rows: int
    col: int
    cols: int
    padded_rows: int
    width: int
    tile: int

    @property
    def groups(self) -> int:
        return self.cols // self.width

    @property
    def tiles(self) -> Iterator[slice]:
        return (slice(g, min(g + self.tile, self.groups)) for g in range(0, self.groups, self.tile))


def quantize(weight: Tensor, spec: MatrixSpec, method: str, pool: Executor | None = None) -> Packed:
    """`weight` [rows, cols], any float dtype, as int4, int3 or int2 by "rtn" or "hqq"; the work is spread over `pool`.

    The same bytes for every pool. QmixError names the position of an inf or NaN.
    """
    return quantize_measured(weight, spec, method, pool)[0]


def quantize_measured(weight: Tensor, spec: MatrixSpec, method: str,
                           pool: Executor | None = None) -> tuple[Packed, Error]:
    """`quantize` and, for a third of its price, what `error` says of the result: the codes are at hand."""
    if method not in METHODS or method in CALIBRATED:
        raise UsageError(f"method: got {method!r}, want " + " or ".join(m for m in METHODS if m not in CALIBRATED))
    packed = blank(weight, spec)
    spare: list[Scratch] = []

    def work(strip: Strip) -> Error:
        scratch = spare.pop() if spare else Scratch.make(weight.dtype)
        found = _quantize(weight, packed, strip, method, scratch)
        spare.append(scratch)
        return found

    return packed, sum((map if pool is None else pool.map)(work, _strips(spec)), Error(0.0, 0.0))


def blank(weight: Tensor, spec: MatrixSpec) -> Packed:
    """Room for `weight` in the format of `spec`, all of it padding; UsageError where their shapes differ."""
    if tuple(weight.shape) != (spec.rows, spec.cols):
        raise UsageError(f"weight: got {list(weight.shape)}, want {[spec.rows, spec.cols]}")
    n, k, block = spec.padded_rows, spec.padded_cols, spec.block
    empty = narrow(torch.full((block // 2,), EMPTY, dtype=torch.uint8), spec.bits)
    qweight = empty.repeat(n // block, k, 1)
    qparams = torch.zeros(k // spec.group_size, n, 2, dtype=torch.bfloat16)
    return Packed.of(spec, {"qweight": qweight, "qparams": qparams}, "quantize")


def error(weight: Tensor, packed: Packed, pool: Executor | None = None) -> Error:
    """How far `packed` is from `weight` [rows, cols], decoded from the stored bytes, piece by piece."""
    total = Error(0.0, 0.0)
    if packed.spec.bits:
        spare: list[Scratch] = []

        def work(strip: Strip) -> Error:
            scratch = spare.pop() if spare else Scratch.make(weight.dtype)
            found = _error(weight, packed, strip, scratch)
            spare.append(scratch)
            return found

        for found in (map if pool is None else pool.map)(work, _strips(packed.spec)):
            total += found
        return total
    for start, tile in formats.tiles(packed):
        original = weight[start:start + len(tile)].float()
        squares = original.square().sum(dtype=torch.float64).item()
        total += Error(tile.sub(original).square_().sum(dtype=torch.float64).item(), squares)
    return total


def _strips(spec: MatrixSpec) -> Iterator[Strip]:
    """Cut a matrix; for Mixtral's at g64: 512 rows by 4096 columns, in tiles of 512 by 64."""
    g, part_rows, part_padded = spec.group_size, spec.rows // spec.parts, spec.padded_rows // spec.parts
    step = min(TILE // max(64, g), round_up(part_rows, 64))
    whole = spec.cols // g * g
    for part in range(spec.parts):
        for start in range(0, part_rows, step):
            rows = min(step, part_rows - start)
            padded = round_up(rows, spec.block)
            strip_rows = (part * part_rows + start, part * part_padded + start, rows)
            cols = TILE // padded * g  # so that a strip's parameters are no more than TILE either
            for col in range(0, whole, cols):
                yield Strip(*strip_rows, col, min(cols, whole - col), padded, g, TILE // padded // g)
            if whole < spec.cols:
                yield Strip(*strip_rows, whole, spec.cols - whole, padded, spec.cols - whole, 1)


@dataclass(frozen=True, slots=True)
class Scratch:
    """A worker's own memory: `source` for a strip in the dtype of the weights, `narrow` for a tile of it on
    its way there, `work` fp32 [3, TILE]."""

    source: Tensor
    narrow: Tensor
    work: Tensor

    @classmethod
    def make(cls, dtype: torch.dtype) -> Scratch:
        return cls(torch.empty(TILE * 128, dtype=dtype), torch.empty(TILE, dtype=dtype), torch.empty(3, TILE))


def _load(weight: Tensor, s: Strip, scratch: Scratch) -> Tensor:
    """The strip's weights, transposed: [G, W, R] in the dtype of `weight`; padded rows are zero."""
    source = scratch.source[:s.cols * s.padded_rows].view(s.cols, s.padded_rows)
    step = s.tile * s.width
    for col in range(0, s.cols, step):
        n = min(step, s.cols - col)
        narrow = scratch.narrow[:s.padded_rows * n].view(s.padded_rows, n)
        narrow[:s.rows] = weight[s.row:s.row + s.rows, s.col + col:s.col + col + n]
        narrow[s.rows:] = 0
        source[col:col + n] = narrow.T  # torch transposes fast only between contiguous tensors of one dtype
    return source.view(s.groups, s.width, s.padded_rows)


def _quantize(weight: Tensor, packed: Packed, s: Strip, method: str, scratch: Scratch) -> Error:
    """Quantize a strip into its place in `packed`; returns its error."""
    source = _load(weight, s, scratch)
    low, high = torch.empty(2, s.groups, s.padded_rows)
    work = scratch.work[:, :s.tile * s.width * s.padded_rows].view(3, -1, s.width, s.padded_rows)
    for groups in s.tiles:
        x = work[0, :groups.stop - groups.start].copy_(source[groups])
        torch.amin(x, 1, out=low[groups])
        torch.amax(x, 1, out=high[groups])
    if not torch.isfinite(low + high).all():
        refuse_nonfinite(weight[s.row:s.row + s.rows, s.col:s.col + s.cols], s.row, s.col)
    bits = packed.spec.bits
    middle = 2**(bits - 1)
    scale, zero = fit_range(low, high, bits)
    blocks = slice(s.padded_row // packed.spec.block, (s.padded_row + s.padded_rows) // packed.spec.block)
    found = Error(0.0, 0.0)
    for groups in s.tiles:
        tile = work[:, :groups.stop - groups.start]
        if method == "hqq":
            scale[groups], zero[groups] = fit_group(source[groups], low[groups], high[groups], bits, tile)
        inverse = inverse_of(scale[groups])
        steps = tile[0].copy_(source[groups]).mul_(inverse.unsqueeze(1))
        steps.sub_((zero[groups] * inverse).unsqueeze(1)).round_().clamp_(-middle, middle - 1)
        col = s.col + groups.start * s.width
        codes = steps.view(-1, s.padded_rows)
        store_codes(codes, packed["qweight"][blocks, col:col + len(codes)])
        x = tile[1].copy_(source[groups])
        found += _distance(steps.mul_(scale[groups].unsqueeze(1)).add_(zero[groups].unsqueeze(1)), x, s.rows)
    group = s.col // packed.spec.group_size
    params = packed["qparams"][group:group + s.groups, s.padded_row:s.padded_row + s.padded_rows]
    params[..., 0], params[..., 1] = scale, zero
    return found


def fit_range(low: Tensor, high: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """(scale, zero) fp32 of groups with these extremes, both exact in bf16: 2^bits steps reach both ends.

    The zero point, the value of the middle code, is rounded first, and the scale then taken wide enough for both
    ends: a group far from zero, whose zero point bf16 holds only coarsely, is not clipped.
    """
    middle = 2**(bits - 1)
    skew = 1 / (4 * middle - 2)  # the middle code lies half a step above the middle
    zero = (low / 2).add_(high, alpha=1 / 2).add_(high, alpha=skew).sub_(low, alpha=skew)
    zero = zero.clamp_(-BF16_MAX, BF16_MAX).bfloat16().float()
    top = middle - 1
    above, below = (high / top).sub_(zero, alpha=1 / top), (zero / middle).sub_(low, alpha=1 / middle)
    scale = torch.maximum(above, below).bfloat16().float()
    return scale.masked_fill_(scale < SMALLEST, 0.0), zero


def inverse_of(scale: Tensor) -> Tensor:
    """1 / scale; all codes of a group without scale are in the middle."""
    return torch.where(scale > 0, 1 / scale, 0.0)


def fit_group(x: Tensor, low: Tensor, high: Tensor, bits: int, work: Tensor) -> tuple[Tensor, Tensor]:
    """hqq's (scale, zero) fp32 [G, R], exact in bf16, of groups x [G, W, R] with these extremes. work: fp32 [3, G, W,
    R], overwritten.

    With few codes it pays to clip: of the ranges that KEPT names, each with the zero point that hqq finds for it, the
    one stays that leaves the least squared error.
    """
    middle = 2**(bits - 1)
    centre, reach = (low + high) / 2, (high - low) / 2
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for kept in KEPT[bits]:
        scale, zero = fit_range(low, high, bits) if kept == 1 else \
            fit_range(centre - kept * reach, centre + kept * reach, bits)
        inverse = inverse_of(scale)
        steps = work[0].copy_(x).mul_(inverse.unsqueeze(1))
        zero = hqq.refine(steps, scale, inverse, zero, work[1:], middle)
        if len(KEPT[bits]) == 1:
            return scale, zero
        steps.sub_((zero * inverse).unsqueeze(1))
        steps.sub_(torch.round(steps, out=work[1]).clamp_(-middle, middle - 1))
        error = steps.mul_(scale.unsqueeze(1)).square_().sum(1)
        if best is None:
            best = scale, zero, error
            continue
        better = error < best[2]
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]),
                torch.where(better, error, best[2]))
    assert best is not None
    return best[0], best[1]


def _error(weight: Tensor, packed: Packed, s: Strip, scratch: Scratch) -> Error:
    """The error of a strip."""
    source, group = _load(weight, s, scratch), s.col // packed.spec.group_size
    params = packed["qparams"][group:group + s.groups, s.padded_row:s.padded_row + s.padded_rows].float()
    scale, zero = params.unsqueeze(1).unbind(-1)
    blocks = slice(s.padded_row // packed.spec.block, (s.padded_row + s.padded_rows) // packed.spec.block)
    work = scratch.work[:, :s.tile * s.width * s.padded_rows].view(3, -1, s.width, s.padded_rows)
    found = Error(0.0, 0.0)
    for groups in s.tiles:
        x, w = work[:2, :groups.stop - groups.start]
        x.copy_(source[groups])
        col = s.col + groups.start * s.width
        load_codes(packed["qweight"][blocks, col:col + w.shape[0] * s.width], w.view(-1, s.padded_rows))
        found += _distance(w.mul_(scale[groups]).add_(zero[groups]), x, s.rows)
    return found


def _distance(w: Tensor, x: Tensor, rows: int) -> Error:
    """The error of a tile: w [G, W, R], overwritten, as decoded, x as it was; rows from `rows` on are padding."""
    w.sub_(x)[..., rows:] = 0
    return Error(torch.linalg.vector_norm(w, dtype=torch.float64).item() ** 2,
                 torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2)
