"""A KV cache in 8 bits: half the memory of bf16, and half the bytes that a token of a long context reads.

kernels/kv_codes.py has the numbers: a key or value head of a position is one vector of codes with one scale. Keys are
quantized rotated, as they are kept.

One token attends through a kernel that reads the codes: the native one, or a device's (DeviceOps.rope_attend). A
prompt, and on the CPU everything where that kernel is missing, attends to keys and values decoded to the compute dtype:
on the CPU of one key-value head after the other, on a device of all heads at once, which the plan has room for.

L layers, Q query heads, KV key-value heads, D head size, T new positions, S positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.kernels.attend import attend
from qmix.kernels.kv_codes import decoded, quantize
from qmix.kernels.native import Attention, Kept
from qmix.model.kvcache import CPU, Attend, KVCache
from qmix.sizes import KV_PIECE
from qmix.spec import Model


class Int8KVCache(KVCache):
    """A KVCache of int8 codes, [KV, capacity, D] a layer, and fp32 scales, [KV, capacity]; dtype: what prompts compute
    attention in. there: the attention of a device's prompts, with the cache at `place`; None on the CPU."""

    __slots__ = ("_dtype", "_key_scales", "_there", "_value_scales")

    def __init__(self, model: Model, capacity: int, dtype: torch.dtype, native: Attention | None = None,
                 place: torch.device = CPU, there: Attend | None = None):
        super().__init__(model, capacity, torch.int8, place=place)
        self._dtype = dtype
        self._there = there
        attention, _ = model.alike()
        shape = (model.num_layers, attention.kv_heads, capacity)
        self._key_scales = torch.empty(shape, device=place).fill_(0).unbind()
        self._value_scales = torch.empty(shape, device=place).fill_(0).unbind()
        self.native = native

    def kept(self, layer: int) -> Kept:
        return Kept(self._keys[layer], self._values[layer], self._key_scales[layer], self._value_scales[layer])

    @property
    def places(self) -> tuple[int, ...]:
        return (*super().places, self._key_scales[0].data_ptr(), self._value_scales[0].data_ptr())

    @property
    def nbytes(self) -> int:
        return super().nbytes + 2 * len(self._key_scales) * self._key_scales[0].nbytes

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As KVCache.write, but what it returns are copies, decoded to the compute dtype."""
        end = start + len(keys)
        self._keep(layer, start, keys, values)
        heads = range(self._keys[layer].shape[0])
        pairs = [self._decoded(layer, head, 0, end) for head in heads]
        return torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])

    def attend(self, layer: int, start: int, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """See KVCache.attend. A position attends to the rounded keys and values, its own included, whether it is one
        of a prompt or decoded."""
        end = start + len(q)
        first = 0 if window is None else max(0, start - window + 1)
        if len(q) == 1 and self.native is not None:
            return self.native.append(self.kept(layer), q, keys, values, first, end)
        q = q.to(self._dtype)
        self._keep(layer, start, keys, values)
        if self._there is not None:
            part = slice(first, end)
            return self._there(q, decoded(self._keys[layer][:, part], self._key_scales[layer][:, part], self._dtype),
                               decoded(self._values[layer][:, part], self._value_scales[layer][:, part], self._dtype),
                               window)
        heads = self._keys[layer].shape[0]
        group = q.shape[1] // heads
        out = torch.empty(len(q), heads, group * q.shape[2], dtype=q.dtype)
        for head in range(heads):
            own = q[:, head * group:(head + 1) * group].contiguous()
            out[:, head] = attend(own, *self._decoded(layer, head, first, end), window)
        return out.view(len(q), -1)

    def _keep(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        end = start + len(keys)
        for new, codes, scales in ((keys, self._keys, self._key_scales), (values, self._values, self._value_scales)):
            quantize(new, codes[layer][:, start:end], scales[layer][:, start:end])

    def _decoded(self, layer: int, head: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, S, D] of positions [begin, end), in pieces, since torch makes fp32 of them on the way."""
        found = []
        for codes, scales in ((self._keys, self._key_scales), (self._values, self._value_scales)):
            out = torch.empty(end - begin, codes[layer].shape[2], dtype=self._dtype)
            for at in range(begin, end, KV_PIECE):
                part = slice(at, min(end, at + KV_PIECE))
                out[at - begin:part.stop - begin] = codes[layer][head, part] * scales[layer][head, part, None]
            found.append(out[None])
        return found[0], found[1]
