"""The numbers in quantized weights, a piece of rows at a time, in fp32.

Each product is one fp32 product, rounded once; `Checkpoint` then rounds the number to the model's dtype. Of integer
codes it is (q - zero) scale, whose factors have at most 9 and 11 bits (fp16 scales; 8 of bf16), so the fp32 product is
exact and the result is the exact number, rounded to the model's dtype once. Of FP8 with fp32 scales and of NVFP4 it is
rounded to fp32 first, as the programs that write them do it.

    FP8, int8        code * scale                       one scale for a block of rows and columns
    integers         (code - zero) * scale              one scale and zero for a group of columns
    NVFP4            e2m1 * (scale / global)            compressed-tensors; modelopt: e2m1 * (scale * global)
    MXFP4            e2m1 * 2^(scale - 127)

N rows out, K columns in, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.formats.mxfp4 import E2M1, powers
from qmix.lowbit import codes
from qmix.schemes import Awq, Fp4, Gptq, PackedInts, Scaled, Scheme
from qmix.schemes.record import E2M1_GROUP

Parts = Mapping[str, Tensor]  # by role, in the dtypes of the files; scales, zeros as matrices


@dataclass(frozen=True, slots=True)
class Levels:
    """Rows of integer weights: w = q * scale. q int16 [n, K], the zero point subtracted; scales fp32 [n, G]; order
    int64 [K], the group of each column."""

    q: Tensor
    scales: Tensor
    order: Tensor

    def numbers(self) -> Tensor:
        return self.q.float().mul_(self.scales.index_select(1, self.order))


def numbers(scheme: Scheme, parts: Parts, shape: tuple[int, int], begin: int, end: int) -> Tensor:
    """fp32 [end - begin, K] of a matrix of `shape`; begin: a multiple of 64."""
    if isinstance(scheme, Fp4):
        return _fp4(scheme, parts, begin, end)
    if isinstance(scheme, Scaled) and scheme.number == "fp8":
        return _fp8(scheme, parts, shape, begin, end)
    return levels(scheme, parts, shape, begin, end).numbers()


def levels(scheme: Scheme, parts: Parts, shape: tuple[int, int], begin: int, end: int) -> Levels:
    """The same of a scheme of integers."""
    k = shape[1]
    zeros: Tensor | None
    if isinstance(scheme, Awq):
        q = codes.awq(parts["codes"][:, begin // 8:-(-end // 8)]).T[:end - begin].short()
        zeros = codes.awq(parts["zeros"][:, begin // 8:-(-end // 8)]).T[:end - begin].short()
        return _grouped(q, zeros, parts["scales"][:, begin:end].T, _order(k, scheme.group))
    if isinstance(scheme, Gptq):
        q = codes.stream(parts["codes"][:, begin:end], scheme.bits).T.short()
        bits = scheme.bits
        zeros = codes.stream(parts["zeros"][:, begin * bits // 32:-(-end * bits // 32)].T, bits)[:end - begin].short()
        if scheme.version == 1:
            zeros += 1
        order = parts["order"].long() if "order" in parts else _order(k, scheme.group)
        return _grouped(q, zeros, parts["scales"][:, begin:end].T, order)
    if isinstance(scheme, PackedInts):
        middle = 2 ** (scheme.bits - 1)
        q = _unpacked(scheme, parts["codes"][begin:end], k).short().sub_(middle)
        zeros = None
        if scheme.zeros and parts["zeros"].dtype == torch.int8:
            zeros = parts["zeros"][begin:end].short()
        elif scheme.zeros:
            zeros = _unpacked(scheme, parts["zeros"].T, shape[0]).T[begin:end].short().sub_(middle)
        order = parts["order"].long() if "order" in parts else _order(k, scheme.group)
        return _grouped(q, zeros, parts["scales"][begin:end], order)
    assert isinstance(scheme, Scaled), scheme
    rows, cols = scheme.block
    q = parts["codes"][begin:end].short()
    scales = _rows(parts["scales"], rows, begin, end)
    zeros = _rows(parts["zeros"], rows, begin, end).short() if scheme.zeros else None
    return _grouped(q, zeros, scales, _order(k, cols))


def _unpacked(scheme: PackedInts, words: Tensor, count: int) -> Tensor:
    """Rows of words, each of `count` codes: uint8 [R, count]."""
    if scheme.is_stream(words.shape[1], count):
        return codes.stream(words.T, scheme.bits)[:count].T
    return codes.lowest_first(words, scheme.bits)[:, :count]


def _grouped(q: Tensor, zeros: Tensor | None, scales: Tensor, order: Tensor) -> Levels:
    if zeros is not None:
        q = q - zeros.index_select(1, order)
    return Levels(q, scales.float(), order)


def _order(k: int, group: int) -> Tensor:
    return torch.arange(k).div_(group or k, rounding_mode="floor")


def _rows(found: Tensor, rows: int, begin: int, end: int) -> Tensor:
    """Of a grid with an entry for each `rows` rows, 0 = all, one row for each of the rows from begin to end."""
    at = torch.arange(begin, end) // rows if rows else torch.zeros(end - begin, dtype=torch.int64)
    return found.index_select(0, at)


def _fp8(scheme: Scaled, parts: Parts, shape: tuple[int, int], begin: int, end: int) -> Tensor:
    rows, cols = scheme.block
    scales = _rows(parts["scales"].float(), rows, begin, end)
    return parts["codes"][begin:end].float().mul_(scales.index_select(1, _order(shape[1], cols)))


def _fp4(scheme: Fp4, parts: Parts, begin: int, end: int) -> Tensor:
    raw = parts["codes"][begin:end]
    both = torch.stack((raw & 15, raw >> 4), -1).view(len(raw), -1)
    w = torch.tensor(E2M1).index_select(0, both.view(-1).int()).view(len(raw), -1, E2M1_GROUP[scheme.kind])
    if scheme.kind == "mxfp4":
        scales = powers(parts["scales"][begin:end].view(torch.uint8))
    else:
        whole = parts["global"].view(())
        scales = parts["scales"][begin:end].float()
        scales = scales.div_(whole) if scheme.divides else scales.mul_(whole)
    return w.mul_(scales.unsqueeze(-1)).view(len(raw), -1)
