"""Attention of one token over its KV cache, through the library: keys and values are read as they are kept.

Q query heads, KV key-value heads, D head size, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.kernels.attend import PLAIN, Softmax
from qmix.kernels.native import jobs
from qmix.kernels.native.loader import levels, library

HEAD_UNIT = 16  # what D must be a multiple of


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer of a KV cache: keys, values [KV, capacity, D], bf16, or int8 with scales [KV, capacity] fp32;
    all contiguous."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """Of keys, values and their scales."""
        scales = (0, 0) if self.key_scales is None or self.value_scales is None else (
            self.key_scales.data_ptr(), self.value_scales.data_ptr())
        return self.keys.data_ptr(), self.values.data_ptr(), *scales


class Attention:
    """The library at one level (see levels()). threads: as many as torch has when this is made."""

    def __init__(self, level: str):
        opened = library()
        assert opened is not None, "no library"
        self._attend = opened.qmix_attend
        self._number = levels()[level]
        self.level = level
        self.threads = torch.get_num_threads()
        self.name = f"native {level}"

    def append(self, layer: KVLayer, q: Tensor, keys: Tensor, values: Tensor, begin: int, end: int,
               softmax: Softmax = PLAIN) -> Tensor:
        """Keep keys and values [1, KV, D] of position end - 1, and let its q [1, Q, D] attend to positions
        [begin, end): [1, Q * D] in q's dtype. All fp32 or bf16; sums are fp32. By up to `threads` threads, which
        the bits do not depend on."""
        q, keys, values = _readable(q), _readable(keys), _readable(values)
        out = torch.empty(1, q.shape[1] * q.shape[2], dtype=q.dtype)
        if self._attend(self._number, self.job(layer, q, keys, values, out, begin, end, softmax), self.threads):
            raise MemoryError("no memory for attention")
        return out

    def job(self, layer: KVLayer, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, begin: int, end: int,
            softmax: Softmax = PLAIN) -> bytes:
        """native.h's qmix_attention, of contiguous tensors."""
        sinks, scale, softcap = softmax.sinks, softmax.scale, softmax.softcap
        (kv_heads, capacity, size), heads = layer.keys.shape, q.shape[1]
        assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == (heads,) and sinks.is_contiguous())
        assert (scale is None or scale > 0) and (softcap is None or softcap > 0), softmax
        assert 0 <= begin < end <= capacity and size % HEAD_UNIT == 0 and heads % kv_heads == 0, (begin, end, q.shape)
        return jobs.ATTENTION.pack(
            q.data_ptr(), keys.data_ptr(), values.data_ptr(), *layer.addresses, out.data_ptr(), capacity, begin, end,
            heads, kv_heads, size, jobs.KV_TYPES[layer.keys.dtype], jobs.TYPES[q.dtype], jobs.TYPES[keys.dtype],
            jobs.TYPES[values.dtype], 0 if sinks is None else sinks.data_ptr(), scale or 0.0, softcap or 0.0)


def _readable(x: Tensor) -> Tensor:
    x = x if x.dtype in jobs.TYPES else x.float()
    return x if x.is_contiguous() else x.contiguous()
