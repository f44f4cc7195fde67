"""One token through all layers where all experts are in memory: the calls of run_native.py's runs, with the experts
between them as calls too, which look their records up by themselves. Python is entered a few times a token.

L layers with records, K chosen per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qmix.config import Step
from qmix.errors import Interrupted
from qmix.forward.calls import Calls, patch_states
from qmix.forward.kv_cache import SessionCache
from qmix.kernels.native import CallSequence, NativeProducts
from qmix.kernels.native.sequence import EXPERTS

AT_ONCE = 4  # layers of a call: cancelling waits for them


class Resident(Protocol):
    """Experts that are all in memory; offload.experts.PagedExperts has the meaning of each call."""

    def job(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, out: Tensor) -> bytes: ...

    def end_token(self, step: Step, ids: Tensor, topk_weights: Tensor, ahead: Sequence[Tensor | None]) -> None: ...


class Joined:
    """pieces: the calls of each run, the last one of what comes behind the last experts. given: of each layer with
    records its number, x, ids and weights; ids [L, 1, K] and topk_weights [L, 1, K] are all of them, ahead the guesses
    of each layer. Everything that calls point to is the caller's."""

    def __init__(self, native: NativeProducts, pieces: Sequence[Calls],
                 given: Sequence[tuple[int, Tensor, Tensor, Tensor]],
                 resident: Resident, ids: Tensor, topk_weights: Tensor, ahead: Sequence[Tensor | None], hidden: int):
        self._resident, self._ids, self._topk_weights, self._ahead = resident, ids, topk_weights, ahead
        self._out = torch.empty(1, hidden)  # what a layer's experts give
        self._starts: list[int] = []
        self._attends: list[tuple[int, int, int | None]] = []
        self._states: list[tuple[int, int, bool]] = []
        calls: list[tuple[int, list[bytes] | bytes]] = []
        for at, piece in enumerate(pieces):
            self._starts.append(len(calls))
            self._attends += [(len(calls) + call, layer, window) for call, layer, window in piece.attends]
            self._states += [(len(calls) + call, layer, of_rule) for call, layer, of_rule in piece.states]
            own = list(piece.calls)
            if piece.taken is not None:
                assert piece.take is not None
                own[piece.taken] = piece.take(self._out)
            calls += own
            if at < len(given):
                layer, x, chosen, topk_weights = given[at]
                calls.append((EXPERTS, resident.job(layer, x, chosen, topk_weights, self._out)))
        self._sequence = CallSequence(native.level, native.code, native.threads, calls)

    def run(self, cache: SessionCache, step: Step) -> None:
        """The token at the end of `cache`, whose length stays. Interrupted when step.cancel is set."""
        start, addresses, capacity = cache.length, cache.addresses, cache.capacity
        for call, layer, window in self._attends:
            begin = 0 if window is None else max(0, start + 1 - window)
            self._sequence.patch_cache(call, addresses[layer], capacity, begin, start + 1)
        patch_states(self._sequence, self._states, cache)
        layers = len(self._starts) - 1
        for first in range(0, layers, AT_ONCE):
            if step.cancel:
                raise Interrupted("cancelled")
            missing = self._sequence.run(self._starts[first], self._starts[min(first + AT_ONCE, layers)])
            assert missing is None, "an expert that is chosen is not in memory"
        self._sequence.run(self._starts[layers])
        self._resident.end_token(step, self._ids, self._topk_weights, self._ahead)
