"""Runs a program Op by Op, in torch: the reference of the other runners, and what calibration looks through.

A pass takes the new tokens of one or several sessions and goes through the program piece by piece: what lies between
two Experts is done block by block, the experts are met by all tokens of the pass at once, so that an expert is fetched
once a layer however long the prompt is. In prefill blocks are at most BLOCK tokens of one session, and passes at most
`pass_tokens`, counted from the first new token: the cut, and with it every bit, depends on the prompt alone, never on a
budget. In decode all tokens of a pass are one block, and attention takes them one by one, also those of one session.

T tokens of a pass, P sessions, H hidden, K chosen per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from qmix.config import Step
from qmix.errors import Interrupted
from qmix.forward.kv_cache import FullLayer, RecurrentLayer, SessionCache
from qmix.forward.program import live, model_program, pass_tokens, pieces
from qmix.kernels import ops, torch_ops
from qmix.kernels.op import Op
from qmix.kernels.rope import inv_freq
from qmix.kernels.torch_ops import LinearBy, Weights
from qmix.spec import LongRope, Model, Rope

BLOCK = 512  # query positions of one attention call

# (op, source [T, H], ids [T, K], step) -> rows [T, K, H] fp32
ExpertsBy = Callable[[ops.Experts, Tensor, Tensor, Step], Tensor]
# Before an Op runs on a block: the Op, and the buffers that it reads, in order
Observe = Callable[[Op, tuple[Tensor, ...]], None]
Stateless = Callable[..., Any]

STATELESS: Mapping[type[Op], Stateless] = {
    ops.Embed: torch_ops.embed, ops.Norm: torch_ops.norm, ops.Linear: torch_ops.linear,
    ops.HeadNorm: torch_ops.head_norm, ops.Gate: torch_ops.gate, ops.Route: torch_ops.route, ops.Mlp: torch_ops.mlp,
    ops.Add: torch_ops.add, ops.Scale: torch_ops.scale, ops.Head: torch_ops.head, ops.Combine: torch_ops.combine,
}


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [begin, end) of a forward's tokens, all new positions of one session from `start` on."""

    cache: SessionCache
    start: int
    begin: int
    end: int


@dataclass(slots=True)
class Block:
    """Rows [begin, end) of a pass, those of `spans` if it still has all; tables: cos and sin by rope, made once."""

    begin: int
    end: int
    spans: Sequence[Span] = ()
    tables: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Eager:
    """A model's program over its dense tensors, by canonical name, and its experts.

    linear_by: multiplies by a packed tensor, by name; None where all are plain. observe: sees every Op before it runs.
    """

    def __init__(self, model: Model, weights: Mapping[str, Tensor], experts: ExpertsBy,
                 dtype: torch.dtype = torch.float32, linear_by: LinearBy | None = None,
                 observe: Observe | None = None):
        self.model = model
        self._weights = Weights(weights, dtype, linear_by)
        self._experts = experts
        self._most = pass_tokens(model)
        self._observe = observe or (lambda op, inputs: None)
        found = pieces(model_program(model))
        after = [live(op for piece in found[i:] for op in piece) for i in range(1, len(found))]
        self._pieces = list(zip(found, [*after, {"logits"}], strict=True))
        self._frequencies: dict[tuple[Rope, bool], tuple[Tensor, float]] = {}

    def new_cache(self, capacity: int) -> SessionCache:
        """An empty cache for one session, with room for `capacity` positions."""
        return SessionCache(self.model, capacity, self._weights.dtype)

    def forward(self, tokens: Tensor, caches: Sequence[SessionCache], step: Step, all_logits: bool = False) -> Tensor:
        """Append tokens to P sessions; fp32 logits [P, V] after each one's last token, or all [T, V].

        tokens: int64 [T], the sessions' new tokens one after another. step.sequence tells the sessions apart, in the
        order of `caches`, and may be empty for one. Example: caches of length 7 and 0, sequence (4, 9, 9).

        UsageError when a cache is full; Interrupted when step.cancel is set. On any error the caches are as they were.
        """
        counts = _counts(len(tokens), len(caches), step)
        for cache, count in zip(caches, counts, strict=True):
            cache.need(count)
        wanted = range(len(tokens)) if all_logits else [end - 1 for end in accumulate(counts)]
        logits = torch.empty(len(wanted), self.model.vocab)
        before = [cache.begin(count) for cache, count in zip(caches, counts, strict=True)]
        done, size = 0, 1 if step.phase == "decode" else BLOCK
        try:
            with torch.inference_mode():
                for spans in _passes(list(_spans(counts, caches, size)), self._most):
                    first, end = spans[0].begin, spans[-1].end
                    rows = [row - first for row in wanted if first <= row < end]
                    part = replace(step, sequence=step.sequence[first:end])
                    found = self._pass(tokens[first:end], spans, part, rows)
                    logits[done:done + len(rows)] = found
                    done += len(rows)
        except BaseException:
            for cache, saved in zip(caches, before, strict=True):
                cache.rollback(saved)
            raise
        return logits

    def _pass(self, tokens: Tensor, spans: Sequence[Span], step: Step, wanted: Sequence[int]) -> Tensor:
        """The tokens of `spans`, at most PASS, through the whole program: logits of the `wanted` rows."""
        first = spans[0].begin
        blocks = [Block(group[0].begin - first, group[-1].end - first, group) for group in _blocks(spans)]
        buffers = {"tokens": tokens}
        for piece, after in self._pieces:
            if isinstance(op := piece[0], ops.Take):
                rows = torch.tensor(wanted, dtype=torch.int64)
                buffers = {name: buffers[name][rows] for name in op.buffers}
                blocks = [Block(begin, min(len(rows), begin + BLOCK)) for begin in range(0, len(rows), BLOCK)]
            elif isinstance(op, ops.Experts):
                buffers[op.out] = self._meet_experts(op, buffers, step)
            elif blocks:
                parts = [self._block(piece, block, buffers, after, step) for block in blocks]
                buffers = {name: parts[0][name] if len(parts) == 1 else torch.cat([part[name] for part in parts])
                           for name in after}
            buffers = {name: buffer for name, buffer in buffers.items() if name in after}
            if not len(wanted) and isinstance(op, ops.Take):
                break
        for span in spans:
            span.cache.length = span.start + span.end - span.begin
        return buffers.get("logits", torch.empty(0, self.model.vocab))

    def _meet_experts(self, op: ops.Experts, buffers: Mapping[str, Tensor], step: Step) -> Tensor:
        source = buffers[op.source].to(self._weights.dtype)
        ids = torch.zeros(len(source), 1, dtype=torch.int64) if op.ids is None else buffers[op.ids]
        self._observe(op, (source, ids))
        return self._experts(op, source, ids, step)

    def _block(self, piece: Sequence[Op], block: Block, whole: Mapping[str, Tensor], after: set[str],
               step: Step) -> dict[str, Tensor]:
        """One block through the Ops between two Experts: the buffers of `after`."""
        if step.cancel:
            raise Interrupted("cancelled")
        buffers = {name: buffer[block.begin:block.end] for name, buffer in whole.items()}
        for op in piece:
            inputs = tuple(buffers[name] for name in op.inputs)
            self._observe(op, inputs)
            found = self._run(op, inputs, block)
            outputs = found if isinstance(found, tuple) else (found,)
            buffers.update(zip(op.outputs, outputs, strict=True))
        return {name: buffers[name] for name in after}

    def _run(self, op: Op, inputs: tuple[Tensor, ...], block: Block) -> Any:
        if isinstance(op, ops.Rope):
            return torch_ops.rope(op, *self._cos_sin(op.rope, block), *inputs)
        if isinstance(op, ops.Attend | ops.Conv | ops.Delta):
            sizes = [span.end - span.begin for span in block.spans]
            split = zip(*(x.split(sizes) for x in inputs), strict=True)
            parts = [self._with_state(op, rows, span) for span, rows in zip(block.spans, split, strict=True)]
            return parts[0] if len(parts) == 1 else tuple(torch.cat(same) for same in zip(*parts, strict=True))
        return STATELESS[type(op)](op, self._weights, *inputs)

    def _with_state(self, op: Op, inputs: tuple[Tensor, ...], span: Span) -> tuple[Tensor, ...]:
        """An Op on the new tokens of one session, with what its cache has."""
        layers = span.cache.layers
        if isinstance(op, ops.Attend):
            q, size, source = inputs[0], op.attention.head_dim, op.attention.kv_source
            layer = layers[op.layer if source is None else source]
            assert isinstance(layer, FullLayer)
            if source is None:
                keys, values = (x.reshape(len(x), -1, size) for x in inputs[1:])
                keys, values = layer.append(span.start, keys, values)
            else:
                keys, values = layer.read(span.start + len(q))
            return (torch_ops.attend_to(op, self._weights, q, keys, values),)
        assert isinstance(op, ops.Conv | ops.Delta)
        state = layers[op.layer]
        assert isinstance(state, RecurrentLayer)
        if isinstance(op, ops.Conv):
            found, state.past = torch_ops.conv(op, self._weights, state.past, *inputs)
            return found
        out, state.state = torch_ops.delta(op, self._weights, state.state, *inputs)
        return (out,)

    def _cos_sin(self, rope: Rope, block: Block) -> tuple[Tensor, Tensor]:
        """Of a block's positions."""
        if rope not in block.tables:
            parts = []
            for span in block.spans:
                positions = torch.arange(span.start, span.start + span.end - span.begin)
                parts.append(torch_ops.cos_sin(positions, *self._inv_freq(rope, span.cache.capacity)))
            cos, sin = (torch.cat(same) for same in zip(*parts, strict=True))
            block.tables[rope] = cos, sin
        return block.tables[rope]

    def _inv_freq(self, rope: Rope, context: int) -> tuple[Tensor, float]:
        long = isinstance(rope.scaling, LongRope) and context > rope.scaling.original
        if (rope, long) not in self._frequencies:
            self._frequencies[rope, long] = inv_freq(rope, self.model.max_positions, context)
        return self._frequencies[rope, long]


def _counts(tokens: int, sessions: int, step: Step) -> list[int]:
    """New tokens of each session: sequence (4, 9, 9) -> [1, 2]."""
    counts = [len(list(run)) for _, run in groupby(step.sequence)] or [tokens]
    if sum(counts) != tokens or len(counts) != sessions or tokens == 0:
        raise ValueError(f"{tokens} tokens, {sessions} caches, but sequence has runs of {counts}")
    return counts


def _spans(counts: Sequence[int], caches: Sequence[SessionCache], size: int) -> Iterator[Span]:
    """The new tokens of each session, cut into pieces of `size`."""
    first = 0
    for cache, count in zip(caches, counts, strict=True):
        for begin in range(0, count, size):
            yield Span(cache, cache.length + begin, first + begin, first + min(count, begin + size))
        first += count


def _passes(spans: Iterable[Span], most: int) -> Iterator[list[Span]]:
    """Spans in order, as many to a pass as fit `most` tokens."""
    group: list[Span] = []
    for span in spans:
        if group and span.end - group[0].begin > most:
            yield group
            group = []
        group.append(span)
    yield group


def _blocks(spans: Sequence[Span]) -> Iterator[tuple[Span, ...]]:
    """A longer span is a block of its own, so that it is computed as it would be alone; neighbouring single tokens, of
    sessions that decode together or of one with drafts, share one."""
    for single, group in groupby(spans, lambda span: span.end - span.begin == 1):
        if single:
            yield tuple(group)
        else:
            yield from ((span,) for span in group)
