"""A run of Ops as steps over the buffers of a block: which function computes each Op, and which neighbours go together.

torch_ops.py computes everything. For the few tokens of a decode pass the kernels of this process (LayerOps) compute
what they have: norms, routers, guesses, the rotation, what joins gate and up. run_native.py runs the same kernels, and
so gives the same bits.

Linears that read the same buffer are one call. With an observer every Op is computed alone, by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor

from qmix.forward.kv_layers import FullLayer, Query
from qmix.forward.passes import Block, Span
from qmix.forward.program import live
from qmix.forward.recurrent import Advance, RecurrentLayer
from qmix.kernels import ops, torch_ops
from qmix.kernels.layer import TORCH, LayerOps
from qmix.kernels.op import Op
from qmix.kernels.rope import inv_freq
from qmix.kernels.torch_ops import Weights
from qmix.spec import LongRope, Model, Rope

Buffers = dict[str, Tensor]
Step = Callable[[Buffers, Block], None]


class Observe(Protocol):
    """Sees an Op before it runs on a block, and the buffers that it reads, in order."""

    def __call__(self, op: Op, inputs: tuple[Tensor, ...], /) -> None: ...


STATELESS: Mapping[type[Op], Callable[..., Any]] = {
    ops.Embed: torch_ops.embed, ops.Norm: torch_ops.norm, ops.Linear: torch_ops.linear, ops.Join: torch_ops.join,
    ops.HeadNorm: torch_ops.head_norm, ops.Gate: torch_ops.gate, ops.Route: torch_ops.route, ops.Mlp: torch_ops.mlp,
    ops.Add: torch_ops.add, ops.Scale: torch_ops.scale, ops.Head: torch_ops.head, ops.Guess: torch_ops.guess,
}


def fused_route(norm: Op, route: Op) -> bool:
    """Whether one call of LayerOps computes these two: the router reads what the norm gives of the residual."""
    return isinstance(norm, ops.Norm) and isinstance(route, ops.Route) and norm.source == "residual" and \
        route.source == norm.wide


def fused_guess(op: ops.Guess) -> bool:
    """The same of a guess: at most a norm lies before its router."""
    return not op.steps or (len(op.steps) == 1 and fused_route(op.steps[0], op.route))


def rotates(op: Op) -> bool:
    """Whether LayerOps.rotate computes it: queries and keys."""
    return isinstance(op, ops.Rope) and len(op.buffers) == 2


@dataclass(frozen=True, slots=True)
class RopeFrequencies:
    """inv_freq of the rotary embedding, by what a session was made for; made once."""

    model: Model
    device: torch.device
    known: dict[tuple[Rope, bool], tuple[Tensor, float]]

    def inv_freq(self, rope: Rope, capacity: int) -> tuple[Tensor, float]:
        """(inv_freq, what cos and sin are multiplied by)."""
        key = rope, self._long(rope, capacity)
        if key not in self.known:
            found, factor = inv_freq(rope, self.model.max_positions, capacity)
            self.known[key] = found.to(self.device), factor
        return self.known[key]

    def cos_sin(self, rope: Rope, block: Block, layer: LayerOps) -> tuple[Tensor, Tensor]:
        """Of a block's positions; one call where all its sessions turn alike."""
        if rope not in block.tables:
            alike = len({self._long(rope, span.cache.capacity) for span in block.spans}) == 1
            parts = [self._cos_sin(rope, spans, layer) for spans in (
                [block.spans] if alike else [[span] for span in block.spans])]
            cos, sin = parts[0] if len(parts) == 1 else (torch.cat(same) for same in zip(*parts, strict=True))
            block.tables[rope] = cos, sin
        return block.tables[rope]

    def _cos_sin(self, rope: Rope, spans: Sequence[Span], layer: LayerOps) -> tuple[Tensor, Tensor]:
        if all(span.tokens == 1 for span in spans):
            positions = torch.tensor([span.start for span in spans])
        else:
            positions = torch.cat([torch.arange(span.start, span.start + span.tokens) for span in spans])
        inv_freq, factor = self.inv_freq(rope, spans[0].cache.capacity)
        return torch_ops.rope_cos_sin(positions.to(self.device), inv_freq, factor, layer)

    @staticmethod
    def _long(rope: Rope, capacity: int) -> bool:
        return isinstance(rope.scaling, LongRope) and capacity > rope.scaling.original


class Steps:
    """Makes steps of Ops. layer: what computes norm, router and rotation, torch's or this process' kernels."""

    def __init__(self, model: Model, weights: Weights, layer: LayerOps = TORCH, device: torch.device | None = None,
                 observe: Observe | None = None):
        self._weights = weights
        self._layer = TORCH if observe is not None else layer
        self._observe = observe
        self.frequencies = RopeFrequencies(model, device or torch.device("cpu"), {})

    def steps(self, program: Sequence[Op], after: set[str]) -> list[Step]:
        """Of Ops between two Experts; after: the buffers that are read later."""
        found: list[Step] = []
        rest = list(program)
        while rest:
            count, step = self._next(rest, after)
            found.append(step)
            used = {name for op in rest[:count] for name in (*op.inputs, *op.outputs)}
            del rest[:count]
            if dead := used - live(rest) - after:
                found.append(_forget(dead))
        return found

    def _next(self, rest: Sequence[Op], after: set[str]) -> tuple[int, Step]:
        """(how many Ops the next step computes, the step)."""
        op = rest[0]
        if self._observe is None:
            if self._layer is not TORCH and len(rest) > 1 and fused_route(op, rest[1]) and not reads(
                    rest[2:], after, op.wide):  # type: ignore[attr-defined]
                return 2, self._routing(op, rest[1])  # type: ignore[arg-type]
            group = same_source(rest)
            if self._layer is not TORCH:  # which computes the exact ones by itself
                group = list(takewhile(lambda linear: not linear.exact, group))
            if len(group) > 1:
                return len(group), self._together(group)
        return 1, self._alone(op)

    def _alone(self, op: Op) -> Step:
        compute, observe, names = self._function(op), self._observe, op.inputs

        def step(buffers: Buffers, block: Block) -> None:
            inputs = tuple([buffers[name] for name in names])
            if observe is not None:
                observe(op, inputs)
            found = compute(inputs, block)
            if isinstance(found, tuple):
                buffers.update(zip(op.outputs, found, strict=True))
            else:
                buffers[op.outputs[0]] = found

        return step

    def _function(self, op: Op) -> Callable[[tuple[Tensor, ...], Block], Any]:
        """What computes one Op of its inputs."""
        weights, layer = self._weights, self._layer
        if isinstance(op, ops.Rope):
            return self._rotation(op)
        if isinstance(op, ops.Attend | ops.Conv | ops.Delta):
            advance = None if isinstance(op, ops.Attend) else self._advance(op)
            return lambda inputs, block: _by_session(op, weights, advance, inputs, block)
        own = self._own(op) if layer is not TORCH else None
        if own is not None:
            return own
        compute = STATELESS[type(op)]
        return lambda inputs, block: compute(op, weights, *inputs)

    def _advance(self, op: ops.Conv | ops.Delta) -> Advance:
        """What takes a state from token to token."""
        weights, layer = self._weights, self._layer
        if isinstance(op, ops.Conv):
            return partial(layer.conv, weights.taps(op.weight))
        return partial(torch_ops.delta, op, weights, layer=layer)

    def _own(self, op: Op) -> Callable[[tuple[Tensor, ...], Block], Any] | None:
        """What LayerOps computes."""
        layer = self._layer
        if isinstance(op, ops.Norm):
            return self._norm(op)
        if isinstance(op, ops.HeadNorm):
            return self._head_norm(op)
        if isinstance(op, ops.Route):
            return self._route(op)
        if isinstance(op, ops.Mlp):
            return partial(self._mlp, op)
        if isinstance(op, ops.Gate):
            return lambda inputs, block: layer.gate(inputs[0], inputs[1], op.kind)
        if isinstance(op, ops.Linear) and op.exact:
            weight, bias = self._weights[op.weight.name], self._weights.vector(op.bias)
            return lambda inputs, block: torch_ops.biased(layer.exact(inputs[0], weight), bias)
        return self._guess(op) if isinstance(op, ops.Guess) else None

    def _mlp(self, op: ops.Mlp, inputs: tuple[Tensor, ...], block: Block) -> Tensor:
        return torch_ops.mlp(op, self._weights, inputs[0], self._layer)

    def _rotation(self, op: ops.Rope) -> Callable[[tuple[Tensor, ...], Block], Any]:
        layer, frequencies = self._layer, self.frequencies
        if layer is TORCH or not rotates(op):
            return lambda inputs, block: torch_ops.rope(op, *frequencies.cos_sin(op.rope, block, layer), *inputs)
        return lambda inputs, block: layer.rotate(inputs[0], inputs[1], *frequencies.cos_sin(op.rope, block, layer),
                                                  op.head_dim)

    def _norm(self, op: ops.Norm) -> Callable[[tuple[Tensor, ...], Block], Any]:
        layer, dtype, eps = self._layer, self._weights.dtype, op.norm.eps
        weight = self._weights.norm(op.weight, op.norm)

        def norm(inputs: tuple[Tensor, ...], block: Block) -> Tensor | tuple[Tensor, Tensor]:
            if op.wide is None:
                return layer.norm(inputs[0], weight, eps, dtype)
            wide = layer.norm(inputs[0], weight, eps, torch.float32)
            return wide if op.out is None else (wide.to(dtype), wide)

        return norm

    def _head_norm(self, op: ops.HeadNorm) -> Callable[[tuple[Tensor, ...], Block], Any]:
        layer, norm = self._layer, op.norm
        weight = None if norm is None else self._weights.norm(op.weight, norm)
        eps = None if norm is None else norm.eps
        return lambda inputs, block: layer.head_norm(inputs[0], op.size, weight, eps, op.clip)

    def _route(self, op: ops.Route) -> Callable[[tuple[Tensor, ...], Block], Any]:
        layer, router, top_k = self._layer, torch_ops.router_of(op, self._weights), op.router.top_k

        def route(inputs: tuple[Tensor, ...], block: Block) -> tuple[Tensor, Tensor]:
            count = len(inputs[0])
            ids, topk_weights = torch.empty(count, top_k, dtype=torch.int64), torch.empty(count, top_k)
            layer.route(inputs[0], None, router, None, None, ids, topk_weights)
            return ids, topk_weights

        return route

    def _guess(self, op: ops.Guess) -> Callable[[tuple[Tensor, ...], Block], Any]:
        layer, weights, fused = self._layer, self._weights, fused_guess(op)
        router, norm = torch_ops.router_of(op.route, weights), op.steps[0] if fused and op.steps else None
        assert norm is None or isinstance(norm, ops.Norm)
        weight, eps = (None, None) if norm is None else (weights.norm(norm.weight, norm.norm), norm.norm.eps)

        def guess(inputs: tuple[Tensor, ...], block: Block) -> Tensor:
            ids = torch.empty(len(inputs[0]), op.count, dtype=torch.int64)
            x = inputs[0] if fused else torch_ops.guess_input(op, weights, inputs[0])
            layer.guess(x, weight, router, eps, ids)
            return ids

        return guess

    def _routing(self, norm: ops.Norm, route: ops.Route) -> Step:
        """A norm and the router behind it, by LayerOps."""
        layer, top_k, dtype, out = self._layer, route.router.top_k, self._weights.dtype, norm.out
        weight, router = self._weights.norm(norm.weight, norm.norm), torch_ops.router_of(route, self._weights)

        def step(buffers: Buffers, block: Block) -> None:
            x = buffers[norm.source]
            normed = None if out is None else torch.empty(x.shape, dtype=dtype)
            ids, topk_weights = torch.empty(len(x), top_k, dtype=torch.int64), torch.empty(len(x), top_k)
            layer.route(x, weight, router, norm.norm.eps, normed, ids, topk_weights)
            buffers[route.ids], buffers[route.topk_weights] = ids, topk_weights
            if out is not None and normed is not None:
                buffers[out] = normed

        return step

    def _together(self, group: Sequence[ops.Linear]) -> Step:
        weights, source, outs = self._weights, group[0].source, [op.out for op in group]

        def step(buffers: Buffers, block: Block) -> None:
            buffers.update(zip(outs, torch_ops.linears(group, weights, buffers[source]), strict=True))

        return step


def run_ops(model: Model, program: Sequence[Op], weights: Weights, buffers: Buffers, spans: Sequence[Span],
            after: Collection[str], observe: Observe | None = None) -> None:
    """Compute Ops that lie between two Experts (program.pieces) by torch on buffers, [T, ...] each, of the tokens of
    `spans`. Afterwards those of `after` are in `buffers`, others may be gone; some are overwritten in place."""
    block = Block(0, sum(span.tokens for span in spans), spans)
    for step in Steps(model, weights, observe=observe).steps(program, set(after)):
        step(buffers, block)


def _forget(names: set[str]) -> Step:
    """Nothing reads these buffers any more: their memory is free."""
    def step(buffers: Buffers, block: Block) -> None:
        for name in names:
            buffers.pop(name, None)

    return step


def same_source(rest: Sequence[Op]) -> list[ops.Linear]:
    """The Linears at the beginning that read one buffer, which none of them writes."""
    group: list[ops.Linear] = []
    for op in rest:
        if not isinstance(op, ops.Linear) or op.source != (group[0].source if group else op.source):
            break
        group.append(op)
        if op.out == op.source:
            break
    return group


def reads(rest: Sequence[Op], after: Collection[str], name: str) -> bool:
    """Whether any of the Ops, or what comes after them, reads a buffer before it is written again."""
    for op in rest:
        if name in op.inputs:
            return True
        if name in op.outputs:
            return False
    return name in after


def _by_session(op: Op, weights: Weights, advance: Advance | None, inputs: tuple[Tensor, ...], block: Block,
                ) -> tuple[Tensor, ...]:
    """An Op with a state on a block: the tokens of each session with what its cache has."""
    if len(block.spans) == 1:
        return _with_state(op, weights, advance, inputs, block.spans[0])
    sizes = [span.tokens for span in block.spans]
    split = zip(*(x.split(sizes) for x in inputs), strict=True)
    parts = [_with_state(op, weights, advance, rows, span) for span, rows in zip(block.spans, split, strict=True)]
    return tuple(torch.cat(same) for same in zip(*parts, strict=True))


def _with_state(op: Op, weights: Weights, advance: Advance | None, inputs: tuple[Tensor, ...], span: Span,
                ) -> tuple[Tensor, ...]:
    layers = span.cache.layers
    if isinstance(op, ops.Attend):
        a = op.attention
        layer = layers[op.layer if a.kv_source is None else a.kv_source]
        assert isinstance(layer, FullLayer)
        heads = [x.reshape(len(x), -1, a.head_dim) for x in inputs]
        query = Query(span.start, *heads) if a.kv_source is None else Query(span.start, heads[0], None, None)
        return (layer.attend(a, weights.vector(op.sinks), query),)
    assert isinstance(op, ops.Conv | ops.Delta) and advance is not None
    state = layers[op.layer]
    assert isinstance(state, RecurrentLayer)
    if isinstance(op, ops.Conv):
        found: tuple[Tensor, ...] = state.past.advance(advance, span.start, *inputs)
        return found
    return (state.state.advance(advance, span.start, *inputs),)
