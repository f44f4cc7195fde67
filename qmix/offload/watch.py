"""Passes the routers' choices on to the router statistics and, if asked for, to a trace.

Passes follow one another. Each layer hands in its choices, and with the last layer the pass is counted. Of a pass with
drafts only the tokens that turned out right are counted, once `discard_drafts` says which.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qmix.config import Step
from qmix.errors import QmixError
from qmix.offload.cache import SEED
from qmix.offload.router_stats import RouterStats


class Recorder(Protocol):
    """What gets every decision: offload.trace.TraceWriter has the meaning of each call. guess_prompts: whether the
    next router is to be asked early in prompts too, and not only while decoding."""

    guess_prompts: bool

    def drop_pass(self) -> None: ...

    def add(self, layer: int, ids: Sequence[Sequence[int]], topk_weights: Sequence[Sequence[float]],
            ahead: Sequence[Sequence[int]] | None) -> None: ...

    def end_pass(self, phase: str, sequence: Sequence[int]) -> None: ...


class RoutingWatch:
    """stats: counts every pass. trace: also gets every decision, with weights and guesses; where it cannot be
    written it ends with a line to `say`, and the answer goes on."""

    def __init__(self, layers: int, experts: int, stats: RouterStats, trace: Recorder | None = None,
                 say: Callable[[str], None] = lambda line: None):
        self._layers = layers
        self._experts = experts
        self.stats = stats
        self._trace = trace
        self._say = say
        self.notify: Callable[[], None] = lambda: None  # called as each layer's choices come, in the computing thread
        self._decoded: list[list[list[int]]] = []  # by layer, by token: the experts, in decode
        self._held: list[list[list[int]]] = []  # by token, by layer: a pass with drafts, not counted yet
        self._counts: list[list[int]] = []
        self._transitions: list[list[list[int]]] = []
        self._before: Tensor | None = None  # the layer before: [T, E], 1 where chosen
        self.last_choices: list[list[int]] = []  # of the last tokens in the layer handed in last, in prefill

    @property
    def traces(self) -> bool:
        """Whether guesses are wanted for their own sake."""
        return self._trace is not None

    @property
    def guesses_prompts(self) -> bool:
        """Whether they are wanted of prompts too."""
        return self._trace is not None and self._trace.guess_prompts

    def layer(self, layer: int, step: Step, ids: Tensor, topk_weights: Tensor, ahead: Tensor | None) -> None:
        """ids [T, K] and topk_weights [T, K] of `layer`; ahead [T, D, A], what it guesses of the next ones."""
        if step.phase == "decode":
            self.decoded(layer, step, ids.tolist(), topk_weights.tolist(),
                         None if ahead is None or self._trace is None else ahead.tolist())
            return
        self._begin(layer)
        if self._trace is not None:
            self._trace.add(layer, ids.tolist(), topk_weights.tolist(), None if ahead is None else ahead[:, 0].tolist())
        self._prefill(ids)
        if layer + 1 == self._layers:
            self._end(step, len(ids))

    def decoded(self, layer: int, step: Step, ids: list[list[int]], topk_weights: list[list[float]],
                ahead: list[list[list[int]]] | None) -> None:
        """The same while decoding, of plain numbers."""
        self._begin(layer)
        if self._trace is not None:
            self._trace.add(layer, ids, topk_weights, None if ahead is None else [token[0] for token in ahead])
        self._decoded.append(ids)
        if layer + 1 == self._layers:
            self._end(step, len(ids))

    def _begin(self, layer: int) -> None:
        self.notify()
        if layer == 0:
            self._decoded, self._counts, self._transitions, self._before = [], [], [], None
            if self._trace is not None:
                self._trace.drop_pass()  # what an interrupted pass has left

    def discard_drafts(self, rejected: int) -> None:
        """Count the last pass but for its last `rejected` tokens."""
        for choices in self._held[:len(self._held) - rejected]:
            self.stats.add_token("decode", choices)
        self._held = []

    def _prefill(self, ids: Tensor) -> None:
        self.last_choices = ids[-SEED:].tolist()
        chosen = torch.zeros(len(ids), self._experts).scatter_(1, ids, 1.0)
        self._counts.append(chosen.sum(0).long().tolist())
        if self._before is not None:
            # Exact: sums of ones, and a pass has far fewer tokens than fp32 has integers.
            self._transitions.append((self._before.T @ chosen).long().tolist())
        self._before = chosen

    def _end(self, step: Step, tokens: int) -> None:
        if step.phase == "decode":
            self._held = [[layer[token] for layer in self._decoded] for token in range(tokens)]
            if not step.drafts:
                self.discard_drafts(0)
        else:
            self.stats.add_counts("prefill", tokens, self._counts, self._transitions)
        if self._trace is not None:
            try:
                self._trace.end_pass(step.phase, step.sequence or (0,) * tokens)
            except QmixError as e:
                self._say(f"{e.message}: the trace ends here")
                self._trace = None
