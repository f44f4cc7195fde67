"""What one session remembers of its past tokens, layer by layer (kv_layers.py).

Memory is allocated once, for `capacity` positions, and touched at once, so that a session which starts can also finish.
What lies beyond `length` is scratch: a pass writes there, layer by layer, and `length` moves when the pass is complete.

Most layers are trimmed by forgetting. A ring keeps SLACK positions beside its window, so that up to FEW tokens (one and
its drafts) can be taken back; for anything longer a copy is made first: `begin` says how many tokens come, and
`rollback` brings back what was there at `begin`. `snapshot` and `restore` do the same at any later time.

A recurrent state can only be trimmed within the last pass of up to FEW tokens (recurrent.py). For all else the cache
keeps snapshots by itself (snapshots.py), at places within and before each prompt; `rewind` goes to the nearest one.

Without `rings` a layer with a window keeps every position: then a failed prompt is taken back without a copy, and the
native kernel, which reads positions in order, attends. A layer whose keys and values another one reads keeps every
position in any case.

KV key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.forward.kv_layers import AttendBy, CacheLayer, FullLayer, Int8Layer, WindowLayer
from qmix.forward.recurrent import Advance, RecurrentLayer
from qmix.forward.recurrent_device import PlacedLayer
from qmix.forward.snapshots import Snapshot, Snapshots
from qmix.hardware.memory import prefer_huge_pages
from qmix.kernels.kv_size import positions
from qmix.kernels.native import Attention as NativeAttention
from qmix.kernels.native import KVLayer
from qmix.kernels.op import FEW
from qmix.spec import Attention, DeltaNet, Model

CPU = torch.device("cpu")
NONE: Mapping[int, NativeAttention] = MappingProxyType({})


class SessionCache:
    """Room for `capacity` positions of one session, `length` of them filled; `layers` as the model's. A layer that
    reads another's keys and values has none of its own: None.

    dtype: of the model's computation, and of keys and values unless kv is "int8". native: what attends for one token,
    by head size (kernels.attention.choose_native_attentions). device: where keys and values lie; attend: of a device's
    prompts. only: the layers that are there, None for all. placed: recurrent states lie where
    captured work of the device finds them."""

    def __init__(self, model: Model, capacity: int, dtype: torch.dtype = torch.float32, kv: str = "bf16",
                 native: Mapping[int, NativeAttention] = NONE, device: torch.device = CPU,
                 attend: AttendBy | None = None, rings: bool = False, only: Collection[int] | None = None,
                 placed: bool = False):
        assert not rings or kv == "bf16", "a ring of codes"
        self._sources = [_source(model, i) for i in range(len(model.layers))]
        made = _Made(kv, torch.int8 if kv == "int8" else dtype, device)
        wanted = range(len(model.layers)) if only is None else only
        self.layers: list[CacheLayer | None] = [None] * len(model.layers)
        for i in wanted:
            mixer = model.layers[i].mixer
            if isinstance(mixer, DeltaNet):
                self.layers[i] = PlacedLayer(mixer, device) if placed else RecurrentLayer(mixer)
            elif mixer.kv_source is None:
                made.want(i, (mixer.kv_heads, positions(model, i, capacity, rings), mixer.head_dim))
        for i, tensors in made.allocate():
            mixer = model.layers[i].mixer
            assert isinstance(mixer, Attention)
            own = native.get(mixer.head_dim)
            keys, values, *scales = tensors
            if kv == "int8":
                self.layers[i] = Int8Layer(keys, values, scales[0], scales[1], dtype, own, attend)
            elif keys.shape[1] < capacity:
                assert mixer.window is not None
                self.layers[i] = WindowLayer(mixer.window, keys, values)
            else:
                self.layers[i] = FullLayer(keys, values, own, attend)
        # What trimming does not bring back by itself.
        self._states = [layer for layer in self.layers if isinstance(layer, WindowLayer | RecurrentLayer)]
        self._recurrent = [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]
        self._snapshots = Snapshots()
        self.marks: Sequence[int] = ()  # lengths within a pass of which snapshots will be kept
        # A ring has no state of an earlier position of a pass.
        self._keeps = bool(self._recurrent) and len(self._recurrent) == len(self._states)
        self.side = torch.zeros(1, dtype=torch.int32, device=device)  # of placed layers: which one a pass reads
        self._reads = 0  # the same on the host
        self.capacity = capacity
        self.length = 0
        self._addresses: list[tuple[int, int, int, int]] = []
        self._cuts: list[int] = []  # every length that it was cut back to

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers if layer is not None)

    def kv_layer(self, layer: int) -> KVLayer:
        """Keys and values that a layer reads: of every position, in place."""
        found = self.layers[self._sources[layer]]
        assert isinstance(found, FullLayer), "a recurrent layer has no keys"
        return found.kv_layer

    @property
    def identity(self) -> tuple[int, ...]:
        """Addresses by which no other living cache is known."""
        return *(address for addresses in self.addresses for address in addresses), self.side.data_ptr()

    @property
    def addresses(self) -> list[tuple[int, int, int, int]]:
        """Where `kv_layer` is, by layer, or what a placed layer has: it never moves. Zeros for other recurrent ones."""
        if not self._addresses:
            self._addresses = [self._addresses_of(i) for i in range(len(self.layers))]
        return self._addresses

    def _addresses_of(self, i: int) -> tuple[int, int, int, int]:
        found = self.layers[self._sources[i]]
        if isinstance(found, PlacedLayer):
            return found.addresses
        return self.kv_layer(i).addresses if isinstance(found, FullLayer) else (0, 0, 0, 0)

    def placed(self, layer: int) -> PlacedLayer:
        found = self.layers[layer]
        assert isinstance(found, PlacedLayer)
        return found

    def enter(self) -> None:
        """A pass on the device follows. To be called on its stream."""
        for layer in self._recurrent:
            assert isinstance(layer, PlacedLayer)
            layer.enter(self._reads)
        self.side.fill_(self._reads)

    def passed(self, tokens: int, again: Mapping[int, tuple[Advance, Advance]]) -> None:
        """It is through, with so many tokens of this session. again: by layer, what computes its convolution and its
        delta rule once more, when drafts are taken back."""
        self._reads = 1 - self._reads
        for i, (conv, delta) in again.items():
            self.placed(i).passed(self._reads, tokens, conv, delta)

    def need(self, count: int) -> None:
        """UsageError unless `count` more positions fit."""
        if self.length + count > self.capacity:
            raise UsageError(f"{self.length} + {count} tokens do not fit a context of {self.capacity}",
                             "raise -c/--ctx-size, or start over")

    def can_trim(self, length: int) -> bool:
        """Whether `trim` can go back to `length`: else a snapshot must."""
        return length == self.length or all(layer.can_trim(length) for layer in self._states)

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on; what follows overwrites them."""
        if not 0 <= length <= self.length:
            raise ValueError(f"trim: got {length}, want 0 to {self.length}")
        if not self.can_trim(length):
            raise ValueError(f"trim: {length} of {self.length} positions are no longer whole: restore a snapshot")
        if length < self.length:
            for layer in self._states:
                layer.trim(length)
        self._cut(length)

    @property
    def recurrent(self) -> bool:
        """Whether a layer has a recurrent state: then `trim` cannot reach every length."""
        return bool(self._recurrent)

    def reachable(self, length: int) -> int:
        """The longest length, at most this one, to which the session can go back."""
        return length if self.can_trim(length) else self._snapshots.best(length)

    def rewind(self, length: int) -> int:
        """Forget all positions from `length` on, or from `reachable(length)` on, which is returned."""
        reached = self.reachable(length)
        if self.can_trim(reached):
            self.trim(reached)
        else:
            self._load(self._snapshots.at(reached))
        return reached

    def begin(self, count: int) -> Snapshot:
        """To be called before `count` tokens are appended: what `rollback` needs to take them back."""
        before = self._save(copy=count > FEW and self.length > 0)
        self.marks = self._snapshots.prepare(before, count) if count > FEW and self._keeps else ()
        for layer in self._recurrent:
            layer.begin(self.length, count, 1 < count <= FEW, self.marks)
        return before

    def rollback(self, before: Snapshot) -> None:
        """As it was at `begin`, whatever part of the tokens has been appended."""
        self._load(before)

    def end(self) -> None:
        """To be called when the tokens of `begin` have been appended."""
        for mark in self.marks:
            self._snapshots.add(Snapshot(mark, len(self._cuts), [layer.marked(mark) for layer in self._recurrent]))

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
        return Snapshot(self.length, len(self._cuts), [layer.save(copy) for layer in self._states])

    def _load(self, snapshot: Snapshot) -> None:
        for layer, saved in zip(self._states, snapshot.layers, strict=True):
            layer.load(saved)
            if snapshot.length == 0:
                layer.trim(0)
        self._cut(snapshot.length)

    def _cut(self, length: int) -> None:
        self._snapshots.cut(length)
        if length < self.length:
            self._cuts.append(length)
        self.length = length


@contextmanager
def unchanged_on_error(caches: Sequence[SessionCache], counts: Sequence[int]) -> Iterator[None]:
    """While it lasts counts[i] tokens are appended to caches[i]; whatever fails, all are as they were. UsageError where
    they do not fit."""
    for cache, count in zip(caches, counts, strict=True):
        cache.need(count)
    before = [cache.begin(count) for cache, count in zip(caches, counts, strict=True)]
    try:
        yield
        for cache in caches:
            cache.end()
    except BaseException:
        for cache, saved in zip(caches, before, strict=True):
            cache.rollback(saved)
        raise


def _source(model: Model, i: int) -> int:
    """The layer whose keys and values layer i reads."""
    mixer = model.layers[i].mixer
    return i if isinstance(mixer, DeltaNet) or mixer.kv_source is None else mixer.kv_source


class _Made:
    """Keys and values of the layers that want them: one allocation for all of a shape, so that they fill huge pages."""

    def __init__(self, kv: str, dtype: torch.dtype, device: torch.device):
        self._scales, self._dtype, self._device = kv == "int8", dtype, device
        self._wanted: dict[tuple[int, int, int], list[int]] = {}

    def want(self, layer: int, shape: tuple[int, int, int]) -> None:
        self._wanted.setdefault(shape, []).append(layer)

    def allocate(self) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """(layer, keys and values [KV, positions, D], and of int8 their scales [KV, positions])."""
        for shape, layers in self._wanted.items():
            kinds = [(shape, self._dtype)] * 2 + [(shape[:2], torch.float32)] * (2 * self._scales)
            whole = [self._zeros((len(layers), *size), dtype).unbind() for size, dtype in kinds]
            yield from zip(layers, zip(*whole, strict=True), strict=True)

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=self._device)
        if self._device.type == "cpu":
            prefer_huge_pages(made.data_ptr(), made.nbytes)
        return made.fill_(0)  # which touches every page
