"""A model as calls of a device and Op by Op, side by side, for the tests of lowering; and specs that reach what no
configuration does. Everything is in fp32, and torch computes what both have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from model_configs import CASES, ON_DEVICE, ids, with_keys
from torch import Tensor

from qmix.config import Step
from qmix.device import Routed, StandIn
from qmix.device.device import Work
from qmix.formats import Packed
from qmix.formats.plain import pack
from qmix.forward.kv_cache import SessionCache
from qmix.forward.lower_device import not_on_device
from qmix.forward.run_eager import Eager, Guesses, program_of
from qmix.forward.run_graph import DeviceDecode
from qmix.forward.runner import Runner
from qmix.forward.weights import PACKED, KernelWeights, assemble
from qmix.kernels import ops, torch_ops
from qmix.kernels.device_ops import TorchDeviceOps
from qmix.kernels.layer import TORCH
from qmix.kernels.table import KernelTable, select
from qmix.kernels.torch_ops import PlainWeights
from qmix.models import read_model
from qmix.sizes import MatrixSpec
from qmix.spec import (
    Activation,
    Attention,
    Branch,
    DeltaNet,
    Expert,
    Layer,
    LongRope,
    Mlp,
    Model,
    Moe,
    Norm,
    Norms,
    Rope,
    Router,
)

IDS = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(2)).tolist()
NORM, BARE, PLUS = Norm(1e-5), Norm(1e-5, "none"), Norm(1e-5, "one_plus")
PLAIN = Attention(4, 2, 8, Rope(1e4, 8))
LONG = Rope(1e4, 8, LongRope(32, (1.0, 1.5, 2.0, 3.0), (2.0, 4.0, 8.0, 9.0), factor=4.0))
NET = DeltaNet(2, 4, 8, 6, 3, NORM)
MOE = Moe(Router(6, 2), Expert(16))
LAYER = Layer(PLAIN, MOE, Norms(NORM, NORM))


def model_of(*layers: Layer, **fields: Any) -> Model:
    return Model("made", 32, 96, 128, layers, NORM, "float32", **fields)


def mixer(**fields: Any) -> Layer:
    return replace(LAYER, mixer=replace(PLAIN, **fields))


def moe(**fields: Any) -> Layer:
    return replace(LAYER, mlp=replace(MOE, **fields))

GEGLU, CLAMPED = Activation("geglu"), Activation("swiglu_clamped", 1.702, 0.5)
GLM = replace(PLAIN, bias="qkv", q_norm=NORM, k_norm=NORM, rope=Rope(1e4, 4))
SPECS: dict[str, Model] = {
    **{ids(raw): read_model(with_keys(raw, {"vocab_size": 96})) for raw in CASES if raw["model_type"] in ON_DEVICE
       and not not_on_device(read_model(raw))},
    "long rope": model_of(mixer(rope=LONG), LAYER, mixer(rope=Rope(1e3, 4))),
    "no rope, a gate": model_of(mixer(rope=None, output_gate=True, bias="qkvo"), LAYER),
    "norms of values": model_of(mixer(q_norm=PLUS, k_norm=BARE, v_norm=BARE, clip_qkv=1.5), LAYER),
    "values of keys": model_of(mixer(v_from_k=True, k_norm=NORM, v_norm=NORM), LAYER),
    "norms behind": model_of(replace(LAYER, norms=Norms(NORM, PLUS, NORM)), Layer(
        PLAIN, Mlp(24), Norms(NORM, NORM, None, NORM), True), LAYER, embed_scale=2.5),
    "a router's own norm": model_of(LAYER, replace(LAYER, mlp=Moe(Router(
        6, 2, "sigmoid", normalize=True, choice_bias=True, logit_bias=True, expert_scale=True, scale=1.5, groups=3,
        top_groups=2), Expert(16)))),
    "other heads": model_of(mixer(heads=2, kv_heads=1, head_dim=24, rope=Rope(1e4, 8), window=5), LAYER),
    "experts with biases": model_of(*[replace(LAYER, mlp=replace(MOE, expert=Expert(16, CLAMPED, bias=True)))] * 2),
    "experts with geglu": model_of(LAYER, replace(LAYER, mlp=replace(MOE, expert=Expert(16, GEGLU)))),
    "a norm behind the experts": model_of(replace(LAYER, norms=Norms(NORM, NORM, None, PLUS)), LAYER),
    "sinks": model_of(mixer(sinks=True, bias="qkvo"), mixer(sinks=True, window=6), LAYER),
    "a cap and a scale": model_of(mixer(scale=0.7, softcap=1.5), LAYER, mixer(sinks=True, scale=0.2, softcap=3.0)),
    "shared experts": model_of(*(Layer(GLM, mlp, Norms(NORM, NORM)) for mlp in (
        Mlp(40), replace(MOE, shared=Mlp(16)), replace(MOE, shared=Mlp(24, GEGLU))))),
    "shared experts with a switch": model_of(moe(shared=Mlp(16), shared_gate=True), LAYER,
                                             moe(shared=Mlp(16), shared_gate=True)),
    "norms and scales behind": model_of(*[replace(LAYER, norms=Norms(NORM, NORM, NORM, NORM), output_scale=True)] * 2,
                                        replace(LAYER, output_scale=True)),
    "a dense MLP beside": model_of(*[Layer(PLAIN, replace(MOE, routed=Branch(PLUS, NORM), beside=(
        Mlp(24, CLAMPED), Branch(NORM, PLUS)), shared=Mlp(8)), Norms(NORM, NORM, None, NORM))] * 2, Layer(
        PLAIN, Mlp(16, GEGLU), Norms(NORM, NORM))),
    "delta nets": model_of(*[replace(LAYER, mixer=NET)] * 2, LAYER,
                           replace(LAYER, mixer=DeltaNet(2, 2, 8, 8, 4, NORM))),
    "attention and a delta net between two experts": model_of(
        *[Layer(net, mlp, Norms(NORM, NORM)) for mlp in (Mlp(24), MOE) for net in (PLAIN, NET)], LAYER),
    "a delta net and attention between two experts": model_of(
        *[Layer(net, mlp, Norms(NORM, NORM)) for mlp in (Mlp(24), MOE) for net in (NET, PLAIN)], LAYER),
    "capped logits": model_of(LAYER, LAYER, logit_softcap=2.0),
    "a router with an input of its own": model_of(*[replace(LAYER, mlp=replace(MOE, router=Router(
        6, 2, input="residual", input_norm=BARE, input_scale=True, input_factor=0.2)))] * 2),
    "experts with a norm of their own": model_of(*[replace(LAYER, mlp=replace(MOE, routed=Branch(PLUS)))] * 2),
}


def random_weights(model: Model) -> dict[str, Tensor]:
    """By canonical name, fp32, none of them 0 or 1."""
    drawn = torch.Generator().manual_seed(3)
    wanted = [*model.tensors(), *(t for key in model.expert_keys for t in model.expert_tensors(key))]
    found = {}
    for t in wanted:
        gain = 1.5 * t.shape[-1]**-0.5 if len(t.shape) > 1 else 0.3
        found[t.name] = torch.randn(t.shape, generator=drawn) * gain + (t.role == "norm")
    return found


class Seen:
    """What a layer's experts were given, and by whom it is computed: rows [T, K, H] of torch's reference."""

    def __init__(self, model: Model, weights: Mapping[str, Tensor]):
        self.plain = PlainWeights(weights)
        self.ops = [op for op in program_of(model) if isinstance(op, ops.Experts)]
        self.layers: list[tuple[int, Tensor, Tensor, Tensor, Tensor | None]] = []

    def rows(self, rank: int, x: Tensor, chosen: Tensor) -> Tensor:
        return torch_ops.experts(self.ops[rank], self.plain, x, chosen)

    def eager(self, layer: int, x: Tensor, chosen: Tensor, weights: Tensor, step: Step, ahead: Tensor | None = None,
              wanted: Tensor | None = None) -> Tensor:
        rank = [op.layer for op in self.ops].index(layer)
        if step.phase == "decode":
            self.layers.append((rank, x.clone(), chosen.clone(), weights.clone(), ahead))
        if wanted is not None:
            x, chosen, weights = x[wanted], chosen[wanted], weights[wanted]
        return TORCH.combine(self.rows(rank, x, chosen), weights)


class OnDevice:
    """forward.run_graph.DeviceExperts over the same. late: rows that `finish` makes, as of records that came."""

    def __init__(self, seen: Seen, device: StandIn, resident: bool, late: bool):
        self.seen, self.resident, self._device, self._late = seen, resident, device, late

    def begin(self, layer: int, routed: Routed) -> Work | None:
        return None if self._late else partial(self._compute, layer, routed)

    def _compute(self, layer: int, routed: Routed) -> None:
        routed.rows.copy_(self.seen.rows(layer, routed.x, routed.ids.long()))

    def refresh(self, layer: int) -> None:
        pass

    def launched(self, layer: int) -> None:
        pass

    def lacking(self, layer: int, routed: Routed) -> bool:
        return self._late

    def finish(self, layer: int, routed: Routed, step: Step) -> None:
        self.seen.layers.append((layer, *(t.clone() for t in (routed.host_x, routed.host_ids, routed.host_topk_weights,
                                                              routed.host_ahead))))
        if self._late:
            self._device.compute.run(partial(self._compute, layer, routed))

    def count(self, layer: int, chosen: Tensor, weights: Tensor, step: Step) -> None:
        self.seen.layers.append((layer, torch.empty(0), chosen.clone(), weights.clone(), None))


@cache
def plain_kernels() -> KernelTable:
    return replace(select({"fp32"}, say=lambda line: None), layer=TORCH)


class Pair:
    """The same model Op by Op and on a device."""

    def __init__(self, model: Model, device: StandIn, resident: bool, late: bool, kv: str):
        plain, roles, kernels = random_weights(model), {t.name: t.role for t in model.tensors()}, plain_kernels()

        def read(name: str) -> Packed | Tensor:
            found = plain[name]
            return pack(found, MatrixSpec("fp32", *found.shape)) if roles[name] in PACKED else found

        self.seen = Seen(model, plain), Seen(model, plain)
        guesses = Guesses() if resident else Guesses(2, 2)
        caches = partial(SessionCache, kv=kv)
        dense = assemble(model, torch.float32, read)
        self.eager = Eager(model, KernelWeights(dense, kernels), self.seen[0].eager, TORCH, guesses, caches)
        there = assemble(model, torch.float32, read, device.torch_device)
        decode = DeviceDecode(model, there, device, TorchDeviceOps(kernels),
                              OnDevice(self.seen[1], device, resident, late), guesses.depth, guesses.count)
        self.runner = Runner(model, there, kernels, self.seen[1].eager, guesses, partial(caches, placed=True), device,
                             decode)

    def agree(self, tokens: list[int], counts: list[int], lengths: list[int], capacities: list[int]) -> None:
        """Sessions with so many positions get tokens in one pass, and more in another one, which is captured."""
        step, at = Step("decode", tuple(i for i, count in enumerate(counts) for _ in range(count))), 0
        caches = [[one.new_cache(capacity) for capacity in capacities] for one in (self.eager, self.runner)]
        for prompt, (mine, theirs) in zip(lengths, zip(*caches, strict=True), strict=True):
            given = torch.tensor(IDS[:prompt])
            self.eager.forward(given, [mine], Step("prefill"))
            self.runner.forward(given, torch.arange(prompt), [theirs], Step("prefill"))
        for _ in range(2):
            given = torch.tensor(tokens[at:at + sum(counts)])
            at += sum(counts)
            positions = torch.cat([torch.arange(cache.length, cache.length + count)
                                   for cache, count in zip(caches[1], counts, strict=True)])
            want = self.eager.forward(given, caches[0], step, all_logits=True)
            got = self.runner.forward(given, positions, caches[1], step, all_logits=True)
            assert torch.equal(got, want) and want.std() > 0.1
        self._same_choices()

    def _same_choices(self) -> None:
        mine, theirs = (seen.layers for seen in self.seen)
        assert len(mine) == len(theirs) > 0
        for one, other in zip(mine, theirs, strict=True):
            assert one[0] == other[0] and torch.equal(one[2].int(), other[2]) and torch.equal(one[3], other[3])
            assert not len(other[1]) or torch.equal(one[1], other[1])
            if one[4] is not None:
                assert other[4] is not None
                depth, count = one[4].shape[1:]
                assert torch.equal(one[4].int(), other[4][:, :depth, :count])
        for seen in self.seen:
            seen.layers.clear()
