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

A piece that is used twice, over the same caches, is captured (device.capture). All work is over buffers that stay, one
set for each number of tokens.

T tokens, H hidden, Q query heads, KV key-value heads, D head size, V vocabulary, K experts chosen, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from qmix.config import Step
from qmix.device import Device, Repeated, Routed
from qmix.device.device import Work
from qmix.errors import Interrupted
from qmix.formats import Packed
from qmix.forward.kv_cache import SessionCache
from qmix.forward.weights import DenseWeights
from qmix.kernels.attend import default_inv_freq
from qmix.kernels.device_ops import DeviceOps, Later
from qmix.kernels.router import RouterTensors
from qmix.spec import Model

KEPT = 8  # sets of pieces: numbers of tokens, and caches


class DeviceExperts(Protocol):
    """The experts' side."""

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


class _Buffers:
    """Of one number of tokens."""

    def __init__(self, model: Model, device: Device, tokens: int, depth: int, guesses: int):
        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device.torch_device)

        attention, _ = model.alike()
        layers, k, size = model.num_layers, model.top_k, attention.head_dim
        self.given = device.host(2, tokens, dtype=torch.int64)  # tokens, positions
        self.arrived = torch.zeros(2, tokens, dtype=torch.int64, device=device.torch_device)
        self.tokens, self.positions = self.arrived
        self.caches: Sequence[SessionCache] = ()  # of each token its session's, while it is computed
        self.residual = floats(tokens, model.hidden)
        self.x = floats(tokens, model.hidden)
        self.qkv = floats(tokens, (attention.heads + 2 * attention.kv_heads) * size)
        self.cos_sin = floats(tokens, size)
        self.attended = floats(tokens, attention.heads * size)
        self.logits = floats(tokens, model.vocab)
        self.host_logits = device.host(tokens, model.vocab, dtype=torch.float32)
        self.routed = Routed(device, tokens, model.hidden, k, max(1, depth), max(1, guesses))
        # Where all is one piece: every layer's choice, to be counted afterwards.
        self.ids = torch.zeros(layers, tokens, k, dtype=torch.int32, device=device.torch_device)
        self.weights = floats(layers, tokens, k)
        self.host_ids = device.host(layers, tokens, k, dtype=torch.int32)
        self.host_weights = device.host(layers, tokens, k, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The work of one number of tokens over the same caches, by layer: before its experts, and of those in slots. last:
    the head; where all experts are resident, everything."""

    layers: Sequence[tuple[Repeated, Repeated | None]]
    last: Repeated


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer on the device: norms [H] fp32; heads: q, k and v, one matrix where their format allows it.
    """

    input_norm: Tensor
    heads: tuple[Packed, ...]
    o: Packed
    post_norm: Tensor
    router: RouterTensors

    @classmethod
    def of(cls, weights: DenseWeights, i: int) -> _Layer:
        names = tuple(f"layers.{i}.attention.{part}" for part in "qkv")
        stack = weights.stacks.get(names)
        heads = (stack,) if stack is not None else tuple(weights.matrices[name] for name in names)
        tensors, (_, moe) = weights.tensors, weights.model.alike()
        return cls(tensors[f"layers.{i}.before_mixer"], heads, weights.matrices[f"layers.{i}.attention.o"],
                   tensors[f"layers.{i}.before_mlp"], RouterTensors(moe.router, tensors[f"layers.{i}.router.weight"]))


class DeviceDecode:
    """depth, guesses: for how many layers ahead how many experts are guessed, 0 for none."""

    def __init__(self, model: Model, weights: DenseWeights, device: Device, ops: DeviceOps, experts: DeviceExperts,
                 depth: int, guesses: int):
        self._model = model
        self._shape, _ = model.alike()
        assert self._shape.rope is not None
        self._layers = [_Layer.of(weights, i) for i in range(model.num_layers)]
        self._embedding, self._final_norm = weights.tensors["embedding"], weights.tensors["final_norm"]
        self._head_matrix = weights.matrices["embedding" if model.tied else "head"]
        self._device = device
        self._ops = ops
        self._experts = experts
        self._depth = depth if guesses else 0
        self._guesses = guesses
        self._inverse = default_inv_freq(self._shape.head_dim, self._shape.rope.theta).to(device.torch_device)
        self._buffers: dict[int, _Buffers] = {}
        self.warm = True  # whether the last call launched only what had been captured before
        self._pieces: dict[tuple[int, ...], _Pieces] = {}

    def __call__(self, tokens: Tensor, positions: Tensor, caches: Sequence[SessionCache], step: Step) -> Tensor:
        """tokens, positions int64 [T] on the host; caches: of each token its session's -> logits [T, V] fp32 on the
        host, overwritten by the next call. The caches' lengths are the caller's. Interrupted between two layers."""
        found = self._buffers.get(len(tokens))
        if found is None:
            found = self._buffers[len(tokens)] = _Buffers(self._model, self._device, len(tokens), self._depth,
                                                          self._guesses)
        pieces = self._pieces_for(found, caches)
        self.warm = pieces.last.warm
        found.given[0], found.given[1] = tokens, positions
        found.caches = caches
        try:
            (self._at_once if self._experts.resident else self._by_layer)(found, pieces, step)
        finally:  # also where it ends early: what has been launched uses the buffers
            self._device.wait(self._device.compute.record())
            found.caches = ()
        if self._experts.resident:
            for layer in range(self._model.num_layers):
                self._experts.count(layer, found.host_ids[layer], found.host_weights[layer], step)
        return found.host_logits

    def _at_once(self, found: _Buffers, pieces: _Pieces, step: Step) -> None:
        if step.cancel:
            raise Interrupted("cancelled")
        pieces.last.launch()

    def _by_layer(self, found: _Buffers, pieces: _Pieces, step: Step) -> None:
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

    def _pieces_for(self, found: _Buffers, caches: Sequence[SessionCache]) -> _Pieces:
        """By where the caches are, not by which they are: a new cache in an old one's place is served by its graphs."""
        key = found.routed.tokens, *(address for cache in caches for address in cache.identity)
        pieces = self._pieces.pop(key, None) or self._cut(found, caches)
        self._pieces[key] = pieces  # the last one used is the last to be forgotten
        if len(self._pieces) > KEPT:
            del self._pieces[next(iter(self._pieces))]
        return pieces

    def _cut(self, found: _Buffers, caches: Sequence[SessionCache]) -> _Pieces:
        works = [(self._before(found, layer, caches), self._experts.begin(layer, found.routed))
                 for layer in range(self._model.num_layers)]
        head, again = self._head(found), partial(Repeated, self._device)
        if not self._experts.resident:
            return _Pieces([(again(before), again(inside) if inside else None) for before, inside in works],
                           again(head))
        chain = [work for pair in works for work in pair if work is not None] + [head]

        def everything() -> None:
            for work in chain:
                work()

        return _Pieces((), again(everything))

    def _before(self, found: _Buffers, index: int, caches: Sequence[SessionCache]) -> Work:
        """What comes before the experts of layer `index`: attention and router, their choice on its way to the host."""
        model, ops, layer = self._model, self._ops, self._layers[index]
        routed, later = found.routed, self._layers[index + 1:index + 1 + self._depth]
        asked = Later([w.post_norm for w in later], [w.router for w in later], routed.ahead[:, :len(later)])
        counted = (found.ids[index], found.weights[index]) if self._experts.resident else None
        outs = found.qkv.split([m.spec.rows for m in layer.heads], 1)
        runs = _runs(caches)

        def work() -> None:
            if index == 0:
                found.arrived.copy_(found.given, non_blocking=True)
                ops.embed(found.tokens, self._embedding, found.residual)
                ops.rope_cos_sin(found.positions, self._inverse, found.cos_sin)
                ops.norm(found.residual, layer.input_norm, model.final_norm.eps, found.x)
            else:
                ops.norm(found.residual, layer.input_norm, model.final_norm.eps, found.x, routed.rows,
                         routed.topk_weights)
            for m, out in zip(layer.heads, outs, strict=True):
                ops.linear(found.x, m, out)
            for first, end in runs:
                kv_layer = found.caches[first].kv_layer(index)
                scales = None if kv_layer.key_scales is None or kv_layer.value_scales is None else (
                    kv_layer.key_scales, kv_layer.value_scales)
                ops.rope_attend(found.qkv[first:end], found.cos_sin[first:end], kv_layer.keys, kv_layer.values,
                                found.positions[first:end], self._shape.window, found.attended[first:end], scales)
            ops.linear(found.attended, layer.o, found.residual, add=True)
            ops.route(found.residual, layer.post_norm, layer.router, model.final_norm.eps, routed.x, routed.ids,
                      routed.topk_weights, asked if later else None, counted)
            if not self._experts.resident:
                routed.read_back(index)

        return work

    def _head(self, found: _Buffers) -> Work:
        final_norm, head, ops, eps = self._final_norm, self._head_matrix, self._ops, self._model.final_norm.eps

        def work() -> None:
            ops.norm(found.residual, final_norm, eps, found.x, found.routed.rows, found.routed.topk_weights)
            ops.linear(found.x, head, found.logits)
            found.host_logits.copy_(found.logits, non_blocking=True)
            if self._experts.resident:
                found.host_ids.copy_(found.ids, non_blocking=True)
                found.host_weights.copy_(found.weights, non_blocking=True)

        return work


def _runs(caches: Sequence[SessionCache]) -> list[tuple[int, int]]:
    """(first token, end) of neighbours with the same cache: a, b, b -> (0, 1), (1, 3)."""
    found: list[tuple[int, int]] = []
    for token, cache in enumerate(caches):
        if token and cache is caches[token - 1]:
            found[-1] = found[-1][0], token + 1
        else:
            found.append((token, token + 1))
    return found
