"""Products through the library: tensors in, pointers out.

T tokens, H hidden, F expert inner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.formats.packed import Packed
from qmix.kernels.native.library import Job, levels, library

ACTIVATIONS = {"int8": 0, "bf16": 1}  # native.h's QMIX_ACT_*
FORMATS = ("int4", "int8")
DENSE_GROUP = 64  # columns that share a step where the weights have no groups
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, slots=True)
class Product:
    """y[y_rows] = x[x_rows] W^T; or silu(x Wgate^T) * (x Wup^T) where `gated`, W being gate over up.

    x [*, cols] and y [*, rows] fp32 or bf16, the numbers of a row adjacent; x_rows, y_rows int64 [T], None for 0..T-1.
    """

    x: Tensor
    w: Packed
    y: Tensor
    x_rows: Tensor | None = None
    y_rows: Tensor | None = None
    gated: bool = False


class Native:
    """The library at one level (see levels()), with activations "int8" or "bf16"."""

    def __init__(self, level: str, activations: str):
        opened = library()
        assert opened is not None, "no library"
        self._products = opened.qmix_products
        self._level = levels()[level]
        self._activations = ACTIVATIONS[activations]
        self.activations = activations
        self.name = f"native {level}, {activations} activations"

    def run(self, products: Sequence[Product]) -> None:
        """Compute all of them, none of which may need another's result, by as many threads as torch is set to."""
        jobs = (Job * len(products))(*map(_job, products))
        if self._products(self._level, self._activations, jobs, len(jobs), torch.get_num_threads()):
            raise MemoryError("no memory for the activations of a product")

    def linear(self, x: Tensor, w: Packed) -> Tensor:
        """x [T, cols] fp32 or bf16 -> [T, rows] in x's dtype."""
        y = x.new_empty(len(x), w.spec.rows)
        self.run([Product(_readable(x), w, y)])
        return y

    def gated(self, x: Tensor, w13: Packed) -> Tensor:
        """silu(gate(x)) * up(x): x [T, H] -> [T, F] in x's dtype."""
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
    return x if x.stride(-1) == 1 and x.dtype in _TYPES else x.float().contiguous()


def _job(p: Product) -> Job:
    spec, tensors, x, y = p.w.spec, p.w.tensors, p.x, p.y
    x_rows, y_rows = p.x_rows, p.y_rows
    if spec.format == "int4":
        params, bits, block, group = tensors["qparams"], 4, spec.block, spec.group_size
    else:
        params, bits, block, group = tensors["scale"], 8, 64, DENSE_GROUP
    return Job(tensors["qweight"].data_ptr(), params.data_ptr(), x.data_ptr(),
               None if x_rows is None else x_rows.data_ptr(), y.data_ptr(), None if y_rows is None else y_rows.data_ptr(),
               x.stride(0), y.stride(0), len(x) if x_rows is None else len(x_rows), spec.padded_rows, spec.padded_cols,
               spec.rows // spec.parts, spec.cols, bits, block, group, spec.parts, p.gated, _TYPES[x.dtype],
               _TYPES[y.dtype])
