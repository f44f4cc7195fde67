"""The experts callable that the model calls: computes each chosen expert from its record in a slot.

In a layer the records that are there are computed first, while the missing ones are read; a missing one
is begun when its gate and up matrices have arrived, while its down matrix still comes. What order they
come in changes nothing: the outputs of a token's K experts are kept apart in fp32 and summed in rank
order 0..K-1.

Prefill wants nearly every expert of a layer, once a pass: at most WINDOW of them are on their way at a time, then
those of the next layer, so that the disk goes on while attention is computed. Decode asks for all that a token
lacks at once, and then for the guesses of the prefetcher.

T tokens, K experts per token, H hidden, E experts, A guesses per layer, D layers looked ahead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.config import ExpertKey, ModelConfig, Step
from qmix.errors import Interrupted
from qmix.formats import Packed
from qmix.kernels.table import KernelTable
from qmix.offload.figures import PhaseFigures
from qmix.offload.prefetch import Prefetcher
from qmix.offload.tiers import Tier
from qmix.offload.watch import RoutingWatch

WINDOW = 2  # records on their way at a time in prefill: one is read while the other is computed
CHUNK = 512  # tokens that one expert computes at a time; bounds its inner activations
CROWD = 4  # tokens per expert from which a prefill is sure to want every expert of the next layer


@dataclass(slots=True)
class _Group:
    """The tokens of a pass that chose one expert, and at which rank. None: the one token there is."""

    tokens: Tensor | None
    ranks: Tensor | int


class PagedExperts:
    """Experts in the slots of `tier`, fetched as they are needed.

    views: (w13, w2) of each slot; half: bytes of a record up to the end of w13; record: all of them.
    ahead, depth: how many experts the model should guess, for how many layers ahead; 0 where nobody fetches.
    """

    def __init__(self, config: ModelConfig, kernels: KernelTable, tier: Tier,
                 views: Sequence[tuple[Packed, Packed]], half: int, prefetcher: Prefetcher, watch: RoutingWatch,
                 depth: int = 1, clock: Callable[[], float] = time.perf_counter):
        self._kernels = kernels
        self._top_k = config.experts_per_token
        self._experts = config.num_experts
        self._layers = config.num_layers
        self._tier = tier
        self._views = views
        self._half = half
        self._record = tier.pool.shape[1]
        self._prefetcher = prefetcher
        self._watch = watch
        self._clock = clock
        self._all_here = len(tier.pool) >= len(config.expert_keys)
        fetches = not (prefetcher.off or self._all_here)
        self.ahead = self._top_k if fetches else 0
        self.depth = depth if fetches else 0
        self._guessed: dict[ExpertKey, None] = {}  # read ahead, and their router has not spoken yet
        self.figures = {"prefill": PhaseFigures(), "decode": PhaseFigures()}

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, step: Step,
                 ahead: Tensor | None = None) -> Tensor:
        """x [T, H] normed hidden states; ids [T, K] int64 and weights [T, K] fp32 from the router; ahead
        [T, D, A] int64, the next layers' guesses -> [T, H] fp32, as the residual is that it is added to.

        Interrupted when step.cancel is set between two experts or while one is waited for; StoreError where a
        record cannot be read. Either leaves everything ready for another pass."""
        self._watch.layer(layer, step, ids, weights, ahead)
        groups = self._groups(ids)
        rows = torch.empty(len(x), self._top_k, x.shape[1], dtype=torch.float32)
        if self._all_here:
            self.figures[step.phase].chosen += len(groups)
            self.figures[step.phase].hits += len(groups)
            for expert in groups:
                self._compute(ExpertKey(layer, expert), x, groups[expert], rows, step)
        else:
            self._settle(layer, step, ids, weights, groups)
            for key in self._in_turn(layer, list(groups), step, ahead):
                self._compute(key, x, groups[key.expert], rows, step)
        return _weighted(rows, weights)

    def _groups(self, ids: Tensor) -> dict[int, _Group]:
        """{expert: its tokens}, in order of rank for one token, else of expert."""
        if len(ids) == 1:
            return {expert: _Group(None, rank) for rank, expert in enumerate(ids[0].tolist())}
        # One sort instead of a search per expert: the (token, rank) pairs of an expert become adjacent.
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        groups, start = {}, 0
        for expert, count in enumerate(torch.bincount(flat, minlength=self._experts).tolist()):
            if count:
                pairs = order[start:start + count]
                groups[expert] = _Group(pairs // self._top_k, pairs % self._top_k)
            start += count
        return groups

    def _compute(self, key: ExpertKey, x: Tensor, group: _Group, rows: Tensor, step: Step) -> None:
        """One expert for its tokens, into its rows. w13 must have arrived; w2 is waited for."""
        _check(step)
        w13, w2 = self._views[self._tier.slot(key)]
        if group.tokens is None:
            hidden = self._kernels.gated(x, w13)
            self._await(key, self._record, step)
            rows[0, group.ranks] = self._kernels.linear(hidden, w2)[0]
            return
        assert isinstance(group.ranks, Tensor)
        for tokens, ranks in zip(group.tokens.split(CHUNK), group.ranks.split(CHUNK), strict=True):
            hidden = self._kernels.gated(x[tokens], w13)
            self._await(key, self._record, step)
            rows[tokens, ranks] = self._kernels.linear(hidden, w2).float()

    def _settle(self, layer: int, step: Step, ids: Tensor, weights: Tensor, groups: dict[int, _Group]) -> None:
        """The router of `layer` has spoken: into the cache's histories, and the guesses for it are judged."""
        cache, figures = self._tier.cache, self._prefetcher.figures[layer]
        if step.phase == "decode":
            if layer == 0:
                cache.begin_token()
            self._prefetcher.settle(layer, ids.reshape(-1).tolist(), weights.reshape(-1).tolist())
        else:
            if layer == 0:
                cache.begin_prefill(len(ids))
            cache.seed(layer, self._watch.last_choices)
        for key in [key for key in self._guessed if key.layer == layer]:
            del self._guessed[key]
            if key.expert not in groups:
                self._give_up(key)
            elif step.phase == "decode":
                figures.used += 1
                figures.late += not self._tier.ready(key)
        for expert in groups if step.phase == "decode" else ():
            cache.use(ExpertKey(layer, expert))
        cache.settle(layer)

    def _give_up(self, key: ExpertKey) -> None:
        """A guess was wrong. What is not there yet is cancelled, what is there may serve another token."""
        figures = self._prefetcher.figures[key.layer]
        taken = self._tier.cancel_guess(key)
        figures.cancelled += key not in self._tier
        figures.wasted_bytes += taken if key not in self._tier else self._record

    def _in_turn(self, layer: int, experts: Sequence[int], step: Step, ahead: Tensor | None) -> Iterator[ExpertKey]:
        """The records of `experts`, each when it can be computed, those that are here first."""
        tier, reason = self._tier, "demand" if step.phase == "decode" else "prefill"
        keys = [ExpertKey(layer, expert) for expert in experts]
        for key in keys:
            tier.pin(key)
        try:
            here = [key for key in keys if tier.ready(key)]
            # Those on their way first: they hold a slot, which the others may need.
            missing = deque(sorted((key for key in keys if key not in here), key=lambda key: key not in tier))
            figures = self.figures[step.phase]
            figures.chosen += len(keys)
            figures.hits += len(here)
            figures.misses += len(missing)
            coming: list[ExpertKey] = []
            self._ask(missing, coming, reason, step)
            self._look_ahead(layer, experts, missing, step, ahead)
            for key in here:
                yield key
                tier.unpin([key])
                self._ask(missing, coming, reason, step)
            while coming:
                key = next((key for key in coming if tier.ready(key)), coming[0])
                self._await(key, self._half, step)
                yield key
                coming.remove(key)
                tier.unpin([key])
                self._ask(missing, coming, reason, step)
                self._look_ahead(layer, (), missing, step, None)
            assert not missing, "no slot could be had"
        finally:
            tier.unpin(keys)

    def _ask(self, missing: deque[ExpertKey], coming: list[ExpertKey], reason: str, step: Step) -> None:
        """Have missing records read, as many as there are slots for."""
        limit = WINDOW if step.phase == "prefill" else len(missing) + len(coming)
        while missing and len(coming) < limit and self._tier.want(missing[0], reason):  # type: ignore[arg-type]
            coming.append(missing.popleft())

    def _look_ahead(self, layer: int, chosen: Sequence[int], missing: deque[ExpertKey], step: Step,
                    ahead: Tensor | None) -> None:
        """Read what the next layers will want, once all that this one lacks is on its way."""
        if missing or self._prefetcher.off or layer + 1 == self._layers:
            return
        if step.phase == "prefill":
            if len(step.sequence) * self._top_k >= CROWD * self._experts:
                self._guess([ExpertKey(layer + 1, expert) for expert in range(self._experts)], WINDOW, counts=False)
        elif ahead is not None or chosen:
            guesses = self._prefetcher.guess(layer, chosen, _merge(ahead))
            keys = [guess.key for guess in guesses]
            for key in [key for key in self._guessed if key.layer == layer + 1 and key not in keys]:
                # A nearer look withdraws what a farther one had guessed.
                del self._guessed[key]
                self._give_up(key)
            self._guess(keys, len(keys))

    def _guess(self, keys: Sequence[ExpertKey], limit: int, counts: bool = True) -> None:
        waiting = sum(not self._tier.ready(key) for key in self._guessed if key in self._tier)
        for key in keys:
            if waiting >= limit:
                return
            if key not in self._tier and self._tier.want(key, "speculative"):
                self._guessed[key] = None
                self._prefetcher.figures[key.layer].issued += counts
                waiting += 1

    def _await(self, key: ExpertKey, nbytes: int, step: Step) -> None:
        """Wait for the first `nbytes` of a record, on the stall clock."""
        if self._all_here or self._tier.load_of(key) is None:
            return
        start = self._clock()
        try:
            self._tier.wait(key, nbytes, step.cancel)
        finally:
            self.figures[step.phase].stalled_seconds += self._clock() - start


def _merge(ahead: Tensor | None) -> list[list[int]]:
    """ahead [T, D, A] -> for each distance the experts of all tokens, best ranks first, each once."""
    if ahead is None:
        return []
    return [list(dict.fromkeys(ahead[:, distance].T.reshape(-1).tolist())) for distance in range(ahead.shape[1])]


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights[:, k] * rows[:, k], strictly in rank order; fp32 [T, H]."""
    total = rows[:, 0] * weights[:, 0, None]
    for rank in range(1, rows.shape[1]):
        total += rows[:, rank] * weights[:, rank, None]
    return total


def _check(step: Step) -> None:
    if step.cancel:
        raise Interrupted("cancelled")
