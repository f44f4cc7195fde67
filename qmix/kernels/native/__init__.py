"""qmix's own CPU kernels, in C: products with int4 and int8 weights for one token up to many.

The library is built when qmix is installed, if there is a C compiler; without it torch's packed products do the work.
It holds the same kernels for several instruction sets ("levels") and runs the best that this processor has.

Activations are either rounded to 8 bits in groups of columns ("int8": one step per token and group, products summed
exactly in integers; the fastest) or to bf16 ("bf16"). Results and sums are fp32. The bits of a row of the result do not
depend on how many rows are computed together, or on the number of threads.

T tokens, H hidden, F expert inner.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from qmix.formats.packed import Packed

ABI = 1
ACTIVATIONS = {"int8": 0, "bf16": 1}
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Job(ctypes.Structure):
    """native.h's qmix_job."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "params", "x", "x_rows", "y", "y_rows")] + \
        [(name, ctypes.c_int64) for name in ("x_stride", "y_stride", "tokens", "padded_rows", "padded_cols", "rows",
                                             "cols")] + \
        [(name, ctypes.c_int32) for name in ("bits", "block", "group", "parts", "gated", "x_type", "y_type")]


@dataclass(frozen=True, slots=True)
class Product:
    """y[y_rows] = x[x_rows] W^T, or silu(x Wgate^T) * (x Wup^T) where gated and W is gate over up.

    x [*, cols] and y [*, rows] fp32 or bf16, rows contiguous; x_rows, y_rows int64 [T], None for 0..T-1. W int4 or int8.
    """

    x: Tensor
    w: Packed
    y: Tensor
    x_rows: Tensor | None = None
    y_rows: Tensor | None = None
    gated: bool = False


class Native:
    """The library at one level. activations: "int8" or "bf16"."""

    def __init__(self, library: ctypes.CDLL, level: int, activations: str):
        self._products = library.qmix_products
        self._level = level
        self._activations = ACTIVATIONS[activations]
        self.name = library.qmix_level_name(level).decode()
        self.activations = activations

    def run(self, products: Sequence[Product]) -> None:
        """Compute all of them, by as many threads as torch is set to; MemoryError where there is none."""
        jobs = (_Job * len(products))(*map(_job, products))
        if self._products(self._level, self._activations, jobs, len(jobs), torch.get_num_threads()):
            raise MemoryError("no memory for the activations of a product")

    def linear(self, x: Tensor, w: Packed) -> Tensor:
        """x [T, cols] -> [T, rows] in x's dtype."""
        y = x.new_empty(len(x), w.spec.rows)
        self.run([Product(x, w, y)])
        return y


def _job(p: Product) -> _Job:
    spec, x, y = p.w.spec, p.x, p.y
    weight = p.w.tensors["qweight"]
    params = p.w.tensors["qparams" if spec.format == "int4" else "scale"]
    parts = spec.parts
    tokens = len(x) if p.x_rows is None else len(p.x_rows)
    int4 = spec.format == "int4"
    return _Job(weight.data_ptr(), params.data_ptr(), x.data_ptr(), _pointer(p.x_rows), y.data_ptr(),
                _pointer(p.y_rows), x.stride(0), y.stride(0), tokens, spec.padded_rows, spec.padded_cols,
                spec.rows // parts, spec.cols, 4 if int4 else 8, spec.block if int4 else 64,
                spec.group_size if int4 else 64, parts, p.gated, _TYPES[x.dtype], _TYPES[y.dtype])


def _pointer(rows: Tensor | None) -> int | None:
    return None if rows is None else rows.data_ptr()


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it was not built or is another version's."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            break
    else:
        return None
    try:
        found = ctypes.CDLL(str(path))
        found.qmix_level_name.restype = ctypes.c_char_p
        return found if found.qmix_abi() == ABI else None
    except (OSError, AttributeError):
        return None


def levels(found: ctypes.CDLL) -> dict[str, int]:
    """{name: number} of the levels that this processor has, the best first."""
    names: dict[str, int] = {}
    for i in range(64):
        name = found.qmix_level_name(i)
        if name is None:
            break
        if found.qmix_level_supported(i):
            names[name.decode()] = i
    return names
