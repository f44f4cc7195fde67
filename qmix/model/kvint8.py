"""A KV cache in 8 bits: half the memory of bf16, and half the bytes that a token of a long context reads.

A key or value head of a position is one vector with one scale: x = code * scale, codes -127 to 127, scale =
max |x| / 127. So no number is off by more than half a scale. Keys are quantized rotated, as they are kept.

One token attends through the native kernel, which reads the codes. A prompt, and everything where that kernel is
missing, attends through torch, to one key-value head after the other, decoded to the compute dtype.

L layers, Q query heads, KV key-value heads, D head size, T new positions, S positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.config import ModelConfig
from qmix.kernels.attend import attend
from qmix.kernels.native import Attention, Kept
from qmix.model.kvcache import KVCache
from qmix.sizes import KV_PIECE

TINY = 1e-30  # a vector below this is kept as zeros, so that 1 / max |x| is finite


class Int8KVCache(KVCache):
    """A KVCache of int8 codes, [KV, capacity, D] a layer, and fp32 scales, [KV, capacity]; dtype: what torch computes
    attention in."""

    __slots__ = ("_dtype", "_key_scales", "_value_scales")

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, native: Attention | None = None):
        super().__init__(config, capacity, torch.int8)
        self._dtype = dtype
        shape = (config.num_layers, config.num_kv_heads, capacity)
        self._key_scales = torch.empty(shape).fill_(0).unbind()
        self._value_scales = torch.empty(shape).fill_(0).unbind()
        self.native = native

    def kept(self, layer: int) -> Kept:
        return Kept(self._keys[layer], self._values[layer], self._key_scales[layer], self._value_scales[layer])

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


def quantize(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """x [T, KV, D] of any float dtype into codes [KV, T, D] int8 and scales [KV, T] fp32. native/attention.h does the
    same to the bit. A vector with a NaN or an infinity decodes to numbers that are not finite."""
    wide = x.transpose(0, 1).float()
    largest = wide.abs().amax(-1)
    inverse = largest.clamp(min=TINY).reciprocal() * 127
    codes.copy_((wide * inverse[..., None]).round_())
    scales.copy_(largest / 127)
