"""The transformer as a program: the Ops of a model, top to bottom, made of its spec alone.

    tokens -> Embed -> residual [T, H] -> layer 0 -> layer 1 -> ... -> Norm -> Head -> logits [n, V]

    layer:  residual += after_mixer(mixer(before_mixer(residual)))
            residual += after_mlp(mlp(before_mlp(residual)))
            residual *= output_scale

A mixer is attention or a gated delta net. An MLP is dense, or routed experts with what is added to them. In a model
without experts the MLPs are the records that are paged, and so an Experts Op. n of the T tokens are wanted: their
logits; in the last layer the experts compute their rows alone, and Take leaves no others (of a dense MLP before it).
Where guesses are asked for, the routers of the next layers are asked behind each router what they would choose now.

Buffers: "residual" fp32; "normed" what a mixer or the experts read; "wide" the same in fp32, for a router; "mixed" what
a mixer gives; "moe" what an MLP gives; "final" fp32, what the head reads; "ahead1", "ahead2", ... the guesses for the
next layers with experts; the others are the Op's own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from qmix.kernels.op import Op
from qmix.kernels.ops import (
    Add,
    Attend,
    Combine,
    Conv,
    Delta,
    Embed,
    Experts,
    Gate,
    Guess,
    Head,
    HeadNorm,
    Join,
    Linear,
    Mlp,
    Norm,
    Rope,
    Route,
    Scale,
    Take,
)
from qmix.sizes import MTP_VOCAB
from qmix.spec import Attention, DeltaNet, Model, Moe, Tensor
from qmix.spec import Mlp as MlpSpec
from qmix.spec import Norm as NormSpec

MTP_ROWS = "mtp.head"


def model_program(model: Model) -> tuple[Op, ...]:
    """The whole pass."""
    return (embed_program(model), *(op for i in range(len(model.layers)) for op in layer_program(model, i)),
            *head_program(model))


def mtp_program(model: Model) -> tuple[Op, ...]:
    """The multi-token-prediction head up to its residual, a pass of its own: "tokens", each the one that follows the
    token of a row of "hidden" [T, H] fp32 (the model's, behind its final norm), to "residual". Its attention has a
    cache of its own, in which it is layer 0."""
    head, tensors = model.mtp_head, _tensors(model)
    assert head is not None
    first = (Embed("tokens", "next", tensors["embedding"], model.embed_factor),
             Norm("next", "embedded", None, head.embedding_norm, model.hidden, tensors.get("mtp.embedding_norm")),
             Norm("hidden", "normed", None, head.hidden_norm, model.hidden, tensors.get("mtp.hidden_norm")),
             Join("embedded", "normed", "residual", tensors["mtp.fc"]))
    return (*first, *(replace(op, layer=0) if isinstance(op, Attend) else op
                      for op in layer_program(model, len(model.layers))))


def mtp_head_program(model: Model) -> tuple[Op, ...]:
    """The head's "residual" to "final", its hidden state for another step, and "logits", of the first MTP_VOCAB ids:
    of "mtp.head", which is the first rows of the model's head, or all of them."""
    head, tensors = model.mtp_head, _tensors(model)
    assert head is not None
    rows = Tensor(MTP_ROWS, (min(MTP_VOCAB, model.vocab), model.hidden), "head")
    return (Norm("residual", None, "final", head.final_norm, model.hidden, tensors.get("mtp.final_norm")),
            Head("final", "logits", rows, model.logit_softcap))


def embed_program(model: Model) -> Op:
    """ "tokens" to "residual"."""
    return Embed("tokens", "residual", _tensors(model)["embedding"], model.embed_factor)


def head_program(model: Model) -> tuple[Op, ...]:
    """ "residual" to "logits"."""
    tensors = _tensors(model)
    return (Norm("residual", None, "final", model.final_norm, model.hidden, tensors.get("final_norm")),
            Head("final", "logits", tensors["embedding" if model.tied else "head"], model.logit_softcap))


def layer_program(model: Model, i: int, depth: int = 0, count: int = 0) -> tuple[Op, ...]:
    """Of layer i, or of the multi-token-prediction head's: "residual" to "residual". depth, count: for how many
    following layers with experts how many experts are guessed."""
    layer = _Layer(model, i)
    layer.mixer()
    first = tuple(layer.ops)
    layer.ops.clear()
    later = [j for j in model.moe_layers if j > i][:depth] if count else []
    layer.mlp([_guess(model, j, f"ahead{distance}", count) for distance, j in enumerate(later, 1)])
    if i + 1 < len(model.layers):
        return first + tuple(layer.ops)
    return first + _only_wanted(layer.ops)


def _only_wanted(ops: Sequence[Op]) -> tuple[Op, ...]:
    """The last layer's second half: every token is routed, but what the experts and all Ops behind them do is done for
    the wanted rows."""
    at = next((i for i, op in enumerate(ops) if isinstance(op, Experts)), None)
    if at is None:
        return (Take(tuple(sorted(live(ops)))), *ops)
    experts, combine, rest = ops[at], ops[at + 1], ops[at + 2:]
    assert isinstance(experts, Experts) and isinstance(combine, Combine)
    live_after = live(rest) - {combine.out}
    return (*ops[:at], replace(experts, last=True), combine, Take(tuple(sorted(live_after))), *rest)


def _guess(model: Model, i: int, out: str, count: int) -> Guess:
    """What lies between the residual and the router of layer i, and that router."""
    layer = _Layer(model, i)
    layer.mlp([])
    at = next(at for at, op in enumerate(layer.ops) if isinstance(op, Route))
    route, needed = layer.ops[at], set(layer.ops[at].inputs)
    steps: list[Op] = []
    for op in reversed(layer.ops[:at]):
        if needed & set(op.outputs):
            needed = needed - set(op.outputs) | set(op.inputs)
            steps.insert(0, replace(op, out=None) if isinstance(op, Norm) else op)
    assert isinstance(route, Route) and needed == {"residual"}
    return Guess("residual", out, tuple(steps), route, min(count, route.router.experts))


def _tensors(model: Model) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in model.tensors()}


def pieces(program: Sequence[Op]) -> list[tuple[Op, ...]]:
    """The program cut at what all tokens of a pass do together: each Take alone, each Experts with its Combine, and the
    runs of Ops between them, which may take the tokens block by block."""
    found: list[list[Op]] = []
    together = True
    for op in program:
        alone = isinstance(op, Take | Experts | Combine)
        if (together and not isinstance(op, Combine)) or (alone and not together):
            found.append([])
        found[-1].append(op)
        together = alone
    return [tuple(ops) for ops in found]


def live(ops: Iterable[Op]) -> set[str]:
    """Buffers that these Ops read before they write them: what must be there when they begin."""
    needed: set[str] = set()
    written: set[str] = set()
    for op in ops:
        needed |= set(op.inputs) - written
        written |= set(op.outputs)
    return needed


class _Layer:
    """The Ops of layer i, as far as its methods have added them."""

    def __init__(self, model: Model, i: int):
        prefix = f"layers.{i}."
        self.i, self.hidden = i, model.hidden
        self.layer = model.layer(i)
        self.dense_model = not model.moe_layers
        self.tensors = {tensor.name.removeprefix(prefix): tensor for tensor in model.layer_tensors(i)}
        self.ops: list[Op] = []

    def mixer(self) -> None:
        """residual += after_mixer(mixer(before_mixer(residual)))"""
        source = self._norm("residual", "normed", self.layer.norms.before_mixer, "before_mixer")
        if isinstance(self.layer.mixer, Attention):
            self._attention(self.layer.mixer, source)
        else:
            self._delta(self.layer.mixer, source)
        self._norm_wide("mixed", self.layer.norms.after_mixer, "after_mixer")
        self.ops.append(Add("residual", "mixed"))

    def mlp(self, guesses: Sequence[Guess]) -> None:
        """residual += after_mlp(mlp(before_mlp(residual))), then the output scale."""
        mlp, norms = self.layer.mlp, self.layer.norms
        if isinstance(mlp, Moe):
            self._moe(mlp, norms.before_mlp, guesses)
        else:
            self._dense(mlp, self._norm("residual", "normed", norms.before_mlp, "before_mlp"))
        self._norm_wide("moe", norms.after_mlp, "after_mlp")
        self.ops.append(Add("residual", "moe"))
        if self.layer.output_scale:
            self.ops.append(Scale("residual", self.tensors["output_scale"]))

    def _norm(self, source: str, out: str, norm: NormSpec | None, name: str, wide: str | None = None) -> str:
        """The buffer that holds `source` normed to the compute dtype, and in fp32 in `wide`."""
        if norm is None:
            return source
        self.ops.append(Norm(source, out, wide, norm, self.hidden, self.tensors.get(name)))
        return out

    def _norm_wide(self, buffer: str, norm: NormSpec | None, name: str) -> None:
        """`buffer` normed in its place, fp32."""
        if norm is not None:
            self.ops.append(Norm(buffer, None, buffer, norm, self.hidden, self.tensors.get(name)))

    def _linear(self, source: str, out: str, name: str, exact: bool = False) -> None:
        self.ops.append(Linear(source, out, self.tensors[name], self.tensors.get(f"{name}_bias"), exact))

    def _attention(self, a: Attention, source: str) -> None:
        """Projections, their norms, the rotation, attention, its gate, and the projection back."""
        own = a.kv_source is None
        for name in ("q", "k", "v") if own else ("q",):
            self._linear(source, name, "attention.k" if name == "v" and a.v_from_k else f"attention.{name}")
        for name, norm in (("q", a.q_norm), ("k", a.k_norm), ("v", a.v_norm)):
            if (own or name == "q") and (norm is not None or a.clip_qkv is not None):
                heads = a.heads if name == "q" else a.kv_heads
                size = heads * a.head_dim if a.norm_over == "whole" else a.head_dim
                self.ops.append(HeadNorm(name, size, norm, self.tensors.get(f"attention.{name}_norm"), a.clip_qkv))
        if a.rope is not None:
            self.ops.append(Rope(("q", "k") if own else ("q",), a.rope, a.head_dim))
        self.ops.append(Attend("q", "k" if own else None, "v" if own else None, "heads", self.i, a,
                               self.tensors.get("attention.sinks")))
        if a.output_gate:
            self._linear(source, "gate", "attention.gate")
            self.ops.append(Gate("heads", "gate"))
        self._linear("heads", "mixed", "attention.o")

    def _delta(self, d: DeltaNet, source: str) -> None:
        """Projections, the short convolution, the delta rule, its norm and gate, and the projection back."""
        for name in ("q", "k", "v", "z"):
            self._linear(source, name, f"delta.{name}")
        for name in ("b", "a"):
            self._linear(source, name, f"delta.{name}", exact=True)
        tensors = self.tensors
        self.ops += [
            Conv(("q", "k", "v"), tensors["delta.conv"], self.i),
            Delta("q", "k", "v", "a", "b", "heads", self.i, d, tensors["delta.a_log"], tensors["delta.dt_bias"]),
            HeadNorm("heads", d.value_dim, d.norm, tensors.get("delta.norm")), Gate("heads", "z", "silu")]
        self._linear("heads", "mixed", "delta.o")

    def _dense(self, mlp: MlpSpec, source: str) -> None:
        """The MLP of a layer without experts: a record in a model without any, else dense."""
        if not self.dense_model:
            self._one(mlp, source, "moe", "mlp")
            return
        self.ops += [Experts(self.i, source, None, "rows", self.hidden, mlp.inner, activation=mlp.activation),
                     Combine("rows", None, "moe", self.hidden)]

    def _one(self, mlp: MlpSpec, source: str, out: str, name: str) -> None:
        gate, up, down = (self.tensors[f"{name}.{part}"] for part in ("gate", "up", "down"))
        self.ops.append(Mlp(source, out, gate, up, down, mlp.activation))

    def _moe(self, moe: Moe, before: NormSpec | None, guesses: Sequence[Guess]) -> None:
        """Router; routed experts; the shared MLP; what stands beside them. All norms read the same residual."""
        router, expert = moe.router, moe.expert
        wide = "residual" if before is None else "wide"
        source = self._norm("residual", "normed", before, "before_mlp", "wide")
        self._route(moe, wide)
        self.ops += guesses
        if moe.routed.norm_in is not None:
            source = self._norm("residual", "normed", moe.routed.norm_in, "routed.norm_in")
        self.ops += [
            Experts(self.i, source, "ids", "rows", self.hidden, expert.inner, router.experts, router.top_k,
                    expert.activation, expert.bias, tuple(guess.out for guess in guesses)),
            Combine("rows", "topk_weights", "moe", self.hidden)]
        if moe.shared is not None:
            self._one(moe.shared, source, "shared", "shared")
            if moe.shared_gate:
                self._linear(wide, "switch", "shared.switch", exact=True)
                self.ops.append(Gate("shared", "switch"))
            self.ops.append(Add("moe", "shared"))
        self._norm_wide("moe", moe.routed.norm_out, "routed.norm_out")
        if moe.beside is not None:
            mlp, branch = moe.beside
            self._one(mlp, self._norm("residual", "normed", branch.norm_in, "beside.norm_in"), "beside", "beside")
            self._norm_wide("beside", branch.norm_out, "beside.norm_out")
            self.ops.append(Add("moe", "beside"))

    def _route(self, moe: Moe, wide: str) -> None:
        """The choice: of what the experts read, or of the residual in the router's own way."""
        router, tensors = moe.router, self.tensors
        if router.input == "residual":
            wide = "routed"
            self._own_input(moe)
        self.ops.append(Route(wide, "ids", "topk_weights", router, tensors["router.weight"],
                              *(tensors.get(f"router.{name}") for name in ("logit_bias", "choice_bias",
                                                                           "expert_scale"))))

    def _own_input(self, moe: Moe) -> None:
        """The residual, normed and scaled: a norm without a weight takes the scale for its own."""
        router, norm = moe.router, moe.router.input_norm
        assert norm is not None
        weight, scale = (self.tensors.get(f"router.{name}") for name in ("input_norm", "input_scale"))
        as_weight = weight is None and scale is not None
        if as_weight:
            norm, weight = NormSpec(norm.eps, factor=router.input_factor), scale
        self.ops.append(Norm("residual", None, "routed", norm, self.hidden, weight))
        if not as_weight and (scale is not None or router.input_factor != 1):
            self.ops.append(Scale("routed", scale, router.input_factor))
