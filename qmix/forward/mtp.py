"""A model's multi-token-prediction head: the guesses for the tokens after the next one.

Entry i of the head's cache is made of the hidden state behind token i and of token i + 1, and guesses token i + 2. The
next guesses come of the head's own hidden state and of the guess before, in place of the model's.

    tokens      t0   t1   t2   t3                     the session's
    hidden      h0   h1   h2                          the model's, behind its final norm; h3 once t3 was run
    entries    h0,t1  h1,t2  h2,t3                    the last one guesses t4

Entries that are missing (of a session that was cut back, or of tokens that were run while nobody drafted) only make
guesses worse: positions of the head count its entries, not the session's.

T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qmix.config import Step
from qmix.forward.kv_cache import SessionCache
from qmix.forward.program import mtp_head_program, mtp_program
from qmix.forward.run_eager import NO_GUESSES, Eager, ExpertsBy, MakeCache
from qmix.kernels import ops
from qmix.kernels.layer import TORCH, LayerOps
from qmix.kernels.op import FEW
from qmix.kernels.torch_ops import Weights
from qmix.sizes import MTP_PENDING
from qmix.spec import Model


def head_model(model: Model) -> Model:
    """The head's layer as a model of its own, for its cache."""
    head = model.mtp_head
    assert head is not None
    return replace(model, layers=(head.layer,), final_norm=head.final_norm, mtp_head=None)


class MtpState:
    """Of one session: the head's cache, and hidden states of tokens that are not in it yet.

    positions: of the session's tokens whose hidden states made the entries, ascending. pending: [n, H] fp32 of the
    tokens at first, first + 1, ...; of those that wait only the last MTP_PENDING.
    """

    def __init__(self, cache: SessionCache):
        self.cache = cache
        self.positions: list[int] = []
        self.first = 0
        self.pending: Tensor | None = None

    def __len__(self) -> int:
        """Hidden states that wait."""
        return 0 if self.pending is None else len(self.pending)

    @property
    def end(self) -> int:
        """The position behind the last hidden state that waits; 0 where none does."""
        return 0 if self.pending is None else self.first + len(self.pending)

    def add(self, first: int, hidden: Tensor, limited: bool) -> None:
        """Hidden states [n, H] of the tokens at first, first + 1, ...: the session's last. limited: drop the oldest
        that wait where there are too many."""
        if self.pending is None or self.end != first:
            self.first, self.pending = first, hidden
        else:
            self.pending = torch.cat((self.pending, hidden))
        if limited and (over := len(self.pending) - MTP_PENDING) > 0:
            self.first, self.pending = self.first + over, self.pending[over:]

    def take(self, count: int) -> tuple[int, Tensor]:
        """(position of the first, hidden states) of the first `count` that wait, which they do no longer."""
        assert self.pending is not None and 0 < count <= len(self.pending)
        first, found = self.first, self.pending[:count]
        self.first, self.pending = first + count, self.pending[count:] if count < len(self.pending) else None
        return first, found

    def trim(self, length: int) -> None:
        """The session has `length` tokens left: an entry needs the token after its own."""
        del self.positions[bisect_right(self.positions, length - 2):]
        self.cache.trim(len(self.positions))
        if self.pending is not None:
            left = length - self.first
            self.pending = self.pending[:left] if left > 0 else None


class Mtp:
    """weights, experts, layer, caches: as of run_eager.Eager, of the whole model."""

    def __init__(self, model: Model, weights: Weights, experts: ExpertsBy, layer: LayerOps = TORCH,
                 caches: MakeCache = SessionCache):
        own, program = head_model(model), mtp_program(model)
        attend = next(i for i, op in enumerate(program) if isinstance(op, ops.Attend))
        last = mtp_head_program(model)
        self._whole = Eager(own, weights, experts, layer, NO_GUESSES, caches, programs=(program, last))
        # Of a prompt only keys and values are needed.
        self._fill = Eager(own, weights, experts, layer, NO_GUESSES, caches, programs=(program[:attend + 1], last))

    def new_state(self, capacity: int) -> MtpState:
        return MtpState(self._whole.new_cache(capacity))

    def fill(self, state: MtpState, following: Sequence[int], step: Step) -> None:
        """Make entries of the first hidden states that wait and of the tokens `following` each."""
        first, hidden = state.take(len(following))
        self._fill.read(torch.tensor(following), state.cache, replace(step, phase="prefill", sequence=()),
                        len(following), {"hidden": hidden})
        state.positions += range(first, first + len(following))

    def catch_up(self, state: MtpState, following: Sequence[int], step: Step) -> None:
        """Make entries of all hidden states that wait but the last, where these are more than a draft takes along;
        following: of each the token after it."""
        if len(state) > FEW:
            self.fill(state, following, step)

    def draft(self, state: MtpState, following: Sequence[int], count: int, step: Step) -> list[int]:
        """`count` guesses for what comes after `following`, one token after each hidden state that waits. Those stay
        as entries, the guesses do not. On an error the state is as it was, but for hidden states that waited."""
        self.catch_up(state, following[:-1], step)
        following = following[-len(state):]
        first, hidden = state.take(len(following))
        kept = state.cache.length
        step = replace(step, phase="decode", drafts=0)
        tokens, found = list(following), list[int]()
        try:
            for n in range(count):
                residual = self._whole.read(torch.tensor(tokens), state.cache, replace(
                    step, sequence=(0,) * len(tokens)), len(tokens) - 1, {"hidden": hidden})
                if n == 0:
                    kept += len(following)
                    state.positions += range(first, first + len(following))
                buffers = self._whole.head_buffers(residual, "decode")
                hidden = buffers["final"]
                tokens = [int(buffers["logits"][0].argmax())]
                found += tokens
        finally:
            state.cache.trim(kept)
        return found
