"""Ops between two Experts as calls of DeviceOps (kernels/device_ops.py): up to FEW tokens, over buffers that stay.

A table says what becomes of an Op, or of neighbours that are one call:

    Embed                             embed, and rope_cos_sin for each rope of the model
    Add of what experts gave, Norm    norm, which adds first
    any other Op of what experts gave combine, once
    Norm, Route, Guess, ...           route
    Norm; Route                       norm; route
    Linear, Linear, ... of a source   linear, by the matrix in which they are stacked or by each, and add of a bias
    Linear summed in fp64             exact
    Linear, Add                       linear, added to what is there
    HeadNorm                          head_norm
    Rope, Attend; Attend              rope_attend for each session
    Mlp                               linear, linear, activate, linear; with an Add behind it the last one adds
    Add; Scale; Gate                  add; scale; gate
    Conv, Delta                       conv, delta for each session
    Head                              linear; softcap

What is not there raises Unsupported. A piece is lowered by its Ops alone, without weights: whether a device computes a
model is known from its spec (`not_on_device`). A Bind then makes the call for weights and buffers. All activations are
fp32, so that what a Norm gives the experts and a router is one buffer.

T tokens, H hidden, Q query heads, KV key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile

from torch import Tensor

from qmix.device.device import Work
from qmix.forward.device_buffers import Room
from qmix.forward.device_pieces import Piece, cut, decode_program
from qmix.forward.run_eager import Guesses
from qmix.forward.steps import fused_guess, reads, same_source
from qmix.kernels import ops
from qmix.kernels.attend import softmax_of
from qmix.kernels.device_ops import Later
from qmix.kernels.op import Op
from qmix.spec import Model, Rope

Bind = Callable[[Room], Work]


class Unsupported(Exception):
    """A device has no call for an Op; str: which, and why."""

    def __init__(self, op: Op, why: str = ""):
        super().__init__(type(op).__name__ + (f" {why}" if why else ""))
        self.op = op


def not_on_device(model: Model) -> str:
    """Which Op of which layer a device has no call for; "" where it computes the model."""
    no = f"qmix's GPU kernels do not compute {model.architecture}"
    if len({model.chosen_in(i) for i in model.record_layers}) > 1:
        return f"{no}: its layers choose different numbers of experts"
    program = decode_program(model, Guesses(1, 1))
    try:
        for piece in cut([op for _, op in program]):
            lower(piece)
    except Unsupported as e:
        layer = next(i for i, op in program if op is e.op)
        return f"{no}: {e}" + ("" if layer is None else f" (layer {layer})")
    return ""


def lower(piece: Piece) -> list[Bind]:
    """The calls of a piece, in order."""
    return _Lowering(piece).calls()


class _Lowering:
    """at: number of an Op in the piece. Each rule gives (how many Ops it takes, what makes the call)."""

    def __init__(self, piece: Piece):
        self._piece = piece
        self._ops = piece.program
        self._given = piece.given  # None where a call has combined it, or its name means another
        self._columns: list[tuple[str, ...]] = []  # results of Linears that lie side by side, none written again
        source = None if piece.experts is None else piece.experts.source
        writers = [at for at, op in enumerate(piece.program) if source in op.outputs]
        self._input = writers[-1] if writers else -1  # the Op that writes what the experts read

    def calls(self) -> list[Bind]:
        found: list[Bind] = []
        at, experts, given = 0, self._piece.experts, self._given
        if given is not None and not self._added_by_norm(given):
            found.append(lambda room: partial(room.ops.combine, room.routed.rows, room.routed.topk_weights,
                                              room.make(room.routed.rows.shape[2], given)))
            self._given = None
        while at < len(self._ops):
            op = self._ops[at]
            rule = RULES.get(type(op))
            if rule is None:
                raise Unsupported(op)
            count, bind = rule(self, at)
            found.append(bind)
            if any(self._given in op.outputs for op in self._ops[at:at + count]):
                self._given = None
            at += count
        if experts is not None and (self._input < 0 or not isinstance(self._ops[self._input], ops.Norm)):
            raise Unsupported(experts, "that read no norm")
        return found

    def _added_by_norm(self, given: str) -> bool:
        """Whether all that becomes of what the experts gave is an Add with a Norm behind it."""
        at = next((i for i, op in enumerate(self._ops) if given in op.inputs), len(self._ops))
        add, norm = self._after(at), self._after(at + 1)
        return isinstance(add, ops.Add) and add.source == given and isinstance(norm, ops.Norm) and \
            norm.source == add.buffer and not reads(self._ops[at + 1:], self._piece.after, given)

    def _after(self, at: int) -> Op | None:
        return self._ops[at] if at < len(self._ops) else None

    def _added(self, at: int, out: str) -> ops.Add | None:
        """The Add at `at`, if it is the only one that reads `out`, a product's result."""
        op = self._after(at)
        if isinstance(op, ops.Add) and op.source == out and not reads(
                self._ops[at + 1:], self._piece.after, out):
            return op
        return None

    def _embed(self, at: int) -> tuple[int, Bind]:
        op = self._ops[at]
        assert isinstance(op, ops.Embed)

        def bind(room: Room) -> Work:
            out = room.make(op.weight.shape[1], op.out)
            start = partial(room.ops.embed, room.tokens, room.weights.embedding(op.weight), out, op.scale)
            return _in_order([start, *(partial(room.ops.rope_cos_sin, room.positions, turn.inv_freq, turn.cos_sin,
                                               turn.factor) for turn in room.cos_sin.values())])

        return 1, bind

    def _add(self, at: int) -> tuple[int, Bind]:
        op, after = self._ops[at], self._after(at + 1)
        assert isinstance(op, ops.Add)
        if op.source == self._given:
            assert isinstance(after, ops.Norm)
            return 2, self._normed(at + 1, after, True)
        return 1, lambda room: partial(room.ops.add, room[op.buffer], room[op.source])

    def _norm(self, at: int) -> tuple[int, Bind]:
        op, after = self._ops[at], self._after(at + 1)
        assert isinstance(op, ops.Norm)
        if isinstance(after, ops.Route) and after.source == op.wide:
            return self._routed(at, op, after)
        return 1, self._normed(at, op, False)

    def _normed(self, at: int, op: ops.Norm, adds: bool) -> Bind:
        def bind(room: Room) -> Work:
            x, weight = room[op.source], room.weights.optional(op.weight)
            out = x if op.source in op.outputs else self._written(room, at, op)
            added = (room.routed.rows, room.routed.topk_weights) if adds else (None, None)
            return partial(room.ops.norm, x, weight, op.norm.eps, out, *added)

        return bind

    def _written(self, room: Room, at: int, op: ops.Norm) -> Tensor:
        """What a Norm writes: where the experts read it, or a buffer."""
        return room.put(room.routed.x, *op.outputs) if at == self._input else room.make(op.size, *op.outputs)

    def _routed(self, at: int, norm: ops.Norm, route: ops.Route) -> tuple[int, Bind]:
        """A norm, the router that reads it, and the routers of later layers that are asked beside it."""
        guesses = [op for op in takewhile(lambda op: isinstance(op, ops.Guess), self._ops[at + 2:])
                   if isinstance(op, ops.Guess)]
        norms: list[ops.Norm] = []
        for guess in guesses:
            step = guess.steps[0] if guess.steps and fused_guess(guess) else None
            if not isinstance(step, ops.Norm) or step.norm.eps != norm.norm.eps or guess.source != norm.source or \
                    guess.count != guesses[0].count:
                raise Unsupported(guess, "by another norm than the layer's own router has")
            norms.append(step)
        end = at + 2 + len(guesses)
        kept = norm.out is not None or reads(self._ops[end:], self._piece.after, route.source)

        def bind(room: Room) -> Work:
            x, weight, normed = room[norm.source], room.weights.optional(norm.weight), None
            if kept:
                normed = self._written(room, at, norm)
            later = None
            if guesses:
                later = Later([room.weights.optional(step.weight) for step in norms],
                              [room.weights.router(guess.route) for guess in guesses],
                              room.routed.ahead[:, :len(guesses), :guesses[0].count])
            return partial(room.ops.route, x, weight, room.weights.router(route), norm.norm.eps, normed,
                           room.routed.ids, room.routed.topk_weights, later, room.counted)

        return end - at, bind

    def _route(self, at: int) -> tuple[int, Bind]:
        op = self._ops[at]
        assert isinstance(op, ops.Route)
        return 1, lambda room: partial(room.ops.route, room[op.source], None, room.weights.router(op), None, None,
                                       room.routed.ids, room.routed.topk_weights, None, room.counted)

    def _linear(self, at: int) -> tuple[int, Bind]:
        group = list(takewhile(lambda op: not op.exact, same_source(self._ops[at:])))
        written = {op.out for op in group} or set(self._ops[at].outputs)
        self._columns = [names for names in self._columns if written.isdisjoint(names)]
        if not group:
            return 1, self._exact(at)
        first = group[0]
        added = self._added(at + 1, first.out) if first.bias is None else None
        if added is not None and added.buffer != first.source:
            return 2, lambda room: partial(room.ops.linear, room[first.source], room.weights.matrix(first.weight),
                                           room[added.buffer], True)
        outs = tuple(op.out for op in group)
        self._columns.append(outs)

        def bind(room: Room) -> Work:
            x = room[first.source]
            whole, columns = room.columns(outs, [op.weight.shape[0] for op in group])
            stack = room.weights.stack([op.weight for op in group])
            products = [(stack, whole)] if stack is not None else [
                (room.weights.matrix(op.weight), out) for op, out in zip(group, columns, strict=True)]
            biases = [(out, room.weights.vector(op.bias)) for op, out in zip(group, columns, strict=True)
                      if op.bias is not None]
            return _in_order([*(partial(room.ops.linear, x, m, out) for m, out in products),
                              *(partial(room.ops.add, out, bias.expand_as(out)) for out, bias in biases)])

        return len(group), bind

    def _exact(self, at: int) -> Bind:
        op = self._ops[at]
        assert isinstance(op, ops.Linear)
        if op.bias is not None:
            raise Unsupported(op, "summed in fp64, with a bias")
        return lambda room: partial(room.ops.exact, room[op.source], room.weights.tensor(op.weight),
                                    room.make(op.weight.shape[0], op.out))

    def _head_norm(self, at: int) -> tuple[int, Bind]:
        op = self._ops[at]
        assert isinstance(op, ops.HeadNorm)
        eps = None if op.norm is None else op.norm.eps
        return 1, lambda room: partial(room.ops.head_norm, room[op.buffer], op.size, room.weights.optional(op.weight),
                                       eps, op.clip)

    def _rope(self, at: int) -> tuple[int, Bind]:
        op, after = self._ops[at], self._after(at + 1)
        assert isinstance(op, ops.Rope)
        if not isinstance(after, ops.Attend) or op.buffers != (after.q, after.k):
            raise Unsupported(op, "of queries alone")
        return 2, self._attention(after, op.rope)

    def _attend(self, at: int) -> tuple[int, Bind]:
        op = self._ops[at]
        assert isinstance(op, ops.Attend)
        return 1, self._attention(op, None)

    def _attention(self, op: ops.Attend, rope: Rope | None) -> Bind:
        a = op.attention
        if op.k is None or op.v is None:
            raise Unsupported(op, "with another layer's keys")
        parts = (op.q, op.k, op.v)
        if parts not in self._columns:
            raise Unsupported(op, "of queries, keys and values that are not made together")

        def bind(room: Room) -> Work:
            qkv, out = room.whole(parts), room.make(a.heads * a.head_dim, op.out)
            softmax = softmax_of(a, None if op.sinks is None else room.weights.vector(op.sinks))
            return _in_order([partial(room.attend, op, softmax, *run, rope, qkv, out) for run in room.runs])

        return bind

    def _mlp(self, at: int) -> tuple[int, Bind]:
        op = self._ops[at]
        assert isinstance(op, ops.Mlp)
        added = self._added(at + 1, op.out)

        def bind(room: Room) -> Work:
            x, inner, w = room[op.source], op.gate.shape[0], room.weights
            gate, up = room.make(inner, f"{op.out}.gate"), room.make(inner, f"{op.out}.up")
            out = room.make(op.down.shape[0], op.out) if added is None else room[added.buffer]
            return _in_order([partial(room.ops.linear, x, w.matrix(op.gate), gate),
                              partial(room.ops.linear, x, w.matrix(op.up), up),
                              partial(room.ops.activate, op.activation, gate, up, gate),
                              partial(room.ops.linear, gate, w.matrix(op.down), out, added is not None)])

        return 1 + (added is not None), bind

    def _scale(self, at: int) -> tuple[int, Bind]:
        op = self._ops[at]
        assert isinstance(op, ops.Scale)
        return 1, lambda room: partial(room.ops.scale, room[op.buffer], None if op.weight is None else
                                       room.weights.vector(op.weight), op.factor)

    def _gate(self, at: int) -> tuple[int, Bind]:
        op = self._ops[at]
        assert isinstance(op, ops.Gate)
        return 1, lambda room: partial(room.ops.gate, room[op.buffer], room[op.by], op.kind)

    def _recurrent(self, at: int) -> tuple[int, Bind]:
        op, after = self._ops[at], self._after(at + 1)
        assert isinstance(op, ops.Conv)
        if not isinstance(after, ops.Delta) or op.sources != (after.q, after.k, after.v) or op.layer != after.layer:
            raise Unsupported(op, "without a delta rule of what it writes")
        parts = next((names for names in self._columns if names[:3] == op.sources), None)
        if parts is None:
            raise Unsupported(op, "of queries, keys and values that are not made together")

        def bind(room: Room) -> Work:
            d, w = after.delta, room.weights
            vectors = [w.vector(weight) for weight in (op.weight, after.a_log, after.dt_bias)]
            channels = op.weight.shape[0]
            rows = (room.whole(parts)[:, :channels], room.make(channels, " ".join(op.sources) + " convolved"),
                    room[after.a], room[after.b])
            out = room.make(d.value_heads * d.value_dim, after.out)
            return _in_order([partial(room.recur, d, op.layer, vectors, *run, rows, out) for run in room.runs])

        return 2, bind

    def _head(self, at: int) -> tuple[int, Bind]:
        op = self._ops[at]
        assert isinstance(op, ops.Head)
        cap = op.softcap

        def bind(room: Room) -> Work:
            out = room.make(op.weight.shape[0], op.out)
            product = partial(room.ops.linear, room[op.source], room.weights.matrix(op.weight), out)
            return product if cap is None else _in_order([product, partial(room.ops.softcap, out, cap)])

        return 1, bind


RULES: Mapping[type[Op], Callable[[_Lowering, int], tuple[int, Bind]]] = {
    ops.Embed: _Lowering._embed, ops.Add: _Lowering._add, ops.Norm: _Lowering._norm, ops.Route: _Lowering._route,
    ops.Linear: _Lowering._linear, ops.HeadNorm: _Lowering._head_norm, ops.Rope: _Lowering._rope,
    ops.Attend: _Lowering._attend, ops.Mlp: _Lowering._mlp, ops.Scale: _Lowering._scale, ops.Gate: _Lowering._gate,
    ops.Head: _Lowering._head, ops.Conv: _Lowering._recurrent,
}


def _in_order(works: Sequence[Work]) -> Work:
    if len(works) == 1:
        return works[0]

    def work() -> None:
        for one in works:
            one()

    return work
