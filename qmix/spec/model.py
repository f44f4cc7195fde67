"""A whole model, and the list of its tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qmix.spec.checks import counts, numbers, one_of, want
from qmix.spec.layers import Attention, DeltaNet, Expert, Layer, Moe, MtpHead
from qmix.spec.tensors import DTYPES, WIDE, WIDENED, ExpertKey, Norm, Role, Tensor

LAYERS = 4096  # more than any model has


@dataclass(frozen=True, slots=True)
class Model:
    """architecture: the registry's name for what read it. dtype: of the checkpoint's weights. embed_scale: what
    embeddings are multiplied by, before it is rounded to that dtype. mtp: layers of a multi-token-prediction head that
    the checkpoint has, by its config.json. mtp_head: that head, where qmix has it: its layer is numbered behind the
    last one, and is none of `layers`, but its tensors and records are the model's. wide: names, without
    "layers.N.", of norms, routers, biases and the like that are fp32, in all layers, since `dtype` does not have all of
    their numbers: of a GGUF file."""

    architecture: str
    hidden: int
    vocab: int
    max_positions: int
    layers: tuple[Layer, ...]
    final_norm: Norm
    dtype: str = "bfloat16"
    tied: bool = False
    bos: int | None = None
    eos: tuple[int, ...] = ()
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    mtp: int = 0
    mtp_head: MtpHead | None = None
    wide: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts(self, "hidden", "vocab", "max_positions")
        counts(self, "mtp", least=0, most=64)
        one_of(self, "dtype", *DTYPES)
        numbers(self, "embed_scale")
        if self.logit_softcap is not None:
            numbers(self, "logit_softcap")
        want(0 < len(self.layers) <= LAYERS, self, "layers", len(self.layers), f"1 to {LAYERS}")
        for i, layer in enumerate(self.layers):
            if isinstance(layer.mixer, Attention) and layer.mixer.kv_source is not None:
                self._check_source(i, layer.mixer, layer.mixer.kv_source)
        if self.wide:
            known, once = {within_layer(t.name) for t in self.tensors() if t.role in WIDENED}, len({*self.wide})
            want(known.issuperset(self.wide), self, "wide", self.wide, "names of norms, routers and biases")
            want(once == len(self.wide), self, "wide", len(self.wide), f"each name once, {once} in all")

    def _check_source(self, i: int, mixer: Attention, source: int) -> None:
        name = f"layers.{i}.kv_source"
        want(source < i, self, name, source, f"a layer before {i}")
        other = self.layers[source].mixer
        want(isinstance(other, Attention) and other.kv_source is None
             and (other.kv_heads, other.head_dim) == (mixer.kv_heads, mixer.head_dim), self, name, source,
             "a layer with keys and values of its own, in the same heads")

    @property
    def embed_factor(self) -> float:
        """embed_scale as a number of the weights' dtype: so the model was trained, and so transformers runs it.
        Example: sqrt(2816) = 53.07 is 53.0 in bfloat16."""
        return rounded(self.embed_scale, self.dtype)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def trunk(self) -> Model:
        """The model without its multi-token-prediction head."""
        return self if self.mtp_head is None else replace(self, mtp_head=None)

    def layer(self, i: int) -> Layer:
        """Layer i; the one behind the last is that of the multi-token-prediction head."""
        if self.mtp_head is not None and i == len(self.layers):
            return self.mtp_head.layer
        return self.layers[i]

    @property
    def num_experts(self) -> int:
        """Records of each layer that has any: experts, or 1, its MLP, in a model without experts. ConfigError where
        layers differ."""
        found = set(map(self.experts_in, self.paged_layers))
        want(len(found) == 1, self, "layers", sorted(found), "the same number of experts in all layers that have any")
        return found.pop()

    @property
    def top_k(self) -> int:
        """Records that a token meets in a layer, at most."""
        return max((layer.mlp.router.top_k for layer in self.layers if isinstance(layer.mlp, Moe)), default=1)

    def experts_in(self, layer: int) -> int:
        """Records of a layer: 0 for a dense one among layers with experts."""
        mlp = self.layer(layer).mlp
        return mlp.router.experts if isinstance(mlp, Moe) else 0 if self.moe_layers else 1

    @property
    def record_layers(self) -> tuple[int, ...]:
        """The layers that have records: those with experts, or all of a model without any."""
        return self.moe_layers or tuple(range(len(self.layers)))

    @property
    def paged_layers(self) -> tuple[int, ...]:
        """`record_layers`, and behind them that of the multi-token-prediction head."""
        return self.record_layers if self.mtp_head is None else (*self.record_layers, len(self.layers))

    @property
    def expert_inner(self) -> int:
        """Inner size of the records, which is the same in all; ConfigError where it is not."""
        mlps = [self.layer(i).mlp for i in self.paged_layers]
        found = {mlp.expert.inner if isinstance(mlp, Moe) else mlp.inner for mlp in mlps}
        want(len(found) == 1, self, "layers", sorted(found), "experts of one inner size")
        return found.pop()

    @property
    def expert(self) -> Expert:
        """What all records are: one layout holds them. ConfigError where they differ."""
        inner, mlps = self.expert_inner, [self.layer(i).mlp for i in self.paged_layers]
        found = {mlp.expert if isinstance(mlp, Moe) else Expert(mlp.inner, mlp.activation) for mlp in mlps}
        want(len(found) == 1, self, "layers", sorted(map(repr, found)), "experts with one activation and alike biases")
        assert all(expert.inner == inner for expert in found)
        return found.pop()

    @property
    def expert_numbers(self) -> int:
        """Of one record: its weights and, where it has them, its biases."""
        expert = self.expert
        return 3 * self.hidden * expert.inner + (2 * expert.inner + self.hidden if expert.bias else 0)

    @property
    def chosen(self) -> int:
        """Records that a token meets in all layers."""
        return sum(map(self.chosen_in, range(len(self.layers))))

    def chosen_in(self, layer: int) -> int:
        """Records that a token meets in a layer."""
        mlp = self.layers[layer].mlp
        return mlp.router.top_k if isinstance(mlp, Moe) else self.experts_in(layer)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.mlp, Moe))

    @property
    def expert_keys(self) -> tuple[ExpertKey, ...]:
        """Every record, in the order of the store: the experts, those of the multi-token-prediction head last; of a
        model without any the MLP of each layer, as (layer, 0)."""
        return tuple(ExpertKey(i, e) for i in self.paged_layers for e in range(self.experts_in(i)))

    def is_wide(self, tensor: Tensor) -> bool:
        """Whether a dense tensor is fp32 in a store, whatever `dtype` is."""
        return tensor.role in WIDE or (tensor.role in WIDENED and within_layer(tensor.name) in self.wide)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every dense tensor, in the order of use. Experts are not among them (`expert_tensors`); nor, in a model
        without experts, are the MLPs, which are records. Without tied embeddings the head comes last, but for a
        multi-token-prediction head."""
        found = [Tensor("embedding", (self.vocab, self.hidden), "embedding")]
        for i in range(len(self.layers)):
            found += self.layer_tensors(i)
        if self.final_norm.weight != "none":
            found.append(Tensor("final_norm", (self.hidden,), "norm"))
        if not self.tied:
            found.append(Tensor("head", (self.vocab, self.hidden), "head"))
        return (*found, *self.mtp_tensors())

    def mtp_tensors(self) -> tuple[Tensor, ...]:
        """Those of `tensors` that are the multi-token-prediction head's."""
        head, hidden = self.mtp_head, self.hidden
        if head is None:
            return ()
        return (*_norm("mtp.embedding_norm", head.embedding_norm, hidden),
                *_norm("mtp.hidden_norm", head.hidden_norm, hidden), Tensor("mtp.fc", (hidden, 2 * hidden), "linear"),
                *self.layer_tensors(len(self.layers)), *_norm("mtp.final_norm", head.final_norm, hidden))

    def layer_tensors(self, i: int) -> tuple[Tensor, ...]:
        """Those of `tensors` that are layer i's."""
        found = _layer(self.hidden, self.layer(i), not self.moe_layers)
        return tuple(Tensor(f"layers.{i}.{t.name}", t.shape, t.role) for t in found)

    def expert_tensors(self, key: ExpertKey) -> tuple[Tensor, ...]:
        """Those of one record: gate and up [inner, hidden], down [hidden, inner], and their biases."""
        mlp, prefix = self.layer(key.layer).mlp, f"layers.{key.layer}.experts.{key.expert}."
        expert = mlp.expert if isinstance(mlp, Moe) else mlp
        found = [Tensor(prefix + t.name, t.shape, "mlp") for t in _mlp("", self.hidden, expert.inner)]
        if isinstance(mlp, Moe) and mlp.expert.bias:
            found += [Tensor(prefix + name, (rows,), "bias") for name, rows in (
                ("gate_bias", expert.inner), ("up_bias", expert.inner), ("down_bias", self.hidden))]
        return tuple(found)


def rounded(number: float, dtype: str) -> float:
    """The nearest number of a dtype, of two that are as near the even one; infinite where it has none as large."""
    if dtype == "float16":
        try:
            return float(struct.unpack("<e", struct.pack("<e", number))[0])
        except OverflowError:
            return math.copysign(math.inf, number)
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    if dtype == "bfloat16":
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def of_mtp_head(model: Model, key: ExpertKey | str) -> bool:
    """Whether a record, or a dense tensor by its name, is of the multi-token-prediction head."""
    layer = key.layer if isinstance(key, ExpertKey) else layer_of(key)
    return key.startswith("mtp.") if isinstance(key, str) and layer is None else layer == len(model.layers)


def layer_of(name: str) -> int | None:
    """The layer of a tensor by its canonical name, None outside the layers."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def within_layer(name: str) -> str:
    """"layers.3.attention.q_norm" -> "attention.q_norm"; names outside the layers as they are."""
    return name if layer_of(name) is None else name.split(".", 2)[2]


def _layer(hidden: int, layer: Layer, dense: bool) -> Iterator[Tensor]:
    norms, mixer, mlp = layer.norms, layer.mixer, layer.mlp
    yield from _norm("before_mixer", norms.before_mixer, hidden)
    yield from _attention(hidden, mixer) if isinstance(mixer, Attention) else _delta(hidden, mixer)
    yield from _norm("after_mixer", norms.after_mixer, hidden)
    yield from _norm("before_mlp", norms.before_mlp, hidden)
    if isinstance(mlp, Moe):
        yield from _moe(hidden, mlp)
    elif not dense:
        yield from _mlp("mlp.", hidden, mlp.inner)
    yield from _norm("after_mlp", norms.after_mlp, hidden)
    if layer.output_scale:
        yield Tensor("output_scale", (1,), "other")


def _norm(name: str, norm: Norm | None, size: int) -> Iterator[Tensor]:
    if norm is not None and norm.weight != "none":
        yield Tensor(name, (size,), "norm")


def _attention(hidden: int, a: Attention) -> Iterator[Tensor]:
    q, kv, own = a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_source is None
    rows = {"q": q, "gate": q * a.output_gate, "k": kv * own, "v": kv * (own and not a.v_from_k)}
    for name, count in rows.items():
        if count:
            yield Tensor(f"attention.{name}", (count, hidden), "linear")
            if a.bias != "none":
                yield Tensor(f"attention.{name}_bias", (count,), "bias")
    whole = a.norm_over == "whole"
    yield from _norm("attention.q_norm", a.q_norm, q if whole else a.head_dim)
    if own:
        yield from _norm("attention.k_norm", a.k_norm, kv if whole else a.head_dim)
        yield from _norm("attention.v_norm", a.v_norm, kv if whole else a.head_dim)
    if a.sinks:
        yield Tensor("attention.sinks", (a.heads,), "other")
    yield Tensor("attention.o", (hidden, q), "linear")
    if a.bias == "qkvo":
        yield Tensor("attention.o_bias", (hidden,), "bias")


def _delta(hidden: int, d: DeltaNet) -> Iterator[Tensor]:
    keys, values = d.key_heads * d.key_dim, d.value_heads * d.value_dim
    for name, rows in (("q", keys), ("k", keys), ("v", values), ("z", values)):
        yield Tensor(f"delta.{name}", (rows, hidden), "linear")
    for name in ("b", "a"):  # few rows that decide what the state forgets: never quantized, as a router
        yield Tensor(f"delta.{name}", (d.value_heads, hidden), "router")
    yield Tensor("delta.conv", (2 * keys + values, d.conv), "other")
    yield Tensor("delta.a_log", (d.value_heads,), "recurrent")
    yield Tensor("delta.dt_bias", (d.value_heads,), "bias")
    if d.norm.weight != "none":
        yield Tensor("delta.norm", (d.value_dim,), "recurrent")
    yield Tensor("delta.o", (hidden, values), "linear")


def _moe(hidden: int, moe: Moe) -> Iterator[Tensor]:
    router = moe.router
    yield from _norm("router.input_norm", router.input_norm, hidden)
    if router.input_scale:
        yield Tensor("router.input_scale", (hidden,), "other")
    yield Tensor("router.weight", (router.experts, hidden), "router")
    vectors: tuple[tuple[str, bool, Role], ...] = (
        ("logit_bias", router.logit_bias, "router"), ("choice_bias", router.choice_bias, "choice_bias"),
        ("expert_scale", router.expert_scale, "router"))
    for name, there, role in vectors:
        if there:
            yield Tensor(f"router.{name}", (router.experts,), role)
    for part, branch in (("routed", moe.routed), ("beside", moe.beside[1] if moe.beside else None)):
        if branch is not None:
            yield from _norm(f"{part}.norm_in", branch.norm_in, hidden)
            yield from _norm(f"{part}.norm_out", branch.norm_out, hidden)
    if moe.beside:
        yield from _mlp("beside.", hidden, moe.beside[0].inner)
    if moe.shared:
        yield from _mlp("shared.", hidden, moe.shared.inner)
        if moe.shared_gate:
            yield Tensor("shared.switch", (1, hidden), "router")


def _mlp(prefix: str, hidden: int, inner: int) -> tuple[Tensor, ...]:
    role: Role = "mlp"
    return (Tensor(prefix + "gate", (inner, hidden), role), Tensor(prefix + "up", (inner, hidden), role),
            Tensor(prefix + "down", (hidden, inner), role))
