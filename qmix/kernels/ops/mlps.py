"""Ops of a layer's second half: the router, the experts that it chooses, and MLPs that every token goes through.

T tokens, H hidden, E experts, K chosen per token, F inner size of an MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmix.kernels.op import WIDE, BytesOf, Op
from qmix.spec import Activation, Router, Tensor

SWIGLU = Activation()


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
