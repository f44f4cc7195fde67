"""The callable for experts that the model calls: it computes each chosen expert from its record in a slot.

In a layer, the records in slots are computed first, while the missing ones are read. A missing expert is started when
its gate and up matrices have arrived, while its down matrix still arrives. The order of arrival changes nothing: the
outputs of a token's K experts are kept apart in fp32 and summed in rank order 0..K-1.

Prefill needs nearly every expert of a layer, once a pass. At most WINDOW of them are on their way at a time, then those
of the next layer, so that the disk works while attention is computed. Decode requests all records that a token lacks at
once, and then the guesses of the prefetcher.

The records of a multi-token-prediction head are one more layer, behind those that a pass goes through. They live in
the same slots; which of them it chose is no part of the router statistics, and nothing is guessed for it.

T tokens, K experts per token, H hidden, E experts, A guesses per layer, D layers looked ahead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from qmix.config import ExpertKey, Step
from qmix.errors import Interrupted
from qmix.formats import Packed
from qmix.kernels.layer import TORCH
from qmix.kernels.native import NativeLayerOps, NativeProducts
from qmix.kernels.op import FEW
from qmix.kernels.table import KernelTable
from qmix.offload.figures import PhaseFigures
from qmix.offload.groups import Group, groups_of, pieces_of
from qmix.offload.lookahead import Guesses, Lookahead, merged
from qmix.offload.one_token import OneToken
from qmix.offload.prefetch import Prefetcher
from qmix.offload.products import ExpertProducts
from qmix.offload.reads import CHUNK
from qmix.offload.resident import ResidentExperts
from qmix.offload.tiers import Tier
from qmix.offload.watch import RoutingWatch
from qmix.offload.workspace import EXPERT_CHUNK
from qmix.spec import Model

WINDOW = 2  # records on their way at a time in prefill: one is read while the other is computed
CROWD = 4  # tokens per expert from which a prefill is sure to want every expert of the next layer


class PagedExperts:
    """Experts in the slots of `tier`, fetched as they are needed.

    views: (w13, w2) of each slot; halves: bytes of a record in it up to the end of w13.
    ahead, depth: how many experts the model should guess, for how many layers ahead; 0 where nobody fetches,
    unless a trace records them.
    window: guesses that are read at a time.
    """

    def __init__(self, model: Model, kernels: KernelTable, tier: Tier,
                 views: Sequence[tuple[Packed, Packed]], halves: Sequence[int], prefetcher: Prefetcher,
                 watch: RoutingWatch, depth: int = 1, window: int = 2, clock: Callable[[], float] = time.perf_counter):
        self._kernels = kernels
        # Set where the native kernels compute the experts.
        self._native: NativeProducts | None = kernels.native if kernels.computes_natively(views[0][0]) else None
        self._top_k = model.top_k
        self._experts = model.num_experts
        self._layers = len(model.record_layers)
        self._rank = {layer: rank for rank, layer in enumerate(model.paged_layers)}
        self._tier = tier
        self._caches = [tier.cache]  # whose histories are kept
        self._views = views
        self._halves = halves
        self._products = ExpertProducts(kernels, self._native, tier, views)
        self._prefetcher = prefetcher
        self._watch = watch
        self._clock = clock
        self._all_here = len(tier.slots) >= len(model.expert_keys)
        # In one call only where the weighted sum is the one that several tokens get.
        self._resident: ResidentExperts | None = None
        if self._native and isinstance(kernels.layer, NativeLayerOps) and kernels.layer.level == self._native.level:
            self._resident = ResidentExperts(self._native, tier, views, model)
        self._one = OneToken(self._native, views, model.top_k) if self._native and not self._all_here else None
        # Small records are computed in less time than one is read, and so many guesses are read at a time that the disk
        # does not wait meanwhile. Of large ones the next guess is begun between two.
        self._joins = prefetcher.off or max(map(len, tier.slots)) <= CHUNK
        guesses = watch.traces or not (prefetcher.off or self._all_here)
        self.ahead = self._top_k if guesses else 0
        self.depth = depth if guesses else 0
        self._lookahead = Lookahead(tier, prefetcher, window)
        self.figures = {"prefill": PhaseFigures(), "decode": PhaseFigures()}

    @property
    def views(self) -> list[tuple[Packed, Packed]]:
        """(w13, w2) of a slot of each kind of record."""
        return list({(w13.spec, w2.spec): (w13, w2) for w13, w2 in self._views}.values())

    def on_layer(self, notify: Callable[[], None]) -> None:
        """See RoutingWatch.notify."""
        self._watch.notify = notify

    @property
    def traces(self) -> bool:
        """Whether every decision is recorded."""
        return self._watch.traces

    @property
    def guesses_prompts(self) -> bool:
        """Whether the model should guess in prompts too; nothing is fetched by it there."""
        return self._watch.guesses_prompts

    def discard_drafts(self, rejected: int) -> None:
        """Of the drafts of the last pass, the last `rejected` were wrong: they do not count as tokens."""
        self._watch.discard_drafts(rejected)
        self.figures["decode"].tokens -= rejected

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, step: Step,
                 ahead: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """x [T, H] normed hidden states; ids [T, K] int64 and weights [T, K] fp32 from the router; ahead
        [T, D, A] int64, the next layers' guesses; wanted [n] int64, the rows to compute, None for all: the others
        count in the statistics, no more -> [n, H] fp32, as the residual is that it is added to.

        layer: of the model; from here on, layers without records are not counted.
        Interrupted when step.cancel is set between two experts or while one is waited for; StoreError where a
        record cannot be read. Either leaves everything ready for another pass."""
        layer = self._rank[layer]
        counts = layer < self._layers and not step.again
        if not counts:
            ids = ids.cpu()
        elif ids.is_cpu:
            self._watch.layer(layer, step, ids, weights, ahead)
        else:
            ids = ids.cpu()  # from here on
            self._watch.layer(layer, step, ids, weights.cpu(), None if ahead is None else ahead.cpu())
        routed = len(ids)
        if wanted is not None:
            x, ids, weights = x[wanted], ids[wanted.cpu()], weights[wanted]
        decode, few = step.phase == "decode", len(x) <= FEW
        if self._all_here:
            if self._resident is not None and few and decode:
                _check(step)
                self._count(ids.shape[1] if len(ids) == 1 else len(ids.unique()))
                return self._resident(layer, x, ids, weights)
            rows = self._all_rows(layer, x, groups_of(ids, self._experts, x.device), step)
        else:
            groups = groups_of(ids, self._experts, x.device)
            if counts:
                self._end_layer(layer, step, ids.reshape(-1).tolist() if decode else (),
                                weights.reshape(-1).tolist() if decode else (), groups, routed)
            elif decode:
                self._tier.cache.use(*(ExpertKey(layer, expert) for expert in groups))
            guesses = None if ahead is None else ahead.tolist()
            joins = decode and few and self._joins and self._resident is not None
            if joins and all(self._tier.ready(ExpertKey(layer, expert)) for expert in groups):
                assert self._resident is not None
                with self._all_in_slots(layer, list(groups), step, guesses):
                    return self._resident(layer, x, ids, weights)
            rows = self._rows(x, groups, step, self._in_turn(layer, list(groups), step, guesses, joins))
        return (self._kernels.layer if decode else TORCH).combine(rows, weights)

    @property
    def resident(self) -> bool:
        """Whether a token's experts are calls of the library: `job` and `end_token`, in place of a call of this."""
        return self._resident is not None and self._all_here

    def job(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, out: Tensor) -> bytes:
        """native.h's qmix_experts: out [1, H] fp32 = what a call of this gives for one token."""
        assert self._resident is not None
        return self._resident.job(self._rank[layer], x, ids, topk_weights, out)

    def end_token(self, step: Step, ids: Tensor, topk_weights: Tensor, ahead: Sequence[Tensor | None]) -> None:
        """A decoded token has been through all layers by way of `job`: what the routers chose goes into the statistics.
        ids [L, 1, K], topk_weights [L, 1, K]; ahead: of each layer its guesses, as a call of this has them."""
        chosen, weights = ids.tolist(), topk_weights.tolist()
        for layer, guesses in enumerate(ahead):
            self._watch.decoded(layer, step, chosen[layer], weights[layer],
                                guesses.tolist() if guesses is not None and self._watch.traces else None)
        self._count(ids.numel())

    def _count(self, chosen: int) -> None:
        """Experts that a decoding layer chose and had."""
        self.figures["decode"].chosen += chosen
        self.figures["decode"].hits += chosen

    @property
    def kernels(self) -> KernelTable:
        """What computes them."""
        return self._kernels

    def _all_rows(self, layer: int, x: Tensor, groups: dict[int, Group], step: Step) -> Tensor:
        """[n, K, H] fp32, what the experts give, where all are in memory."""
        rows = torch.empty(len(x), self._top_k, x.shape[1], dtype=torch.float32, device=x.device)
        self.figures[step.phase].chosen += len(groups)
        self.figures[step.phase].hits += len(groups)
        if self._native is not None:
            for pieces in pieces_of(groups, EXPERT_CHUNK):
                _check(step)
                self._products.several(layer, x, pieces, rows)
        else:
            for expert in groups:
                self._compute(ExpertKey(layer, expert), x, groups[expert], rows, step)
        return rows

    def _rows(self, x: Tensor, groups: dict[int, Group], step: Step, turns: Iterator[list[ExpertKey]]) -> Tensor:
        """The same of experts that come one after the other, or some at a time; see _in_turn."""
        one = self._one if len(x) == 1 and step.phase == "decode" else None
        if one is not None:
            x, ranks = x.contiguous(), {expert: rank for rank, expert in enumerate(groups)}
            for some in turns:
                _check(step)
                pairs = [(self._tier.slot(key), ranks[key.expert]) for key in some]
                one.gate_up(x, pairs)
                for key in some:
                    self._await_all(key, step)
                one.down(pairs)
            return one.rows
        rows = torch.empty(len(x), self._top_k, x.shape[1], dtype=torch.float32, device=x.device)
        for some in turns:
            if len(some) == 1:
                self._compute(some[0], x, groups[some[0].expert], rows, step)
            else:
                _check(step)
                chosen = {key.expert: groups[key.expert] for key in some}
                for pieces in pieces_of(chosen, EXPERT_CHUNK):
                    self._products.several(some[0].layer, x, pieces, rows)
        return rows

    def _compute(self, key: ExpertKey, x: Tensor, group: Group, rows: Tensor, step: Step) -> None:
        """One expert for its tokens, into its rows. w13 must have arrived; w2 is waited for."""
        _check(step)
        self._products.one(key, x, group, rows, partial(self._await_all, key, step))

    def _end_layer(self, layer: int, step: Step, ids: Sequence[int], weights: Sequence[float], groups: Collection[int],
                   routed: int) -> None:
        """The router of `layer` has spoken: into the caches' histories, and the guesses for it are judged. ids,
        weights: of all tokens, one after the other; not asked for in prefill."""
        if step.phase == "decode" and self._prefetcher.guessed(layer):
            self._prefetcher.score_guesses(layer, ids, weights)
        self.figures[step.phase].prefetched += self._lookahead.score_guesses(layer, groups)
        keys = [ExpertKey(layer, expert) for expert in groups]
        for cache in self._caches:
            if step.phase == "decode":
                if layer == 0:
                    cache.begin_token()
                cache.use(*keys)
            else:
                if layer == 0:
                    cache.begin_prefill(routed)
                cache.seed(layer, self._watch.last_choices)
            cache.end_layer(layer)

    @contextmanager
    def _all_in_slots(self, layer: int, experts: Sequence[int], step: Step, ahead: Guesses | None) -> Iterator[None]:
        """All records that a decoding layer wants are here: they stay meanwhile, and what the next layers may want is
        read."""
        _check(step)
        keys = [ExpertKey(layer, expert) for expert in experts]
        for key in keys:
            self._tier.pin(key)
        try:
            self._count(len(keys))
            self._look_ahead(layer, experts, step, ahead)
            self._lookahead.pursue()
            yield
        finally:
            self._tier.unpin(keys)

    def _in_turn(self, layer: int, experts: Sequence[int], step: Step, ahead: Guesses | None,
                 together: bool = False) -> Iterator[list[ExpertKey]]:
        """The records of `experts`, each when it can be computed, those that are here first; one may be there only up
        to the end of its w13. together: all that are whole at a time, once none has to wait for a slot."""
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
            looked = False
            while here or missing or coming:
                self._ask(missing, coming, reason, step)
                if not missing and not looked:
                    looked = True
                    self._look_ahead(layer, experts, step, ahead)
                self._lookahead.pursue()
                some = self._whole(here, coming) if together and not missing else []
                if not some:
                    some = [self._next(here, coming)]
                    self._await(some[0], self._halves[self._tier.slot(some[0])], step)
                yield some
                for key in some:
                    self._launched(key)
                    (here if key in here else coming).remove(key)
                tier.unpin(some)
        finally:
            tier.unpin(keys)

    def _whole(self, here: list[ExpertKey], coming: list[ExpertKey]) -> list[ExpertKey]:
        """What can be computed at once: what is here, then what has arrived."""
        return list(here) if here else [key for key in coming if self._tier.ready(key)]

    def _next(self, here: list[ExpertKey], coming: list[ExpertKey]) -> ExpertKey:
        """What to compute now: what is here, else what has arrived, else what will arrive first."""
        if here:
            return here[0]
        assert coming, "no slot is free"
        return next((key for key in coming if self._tier.ready(key)), coming[0])

    def _ask(self, missing: deque[ExpertKey], coming: list[ExpertKey], reason: str, step: Step) -> None:
        """Have missing records read, as many as there are slots for."""
        limit = WINDOW if step.phase == "prefill" else len(missing) + len(coming)
        while missing and len(coming) < limit and self._tier.want(missing[0], reason):  # type: ignore[arg-type]
            coming.append(missing.popleft())

    def _look_ahead(self, layer: int, chosen: Sequence[int], step: Step, ahead: Guesses | None) -> None:
        """Once all that this layer lacks is on its way: what will the next ones want?"""
        if self._prefetcher.off or layer + 1 >= self._layers or step.again:
            return
        if self._experts == 1:  # nothing to guess: every token wants the record of every layer
            self._lookahead.expect([ExpertKey(at, 0) for at in range(layer + 1, layer + 1 + self.depth)
                                    if at < self._layers], account=step.phase == "decode")
        elif step.phase == "decode":
            guesses = self._prefetcher.guess(layer, chosen, merged(ahead))
            self._lookahead.expect([guess.key for guess in guesses])
        elif len(step.sequence) * self._top_k >= CROWD * self._experts and layer + 2 < self._layers:
            # Of the last layer mostly the last token's experts are wanted: K, not all.
            self._lookahead.expect([ExpertKey(layer + 1, expert) for expert in range(self._experts)], account=False)

    def _launched(self, key: ExpertKey) -> None:
        """All that reads its slot has been computed, or on a device given to it."""

    def _await_all(self, key: ExpertKey, step: Step) -> None:
        if not self._all_here and self._tier.load_of(key) is not None:
            self._await(key, len(self._tier.bytes_of(key)), step)

    def _await(self, key: ExpertKey, nbytes: int, step: Step) -> None:
        """Wait for the first `nbytes` of a record, on the stall clock."""
        if self._all_here or self._tier.load_of(key) is None:
            return
        start = self._clock()
        try:
            self._tier.wait(key, nbytes, step.cancel)
        finally:
            self.figures[step.phase].stalled_seconds += self._clock() - start


def _check(step: Step) -> None:
    if step.cancel:
        raise Interrupted("cancelled")
