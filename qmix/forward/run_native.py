"""Runs a program for one token of one session: all that lies between two Experts is one call of the native library.

It computes what run_eager.py computes Op by Op, to the bit; drafts, which go there, rely on it. Ops that lower.py has
no calls for are run there, in the middle of a token.

H hidden, K chosen per token, D head size, A guessed for each of the layers ahead, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.config import Step
from qmix.errors import Interrupted
from qmix.forward.kv_cache import SessionCache, unchanged_on_error
from qmix.forward.kv_layers import FullLayer
from qmix.forward.lower import Buffers, Calls, Lowering, Unsupported
from qmix.forward.passes import Block, Span
from qmix.forward.program import head_program
from qmix.forward.run_eager import Eager, Piece
from qmix.forward.weights import KernelWeights
from qmix.kernels import native, ops
from qmix.kernels.native import Product
from qmix.kernels.native import Sequence as NativeSequence
from qmix.kernels.op import Op


def unsupported(eager: Eager, weights: KernelWeights, cache: SessionCache) -> str | None:
    """Why single tokens cannot go through the native library, None where at least one layer can."""
    kernels = weights.kernels
    own, layer = kernels.native, kernels.layer
    if own is None:
        return "the native kernels do not compute this store"
    if not isinstance(layer, native.LayerOps) or layer.level != own.level:
        return "products and norms are not computed at one level"
    attention = {found.native.level for found in cache.layers if isinstance(found, FullLayer) and found.native}
    if attention != {own.level}:
        return "products and attention are not computed at one level" if attention else "torch attends"
    runs = NativeToken(eager, weights, cache).runs
    return None if any(run.sequence is not None for run in runs[:-1]) else runs[0].reason


@dataclass(slots=True)
class Run:
    """Ops between two Experts: a sequence of calls, or the eager runner's steps, for `reason`; then the experts of a
    layer: what they are given, x, ids, weights and guesses. added, attends: see lower.Calls."""

    piece: Piece
    sequence: NativeSequence | None = None
    reason: str = ""
    added: int | None = None
    attends: Sequence[tuple[int, int, int | None]] = ()
    dynamic: str | None = None  # the buffer that the experts before it gave
    layer: int | None = None
    given: tuple[Tensor, Tensor, Tensor] | None = None
    ahead: Tensor | None = None


class NativeToken:
    """The buffers of one token, and the calls over them. For one token at a time. runs: of the layers, the last one of
    what comes behind the last experts."""

    def __init__(self, eager: Eager, weights: KernelWeights, cache: SessionCache):
        self._eager, self._weights = eager, weights
        self._tokens = torch.zeros(1, dtype=torch.int64)
        self.residual = torch.empty(1, eager.model.hidden)
        self._whole = {"tokens": self._tokens, "residual": self.residual}
        pieces = [piece for piece in eager.pieces["decode"] if not isinstance(piece.ops[0], ops.Take)]
        self._stay = self._make_buffers(pieces)
        embed = pieces[0].ops[0]
        assert isinstance(embed, ops.Embed)
        self._embed = embed
        self._lowering = Lowering(weights, cache, Buffers(self._whole), eager.by_phase["decode"].turning)
        self.runs: list[Run] = []
        dynamic = None
        for piece in pieces:
            if isinstance(piece.ops[0], ops.Experts):
                dynamic = self._meet(piece.ops, self.runs[-1])
            else:
                self.runs.append(self._lower(piece, dynamic))
                dynamic = None
        self._head = self._lower_head()
        self._lowering.finish()

    def logits(self, token: int, cache: SessionCache, step: Step) -> Tensor:
        """Append `token` to the session of `cache`: [1, V] fp32. UsageError when the cache is full; Interrupted when
        step.cancel is set; on any error the cache is as it was."""
        out = torch.empty(1, self._eager.model.vocab)  # outside inference mode, so that the caller may change it
        with unchanged_on_error([cache], [1]), torch.inference_mode():
            self._set(token, cache)
            self._layers(cache, step)
            if self._head is None:
                out.copy_(self._eager.head(self.residual, "decode"))
            else:
                sequence, call, product = self._head
                sequence.patch(call, product(out))
                sequence.run()
            cache.length += 1
        return out

    def _set(self, token: int, cache: SessionCache) -> None:
        """Which token, and where; and what turns there, of those ropes for which there is no call."""
        self._tokens.fill_(token)
        self.residual.copy_(self._weights[self._embed.weight.name][token])
        if self._embed.scale != 1:
            self.residual.mul_(self._embed.scale)
        self._lowering.position.fill_(cache.length)
        for rope, turn in self._lowering.turns.items():
            if turn.speeds is None:
                block = Block(0, 1, [Span(cache, cache.length, 0, 1)])
                turning = self._eager.by_phase["decode"].turning
                cos, sin = turning.cos_sin(rope, block, self._weights.kernels.layer)
                turn.cos.copy_(cos)
                turn.sin.copy_(sin)

    def _layers(self, cache: SessionCache, step: Step) -> None:
        experts, addresses, capacity, start = self._eager.experts, cache.addresses, cache.capacity, cache.length
        out = None
        for run in self.runs:
            if step.cancel:
                raise Interrupted("cancelled")
            sequence = run.sequence
            if sequence is None:
                self._by_eager(run, out, Span(cache, start, 0, 1))
            else:
                if run.added is not None:
                    assert out is not None
                    sequence.patch_source(run.added, out.data_ptr())
                for call, layer, window in run.attends:
                    begin = 0 if window is None else max(0, start + 1 - window)
                    sequence.patch_cache(call, addresses[layer], capacity, begin, start + 1)
                sequence.run()
            if run.layer is not None:
                assert run.given is not None
                out = experts(run.layer, *run.given, step, run.ahead, None)
                assert out.dtype == torch.float32 and out.is_contiguous(), "experts return fp32 rows"

    def _by_eager(self, run: Run, out: Tensor | None, span: Span) -> None:
        """A piece Op by Op; what is read later goes into the buffers that stay."""
        whole = self._whole
        if run.dynamic is not None:
            assert out is not None
            whole[run.dynamic] = out
        part = {name: whole[name] for name in run.piece.reads}
        block = Block(0, 1, [span])
        for compute in run.piece.steps:
            compute(part, block)
        for name in run.piece.after & part.keys():
            if name not in self._stay:
                whole[name] = part[name]
            elif part[name] is not whole[name]:
                whole[name].copy_(part[name])

    def _make_buffers(self, pieces: Sequence[Piece]) -> frozenset[str]:
        """Those whose addresses calls have: the residual, and what experts are given."""
        whole, dtype = self._whole, self._weights.dtype
        for op, combine in (piece.ops for piece in pieces if isinstance(piece.ops[0], ops.Experts)):
            assert isinstance(op, ops.Experts) and isinstance(combine, ops.Combine)
            whole.setdefault(op.source, torch.empty(1, op.hidden, dtype=dtype))
            if op.ids is not None and combine.topk_weights is not None:
                whole.setdefault(op.ids, torch.empty(1, op.top_k, dtype=torch.int64))
                whole.setdefault(combine.topk_weights, torch.empty(1, op.top_k))
        guesses = {op.out: op for piece in pieces for op in piece.ops if isinstance(op, ops.Guess)}
        count = max((op.count for op in guesses.values()), default=0)
        self._ahead = torch.empty(1, len(guesses), count, dtype=torch.int64)
        whole |= {name: self._ahead[:, at] for at, name in enumerate(sorted(guesses))}
        return frozenset(whole)

    def _lower(self, piece: Piece, dynamic: str | None) -> Run:
        run, program = Run(piece, dynamic=dynamic), piece.ops[isinstance(piece.ops[0], ops.Embed):]
        try:
            calls = self._lowering.piece(program, dynamic)
        except Unsupported as e:
            run.reason = str(e)
            return run
        run.sequence, run.added, run.attends = self._sequence(calls), calls.added, calls.attends
        return run

    def _meet(self, piece: Sequence[Op], run: Run) -> str:
        """The experts behind a run; the name of what they give."""
        op, combine = piece
        assert isinstance(op, ops.Experts) and isinstance(combine, ops.Combine)
        run.layer, whole = op.layer, self._whole
        if op.ids is None or combine.topk_weights is None:
            run.given = whole[op.source], torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
        else:
            run.given = whole[op.source], whole[op.ids], whole[combine.topk_weights]
        run.ahead = self._ahead[:, :len(op.ahead)] if op.ahead else None
        return combine.out

    def _sequence(self, calls: Calls) -> NativeSequence:
        own = self._weights.kernels.native
        assert own is not None
        return NativeSequence(own.level, own.code, own.threads, calls.calls)

    def _lower_head(self) -> tuple[NativeSequence, int, Callable[[Tensor], bytes]] | None:
        """Norm and head as one sequence: the number of its product, and that product's job for logits [1, V]; None
        where there are no calls for them."""
        program = head_program(self._eager.model)
        try:
            calls = self._lowering.piece(program, None)
        except Unsupported:
            return None
        own, (norm, head) = self._weights.kernels.native, program
        assert own is not None and isinstance(head, ops.Head) and isinstance(norm, ops.Norm)
        x, matrix = self._lowering.last(head.source), self._weights.matrix(head.weight.name)
        return self._sequence(calls), len(calls.calls) - 1, lambda out: own.job(Product(x, matrix, out))
