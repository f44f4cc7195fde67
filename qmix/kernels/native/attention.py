"""Attention of one token over its KV cache, through the library: keys and values are read as they are kept.

Q query heads, KV key-value heads, D head size, S positions.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.kernels.native.loader import Attention as Job
from qmix.kernels.native.loader import levels, library

HEAD_UNIT = 16  # what D must be a multiple of
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_KEPT = {torch.int8: 0, torch.bfloat16: 1}


@dataclass(frozen=True, slots=True)
class Kept:
    """One layer of a KV cache: keys, values [KV, capacity, D], bf16, or int8 with scales [KV, capacity] fp32;
    all contiguous."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


class Attention:
    """The library at one level (see levels()). threads: as many as torch has when this is made."""

    def __init__(self, level: str):
        opened = library()
        assert opened is not None, "no library"
        self._attend = opened.qmix_attend
        self._level = levels()[level]
        self.threads = torch.get_num_threads()
        self.name = f"native {level}"

    def append(self, kept: Kept, q: Tensor, keys: Tensor, values: Tensor, begin: int, end: int) -> Tensor:
        """Keep keys and values [1, KV, D] of position end - 1, and let its q [1, Q, D] attend to positions
        [begin, end): [1, Q * D] in q's dtype. All fp32 or bf16; sums are fp32. By up to `threads` threads, which
        the bits do not depend on."""
        (kv_heads, capacity, size), heads = kept.keys.shape, q.shape[1]
        assert 0 <= begin < end <= capacity and size % HEAD_UNIT == 0 and heads % kv_heads == 0, (begin, end, q.shape)
        q, keys, values = _readable(q), _readable(keys), _readable(values)
        out = torch.empty(1, heads * size, dtype=q.dtype)
        scales = (None, None) if kept.key_scales is None or kept.value_scales is None else (
            kept.key_scales.data_ptr(), kept.value_scales.data_ptr())
        job = Job(q.data_ptr(), keys.data_ptr(), values.data_ptr(), kept.keys.data_ptr(), kept.values.data_ptr(),
                  *scales, out.data_ptr(), capacity, begin, end, heads, kv_heads, size, _KEPT[kept.keys.dtype],
                  _TYPES[q.dtype], _TYPES[keys.dtype], _TYPES[values.dtype])
        if self._attend(self._level, ctypes.byref(job), self.threads):
            raise MemoryError("no memory for attention")
        return out


def _readable(x: Tensor) -> Tensor:
    x = x if x.dtype in _TYPES else x.float()
    return x if x.is_contiguous() else x.contiguous()
