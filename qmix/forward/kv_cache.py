"""What one session remembers of its past tokens, layer by layer: keys and values, or the state of a delta net.

Three kinds of layer:

    FullLayer       every position                     trim: any length
    WindowLayer     the last W + SLACK positions       trim: as far as the window of the next token is still there
    RecurrentLayer  a state, and the convolution's     trim: only to nothing
                    last inputs

A window of W positions keeps SLACK more, so that up to FEW tokens (one and its drafts) can be taken back. For anything
longer a copy is made first: `begin` says how many tokens come, and `rollback` brings back what was there at `begin`.
`snapshot` and `restore` do the same at any later time. `length` moves when a pass is complete.

A layer whose keys and values another one reads keeps every position, also where it has a window of its own.

KV key-value heads, D head size, T new positions, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.kernels.cpu import FEW
from qmix.spec import Attention, DeltaNet, Model

SLACK = FEW - 1


class FullLayer:
    """Keys and values [KV, capacity, D], rotated."""

    def __init__(self, attention: Attention, capacity: int, dtype: torch.dtype):
        shape = (attention.kv_heads, capacity, attention.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [T, KV, D] of positions start, start + 1, ...; all up to there [KV, S, D], as views."""
        end = start + len(keys)
        self.keys[:, start:end] = keys.transpose(0, 1)
        self.values[:, start:end] = values.transpose(0, 1)
        return self.read(end)

    def read(self, end: int) -> tuple[Tensor, Tensor]:
        return self.keys[:, :end], self.values[:, :end]

    def can_trim(self, length: int) -> bool:
        return True

    def trim(self, length: int) -> None:
        pass

    def save(self, copy: bool) -> tuple[Tensor, ...]:
        return ()

    def load(self, saved: tuple[Tensor, ...]) -> None:
        pass


class WindowLayer(FullLayer):
    """A ring: position p lies in slot p mod (window + SLACK). written: positions ever written; those from
    written - slots on are there."""

    def __init__(self, attention: Attention, capacity: int, dtype: torch.dtype):
        assert attention.window is not None
        self.window, self.slots = attention.window, attention.window + SLACK
        self.written = 0
        super().__init__(attention, self.slots, dtype)

    def append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As FullLayer.append, but of the positions that the first new one sees on, and copies.
        Window 3, start 5, two new: positions 3, 4, 5, 6."""
        first = max(0, start - self.window + 1)
        assert first >= self.written - self.slots, "the window is no longer there"
        old = torch.arange(first, start) % self.slots
        new = keys.transpose(0, 1).to(self.keys.dtype), values.transpose(0, 1).to(self.values.dtype)
        found = torch.cat((self.keys[:, old], new[0]), 1), torch.cat((self.values[:, old], new[1]), 1)
        end, kept = start + len(keys), min(len(keys), self.slots)
        at = torch.arange(end - kept, end) % self.slots
        self.keys[:, at], self.values[:, at] = new[0][:, -kept:], new[1][:, -kept:]
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


class RecurrentLayer:
    """A delta net's state [value_heads, key_dim, value_dim] and the last inputs of its convolution
    [taps - 1, channels], fp32. Replaced, never written into, so that a saved one stays as it is."""

    def __init__(self, delta: DeltaNet):
        channels = 2 * delta.key_heads * delta.key_dim + delta.value_heads * delta.value_dim
        self.state = torch.zeros(delta.value_heads, delta.key_dim, delta.value_dim)
        self.past = torch.zeros(delta.conv - 1, channels)

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.past.nbytes

    def can_trim(self, length: int) -> bool:
        return length == 0

    def trim(self, length: int) -> None:
        self.state, self.past = torch.zeros_like(self.state), torch.zeros_like(self.past)

    def save(self, copy: bool) -> tuple[Tensor, ...]:
        return self.state, self.past

    def load(self, saved: tuple[Tensor, ...]) -> None:
        self.state, self.past = saved


CacheLayer = FullLayer | RecurrentLayer


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session at `length` positions. cuts: how often it had been cut back by then."""

    length: int
    cuts: int
    layers: Sequence[tuple[Tensor, ...]]


class SessionCache:
    """Room for `capacity` positions of one session, `length` of them filled; `layers` as the model's. A layer that
    reads another's keys and values has none of its own: None."""

    def __init__(self, model: Model, capacity: int, dtype: torch.dtype = torch.float32):
        mixers = [layer.mixer for layer in model.layers]
        read = {m.kv_source for m in mixers if isinstance(m, Attention)}
        self.layers = [_layer(mixer, capacity, dtype, i in read) for i, mixer in enumerate(mixers)]
        self.capacity = capacity
        self.length = 0
        self._cuts: list[int] = []  # every length that it was cut back to

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers if layer is not None)

    def need(self, count: int) -> None:
        """UsageError unless `count` more positions fit."""
        if self.length + count > self.capacity:
            raise UsageError(f"{self.length} + {count} tokens do not fit a context of {self.capacity}",
                             "raise -c/--ctx-size, or start over")

    def can_trim(self, length: int) -> bool:
        """Whether `trim` can go back to `length`: else a snapshot must."""
        return length == self.length or all(layer.can_trim(length) for layer in self.layers if layer is not None)

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on; what follows overwrites them."""
        if not 0 <= length <= self.length:
            raise ValueError(f"trim: got {length}, want 0 to {self.length}")
        if not self.can_trim(length):
            raise ValueError(f"trim: {length} of {self.length} positions are no longer whole: restore a snapshot")
        if length < self.length:
            for layer in self.layers:
                if layer is not None:
                    layer.trim(length)
        self._cut(length)

    def begin(self, count: int) -> Snapshot:
        """To be called before `count` tokens are appended: what `rollback` needs to take them back."""
        return self._save(copy=count > FEW and self.length > 0)

    def rollback(self, before: Snapshot) -> None:
        """As it was at `begin`, whatever part of the tokens has been appended."""
        self._load(before)

    def snapshot(self) -> Snapshot:
        """The session as it is, for `restore` at any time."""
        return self._save(copy=True)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot of this session; ValueError where it has been cut back below that length since, and so may
        have other tokens there."""
        if min(self._cuts[snapshot.cuts:], default=snapshot.length) < snapshot.length:
            raise ValueError(f"restore: the session was cut back below {snapshot.length} positions since the snapshot")
        self._load(snapshot)

    def _save(self, copy: bool) -> Snapshot:
        saved = [() if layer is None else layer.save(copy) for layer in self.layers]
        return Snapshot(self.length, len(self._cuts), saved)

    def _load(self, snapshot: Snapshot) -> None:
        for layer, saved in zip(self.layers, snapshot.layers, strict=True):
            if layer is not None:
                layer.load(saved)
                if snapshot.length == 0:
                    layer.trim(0)
        self._cut(snapshot.length)

    def _cut(self, length: int) -> None:
        if length < self.length:
            self._cuts.append(length)
        self.length = length


def _layer(mixer: Attention | DeltaNet, capacity: int, dtype: torch.dtype, shared: bool) -> CacheLayer | None:
    if isinstance(mixer, DeltaNet):
        return RecurrentLayer(mixer)
    if mixer.kv_source is not None:
        return None
    ring = mixer.window is not None and mixer.window + SLACK < capacity and not shared
    return (WindowLayer if ring else FullLayer)(mixer, capacity, dtype)
