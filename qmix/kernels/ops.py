"""The operations that a forward pass is made of, each once: a record whose docstring is its definition.

An Op reads and writes buffers by name. A buffer has a row for each of T tokens; its dtype is fp32, int64 for ids, or
"compute", the dtype that the model computes in (bf16, or fp32 for fp32 stores). `torch_ops.py` is the reference
implementation; any other computes the same up to the order of sums. No torch here: a plan sums over Ops (op.py).

T tokens, H hidden, Q query heads, KV key-value heads, D head size, E experts, K chosen per token, F inner size of an
MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmix.kernels.op import FEW, WIDE, BytesOf, Op
from qmix.spec import Activation, Attention, DeltaNet, Router, Tensor
from qmix.spec import Norm as NormSpec
from qmix.spec import Rope as RopeSpec

SWIGLU = Activation()
CHUNK = 64  # tokens of a prompt that the delta rule takes at once


@dataclass(frozen=True, slots=True)
class Embed(Op):
    """out [T, H] fp32 = weight[tokens] * scale; weight [V, H], widened first."""

    READS = ("tokens",)
    WRITES = ("out",)
    WEIGHTS = ("weight",)

    tokens: str
    out: str
    weight: Tensor
    scale: float = 1.0

    def scratch(self, tokens: int) -> int:
        return tokens * self.weight.shape[1] * WIDE

    def bytes_read(self, tokens: int, bytes_of: BytesOf, context: int = 0, kv_bytes: int = 2) -> int:
        return tokens * bytes_of(self.weight) // self.weight.shape[0]

    def flops(self, tokens: int, context: int = 0) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Norm(Op):
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467): out [T, H] = source / sqrt(mean(source^2) + eps) * w, in fp32;
    w = weight, 1 + weight, or 1 (spec.Norm). source fp32 or compute; out compute; wide: the same unrounded, fp32. One
    of them may be None."""

    READS = ("source",)
    WRITES = ("out", "wide")
    WEIGHTS = ("weight",)

    source: str
    out: str | None
    wide: str | None
    norm: NormSpec
    size: int
    weight: Tensor | None = None

    def scratch(self, tokens: int) -> int:
        return len(self.outputs) * tokens * self.size * WIDE


@dataclass(frozen=True, slots=True)
class Linear(Op):
    """out [T, N] = source weight^T + bias; weight [N, M], bias [N]. source compute or fp32: a product that takes fp32
    takes it as it is, any other rounds it to compute; out has the dtype that was taken. exact: sums in fp64, source and
    out fp32: for the few rows that decide something (a router, a gate)."""

    READS = ("source",)
    WRITES = ("out",)
    WEIGHTS = ("weight", "bias")

    source: str
    out: str
    weight: Tensor
    bias: Tensor | None = None
    exact: bool = False

    def scratch(self, tokens: int) -> int:
        return tokens * self.weight.shape[0] * WIDE


@dataclass(frozen=True, slots=True)
class Join(Op):
    """out [T, N] fp32 = [first; second] weight^T; first, second [T, M / 2], compute; weight [N, M]. The product is as
    of Linear."""

    READS = ("first", "second")
    WRITES = ("out",)
    WEIGHTS = ("weight",)

    first: str
    second: str
    out: str
    weight: Tensor

    def scratch(self, tokens: int) -> int:
        return tokens * sum(self.weight.shape) * WIDE


@dataclass(frozen=True, slots=True)
class HeadNorm(Op):
    """buffer [T, n * size] becomes fp32: each `size` neighbours normed as by Norm (one head, or all of them at once),
    then clamped to [-clip, clip]; norm None: only clamped."""

    READS = ("buffer",)
    WRITES = ("buffer",)
    WEIGHTS = ("weight",)

    buffer: str
    size: int
    norm: NormSpec | None
    weight: Tensor | None = None
    clip: float | None = None


@dataclass(frozen=True, slots=True)
class Rope(Op):
    """Each buffer [T, n * head_dim] becomes [T, n, head_dim] fp32, its heads rotated by their token's position p:
    dimension i of the first rope.dim turns with i + rope.dim / 2 by the angle p * inv_freq[i]; cos and sin are
    multiplied by the scaling's attention factor (kernels/rope.py)."""

    READS = ("buffers",)
    WRITES = ("buffers",)

    buffers: tuple[str, ...]
    rope: RopeSpec
    head_dim: int


@dataclass(frozen=True, slots=True)
class Attend(Op):
    """Causal attention of T tokens of one session over all of its positions, or over each one's last `window`: keys k
    and values v [T, KV * D] are appended to the cache of `layer`; then for each query head h of q [T, Q * D]

        out[t, h] = sum_s p[s] value[s, h // (Q / KV)],  p = softmax over s of score(scale * q . key[s])

    score: identity, or softcap * tanh(. / softcap). With sinks [Q], p is softmax over the scores and sinks[h], which
    itself has no value. Keys and values are kept, and q is rounded, to the cache's dtype; so is out [T, Q * D].
    kv_source: nothing is appended, and the keys and values are those of that layer; k and v are None.
    """

    READS = ("q", "k", "v")
    WRITES = ("out",)
    WEIGHTS = ("sinks",)

    q: str
    k: str | None
    v: str | None
    out: str
    layer: int
    attention: Attention
    sinks: Tensor | None = None

    def _seen(self, context: int) -> int:
        return context if self.attention.window is None else min(context, self.attention.window)

    def scratch(self, tokens: int) -> int:
        return tokens * self.attention.heads * self.attention.head_dim * WIDE

    def bytes_read(self, tokens: int, bytes_of: BytesOf, context: int = 0, kv_bytes: int = 2) -> int:
        a = self.attention
        return sum(map(bytes_of, self.weights)) + 2 * self._seen(context) * a.kv_heads * a.head_dim * kv_bytes

    def flops(self, tokens: int, context: int = 0) -> int:
        return 4 * tokens * self._seen(context) * self.attention.heads * self.attention.head_dim


@dataclass(frozen=True, slots=True)
class Gate(Op):
    """buffer [T, N] *= f(by) in fp32; by [T, N], or [T, 1] for one number a token; f: sigmoid, or silu."""

    READS = ("buffer", "by")
    WRITES = ("buffer",)

    buffer: str
    by: str
    kind: str = "sigmoid"


@dataclass(frozen=True, slots=True)
class Conv(Op):
    """Causal convolution of each channel with its own taps, over the tokens of one session, then silu: of the sources
    side by side, x [T, C] fp32, y[t] = silu(sum_j weight[:, j] * x[t - J + 1 + j]); weight [C, J]. The last J - 1 rows
    of x stay in the cache of `layer`; before the first token they are 0. Each source is overwritten."""

    READS = ("sources",)
    WRITES = ("sources",)
    WEIGHTS = ("weight",)

    sources: tuple[str, ...]
    weight: Tensor
    layer: int


@dataclass(frozen=True, slots=True)
class Delta(Op):
    """The gated delta rule (Yang et al. 2024, arXiv 2412.06464), fp32, over the tokens of one session in order. Of a
    value head, with the key and query of its key head brought to length 1 (x / sqrt(sum(x^2) + 1e-6)) and the query
    divided by sqrt(key_dim), state S [key_dim, value_dim] in the cache of `layer`, 0 before the first token:

        S *= exp(-exp(a_log) * softplus(a + dt_bias));  S += k (sigmoid(b) * (v - S^T k))^T;  out = S^T q

    Of more than FEW tokens CHUNK at a time, counted from the first, by products of matrices (kernels/delta_rule.py).
    q, k [T, key_heads * key_dim], v [T, value_heads * value_dim], a, b [T, value_heads]; out as v, fp32.
    """

    READS = ("q", "k", "v", "a", "b")
    WRITES = ("out",)
    WEIGHTS = ("a_log", "dt_bias")

    q: str
    k: str
    v: str
    a: str
    b: str
    out: str
    layer: int
    delta: DeltaNet
    a_log: Tensor
    dt_bias: Tensor

    @property
    def _state(self) -> int:
        return self.delta.value_heads * self.delta.key_dim * self.delta.value_dim

    def scratch(self, tokens: int) -> int:
        """Its output, and what a chunk of a prompt takes meanwhile (delta_rule.py)."""
        d, count = self.delta, min(tokens, CHUNK)
        if tokens <= FEW:
            return tokens * d.value_heads * d.value_dim * WIDE
        squares = 5 * d.value_heads * count * count
        rows = 5 * count * (d.value_heads * d.value_dim + d.key_heads * d.key_dim)
        return (tokens * d.value_heads * d.value_dim + squares + rows + 2 * self._state) * WIDE

    def bytes_read(self, tokens: int, bytes_of: BytesOf, context: int = 0, kv_bytes: int = 2) -> int:
        return sum(map(bytes_of, self.weights)) + self._state * WIDE

    def flops(self, tokens: int, context: int = 0) -> int:
        return 7 * tokens * self._state


@dataclass(frozen=True, slots=True)
class Route(Op):
    """The experts of each token and their weights, by spec.Router: source [T, H] fp32 -> ids [T, K] int64, the best
    first, and topk_weights [T, K] fp32. Logits are summed in fp64 and rounded to fp32."""

    READS = ("source",)
    WRITES = ("ids", "topk_weights")
    WEIGHTS = ("weight", "logit_bias", "choice_bias", "expert_scale")

    source: str
    ids: str
    topk_weights: str
    router: Router
    weight: Tensor
    logit_bias: Tensor | None = None
    choice_bias: Tensor | None = None
    expert_scale: Tensor | None = None

    def scratch(self, tokens: int) -> int:
        return tokens * self.router.top_k * (8 + WIDE)


@dataclass(frozen=True, slots=True)
class Guess(Op):
    """out [T, count] int64: what the router of a later layer would choose of the source, which is what it will read as
    far as it is known now; the best first. steps: what lies between the source and that router, Norms and Scales."""

    READS = ("source",)
    WRITES = ("out",)

    source: str
    out: str
    steps: tuple[Op, ...]
    route: Route
    count: int

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return tuple(weight for op in (*self.steps, self.route) for weight in op.weights)

    def scratch(self, tokens: int) -> int:
        return tokens * self.count * 8


@dataclass(frozen=True, slots=True)
class Experts(Op):
    """out [T, K, H] fp32: out[t, k] is what expert ids[t, k] of `layer` gives for source[t] [H] (compute): an MLP as
    Mlp has it, of the tensors "layers.3.experts.7.gate", up and down, plus the biases of each where `bias`. ids None:
    a model without experts, whose MLPs are records: expert 0 for every token, K = 1. `weights` does not name experts:
    they are paged, and whoever has them computes this and the Combine behind it as one. ahead: guesses that they may
    fetch by, of the next layers with experts in order. last: nothing reads what would come of tokens whose logits are
    not wanted: out has the rows of the wanted ones alone."""

    READS = ("source", "ids", "ahead")
    WRITES = ("out",)

    layer: int
    source: str
    ids: str | None
    out: str
    hidden: int
    inner: int
    experts: int = 1
    top_k: int = 1
    activation: Activation = SWIGLU
    bias: bool = False
    ahead: tuple[str, ...] = ()
    last: bool = False

    def scratch(self, tokens: int) -> int:
        return tokens * self.top_k * self.hidden * WIDE

    def bytes_read(self, tokens: int, bytes_of: BytesOf, context: int = 0, kv_bytes: int = 2) -> int:
        """The most: every choice another expert, until all are read. bytes_of gets an expert's gate, up and down."""
        names = (("gate", (self.inner, self.hidden)), ("up", (self.inner, self.hidden)),
                 ("down", (self.hidden, self.inner)))
        one = sum(bytes_of(Tensor(f"layers.{self.layer}.experts.0.{name}", shape, "mlp")) for name, shape in names)
        return min(self.experts, tokens * self.top_k) * one

    def flops(self, tokens: int, context: int = 0) -> int:
        return 6 * tokens * self.top_k * self.hidden * self.inner


@dataclass(frozen=True, slots=True)
class Combine(Op):
    """out [T, H] fp32 = sum over k of topk_weights[:, k] * rows[:, k], strictly in the order k = 0, 1, ...;
    topk_weights None: every weight is 1. Behind an Experts that is `last`: of the wanted rows."""

    READS = ("rows", "topk_weights")
    WRITES = ("out",)

    rows: str
    topk_weights: str | None
    out: str
    hidden: int

    def scratch(self, tokens: int) -> int:
        return tokens * self.hidden * WIDE


@dataclass(frozen=True, slots=True)
class Take(Op):
    """Of these buffers only the rows stay whose logits are wanted, and all others end: in the last layer nothing reads
    what the other tokens would give."""

    READS = ("buffers",)
    WRITES = ("buffers",)

    buffers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mlp(Op):
    """out [T, H] fp32 = down(activation(gate source, up source)), by spec.Activation in fp32; source compute; gate, up
    [F, H], down [H, F]."""

    READS = ("source",)
    WRITES = ("out",)
    WEIGHTS = ("gate", "up", "down")

    source: str
    out: str
    gate: Tensor
    up: Tensor
    down: Tensor
    activation: Activation = SWIGLU

    def scratch(self, tokens: int) -> int:
        return tokens * self.down.shape[0] * WIDE


@dataclass(frozen=True, slots=True)
class Add(Op):
    """buffer [T, H] fp32 += source."""

    READS = ("buffer", "source")
    WRITES = ("buffer",)

    buffer: str
    source: str


@dataclass(frozen=True, slots=True)
class Scale(Op):
    """buffer [T, N] fp32 *= weight * factor; weight [N], or [1] for one number, None for 1."""

    READS = ("buffer",)
    WRITES = ("buffer",)
    WEIGHTS = ("weight",)

    buffer: str
    weight: Tensor | None = None
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Head(Op):
    """out [T, V] fp32: logits = source weight^T, then softcap * tanh(logits / softcap) where there is one; source fp32,
    which the product rounds as Linear has it."""

    READS = ("source",)
    WRITES = ("out",)
    WEIGHTS = ("weight",)

    source: str
    out: str
    weight: Tensor
    softcap: float | None = None

    def scratch(self, tokens: int) -> int:
        return tokens * self.weight.shape[0] * WIDE
