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

from collections.abc import Callable, Mapping
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
    """Rows of integer weights: w = (codes - zeros - middle) scales. codes uint8 or int8 [n, K]; zeros int16 [n, G] or
    None; scales fp32 [n, G]; group: columns that share these; order: int64 [K], the group of each column where they do
    not lie together, else None. All may be transposed views: what is stored along K is computed along K."""

    codes: Tensor
    middle: int
    zeros: Tensor | None
    scales: Tensor
    group: int
    order: Tensor | None = None

    def numbers(self) -> Tensor:
        """fp32 [n, K]."""
        w = self.codes.float()
        if self.middle:
            w.sub_(self.middle)
        if self.zeros is not None:
            self._each(w, self.zeros.float(), Tensor.sub_)
        return self._each(w, self.scales, Tensor.mul_)

    def integers(self) -> Tensor:
        """int16 [n, K], codes - zeros - middle."""
        q = self.codes.short()
        if self.middle:
            q.sub_(self.middle)
        return q if self.zeros is None else self._each(q, self.zeros, Tensor.sub_).contiguous()

    def columns(self, step: int) -> Tensor:
        """fp32 [n, K / step], the scales of every `step`-th column."""
        return self.scales.index_select(1, self._order(self.codes.shape[1])[::step])

    def _order(self, k: int) -> Tensor:
        return torch.arange(k) // self.group if self.order is None else self.order

    def _each(self, w: Tensor, of_group: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`apply` to w [n, K], in place, and the entry [n, G] of each column's group."""
        n, k = w.shape
        if self.order is not None or k % self.group:
            apply(w, of_group.index_select(1, self._order(k)))
        elif w.is_contiguous():
            apply(w.view(n, -1, self.group), of_group.unsqueeze(-1))
        else:
            apply(w.T.view(-1, self.group, n), of_group.T.unsqueeze(1))
        return w


def numbers(scheme: Scheme, parts: Parts, shape: tuple[int, int], begin: int, end: int) -> Tensor:
    """fp32 [end - begin, K] of a matrix of `shape`; begin: a multiple of 64."""
    if isinstance(scheme, Fp4):
        return _fp4(scheme, parts, begin, end)
    if isinstance(scheme, Scaled) and scheme.number == "fp8":
        return _fp8(scheme, parts, begin, end)
    return levels(scheme, parts, shape, begin, end).numbers()


def levels(scheme: Scheme, parts: Parts, shape: tuple[int, int], begin: int, end: int) -> Levels:
    """The same of a scheme of integers."""
    order = parts["order"].long() if "order" in parts else None
    if order is not None and torch.equal(order, torch.arange(shape[1]) // _columns(scheme, shape)):
        order = None
    return Levels(*_levels(scheme, parts, shape, begin, end), _columns(scheme, shape), order)


def _columns(scheme: Scheme, shape: tuple[int, int]) -> int:
    """That share a scale."""
    assert not isinstance(scheme, Fp4)
    return (scheme.block[1] if isinstance(scheme, Scaled) else scheme.group) or shape[1]


def _levels(scheme: Scheme, parts: Parts, shape: tuple[int, int], begin: int,
            end: int) -> tuple[Tensor, int, Tensor | None, Tensor]:
    """codes, middle, zeros and scales of Levels."""
    n, k = shape
    if isinstance(scheme, Awq):
        words = slice(begin // 8, -(-end // 8))
        zeros = codes.awq(parts["zeros"][:, words])[:, :end - begin].short()
        found = codes.awq(parts["codes"][:, words])[:, :end - begin]
        return found.T, 0, zeros.T, parts["scales"][:, begin:end].float().T
    if isinstance(scheme, Gptq):
        bits = scheme.bits
        words = slice(begin * bits // 32, -(-end * bits // 32))
        zeros = codes.stream(parts["zeros"][:, words].T, bits)[:end - begin].short()
        if scheme.version == 1:
            zeros += 1
        return codes.stream(parts["codes"][:, begin:end], bits).T, 0, zeros, parts["scales"][:, begin:end].float().T
    if isinstance(scheme, PackedInts):
        middle, packed = 2 ** (scheme.bits - 1), _unpacked(scheme, parts["codes"][begin:end], k)
        scales = parts["scales"][begin:end].float()
        if not scheme.zeros:
            return packed, middle, None, scales
        if parts["zeros"].dtype == torch.int8:
            return packed, middle, parts["zeros"][begin:end].short(), scales
        zeros = _unpacked(scheme, parts["zeros"].T, n).T[begin:end].short()
        return packed, 0, zeros, scales  # middle is in both
    assert isinstance(scheme, Scaled), scheme
    rows, _ = scheme.block
    spread = _rows(parts["zeros"], rows, begin, end).short() if scheme.zeros else None
    return parts["codes"][begin:end], 0, spread, _rows(parts["scales"], rows, begin, end).float()


def _unpacked(scheme: PackedInts, words: Tensor, count: int) -> Tensor:
    """Rows of words, each of `count` codes: uint8 [R, count]."""
    if 32 % scheme.bits and scheme.is_stream(words.shape[1], count):
        return codes.stream(words.T, scheme.bits)[:count].T
    return codes.lowest_first(words, scheme.bits)[:, :count]


def _rows(found: Tensor, rows: int, begin: int, end: int) -> Tensor:
    """Of a grid with an entry for each `rows` rows, 0 = all, one row for each of the rows from begin to end."""
    at = torch.arange(begin, end) // rows if rows else torch.zeros(end - begin, dtype=torch.int64)
    return found.index_select(0, at)


def _fp8(scheme: Scaled, parts: Parts, begin: int, end: int) -> Tensor:
    rows, columns = scheme.block
    w, scales = parts["codes"][begin:end].float(), _rows(parts["scales"].float(), rows, begin, end)
    n, k = w.shape
    columns = columns or k
    if k % columns:
        return w.mul_(scales.index_select(1, torch.arange(k) // columns))
    w.view(n, -1, columns).mul_(scales.unsqueeze(-1))
    return w


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
