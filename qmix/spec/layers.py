"""Mixers, routers, MLPs, and the layer that joins them."""

from __future__ import annotations

from dataclasses import dataclass

from qmix.spec.checks import counts, numbers, one_of, want
from qmix.spec.rope import Proportional, Rope
from qmix.spec.tensors import Norm


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention, causal, of heads that share keys and values in groups (GQA, arXiv 2305.13245).

    scale: of scores, None = head_dim^-0.5. window: positions that a token sees, itself included; None = all. rope None:
    no positions. q_norm, k_norm: a norm of each head ("head") or of the whole projection ("whole") before the rotation;
    v_norm likewise, without a rotation. bias: "none", "qkv" or "qkvo". clip_qkv: projections are clamped to
    [-clip, clip], after their norms. sinks: a learnt logit a head that takes part in the softmax and gives nothing.
    output_gate: the result is multiplied by the sigmoid of one more projection, as wide as q. softcap: scores become
    cap * tanh(score / cap). v_from_k: values are made of the key projection, before its norm. kv_source: the layer
    whose keys and values this one reads instead of its own.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    scale: float | None = None
    window: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_norm: Norm | None = None
    norm_over: str = "head"
    bias: str = "none"
    clip_qkv: float | None = None
    sinks: bool = False
    output_gate: bool = False
    softcap: float | None = None
    v_from_k: bool = False
    kv_source: int | None = None

    def __post_init__(self) -> None:
        counts(self, "heads", "kv_heads", "head_dim")
        want(self.heads % self.kv_heads == 0, self, "kv_heads", self.kv_heads, f"a divisor of heads = {self.heads}")
        if self.rope is not None:
            whole = isinstance(self.rope.scaling, Proportional)
            want(self.rope.dim <= self.head_dim and (not whole or self.rope.dim == self.head_dim), self, "rope.dim",
                 self.rope.dim, f"at most head_dim = {self.head_dim}")
        if self.window is not None:
            counts(self, "window")
        for name in ("scale", "clip_qkv", "softcap"):
            if getattr(self, name) is not None:
                numbers(self, name)
        one_of(self, "norm_over", "head", "whole")
        one_of(self, "bias", "none", "qkv", "qkvo")
        if self.kv_source is not None:
            counts(self, "kv_source", least=0)


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Gated delta net (Yang et al. 2024, arXiv 2412.06464): a short causal convolution over q, k, v, then a recurrent
    state a head that decays and is corrected by the delta rule; its output is normed a head, and gated by silu(z).
    conv: taps of the convolution. Each key head serves value_heads / key_heads neighbouring value heads."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int
    norm: Norm

    def __post_init__(self) -> None:
        counts(self, "key_heads", "value_heads", "key_dim", "value_dim", "conv")
        want(self.value_heads % self.key_heads == 0, self, "value_heads", self.value_heads,
             f"a multiple of key_heads = {self.key_heads}")


Mixer = Attention | DeltaNet


@dataclass(frozen=True, slots=True)
class Activation:
    """What joins gate and up. "swiglu": silu(gate) * up. "geglu": gelu by tanh of the gate, times up. "swiglu_clamped"
    (gpt-oss): gate clamped from above to `limit`, up to both sides; gate * sigmoid(alpha * gate) * (up + 1)."""

    kind: str = "swiglu"
    alpha: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        one_of(self, "kind", "swiglu", "geglu", "swiglu_clamped")
        if self.kind == "swiglu_clamped":
            numbers(self, "alpha", "limit")
        else:
            want(self.alpha is None is self.limit, self, "alpha", self.alpha, f"none for {self.kind}")


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(activation(gate(x), up(x))): gate, up [inner, hidden], down [hidden, inner]."""

    inner: int
    activation: Activation = Activation()

    def __post_init__(self) -> None:
        counts(self, "inner")


@dataclass(frozen=True, slots=True)
class Expert:
    """The same, one of many; bias: of gate, up and down each."""

    inner: int
    activation: Activation = Activation()
    bias: bool = False

    def __post_init__(self) -> None:
        counts(self, "inner")


@dataclass(frozen=True, slots=True)
class Router:
    """Which experts a token gets, and their weights.

    logits = weights [experts, hidden] * input, in fp64 sums, plus logit_bias. score: softmax or sigmoid of them; over:
    "chosen", the softmax is over the chosen logits alone, or "all". The top_k best scores are chosen, of each score
    plus choice_bias, which does not enter its weight; with groups > 1 only experts of the top_groups best groups, by
    group_score: "max", or "top2", the sum of a group's two best. normalize: weights are divided by their sum plus eps.
    Then they are multiplied by `scale`, and by a learnt number an expert (expert_scale).
    input: "mlp" reads what the norm before the MLP gives; "residual" reads the residual through a norm of its own
    (input_norm), times a learnt number a dimension where input_scale, times input_factor.
    """

    experts: int
    top_k: int
    score: str = "softmax"
    over: str = "chosen"
    normalize: bool = False
    eps: float = 0.0
    logit_bias: bool = False
    choice_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    scale: float = 1.0
    expert_scale: bool = False
    input: str = "mlp"
    input_norm: Norm | None = None
    input_scale: bool = False
    input_factor: float = 1.0

    def __post_init__(self) -> None:
        counts(self, "experts", most=4096)
        counts(self, "top_k", most=self.experts)
        counts(self, "groups", most=self.experts)
        counts(self, "top_groups", most=self.groups)
        want(self.experts % self.groups == 0, self, "groups", self.groups, f"a divisor of experts = {self.experts}")
        allowed = self.experts // self.groups * self.top_groups
        want(self.top_k <= allowed, self, "top_k", self.top_k, f"at most {allowed}, the experts of its groups")
        one_of(self, "score", "softmax", "sigmoid")
        one_of(self, "over", "chosen", "all")
        one_of(self, "group_score", "max", "top2")
        want(self.group_score != "top2" or self.experts >= 2 * self.groups, self, "group_score", self.group_score,
             "groups of two experts or more")
        one_of(self, "input", "mlp", "residual")
        want(self.input == "residual" or (self.input_norm is None and not self.input_scale and self.input_factor == 1),
             self, "input", self.input, "'residual' for a norm, a scale or a factor of its own")
        want(self.input == "mlp" or self.input_norm is not None, self, "input_norm", None, "a norm of the residual")
        numbers(self, "scale", "input_factor")
        numbers(self, "eps", positive=False)
        want(self.eps >= 0, self, "eps", self.eps, "0 or more")


@dataclass(frozen=True, slots=True)
class Branch:
    """Norms around a part of a layer's second half: of the residual, which it reads instead of what `before_mlp` gives
    where norm_in is set; and of what it gives."""

    norm_in: Norm | None = None
    norm_out: Norm | None = None


@dataclass(frozen=True, slots=True)
class Moe:
    """Routed experts, and what is added to their weighted sum. routed: norms of their own (Gemma 4). shared: an MLP
    that every token meets, which reads what the experts read, and is added before routed.norm_out; shared_gate: its
    result is multiplied by the sigmoid of a learnt projection of its input. beside: an MLP with a branch of its own,
    added last."""

    router: Router
    expert: Expert
    routed: Branch = Branch()
    shared: Mlp | None = None
    shared_gate: bool = False
    beside: tuple[Mlp, Branch] | None = None

    def __post_init__(self) -> None:
        want(self.shared is not None or not self.shared_gate, self, "shared_gate", True, "a shared MLP to gate")
        want(not self.shared_gate or self.routed.norm_in is None, self, "shared_gate", True,
             "no norm of the routed branch: the gate reads what `before_mlp` gives")


@dataclass(frozen=True, slots=True)
class Norms:
    """Of a layer; None where it has none: then what they stand before reads the residual as it is, or in the second
    half through the norms of its branches."""

    before_mixer: Norm | None
    before_mlp: Norm | None
    after_mixer: Norm | None = None
    after_mlp: Norm | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """residual += after_mixer(mixer(before_mixer(residual))); the same with the MLP. output_scale: a learnt number that
    multiplies the whole residual behind the layer."""

    mixer: Mixer
    mlp: Moe | Mlp
    norms: Norms
    output_scale: bool = False


@dataclass(frozen=True, slots=True)
class MtpHead:
    """A multi-token-prediction head (DeepSeek-AI 2024, arXiv 2412.19437, section 2.2): of a token's final hidden state
    and of the token that follows it predicts the token after that.

    residual = fc [embedding_norm(embedding of the next token); hidden_norm(hidden)], fc [hidden, 2 hidden]; then
    `layer`; then `final_norm`, which gives the logits, by the model's own head, and the hidden state for another step.
    hidden: what the model's final norm gives.
    """

    layer: Layer
    embedding_norm: Norm
    hidden_norm: Norm
    final_norm: Norm

    def __post_init__(self) -> None:
        want(isinstance(self.layer.mixer, Attention) and self.layer.mixer.kv_source is None, self, "layer.mixer",
             type(self.layer.mixer).__name__, "attention with keys and values of its own")
        want(isinstance(self.layer.mlp, Moe), self, "layer.mlp", type(self.layer.mlp).__name__, "experts")
