"""What the calls of a decode pass on a device read and write (lower_device.py): weights by name, buffers that stay.

A buffer is made once, with FEW rows, for its name and width, and calls of T tokens have its first T rows. So the passes
of one, two, ... tokens share their memory, and a captured call finds its buffers where they were.

T tokens, H hidden, K experts chosen, L layers with records, V vocabulary, R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from qmix.device import Device, Routed
from qmix.formats import Packed
from qmix.forward.kv_cache import SessionCache
from qmix.forward.steps import RopeFrequencies
from qmix.forward.weights import DenseWeights
from qmix.kernels import ops
from qmix.kernels.attend import Softmax
from qmix.kernels.device_ops import DeviceOps
from qmix.kernels.op import FEW
from qmix.kernels.router import RouterTensors
from qmix.spec import Attention, DeltaNet, Model, Rope
from qmix.spec import Tensor as Named


class DeviceWeights:
    """The dense weights of a model on the device."""

    def __init__(self, dense: DenseWeights):
        self._dense = dense
        self._vectors: dict[str, Tensor] = {}
        self._routers: dict[str, RouterTensors] = {}

    def tensor(self, weight: Named) -> Tensor:
        return self._dense.tensors[weight.name]

    def embedding(self, weight: Named) -> Tensor | Packed:
        found = self._dense.tensors.get(weight.name)
        return self.matrix(weight) if found is None else found

    def matrix(self, weight: Named) -> Packed:
        return self._dense.matrices[weight.name]

    def stack(self, weights: Sequence[Named]) -> Packed | None:
        """One matrix that has the rows of all of them, if there is one."""
        return self._dense.stacks.get(tuple(weight.name for weight in weights))

    def optional(self, weight: Named | None) -> Tensor | None:
        """What a norm multiplies by, fp32; None for 1."""
        return None if weight is None else self.tensor(weight)

    def vector(self, weight: Named) -> Tensor:
        """A bias or the like, fp32. Made once: captured calls have its address."""
        if weight.name not in self._vectors:
            self._vectors[weight.name] = self.tensor(weight).float()
        return self._vectors[weight.name]

    def router(self, op: ops.Route) -> RouterTensors:
        if op.weight.name not in self._routers:
            biases = (None if vector is None else self.vector(vector)
                      for vector in (op.logit_bias, op.choice_bias, op.expert_scale))
            self._routers[op.weight.name] = RouterTensors(op.router, self.tensor(op.weight), *biases)
        return self._routers[op.weight.name]


class Shared:
    """Buffers of all numbers of tokens, by name and width: fp32 [FEW, width]."""

    def __init__(self, device: Device, vocab: int):
        self.device = device
        self._made: dict[tuple[str, int], Tensor] = {}
        self.host_logits = device.host(FEW, vocab, dtype=torch.float32)

    def __call__(self, name: str, width: int) -> Tensor:
        if (name, width) not in self._made:
            self._made[name, width] = torch.zeros(FEW, width, device=self.device.torch_device)
        return self._made[name, width]


class FewBuffers:
    """Of one number of tokens: what goes to the host and comes from there, and the choices. depth, guesses: as of
    Routed. Where nothing chooses, the MLP of each layer is expert 0, and its weight is 1."""

    def __init__(self, model: Model, shared: Shared, tokens: int, depth: int, guesses: int):
        device = shared.device
        layers, k, place = len(model.record_layers), model.top_k, device.torch_device
        self.shared = shared
        self.given = device.host(2, tokens, dtype=torch.int64)  # tokens, positions
        self.tokens, self.positions = self.arrived = torch.zeros(2, tokens, dtype=torch.int64, device=place)
        self.caches: Sequence[SessionCache] = ()  # of each token its session's, while it is computed
        self.routed = Routed(device, tokens, model.hidden, k, max(1, depth), max(1, guesses))
        self.routed.topk_weights.fill_(1)
        self.logits = shared("logits", model.vocab)[:tokens]
        self.host_logits = shared.host_logits[:tokens]
        # Where all is one piece: every layer's choice, to be counted afterwards.
        self.ids = torch.zeros(layers, tokens, k, dtype=torch.int32, device=place)
        self.weights = torch.ones(layers, tokens, k, device=place)
        self.host_ids = device.host(layers, tokens, k, dtype=torch.int32)
        self.host_weights = device.host(layers, tokens, k, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class RopeCosSin:
    """A rope at the positions of a pass: its inv_freq, and what rope_cos_sin writes, [T, R]."""

    inv_freq: Tensor
    factor: float
    cos_sin: Tensor


class Room:
    """Where the calls of T tokens over the same caches are bound: the buffers by their names in the program, as of the
    call that is bound next. runs: (first token, end) of neighbours with the same cache; turns: of every rope, by what
    its inv_freq are; counted: where a router writes its choice a second time."""

    def __init__(self, model: Model, ops: DeviceOps, weights: DeviceWeights, few: FewBuffers,
                 frequencies: RopeFrequencies,
                 caches: Sequence[SessionCache]):
        self.ops, self.weights, self._few = ops, weights, few
        self.tokens, self.positions, self.routed = few.tokens, few.positions, few.routed
        self.counted: tuple[Tensor, Tensor] | None = None
        self.runs = runs_of(caches)
        self._names: dict[str, Tensor] = {}
        self._wholes: dict[tuple[str, ...], Tensor] = {}
        self.cos_sin: dict[tuple[Rope, int], RopeCosSin] = {}
        self._cos_sin_of: dict[tuple[Rope, int], RopeCosSin] = {}  # by a rope and the first token of a run
        ropes = dict.fromkeys(layer.mixer.rope for layer in model.layers if isinstance(layer.mixer, Attention))
        for rope in ropes:
            if rope is not None:
                self._cos_sin(rope, frequencies, caches)

    def _cos_sin(self, rope: Rope, frequencies: RopeFrequencies, caches: Sequence[SessionCache]) -> None:
        """The inv_freq of a rope may depend on what a session was made for."""
        for first, _ in self.runs:
            inv_freq, factor = frequencies.inv_freq(rope, caches[first].capacity)
            key = rope, inv_freq.data_ptr()  # made once for all sessions that turn alike
            if key not in self.cos_sin:
                name = f"cos_sin {len(self.cos_sin)}"
                self.cos_sin[key] = RopeCosSin(inv_freq, factor, self._few.shared(name, rope.dim)[:len(self.tokens)])
            self._cos_sin_of[rope, first] = self.cos_sin[key]

    def __getitem__(self, name: str) -> Tensor:
        return self._names[name]

    def put(self, buffer: Tensor, *names: str) -> Tensor:
        """`buffer` is known by these names from now on."""
        self._names |= dict.fromkeys(names, buffer)
        return buffer

    def make(self, width: int, *names: str) -> Tensor:
        """A buffer [T, width] by these names."""
        return self.put(self._few.shared(names[0], width)[:len(self.tokens)], *names)

    def columns(self, names: tuple[str, ...], widths: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Buffers [T, width] by these names, side by side: (what they are columns of, they)."""
        whole = self._wholes[names] = self._few.shared(" ".join(names), sum(widths))[:len(self.tokens)]
        ends = list(accumulate(widths))
        found = [whole[:, end - width:end] for width, end in zip(widths, ends, strict=True)]
        self._names |= dict(zip(names, found, strict=True))
        return whole, found

    def whole(self, names: tuple[str, ...]) -> Tensor:
        """What `columns` made for these names last."""
        return self._wholes[names]

    def attend(self, op: ops.Attend, softmax: Softmax, first: int, end: int, rope: Rope | None, qkv: Tensor,
               out: Tensor) -> None:
        """Tokens first to end over their session's cache, which is looked up now: another one may have its place."""
        kept = self._few.caches[first].kv_layer(op.layer)
        scales = None if kept.key_scales is None or kept.value_scales is None else (kept.key_scales, kept.value_scales)
        cos_sin = None if rope is None else self._cos_sin_of[rope, first].cos_sin[first:end]
        self.ops.rope_attend(qkv[first:end], cos_sin, kept.keys, kept.values, self.positions[first:end],
                             op.attention.window, out[first:end], scales, softmax)


    def recur(self, delta: DeltaNet, layer: int, vectors: Sequence[Tensor], first: int, end: int,
              rows: Sequence[Tensor], out: Tensor) -> None:
        """The convolution and the delta rule of tokens first to end. vectors: taps, a_log, dt_bias; rows [T, ...]: q, k
        and v side by side, where the convolution writes these, a, b."""
        cache, (x, mixed, a, b) = self._few.caches[first], (row[first:end] for row in rows)
        kept, (taps, a_log, dt_bias) = cache.placed(layer), vectors
        self.ops.conv(x, taps, kept.past.pair, cache.side, mixed)
        self.ops.delta(delta, mixed, a, b, a_log, dt_bias, kept.state.pair, cache.side, out[first:end])
        if end - first > 1:
            kept.keep(x, mixed, a, b)


def runs_of(caches: Sequence[SessionCache]) -> list[tuple[int, int]]:
    """(first token, end) of neighbours with the same cache: a, b, b -> (0, 1), (1, 3)."""
    found: list[tuple[int, int]] = []
    for token, cache in enumerate(caches):
        if token and cache is caches[token - 1]:
            found[-1] = found[-1][0], token + 1
        else:
            found.append((token, token + 1))
    return found
