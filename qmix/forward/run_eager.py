"""Runs a program Op by Op: prompts, several sessions at once, drafts; and what calibration looks through.

A pass takes the new tokens of one or several sessions (passes.py has the cut) and goes through the program piece by
piece: what lies between two Experts is done block by block, the experts are met by all tokens of the pass at once, so
that an expert is fetched once a layer however long the prompt is.

The residual stream, norms, rotation, routers and logits are fp32; matrix products, keys and values are in the compute
dtype. Prompts get torch's norms and routers, decode passes those of this process' kernels (steps.py). The rows of up to
FEW tokens do not depend on each other: a token gets the same bits decoded among others as alone, be they other
sessions' or drafts of its own.

T tokens of a pass, P sessions, H hidden, K chosen per token, A guessed for each of D layers ahead, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType

import torch
from torch import Tensor

from qmix.config import Step
from qmix.errors import Interrupted
from qmix.forward.kv_cache import SessionCache, unchanged_on_error
from qmix.forward.passes import BLOCK, Block, Span, blocks_of, blocks_of_rows, counts_of, split_passes
from qmix.forward.program import embed_program, head_program, layer_program, live, pieces
from qmix.forward.steps import Observe, Steps
from qmix.forward.steps import Step as StepOfOps
from qmix.kernels import ops
from qmix.kernels.layer import TORCH, LayerOps
from qmix.kernels.op import Op
from qmix.kernels.torch_ops import Weights
from qmix.sizes import pass_tokens
from qmix.spec import Model

# (layer, x [T, H], ids [T, K], topk_weights [T, K], step, ahead [T, D, A] or None, wanted [n] or None) -> [n, H] fp32:
# the weighted sums of what the chosen experts give. wanted: the n rows to compute, None for all; others were routed and
# count. In a model without experts ids are 0, K is 1 and topk_weights are 1.
ExpertsBy = Callable[[int, Tensor, Tensor, Tensor, Step, Tensor | None, Tensor | None], Tensor]
MakeCache = Callable[[Model, int, torch.dtype], SessionCache]  # (model, capacity, compute dtype)
Take = Callable[[int, Tensor], None]  # (which of the wanted rows comes first, residual [n, H])
Buffers = Mapping[str, Tensor]
# (first token of a pass, residual [t, H] fp32 of all of its tokens, seconds that those took which nobody else wanted)
Collect = Callable[[int, Tensor, float], None]
Programs = tuple[Sequence[Op], Sequence[Op]]  # up to the residual behind the last layer; from it to the logits


NOTHING: Buffers = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Piece:
    """Ops that are computed together, the buffers that they read, and those that are read after them."""

    ops: tuple[Op, ...]
    reads: frozenset[str]
    after: frozenset[str]
    steps: Sequence[StepOfOps]


@dataclass(frozen=True, slots=True)
class Guesses:
    """For how many following layers with experts how many experts are guessed while decoding; prompts: in prompts
    too. Nothing is guessed where `count` is 0."""

    depth: int = 0
    count: int = 0
    prompts: bool = False


NO_GUESSES = Guesses()


class Eager:
    """A model's program over its dense weights, and its experts.

    layer: what computes norms, routers and the rotation in decode passes. observe: sees every Op before it runs; then
    torch computes all of them, also in decode passes. device: where weights, caches and all tensors of a pass are.
    programs: in place of the model's own.
    """

    def __init__(self, model: Model, weights: Weights, experts: ExpertsBy, layer: LayerOps = TORCH,
                 guesses: Guesses = NO_GUESSES, caches: MakeCache = SessionCache, device: torch.device | None = None,
                 observe: Observe | None = None, programs: Programs | None = None):
        self.model = model
        self.guesses = guesses
        self._weights = weights
        self.experts = experts
        self._observe = observe
        self._device = device or torch.device("cpu")
        self._most = pass_tokens(model)
        self._make_cache = caches
        self.by_phase = {"prefill": Steps(model, weights, TORCH, self._device, observe),
                         "decode": Steps(model, weights, layer, self._device, observe)}
        self.pieces: dict[str, list[Piece]] = {}
        self._heads = {}
        for phase, steps in self.by_phase.items():
            guessed = guesses if phase == "decode" or guesses.prompts else NO_GUESSES
            layers, head = programs or (program_of(model, guessed), head_program(model))
            self.pieces[phase] = _pieces(steps, layers, {"residual"})
            self._heads[phase] = steps.steps(head, {"final", "logits"})
        self._final = self._heads["prefill"][0]

    def new_cache(self, capacity: int) -> SessionCache:
        """An empty cache for one session, with room for `capacity` positions."""
        return self._make_cache(self.model, capacity, self._weights.dtype)

    def forward(self, tokens: Tensor, caches: Sequence[SessionCache], step: Step, all_logits: bool = False,
                collect: Collect | None = None) -> Tensor:
        """Append tokens to P sessions; fp32 logits [P, V] after each one's last token, or all [T, V].

        tokens: int64 [T], the sessions' new tokens one after another. step.sequence tells the sessions apart, in the
        order of `caches`, and may be empty for one. Example: caches of length 7 and 0, sequence (4, 9, 9). collect:
        gets the residuals behind the last layer of all tokens, a pass at a time, of which a prompt else has those of
        the last ones alone; the logits are the same.

        UsageError when a cache is full; Interrupted when step.cancel is set. On any error the caches are as they were.
        """
        counts = counts_of(len(tokens), len(caches), step)
        wanted = range(len(tokens)) if all_logits else [end - 1 for end in accumulate(counts)]
        # Made outside inference mode, so that the caller may change it in place.
        logits = torch.empty(len(wanted), self.model.vocab)

        def head(first: int, residual: Tensor) -> None:
            out = logits[first:first + len(residual)]
            for rows, part in zip(residual.split(BLOCK), out.split(BLOCK), strict=True):
                part.copy_(self.head(rows, step.phase))

        self._run(tokens, caches, step, counts, wanted, head, collect)
        return logits

    def read(self, tokens: Tensor, cache: SessionCache, step: Step, skip: int, given: Buffers = NOTHING) -> Tensor:
        """Append tokens [T] to one session; the residual stream [T - skip, H] fp32 after the last layer of all but the
        first `skip`, of which `head` makes logits, a piece at a time: all at once they may be larger than the model.
        given: other buffers that the program begins with, [T, ...] each. Errors as of forward."""
        kept = torch.empty(len(tokens) - skip, self.model.hidden, device=self._device)

        def keep(first: int, residual: Tensor) -> None:
            kept[first:first + len(residual)] = residual

        self._run(tokens, [cache], step, [len(tokens)], range(skip, len(tokens)), keep, given=given)
        return kept

    def head(self, residual: Tensor, phase: str = "prefill") -> Tensor:
        """Logits [n, V] of at most BLOCK rows of `read`, the bits that forward gives where the rows are cut as it cuts
        them."""
        return self.head_buffers(residual, phase)["logits"]

    def final(self, residual: Tensor) -> Tensor:
        """What the final norm gives of any rows: [n, H] fp32, by torch."""
        with torch.inference_mode():
            buffers = {"residual": residual}
            self._final(buffers, Block(0, len(residual)))
            return buffers["final"]

    def head_buffers(self, residual: Tensor, phase: str) -> dict[str, Tensor]:
        """The same, and "final" [n, H] fp32, of which they are made."""
        with torch.inference_mode():
            buffers = {"residual": residual}
            for step in self._heads[phase]:
                step(buffers, Block(0, len(residual)))
            return buffers

    def _run(self, tokens: Tensor, caches: Sequence[SessionCache], step: Step, counts: Sequence[int],
             wanted: Sequence[int], take: Take, collect: Collect | None = None, given: Buffers = NOTHING) -> None:
        """All tokens through all layers, a pass at a time; `take` gets the residuals of the wanted rows, `collect` of
        all."""
        done = 0
        with unchanged_on_error(caches, counts), torch.inference_mode():
            for spans in split_passes(counts, caches, step, self._most):
                first, end = spans[0].begin, spans[-1].end
                rows = [row - first for row in wanted if first <= row < end]
                buffers = {"tokens": tokens[first:end].to(self._device),
                           **{name: buffer[first:end] for name, buffer in given.items()}}
                residual, others, seconds = self._pass(
                    buffers, spans, replace(step, sequence=step.sequence[first:end]), rows, collect is not None)
                if rows:
                    take(done, residual)
                done += len(rows)
                if collect is not None:
                    collect(first, residual if others is None else others, seconds)

    def _pass(self, buffers: dict[str, Tensor], spans: Sequence[Span], step: Step, wanted: Sequence[int],
              everything: bool = False) -> tuple[Tensor, Tensor | None, float]:
        """The tokens of `spans` through all layers: residuals of the `wanted` rows. everything: and of all rows, None
        where all are wanted; then the other rows go through the end of the last layer by themselves, so that the wanted
        ones have the bits that they have without; and the seconds that this took."""
        tokens, blocks, rows = len(buffers["tokens"]), blocks_of(spans), None
        if len(wanted) < tokens:
            rows = torch.tensor(wanted, dtype=torch.int64, device=self._device)
        pieces = self.pieces[step.phase]
        end = next((i for i, piece in enumerate(pieces) if isinstance(op := piece.ops[0], ops.Take) or (
            isinstance(op, ops.Experts) and op.last)), len(pieces))
        buffers = self._go(pieces[:end], blocks, buffers, step, None)
        others, seconds = None, 0.0
        if everything and rows is not None:
            rest = torch.tensor(sorted({*range(tokens)} - {*wanted}), dtype=torch.int64, device=self._device)
            begun = dict(buffers)
        residual = self._go(pieces[end:], blocks, buffers, step, rows)["residual"]
        if everything and rows is not None:
            start = time.perf_counter()
            others = torch.empty(tokens, self.model.hidden, device=self._device)
            others[rows] = residual
            if len(rest):
                others[rest] = self._go(pieces[end:], blocks, begun, replace(step, again=True), rest)["residual"]
            seconds = time.perf_counter() - start
        for span in spans:
            span.cache.length = span.start + span.tokens
        return residual, others, seconds

    def _go(self, pieces: Sequence[Piece], blocks: Sequence[Block], buffers: dict[str, Tensor], step: Step,
            rows: Tensor | None) -> dict[str, Tensor]:
        """Pieces of the program, one after another; rows: the wanted ones, None for all."""
        for piece in pieces:
            op = piece.ops[0]
            if isinstance(op, ops.Experts):
                found = self.meet_experts(piece.ops, buffers, step, rows if op.last else None)
                buffers[piece.ops[-1].outputs[0]] = found
            elif isinstance(op, ops.Take):
                count = len(buffers[op.buffers[0]]) if rows is None else len(rows)
                if rows is not None:
                    buffers |= {name: buffers[name][rows] for name in op.buffers}
                blocks = blocks_of_rows(count)
            else:
                self._by_block(piece, blocks, buffers, step)
            buffers = {name: buffer for name, buffer in buffers.items() if name in piece.after}
        return buffers

    def meet_experts(self, piece: Sequence[Op], buffers: Buffers, step: Step, wanted: Tensor | None) -> Tensor:
        """An Experts and its Combine: [n, H] fp32."""
        op, combine = piece
        assert isinstance(op, ops.Experts) and isinstance(combine, ops.Combine)
        source = buffers[op.source].to(self._weights.dtype)
        if op.ids is None or combine.topk_weights is None:
            ids = torch.zeros(len(source), 1, dtype=torch.int64, device=self._device)
            topk_weights = torch.ones(len(source), 1, device=self._device)
        else:
            ids, topk_weights = buffers[op.ids], buffers[combine.topk_weights]
        if self._observe is not None:
            self._observe(op, (source, ids))
        ahead = torch.stack([buffers[name] for name in op.ahead], 1) if op.ahead else None
        return self.experts(op.layer, source, ids, topk_weights, step, ahead, wanted)

    def _by_block(self, piece: Piece, blocks: Sequence[Block], buffers: dict[str, Tensor], step: Step) -> None:
        """Ops between two Experts, block by block. What is read later is put together in one buffer of all rows, which
        is made when the first block has it, unless an Op wrote in its place."""
        whole = dict(buffers)
        for block in blocks:
            if step.cancel:
                raise Interrupted("cancelled")
            part = {name: whole[name][block.begin:block.end] for name in piece.reads}
            given = dict(part)
            for compute in piece.steps:
                compute(part, block)
            for name in piece.after & part.keys():
                found = part[name]
                if found is given.get(name):
                    continue
                if len(blocks) == 1:
                    buffers[name] = found
                    continue
                if block is blocks[0]:
                    buffers[name] = found.new_empty(blocks[-1].end, *found.shape[1:])
                buffers[name][block.begin:block.end] = found


def program_of(model: Model, guesses: Guesses = NO_GUESSES) -> tuple[Op, ...]:
    """The program up to the residual behind the last layer."""
    return (embed_program(model), *(op for i in range(len(model.layers)) for op in layer_program(
        model, i, guesses.depth, guesses.count)))


def _pieces(steps: Steps, program: Sequence[Op], result: set[str]) -> list[Piece]:
    found = pieces(program)
    live_from = [frozenset(result)]  # what is read from piece i on, the last one first
    for piece in reversed(found):
        written = {name for op in piece for name in op.outputs}
        live_from.append(frozenset(live(piece)) | (live_from[-1] - written))
    live_from.reverse()
    return [Piece(piece, frozenset(live(piece)), after, [] if isinstance(piece[0], ops.Experts | ops.Take) else
                  steps.steps(piece, set(after))) for piece, after in zip(found, live_from[1:], strict=True)]
