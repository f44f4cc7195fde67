"""Products through the library: tensors in, pointers out.

T tokens, H hidden, F expert inner.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qmix.config import CARRIED_NAMES, GROUPED_BITS
from qmix.formats.packed import Packed
from qmix.kernels.native import jobs
from qmix.kernels.native.loader import levels, library

ACTIVATIONS = {"int8": 0, "bf16": 1}  # native.h's QMIX_ACT_*
FORMATS = (*GROUPED_BITS, "int8", "mxfp4", *CARRIED_NAMES)
E2M1 = 5  # native.h's QMIX_E2M1, in the place of bits
CARRIED_KINDS = {name: 16 + i for i, name in enumerate(CARRIED_NAMES)}  # native.h's QMIX_Q8_0 and so on
NO_UP = (0, 0, 0, 0, 0)
DENSE_GROUP = 64  # columns that share a step where the weights have no groups


@dataclass(frozen=True, slots=True)
class Product:
    """y[y_rows] = x[x_rows] W^T + bias; or activation(x Wgate^T + bias, x Wup^T + bias) where `gated`, W being gate
    over up: bias and activation as w's spec says.

    x [*, cols] and y [*, rows] fp32 or bf16, the numbers of a row adjacent; x_rows, y_rows int64 [T], None for 0..T-1.
    """

    x: Tensor
    w: Packed
    y: Tensor
    x_rows: Tensor | None = None
    y_rows: Tensor | None = None
    gated: bool = False
    add: bool = False  # to what y, fp32, has


class NativeProducts:
    """The library at one level (see levels()), with activations "int8" or "bf16". threads: as many as torch has when
    this is made."""

    def __init__(self, level: str, activations: str):
        opened = library()
        assert opened is not None, "no library"
        self._library = opened
        self._products = opened.qmix_products
        # Matrices stay where they are, in their slots: what is said of them is put together once.
        self._matrices: dict[int, tuple[Packed, Layout]] = {}
        self._number = levels()[level]
        self.level = level
        self.code = ACTIVATIONS[activations]
        self.activations = activations
        self.threads = torch.get_num_threads()
        # torch's int8 product is the faster one where activations stay bf16.
        self.formats = FORMATS if activations == "int8" else tuple(name for name in FORMATS if name != "int8")
        self.name = f"native {level}, {activations} activations"

    def run(self, products: Sequence[Product]) -> None:
        """Compute all of them, none of which may need another's result, by up to `threads` threads."""
        self.run_jobs([self.job(p) for p in products])

    def run_jobs(self, packed: Sequence[bytes]) -> None:
        """The same of products that are jobs already."""
        if self._products(self._number, self.code, b"".join(packed), len(packed), self.threads):
            raise MemoryError("no memory for the activations of a product")

    def job(self, p: Product) -> bytes:
        """native.h's qmix_job."""
        w, x, y, x_rows, y_rows = p.w, p.x, p.y, p.x_rows, p.y_rows
        known = self._matrices.get(id(w))
        if known is None or known[0] is not w:
            known = self._matrices[id(w)] = w, layout_of(w)
        of = known[1]
        assert not p.add or y.dtype == torch.float32, y.dtype
        return jobs.PRODUCT.pack(
            of.weight, of.params, of.bias, x.data_ptr(), 0 if x_rows is None else x_rows.data_ptr(), y.data_ptr(),
            0 if y_rows is None else y_rows.data_ptr(), x.stride(0), y.stride(0),
            x.shape[0] if x_rows is None else x_rows.shape[0], *of.sizes, *of.layout, p.gated, jobs.TYPES[x.dtype],
            jobs.TYPES[y.dtype], p.add, *of.activation, *(of.up if p.gated else NO_UP))

    def peak(self, threads: int, seconds: float = 0.3,
             clock: Callable[[], float] = time.perf_counter) -> float:
        """Operations a second (a product and a sum are two) of bare dot products on `threads` threads, the best of
        several stretches within `seconds`: what the products here would reach if nothing else were to be done."""
        turns, best, start = ctypes.c_int64(100_000), 0.0, clock()
        while not best or clock() - start < seconds:
            begin = clock()
            done = self._library.qmix_peak(self._number, self.code, turns, threads)
            best = max(best, done / max(clock() - begin, 1e-9))
        return best

    def linear(self, x: Tensor, *matrices: Packed) -> list[Tensor]:
        """x [T, cols] fp32 or bf16 -> [T, rows] of each matrix, in x's dtype."""
        x = _readable(x)
        found = [x.new_empty(len(x), w.spec.rows) for w in matrices]
        self.run([Product(x, w, y) for w, y in zip(matrices, found, strict=True)])
        return found

    def gated(self, x: Tensor, w13: Packed) -> Tensor:
        """activation(gate(x), up(x)): x [T, H] -> [T, F] in x's dtype."""
        y = x.new_empty(len(x), w13.spec.rows // 2)
        self.run([Product(_readable(x), w13, y, gated=True)])
        return y


def as_seen(x: Tensor, activations: str, group: int) -> Tensor:
    """x [T, K] as the products see it, fp32: rounded to bf16, or to 255 steps within each `group` columns. The
    reference that kernels are held to; ties may fall the other way there."""
    if activations == "bf16":
        return x.bfloat16().float()
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group)).view(len(x), -1, group)
    step = padded.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, padded / step, 0.0).round()
    return (codes * step).view(len(x), -1)[:, :x.shape[1]]


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 and x.dtype in jobs.TYPES else x.float().contiguous()


class Layout(NamedTuple):
    """What a job says of its matrix. weight, params, bias: addresses, bias 0 where there is none; sizes: padded rows
    and columns, rows of a part, columns; layout: bits, block, group, parts; activation: its number, alpha, limit; up:
    weight, params, padded columns, bits, group of an up whose format is not the gate's, else zeros."""

    weight: int
    params: int
    bias: int
    sizes: tuple[int, int, int, int]
    layout: tuple[int, int, int, int]
    activation: tuple[int, float, float]
    up: tuple[int, int, int, int, int] = NO_UP


def layout_of(w: Packed) -> Layout:
    spec, tensors = w.spec, w.tensors
    if halves := w.halves:
        gate, up = map(layout_of, halves)
        (_, cols, *_), (bits, _, group, _) = up.sizes, up.layout
        bits_of_gate, block, group_of_gate, _ = gate.layout
        sizes = spec.padded_rows, *gate.sizes[1:]
        return gate._replace(sizes=sizes, layout=(bits_of_gate, block, group_of_gate, 2),
                             up=(up.weight, up.params, cols, bits, group))
    sizes = spec.padded_rows, spec.padded_cols, spec.rows // spec.parts, spec.cols
    if spec.bits:
        params, layout = tensors["qparams"], (spec.bits, spec.block, spec.group_size, spec.parts)
    elif spec.format in CARRIED_KINDS:
        params, layout = tensors["scales"], (CARRIED_KINDS[spec.format], spec.block, spec.group_size, spec.parts)
    elif spec.format == "mxfp4":
        params, layout = tensors["scale"], (E2M1, spec.block, spec.group_size, spec.parts)
    else:
        params, layout = tensors["scale"], (8, 64, DENSE_GROUP, spec.parts)
    how = spec.activation
    return Layout(tensors["qweight"].data_ptr(), params.data_ptr(), tensors["bias"].data_ptr() if spec.bias else 0,
                  sizes, layout, (jobs.ACTIVATIONS[how.kind], how.alpha or 0.0, how.limit or 0.0))
