"""Runs a program for one token of one session: all that lies between two Experts is one call of the native library;
where all experts are in memory, so is all that several layers do (joined.py).

It computes what run_eager.py computes Op by Op, to the bit; drafts, which go there, rely on it. Ops that lower.py has
no calls for are run there, in the middle of a token.

H hidden, K chosen per token, D head size, A guessed for each of the layers ahead, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qmix.config import Step
from qmix.errors import Interrupted
from qmix.forward.calls import Buffers, Calls, Unsupported, patch_states
from qmix.forward.joined import Joined, Resident
from qmix.forward.kv_cache import SessionCache, unchanged_on_error
from qmix.forward.kv_layers import FullLayer
from qmix.forward.lower import Lowering
from qmix.forward.passes import Block, Span
from qmix.forward.program import head_program
from qmix.forward.run_eager import Eager, Piece
from qmix.forward.weights import KernelWeights
from qmix.kernels import native, ops
from qmix.kernels.layer import capped
from qmix.kernels.native import CallSequence, Product
from qmix.kernels.op import Op
from qmix.spec import Moe


def unsupported(eager: Eager, weights: KernelWeights, cache: SessionCache) -> str | None:
    """Why single tokens cannot go through the native library, None where at least one layer can."""
    kernels = weights.kernels
    own, layer = kernels.native, kernels.layer
    if own is None:
        return "the native kernels do not compute this store"
    if not isinstance(layer, native.NativeLayerOps) or layer.level != own.level:
        return "products and norms are not computed at one level"
    attends = [found.native for found in cache.layers if isinstance(found, FullLayer)]
    attention = {found.level for found in attends if found is not None}
    if attends and attention != {own.level}:
        return "products and attention are not computed at one level" if attention else "torch attends"
    chosen = {moe.router.top_k for layer in eager.model.layers if isinstance(moe := layer.mlp, Moe)}
    if len(chosen) > 1:
        return f"layers choose different numbers of experts ({', '.join(map(str, sorted(chosen)))})"
    runs = NativeToken(eager, weights, cache).runs
    return None if any(run.sequence is not None for run in runs[:-1]) else runs[0].reason


@dataclass(slots=True)
class Run:
    """Ops between two Experts: a sequence of calls, or the eager runner's steps, for `reason`; then the experts of a
    layer: what they are given, x, ids, weights and guesses. calls: those of the sequence; own: buffers of this run
    alone, by name."""

    piece: Piece
    sequence: CallSequence | None = None
    reason: str = ""
    calls: Calls | None = None
    own: Mapping[str, Tensor] = field(default_factory=dict)
    dynamic: str | None = None  # the buffer that the experts before it gave
    layer: int | None = None
    given: tuple[Tensor, Tensor, Tensor] | None = None
    ahead: Tensor | None = None


class NativeToken:
    """The buffers of one token, and the calls over them. For one token at a time. runs: of the layers, the last one of
    what comes behind the last experts."""

    def __init__(self, eager: Eager, weights: KernelWeights, cache: SessionCache, resident: Resident | None = None):
        self._eager, self._weights = eager, weights
        self._tokens = torch.zeros(1, dtype=torch.int64)
        self.residual = torch.empty(1, eager.model.hidden)
        self._whole = {"tokens": self._tokens, "residual": self.residual}
        pieces = [piece for piece in eager.pieces["decode"] if not isinstance(piece.ops[0], ops.Take)]
        self._make_buffers(pieces)
        embed = pieces[0].ops[0]
        assert isinstance(embed, ops.Embed)
        self._embed = embed
        self._lowering = Lowering(weights, cache, Buffers(self._whole), eager.by_phase["decode"].frequencies)
        self.runs: list[Run] = []
        dynamic, own = None, self._choices(pieces)
        for piece in pieces:
            if isinstance(piece.ops[0], ops.Experts):
                dynamic = self._meet(piece.ops, self.runs[-1])
            else:
                chosen = own[len(self.runs)] if len(self.runs) < len(own) else {}
                self._whole |= chosen
                self.runs.append(self._lower(piece, dynamic))
                self.runs[-1].own = chosen
                dynamic = None
        self._stay = frozenset(self._whole)  # those whose addresses calls have
        self._head = self._lower_head()
        self._joined = None if resident is None else self._join(resident)
        self._lowering.finish()

    def logits(self, token: int, cache: SessionCache, step: Step) -> Tensor:
        """Append `token` to the session of `cache`: [1, V] fp32. UsageError when the cache is full; Interrupted when
        step.cancel is set; on any error the cache is as it was."""
        out = torch.empty(1, self._eager.model.vocab)  # outside inference mode, so that the caller may change it
        with unchanged_on_error([cache], [1]), torch.inference_mode():
            self._set(token, cache)
            if self._joined is not None:
                self._joined.run(cache, step)
            else:
                self._layers(cache, step)
            if self._head is None:
                out.copy_(self._eager.head(self.residual, "decode"))
            else:
                sequence, call, product = self._head
                sequence.patch(call, product(out))
                sequence.run()
                if (cap := self._eager.model.logit_softcap) is not None:
                    capped(out, cap)
            cache.length += 1
        return out

    def _set(self, token: int, cache: SessionCache) -> None:
        """Which token, and where; and what turns there, of those ropes for which there is no call."""
        self._tokens.fill_(token)
        self.residual.copy_(self._weights.rows(self._embed.weight.name, self._tokens))
        if self._embed.scale != 1:
            self.residual.mul_(self._embed.scale)
        self._lowering.position.fill_(cache.length)
        for rope, turn in self._lowering.cos_sin.items():
            if turn.inv_freq is None:
                block = Block(0, 1, [Span(cache, cache.length, 0, 1)])
                frequencies = self._eager.by_phase["decode"].frequencies
                cos, sin = frequencies.cos_sin(rope, block, self._weights.kernels.layer)
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
                assert run.calls is not None
                if run.calls.taken is not None:
                    assert out is not None
                    sequence.patch_source(run.calls.taken, out.data_ptr())
                for call, layer, window in run.calls.attends:
                    begin = 0 if window is None else max(0, start + 1 - window)
                    sequence.patch_cache(call, addresses[layer], capacity, begin, start + 1)
                patch_states(sequence, run.calls.states, cache)
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
            kept = run.own.get(name, whole[name]) if name in self._stay else None
            if kept is None:
                whole[name] = part[name]
            elif part[name] is not kept:
                kept.copy_(part[name])

    def _make_buffers(self, pieces: Sequence[Piece]) -> None:
        """Those that experts are given."""
        whole, dtype = self._whole, self._weights.dtype
        for op, combine in (piece.ops for piece in pieces if isinstance(piece.ops[0], ops.Experts)):
            assert isinstance(op, ops.Experts) and isinstance(combine, ops.Combine)
            whole.setdefault(op.source, torch.empty(1, op.hidden, dtype=dtype))

    def _choices(self, pieces: Sequence[Piece]) -> list[dict[str, Tensor]]:
        """Of each layer with records the buffers of its choice and guesses, by name: its own, so that all of them are
        there when the token is through."""
        layers = [piece.ops for piece in pieces if isinstance(piece.ops[0], ops.Experts)]
        guesses = {op.out: op.count for piece in pieces for op in piece.ops if isinstance(op, ops.Guess)}
        self._ids = torch.zeros(len(layers), 1, self._eager.model.top_k, dtype=torch.int64)
        self._topk_weights = torch.ones(len(layers), 1, self._eager.model.top_k)
        self._ahead = torch.empty(len(layers), 1, len(guesses), max(guesses.values(), default=0), dtype=torch.int64)
        found = []
        for rank, (op, combine) in enumerate(layers):
            assert isinstance(op, ops.Experts) and isinstance(combine, ops.Combine)
            own = {name: self._ahead[rank, :, at] for at, name in enumerate(sorted(guesses))}
            if op.ids is not None and combine.topk_weights is not None:
                own |= {op.ids: self._ids[rank], combine.topk_weights: self._topk_weights[rank]}
            found.append(own)
        return found

    def _lower(self, piece: Piece, dynamic: str | None) -> Run:
        run, program = Run(piece, dynamic=dynamic), piece.ops[isinstance(piece.ops[0], ops.Embed):]
        try:
            calls = self._lowering.piece(program, dynamic, piece.after)
        except Unsupported as e:
            run.reason = str(e)
            return run
        run.sequence, run.calls = self._sequence(calls), calls
        return run

    def _meet(self, piece: Sequence[Op], run: Run) -> str:
        """The experts behind a run; the name of what they give."""
        op, combine = piece
        assert isinstance(op, ops.Experts) and isinstance(combine, ops.Combine)
        rank = sum(earlier.layer is not None for earlier in self.runs)
        run.layer = op.layer
        run.given = self._whole[op.source], self._ids[rank], self._topk_weights[rank]
        run.ahead = self._ahead[rank, :, :len(op.ahead)] if op.ahead else None
        return combine.out

    def _join(self, resident: Resident) -> Joined | None:
        """All runs and the experts between them, where there are calls for everything."""
        own, calls = self._weights.kernels.native, [run.calls for run in self.runs if run.calls is not None]
        given = [(run.layer, *run.given) for run in self.runs if run.layer is not None and run.given is not None]
        if own is None or len(calls) < len(self.runs) or any(run.layer is None for run in self.runs[:-1]):
            return None
        return Joined(own, calls, given, resident, self._ids, self._topk_weights,
                      [run.ahead for run in self.runs[:-1]], self._eager.model.hidden)

    def _sequence(self, calls: Calls) -> CallSequence:
        own = self._weights.kernels.native
        assert own is not None
        return CallSequence(own.level, own.code, own.threads, calls.calls)

    def _lower_head(self) -> tuple[CallSequence, int, Callable[[Tensor], bytes]] | None:
        """Norm and head as one sequence: the number of its product, and that product's job for logits [1, V]; None
        where there are no calls for them."""
        program = head_program(self._eager.model)
        try:
            calls = self._lowering.piece(program, None, ())
        except Unsupported:
            return None
        own, (norm, head) = self._weights.kernels.native, program
        assert own is not None and isinstance(head, ops.Head) and isinstance(norm, ops.Norm)
        x, matrix = self._lowering.last(head.source), self._weights.matrix(head.weight.name)
        return self._sequence(calls), len(calls.calls) - 1, lambda out: own.job(Product(x, matrix, out))
