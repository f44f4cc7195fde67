"""Ops between two Experts as calls of the native library: one token, over buffers that stay.

A table says what becomes of an Op, or of neighbours that are one call:

    Linear, Linear, ...   of one source            PRODUCTS, then BIAS for each that has one
    Linear, Add           to an fp32 buffer        PRODUCTS, added to what is there
    Norm, Route           as steps.fused_route     ROUTE
    Norm, HeadNorm                                 NORM
    Route                                          ROUTE
    Rope                  as steps.rotates         ROTATE
    Attend                of its own keys          ATTEND
    Linear                exact                    EXACT
    Conv                  of three sources         CONV
    Delta                                          DELTA
    Gate                                           GATE
    Guess                 as steps.fused_guess     ROUTE
    Add                                            ADD
    Mlp                                            PRODUCTS of one source, JOIN, PRODUCTS
    Scale                                          SCALE
    Head                                           PRODUCTS; its cap is whoever runs it's

What the experts before a piece gave lies elsewhere for each token: an Add reads it there, or else it is copied first,
by a NORM that norms nothing. Each call gives the bits that steps.py gives. What is not there raises Unsupported, with
the reason.

H hidden, Q query heads, KV key-value heads, D head size, A guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from qmix.forward.calls import Buffers, Calls, RopeCosSin, Unsupported
from qmix.forward.kv_cache import SessionCache
from qmix.forward.kv_layers import FullLayer
from qmix.forward.recurrent import RecurrentLayer
from qmix.forward.steps import RopeFrequencies, fused_guess, fused_route, reads, rotates
from qmix.forward.weights import KernelWeights
from qmix.kernels import native, ops
from qmix.kernels.attend import softmax_of
from qmix.kernels.native import Product, jobs
from qmix.kernels.native.sequence import (
    ADD,
    ATTEND,
    BIAS,
    CONV,
    DELTA,
    EXACT,
    GATE,
    JOIN,
    NORM,
    PRODUCTS,
    ROPE_COS_SIN,
    ROTATE,
    ROUTE,
    SCALE,
    addition,
)
from qmix.kernels.op import Op
from qmix.kernels.router import RouterTensors
from qmix.kernels.torch_ops import router_of
from qmix.spec import LongRope, Rope
from qmix.spec import Tensor as Named


class Lowering:
    """Lowers pieces, in order, for caches like `cache`. position: int64 [1], the token's. cos_sin: of each rope; the
    first call that needs them is behind one that makes them."""

    def __init__(self, weights: KernelWeights, cache: SessionCache, buffers: Buffers, frequencies: RopeFrequencies):
        assert weights.kernels.native is not None
        self._weights, self._cache, self._buffers, self._frequencies = weights, cache, buffers, frequencies
        self._native: native.NativeProducts = weights.kernels.native
        self.position = torch.zeros(1, dtype=torch.int64)
        self.cos_sin: dict[Rope, RopeCosSin] = {}
        self._referenced: list[Tensor] = []  # what jobs point to

    def piece(self, program: Sequence[Op], dynamic: str | None, after: Collection[str]) -> Calls:
        """dynamic: the buffer whose address changes with each token, what the experts gave. after: what is read later;
        it stays."""
        made, self._buffers.own = set(self.cos_sin), {}
        try:
            found = self._piece(program, dynamic, after)
        except Unsupported:
            self.cos_sin = {rope: turn for rope, turn in self.cos_sin.items() if rope in made}
            raise
        own = self._buffers.own
        self._referenced += own.values()
        self._buffers.whole |= {name: own[name] for name in after if name in own}
        return found

    def finish(self) -> None:
        """Let go of the cache, which was an example: a session that is dropped frees its memory."""
        del self._cache

    def last(self, name: str) -> Tensor:
        """A buffer of the piece that was lowered last."""
        return self._buffers[name]

    def _piece(self, program: Sequence[Op], dynamic: str | None, after: Collection[str]) -> Calls:
        found, rest = Calls(), list(program)
        if dynamic is not None and reads(rest, after, dynamic):
            self._take(rest, dynamic, found, after)
        while rest:
            del rest[:self._next(rest, found, after)]
        return found

    def _take(self, rest: list[Op], dynamic: str, found: Calls, after: Collection[str]) -> None:
        """The call that reads what the experts gave: an Add at the beginning that is all that reads it, or a copy."""
        first, hidden = rest[0], self._buffers["residual"].shape[1]
        if isinstance(first, ops.Add) and first.source == dynamic and not reads(rest[1:], after, dynamic):
            target = self._buffers[first.buffer]
            del rest[0]
            found.take = lambda given: (ADD, addition(given, target))
        else:
            target = self._buffers.make(dynamic, hidden, torch.float32)
            found.take = lambda given: (NORM, jobs.norm(given, None, None, target))
        found.taken = found.add(*found.take(target))

    def _next(self, rest: Sequence[Op], found: Calls, after: Collection[str]) -> int:
        """Add the next call; how many Ops it is."""
        op = rest[0]
        if len(rest) > 1 and fused_route(op, rest[1]) and not reads(rest[2:], after, op.wide):  # type: ignore[attr-defined]
            self._route(op, rest[1], found)  # type: ignore[arg-type]
            return 2
        if isinstance(op, ops.Linear) and not op.exact:
            if len(rest) > 1 and self._adds(op, rest[1]):
                source, target = self._buffers[op.source], self._buffers[rest[1].outputs[0]]
                found.add(PRODUCTS, self._product(source, op.weight, target, add=True))
                return 2
            return self._linears(rest, found)
        lower = LOWERINGS.get(type(op))
        if lower is None:
            raise Unsupported(f"no call for {_name(op)}")
        lower(self, op, found)
        return 1

    def _adds(self, op: ops.Linear, after: Op) -> bool:
        """Whether a product can be added where it is to be added: what it would be rounded to otherwise is fp32."""
        return isinstance(after, ops.Add) and after.source == op.out and after.buffer != op.source and \
            op.bias is None and not op.exact and self._buffers[op.source].dtype == torch.float32

    def _product(self, source: Tensor, weight: Named, out: Tensor, add: bool = False) -> bytes:
        matrix = self._weights.matrix(weight.name)
        if not self._weights.kernels.computes_natively(matrix):
            raise Unsupported(f"{weight.name} is {matrix.spec.format}, which the native kernels do not compute")
        return self._native.job(Product(source, matrix, out, add=add))

    def _linears(self, rest: Sequence[Op], found: Calls) -> int:
        group: list[ops.Linear] = []
        for op in rest:
            if not isinstance(op, ops.Linear) or op.source != rest[0].inputs[0]:
                break
            if op.exact:
                break
            group.append(op)
        source = self._buffers[group[0].source]
        found.add(PRODUCTS, [self._product(source, op.weight, self._buffers.make(op.out, op.weight.shape[0],
                                                                                 source.dtype)) for op in group])
        for op in group:
            bias = self._vector(op.bias)
            if bias is not None:
                found.add(BIAS, jobs.bias(self._buffers[op.out], bias))
        return len(group)

    def _exact(self, op: ops.Linear, found: Calls) -> None:
        weight, bias = self._weights[op.weight.name], self._vector(op.bias)
        out = self._buffers.make(op.out, op.weight.shape[0], torch.float32)
        found.add(EXACT, jobs.exact(self._readable(op.source), weight, out))
        if bias is not None:
            found.add(BIAS, jobs.bias(out, bias))

    def _gate(self, op: ops.Gate, found: Calls) -> None:
        found.add(GATE, jobs.gate(self._readable(op.buffer), self._readable(op.by), op.kind))

    def _conv(self, op: ops.Conv, found: Calls) -> None:
        sources = [self._readable(name) for name in op.sources]
        if len(sources) != 3:
            raise Unsupported(f"Conv of {len(sources)} buffers")
        taps, past = self._weights.taps(op.weight), self._recurrent(op.layer).past.now
        out = [self._buffers.make(name, x.shape[1], torch.float32) for name, x in zip(op.sources, sources, strict=True)]
        self._referenced += [taps, *sources]
        found.states.append((found.add(CONV, jobs.conv(taps, past, past, sources, out)), op.layer, False))

    def _delta(self, op: ops.Delta, found: Calls) -> None:
        d, state = op.delta, self._recurrent(op.layer).state.now
        rows = [self._fp32(name, op) for name in op.inputs]
        vectors = [self._vector(weight) for weight in op.weights]
        out = self._buffers.make(op.out, d.value_heads * d.value_dim, torch.float32)
        job = jobs.delta(d, state, state, [x for x in (*rows, *vectors) if x is not None], out)
        found.states.append((found.add(DELTA, job), op.layer, True))

    def _recurrent(self, layer: int) -> RecurrentLayer:
        """An example: where its tensors lie is patched for each token."""
        found = self._cache.layers[layer]
        assert isinstance(found, RecurrentLayer)
        return found

    def _vector(self, weight: Named | None) -> Tensor | None:
        """fp32, kept for the jobs that point to it."""
        found = self._weights.vector(weight)
        self._referenced += [] if found is None else [found]
        return found

    def _norm(self, op: ops.Norm, found: Calls) -> None:
        x, weight, make = self._readable(op.source), self._weights.norm(op.weight, op.norm), self._buffers.make
        out = None if op.out is None else make(op.out, op.size, self._weights.dtype)
        wide = None if op.wide is None else make(op.wide, op.size, torch.float32)
        found.add(NORM, jobs.norm(x, weight, op.norm.eps, out, wide))

    def _head_norm(self, op: ops.HeadNorm, found: Calls) -> None:
        x, norm = self._readable(op.buffer), op.norm
        weight = None if norm is None else self._weights.norm(op.weight, norm)
        out = self._buffers.make(op.buffer, x.shape[1], torch.float32)
        self._referenced.append(x)
        found.add(NORM, jobs.norm(x, weight, None if norm is None else norm.eps, out, None, op.clip,
                                  x.shape[1] // op.size))

    def _route_alone(self, op: ops.Route, found: Calls) -> None:
        self._choose(op, self._fp32(op.source, op), None, None, None, found)

    def _route(self, norm: ops.Norm, route: ops.Route, found: Calls) -> None:
        normed = None if norm.out is None else self._buffers.make(norm.out, norm.size, self._weights.dtype)
        self._choose(route, self._buffers[norm.source], self._weights.norm(norm.weight, norm.norm), norm.norm.eps,
                     normed, found)

    def _choose(self, op: ops.Route, x: Tensor, weight: Tensor | None, eps: float | None, normed: Tensor | None,
                found: Calls) -> None:
        ids = self._buffers.make(op.ids, op.router.top_k, torch.int64)
        topk_weights = self._buffers.make(op.topk_weights, op.router.top_k, torch.float32)
        found.add(ROUTE, jobs.route(x, weight, self._router(op), eps, normed, ids, topk_weights))

    def _guess(self, op: ops.Guess, found: Calls) -> None:
        if not fused_guess(op):
            raise Unsupported("Guess by a router with an input of its own")
        norm = op.steps[0] if op.steps else None
        assert norm is None or isinstance(norm, ops.Norm)
        weight, eps = (None, None) if norm is None else (self._weights.norm(norm.weight, norm.norm), norm.norm.eps)
        ids = self._buffers.make(op.out, op.count, torch.int64)
        found.add(ROUTE, jobs.route(self._buffers[op.source], weight, self._router(op.route), eps, None, ids, None))

    def _router(self, op: ops.Route) -> RouterTensors:
        router = router_of(op, self._weights)
        self._referenced += [v for v in (router.logit_bias, router.choice_bias, router.expert_scale) if v is not None]
        return router

    def _rope(self, op: ops.Rope, found: Calls) -> None:
        if not rotates(op):
            raise Unsupported("Rope of queries alone")
        q, k = (self._readable(name) for name in op.buffers)
        heads, size = q.shape[1] // op.head_dim, op.head_dim
        turned = torch.empty(1, heads + k.shape[1] // size, size)
        turn = self._cos_sin(op.rope, found)
        found.add(ROTATE, jobs.rotate(q, k, turn.cos, turn.sin, turned))
        self._referenced += [q, k, turned]
        self._buffers.own |= {op.buffers[0]: turned[:, :heads], op.buffers[1]: turned[:, heads:]}

    def _cos_sin(self, rope: Rope, found: Calls) -> RopeCosSin:
        if rope not in self.cos_sin:
            cos, sin = torch.empty(2, 1, 1, rope.dim)
            inv_freq, factor = self._frequencies.inv_freq(rope, self._cache.capacity)
            called = not isinstance(rope.scaling, LongRope)  # whose inv_freq depend on the session
            self.cos_sin[rope] = RopeCosSin(cos, sin, inv_freq if called else None)
            if called:
                found.add(ROPE_COS_SIN, jobs.rope_cos_sin(self.position, inv_freq, cos, sin, factor))
        return self.cos_sin[rope]

    def _attend(self, op: ops.Attend, found: Calls) -> None:
        a, layer = op.attention, self._cache.layers[op.layer]
        if op.k is None or op.v is None:
            raise Unsupported("Attend with another layer's keys")
        if not isinstance(layer, FullLayer) or layer.native is None:
            raise Unsupported("torch attends")
        q, k, v = (self._buffers[name].view(1, -1, a.head_dim) for name in (op.q, op.k, op.v))
        out = self._buffers.make(op.out, a.heads * a.head_dim, q.dtype)
        sinks = self._vector(op.sinks)
        call = found.add(ATTEND, layer.native.job(layer.kv_layer, q, k, v, out, 0, 1, softmax_of(a, sinks)))
        found.attends.append((call, op.layer, a.window))

    def _mlp(self, op: ops.Mlp, found: Calls) -> None:
        source, inner = self._buffers[op.source], op.gate.shape[0]
        gate, up = (torch.empty(1, inner, dtype=source.dtype) for _ in range(2))
        joined, out = torch.empty(1, inner), self._buffers.make(op.out, op.down.shape[0], torch.float32)
        self._referenced += [source, gate, up, joined]
        found.add(PRODUCTS, [self._product(source, op.gate, gate), self._product(source, op.up, up)])
        found.add(JOIN, jobs.join(op.activation, gate, up, joined))
        found.add(PRODUCTS, self._product(joined, op.down, out))

    def _add(self, op: ops.Add, found: Calls) -> None:
        found.add(ADD, addition(self._fp32(op.source, op), self._buffers[op.buffer]))

    def _scale(self, op: ops.Scale, found: Calls) -> None:
        found.add(SCALE, jobs.scale(self._fp32(op.buffer, op), self._vector(op.weight), op.factor))

    def _head(self, op: ops.Head, found: Calls) -> None:
        out = self._buffers.make(op.out, op.weight.shape[0], torch.float32)
        found.add(PRODUCTS, self._product(self._buffers[op.source], op.weight, out))

    def _readable(self, name: str) -> Tensor:
        if self._buffers[name].dtype not in jobs.TYPES:
            raise Unsupported(f"{name} in {self._buffers[name].dtype}")
        return self._buffers[name]

    def _fp32(self, name: str, op: Op) -> Tensor:
        if self._buffers[name].dtype != torch.float32:
            raise Unsupported(f"{_name(op)} of {name}, which is not fp32")
        return self._buffers[name]


LOWERINGS: Mapping[type[Op], Callable[..., None]] = {
    ops.Norm: Lowering._norm, ops.HeadNorm: Lowering._head_norm, ops.Route: Lowering._route_alone,
    ops.Rope: Lowering._rope, ops.Attend: Lowering._attend, ops.Guess: Lowering._guess, ops.Add: Lowering._add,
    ops.Head: Lowering._head, ops.Mlp: Lowering._mlp, ops.Linear: Lowering._exact, ops.Gate: Lowering._gate,
    ops.Conv: Lowering._conv, ops.Delta: Lowering._delta, ops.Scale: Lowering._scale,
}


def _name(op: Op) -> str:
    return type(op).__name__
