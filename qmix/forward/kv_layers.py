"""What one layer of a session remembers: keys and values, rotated, or the state of a delta net (recurrent.py).

    FullLayer       every position, in the compute dtype               trim: any length
    Int8Layer       every position, in 8 bits (kernels/kv_codes.py)    trim: any length
    WindowLayer     the last W + SLACK positions, in a ring            trim: while the next token's window is there
    RecurrentLayer  a state, and the convolution's last inputs         trim: within the last few tokens, or to nothing

A layer attends. One token attends through the native kernel where there is one; all else goes through torch, or on a
device through the device's own attention. An Int8Layer decodes for that: on the CPU of one key-value head after the
other, on a device of all heads at once.

Q query heads, KV key-value heads, D head size, T new positions, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.forward.recurrent import RecurrentLayer
from qmix.kernels.attend import Softmax, softmax_attention, softmax_of
from qmix.kernels.kv_codes import decoded, quantize
from qmix.kernels.native import HEAD_UNIT, KVLayer
from qmix.kernels.native import Attention as NativeAttention
from qmix.sizes import KV_PIECE
from qmix.spec import Attention

AttendBy = Callable[[Tensor, Tensor, Tensor, int | None, Softmax], Tensor]  # as kernels.attend.softmax_attention


@dataclass(frozen=True, slots=True)
class Query:
    """What attention asks of a layer: q [T, Q, D] of positions start, start + 1, ..., and their keys and values
    [T, KV, D], or None where the layer has those already, being another's."""

    start: int
    q: Tensor
    keys: Tensor | None
    values: Tensor | None


def begins(a: Attention, position: int) -> int:
    """The first position that one sees."""
    return 0 if a.window is None else max(0, position + 1 - a.window)


class FullLayer:
    """keys, values [KV, capacity, D] of the compute dtype. native: attends for one token; there: for prompts, on a
    device."""

    def __init__(self, keys: Tensor, values: Tensor, native: NativeAttention | None = None,
                 there: AttendBy | None = None):
        self.keys, self.values = keys, values
        self.native = native if keys.shape[2] % HEAD_UNIT == 0 and keys.dtype in (torch.bfloat16, torch.int8) else None
        self._there = there

    @property
    def kv_layer(self) -> KVLayer:
        """Of every position, in place."""
        return KVLayer(self.keys, self.values)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def attend(self, a: Attention, sinks: Tensor | None, query: Query) -> Tensor:
        """Store the new keys and values, and let each q attend to all up to its own, or the last `window` of them:
        [T, Q * D], in q's dtype where the native kernel does it, else in the compute dtype."""
        end = query.start + len(query.q)
        if self.native is not None and len(query.q) == 1 and query.keys is not None:
            assert query.values is not None
            return self.native.append(self.kv_layer, query.q, query.keys, query.values, begins(a, query.start), end,
                                      softmax_of(a, sinks))
        return self._attend(a, sinks, query)

    def _attend(self, a: Attention, sinks: Tensor | None, query: Query) -> Tensor:
        if query.keys is None or query.values is None:
            keys, values = self.read(query.start + len(query.q))
        else:
            keys, values = self.append(query.start, query.keys, query.values)
        attend = self._there or softmax_attention
        return attend(query.q.to(keys.dtype), keys, values, a.window, softmax_of(a, sinks))

    def append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [T, KV, D] of positions start, start + 1, ...; all up to there [KV, S, D], as views."""
        end = start + len(keys)
        self.keys[:, start:end] = keys.transpose(0, 1)
        self.values[:, start:end] = values.transpose(0, 1)
        return self.read(end)

    def read(self, end: int) -> tuple[Tensor, Tensor]:
        return self.keys[:, :end], self.values[:, :end]


class Int8Layer(FullLayer):
    """keys, values [KV, capacity, D] int8, scales [KV, capacity] fp32; dtype: what prompts compute attention in. A
    position attends to the rounded keys and values, its own included, whether it is one of a prompt or decoded."""

    def __init__(self, keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor, dtype: torch.dtype,
                 native: NativeAttention | None = None, there: AttendBy | None = None):
        super().__init__(keys, values, native, there)
        self.key_scales, self.value_scales = key_scales, value_scales
        self._dtype = dtype

    @property
    def kv_layer(self) -> KVLayer:
        return KVLayer(self.keys, self.values, self.key_scales, self.value_scales)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.key_scales.nbytes + self.value_scales.nbytes

    def _attend(self, a: Attention, sinks: Tensor | None, query: Query) -> Tensor:
        if query.keys is not None and query.values is not None:
            self._write(query.start, query.keys, query.values)
        q, end, first = query.q.to(self._dtype), query.start + len(query.q), begins(a, query.start)
        part = slice(first, end)
        if self._there is not None:
            return self._there(q, decoded(self.keys[:, part], self.key_scales[:, part], self._dtype),
                               decoded(self.values[:, part], self.value_scales[:, part], self._dtype), a.window,
                               softmax_of(a, sinks))
        heads = len(self.keys)
        group = q.shape[1] // heads
        out = torch.empty(len(q), heads, group * q.shape[2], dtype=q.dtype, device=q.device)
        for head in range(heads):
            own = slice(head * group, (head + 1) * group)
            softmax = softmax_of(a, None if sinks is None else sinks[own])
            out[:, head] = softmax_attention(q[:, own].contiguous(), *self._decoded(head, first, end), a.window,
                                             softmax)
        return out.view(len(q), -1)

    def append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As FullLayer.append, but copies, decoded to the compute dtype."""
        self._write(start, keys, values)
        return self.read(start + len(keys))

    def read(self, end: int) -> tuple[Tensor, Tensor]:
        pairs = [self._decoded(head, 0, end) for head in range(len(self.keys))]
        return torch.cat([keys for keys, _ in pairs]), torch.cat([values for _, values in pairs])

    def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
        part = slice(start, start + len(keys))
        quantize(keys, self.keys[:, part], self.key_scales[:, part])
        quantize(values, self.values[:, part], self.value_scales[:, part])

    def _decoded(self, head: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, S, D] of positions [begin, end), in pieces, since torch makes fp32 of them on the way."""
        found = []
        for codes, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            out = torch.empty(end - begin, codes.shape[2], dtype=self._dtype, device=codes.device)
            for at in range(begin, end, KV_PIECE):
                part = slice(at, min(end, at + KV_PIECE))
                out[at - begin:part.stop - begin] = codes[head, part] * scales[head, part, None]
            found.append(out[None])
        return found[0], found[1]


class WindowLayer(FullLayer):
    """A ring: position p lies in slot p mod (window + SLACK). written: positions ever written; those from
    written - slots on are there. Torch attends."""

    def __init__(self, window: int, keys: Tensor, values: Tensor):
        super().__init__(keys, values)
        self.native = None
        self.window, self.slots = window, keys.shape[1]
        self.written = 0

    def append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As FullLayer.append, but of the positions that the first new one sees on, and copies.
        Window 3, start 5, two new: positions 3, 4, 5, 6."""
        first = max(0, start - self.window + 1)
        assert first >= self.written - self.slots, "the window is no longer there"
        old = torch.arange(first, start) % self.slots
        new = keys.transpose(0, 1).to(self.keys.dtype), values.transpose(0, 1).to(self.values.dtype)
        found = torch.cat((self.keys[:, old], new[0]), 1), torch.cat((self.values[:, old], new[1]), 1)
        end, newest = start + len(keys), min(len(keys), self.slots)
        at = torch.arange(end - newest, end) % self.slots
        self.keys[:, at], self.values[:, at] = new[0][:, -newest:], new[1][:, -newest:]
        self.written = max(self.written, end)
        return found

    def read(self, end: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("a layer that others read keeps every position")

    def can_trim(self, length: int) -> bool:
        return length == 0 or self.written - self.slots <= max(0, length - self.window + 1)

    def trim(self, length: int) -> None:
        if length == 0:
            self.written = 0  # else what was written since lies in slots that are written again

    def save(self, copy: bool) -> tuple[Tensor, ...]:
        """written, keys and values; without `copy` the slots themselves, which FEW more tokens leave usable."""
        written = torch.tensor(self.written)
        return (written, self.keys.clone(), self.values.clone()) if copy else (written, self.keys, self.values)

    def load(self, saved: tuple[Tensor, ...]) -> None:
        written, keys, values = saved
        if keys is not self.keys:
            self.keys.copy_(keys)
            self.values.copy_(values)
            self.written = int(written)


CacheLayer = FullLayer | RecurrentLayer
