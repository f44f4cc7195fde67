"""A few tokens through the layers on a device, while decoding.

A layer is two pieces of work: what comes before its experts, ending with the router's choice on its way to the host,
and the experts that are in the device's slots, which need no word from the host. The host reads the choice while the
second piece runs. Where nothing is missing it gives the next layer both its pieces at once, and does its own accounts
of this layer while the device computes:

    device   attention, router, readback | experts in slots | attention, router, readback | experts in slots
    host                                 ^ reads; gives the next layer; accounts of this one ^ reads ...

What is missing it brings in or computes, and only then gives the next layer its first piece:

    device   attention, router, readback | experts in slots      | experts that came | attention, router ...
    host                                 ^ reads, asks for what is missing, waits for it ^

Where every expert is in a slot nobody has to ask, and all layers and the head are one piece.

A piece that is used twice, over the same caches, is captured (device.capture). All work is over buffers that stay
(device_buffers.py). lower_device.py makes the work of the program's Ops. Here a layer is one with records, and layers
are counted without the others: a layer without experts is a part of the piece before the next one that has some. In a
model without experts each layer has one record, its MLP, and the choice is known; all else is the same.

T tokens, V vocabulary, K experts chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from qmix.config import Step
from qmix.device import Device, Repeated, Routed
from qmix.device.device import Work
from qmix.errors import Interrupted
from qmix.forward.device_buffers import DeviceWeights, FewBuffers, Room, Shared
from qmix.forward.device_pieces import cut, decode_program
from qmix.forward.kv_cache import SessionCache
from qmix.forward.lower_device import lower
from qmix.forward.recurrent import Advance
from qmix.forward.run_eager import Guesses
from qmix.forward.steps import RopeFrequencies
from qmix.forward.weights import DenseWeights
from qmix.kernels.device_ops import DeviceOps
from qmix.kernels.ops import Conv, Delta
from qmix.spec import Model

KEPT = 8  # sets of pieces: numbers of tokens, and caches


class DeviceExperts(Protocol):
    """The experts' side. layer: counted among those with records."""

    @property
    def resident(self) -> bool:
        """Whether all are in slots and stay there."""

    def begin(self, layer: int, routed: Routed) -> Work | None:
        """Work for the device: the rows of the chosen experts that are in slots when it runs. None where the device
        cannot do that by itself."""

    def refresh(self, layer: int) -> None:
        """Before each begin's work is given to the device: what has arrived can be used."""

    def launched(self, layer: int) -> None:
        """After that."""

    def lacking(self, layer: int, routed: Routed) -> bool:
        """The router's choice is on the host: whether there are rows that begin's work does not make."""

    def finish(self, layer: int, routed: Routed, step: Step) -> None:
        """Have the other rows made, and account for the choice. Called for every layer in turn; where none is lacking
        the next layer's begin may have been launched by now."""

    def count(self, layer: int, ids: Tensor, weights: Tensor, step: Step) -> None:
        """In place of refresh and finish where all experts are resident: what was chosen, ids and weights [T, K]."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The work of one number of tokens over the same caches, by layer: before its experts, and of those in slots. last:
    the head; where all experts are resident, everything."""

    layers: Sequence[tuple[Repeated, Repeated | None]]
    last: Repeated


class DeviceDecode:
    """depth, guesses: for how many layers ahead how many experts are guessed, 0 for none."""

    def __init__(self, model: Model, weights: DenseWeights, device: Device, ops: DeviceOps, experts: DeviceExperts,
                 depth: int, guesses: int):
        self._model = model
        self._weights = DeviceWeights(weights)
        self._device = device
        self._ops = ops
        self._experts = experts
        self._depth = depth if guesses else 0
        self._guesses = guesses
        program = decode_program(model, Guesses(self._depth, guesses))
        self._lowered = [lower(piece) for piece in cut([op for _, op in program])]
        self._again = {op.layer: _again(op, rule, self._weights, ops, device) for (_, op), (_, rule) in pairwise(
            program) if isinstance(op, Conv) and isinstance(rule, Delta)}
        self._frequencies = RopeFrequencies(model, device.torch_device, {})
        self._shared = Shared(device, model.vocab)
        self._buffers: dict[int, FewBuffers] = {}
        self.warm = True  # whether the last call launched only what had been captured before
        self._pieces: dict[tuple[int, ...], _Pieces] = {}

    def __call__(self, tokens: Tensor, positions: Tensor, caches: Sequence[SessionCache], step: Step) -> Tensor:
        """tokens, positions int64 [T] on the host; caches: of each token its session's -> logits [T, V] fp32 on the
        host, overwritten by the next call. The caches' lengths are the caller's. Interrupted between two layers."""
        found = self._buffers.get(len(tokens))
        if found is None:
            found = self._buffers[len(tokens)] = FewBuffers(self._model, self._shared, len(tokens), self._depth,
                                                            self._guesses)
        pieces = self._pieces_for(found, caches)
        self.warm = pieces.last.warm
        found.given[0], found.given[1] = tokens, positions
        found.caches = caches
        sessions = {id(cache): cache for cache in caches} if self._again else {}
        try:
            for cache in sessions.values():
                self._device.compute.run(cache.enter)
            (self._at_once if self._experts.resident else self._by_layer)(found, pieces, step)
        finally:  # also where it ends early: what has been launched uses the buffers
            self._device.wait(self._device.compute.record())
            found.caches = ()
        for cache in sessions.values():
            cache.passed(sum(one is cache for one in caches), self._again)
        if self._experts.resident:
            for layer in range(len(self._lowered) - 1):
                self._experts.count(layer, found.host_ids[layer], found.host_weights[layer], step)
        return found.host_logits

    def _at_once(self, found: FewBuffers, pieces: _Pieces, step: Step) -> None:
        if step.cancel:
            raise Interrupted("cancelled")
        pieces.last.launch()

    def _by_layer(self, found: FewBuffers, pieces: _Pieces, step: Step) -> None:
        experts, routed, told = self._experts, found.routed, -1  # told: the last layer that is accounted for

        def finish(layer: int) -> None:
            nonlocal told
            told = layer
            routed.look(layer)
            experts.finish(layer, routed, step)

        for layer, (before, inside) in enumerate(pieces.layers):
            if step.cancel:
                raise Interrupted("cancelled")
            before.launch()
            read = self._device.compute.record()
            if inside is not None:
                experts.refresh(layer)
                inside.launch()
                experts.launched(layer)
            if told < layer - 1:
                finish(layer - 1)
            self._device.wait(read)
            routed.look(layer)
            if experts.lacking(layer, routed):
                finish(layer)
        pieces.last.launch()
        if told < len(pieces.layers) - 1:
            finish(len(pieces.layers) - 1)

    def _pieces_for(self, found: FewBuffers, caches: Sequence[SessionCache]) -> _Pieces:
        """By where the caches are, not by which they are: a new cache in an old one's place is served by its graphs."""
        key = found.routed.tokens, *(number for cache in caches for number in (cache.capacity, *cache.identity))
        pieces = self._pieces.pop(key, None) or self._cut(found, caches)
        self._pieces[key] = pieces  # the last one used is the last to be forgotten
        if len(self._pieces) > KEPT:
            del self._pieces[next(iter(self._pieces))]
        return pieces

    def _cut(self, found: FewBuffers, caches: Sequence[SessionCache]) -> _Pieces:
        room = Room(self._model, self._ops, self._weights, found, self._frequencies, caches)
        works = [(self._before(found, layer, room), self._experts.begin(layer, found.routed))
                 for layer in range(len(self._lowered) - 1)]
        head, again = self._head(found, room), partial(Repeated, self._device)
        if not self._experts.resident:
            return _Pieces([(again(before), again(inside) if inside else None) for before, inside in works],
                           again(head))
        chain = [work for pair in works for work in pair if work is not None] + [head]

        def everything() -> None:
            for work in chain:
                work()

        return _Pieces((), again(everything))

    def _before(self, found: FewBuffers, layer: int, room: Room) -> Work:
        """What comes before the experts of a layer with records: their choice on its way to the host."""
        resident = self._experts.resident
        room.counted = (found.ids[layer], found.weights[layer]) if resident else None
        calls = [bind(room) for bind in self._lowered[layer]]

        def work() -> None:
            if layer == 0:
                found.arrived.copy_(found.given, non_blocking=True)
            for call in calls:
                call()
            if not resident:
                found.routed.read_back(layer)

        return work

    def _head(self, found: FewBuffers, room: Room) -> Work:
        """What comes behind the last experts."""
        calls, resident = [bind(room) for bind in self._lowered[-1]], self._experts.resident

        def work() -> None:
            for call in calls:
                call()
            found.host_logits.copy_(found.logits, non_blocking=True)
            if resident:
                found.host_ids.copy_(found.ids, non_blocking=True)
                found.host_weights.copy_(found.weights, non_blocking=True)

        return work


def _again(op: Conv, rule: Delta, weights: DeviceWeights, by: DeviceOps, device: Device) -> tuple[Advance, Advance]:
    """What computes the convolution and the delta rule of some tokens once more, with the same bits, in memory of its
    own."""
    first = torch.zeros(1, dtype=torch.int32, device=device.torch_device)
    taps, a_log, dt_bias = (weights.vector(weight) for weight in (op.weight, rule.a_log, rule.dt_bias))

    def conv(past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        pair, out = torch.stack((past, past)), torch.empty_like(x)
        by.conv(x, taps, pair, first, out)
        return out, pair[1]

    def delta(state: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        pair, out = torch.stack((state, state)), x.new_empty(len(x), rule.delta.value_heads * rule.delta.value_dim)
        by.delta(rule.delta, x, a, b, a_log, dt_bias, pair, first, out)
        return out, pair[1]

    return conv, delta
