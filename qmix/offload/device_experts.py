"""Experts on a device: prompts as in PagedExperts, decoding by slots that the device looks up itself.

While decoding, the experts that are in slots when a layer's router speaks are computed without the host (`begin`). Once
the host has read the choice, it does three things with the others at once (`finish`): it has some copied into slots,
computes some on the CPU from their records in RAM, and has guesses for the next layers read ahead. The CPU also
computes an expert whose copy is on its way but would arrive too late. With `exact` the CPU computes none, because its
bits differ from the device's. Each expert has a row of its own, and the rows are summed in rank order later. So the
order of arrival changes no bit; only the kind of device that computed a row does.

Who may read a slot: work given to `compute` before the record left it. `tier.used` says until when.

T tokens, H hidden, E experts, K chosen per token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qmix.config import ExpertKey, Step
from qmix.device import Device, Repeated, Routed
from qmix.device.device import Work
from qmix.errors import Interrupted
from qmix.kernels.device_ops import DeviceOps, ExpertSlots
from qmix.kernels.prompt_experts import tiles_by_expert
from qmix.offload.below import TRIP, Below, Promotion, divide
from qmix.offload.device_prompts import Choices, DevicePrompts, RoutedPrompt
from qmix.offload.experts import PagedExperts
from qmix.offload.host_rows import HostRows
from qmix.offload.lookahead import Guesses
from qmix.offload.slot_table import NOWHERE, SlotTable
from qmix.offload.tiers import Tier
from qmix.sizes import MIB, pass_tokens
from qmix.spec import Model

JOINED = 32 * MIB  # bytes of a record up to which the CPU computes all that are there at once


class DeviceExperts(PagedExperts):
    """slots: the tier's, by slab. table: told by the tier of what leaves. prompts: what computes them, None for the
    `kernels` of PagedExperts, one expert after the other. The rest as there."""

    def __init__(self, device: Device, ops: DeviceOps, slots: Sequence[ExpertSlots], table: SlotTable, below: Below,
                 prompts: DevicePrompts | None, model: Model, *args: Any, **options: Any):
        super().__init__(model, *args, **options)
        self._device = device
        self._ops = ops
        self._slots = slots
        self._table = table
        self._below = below
        self.prompts = prompts
        self._choices = Choices(device, pass_tokens(model) * model.top_k)
        # A tier that holds every record needs no history: nothing ever leaves it.
        if len(below.tier.slots) < self._layers * self._experts:
            self._caches = [self._tier.cache, below.tier.cache]
        self._by_slot = all(ops.handles(one) for one in slots)  # else the host must name each expert
        self._late = torch.full((self._experts,), NOWHERE, dtype=torch.int32, device=device.torch_device)
        self._late_works: dict[Routed, Repeated] = {}
        self._host = HostRows(device, below.kernels, below.views, model.top_k)
        self._sizes = [one.record.nbytes for one in slots]  # by kind
        self._small = self._host.joins and max(self._sizes) <= JOINED
        self._promotion = Promotion(self._tier, self._small, self._clock)
        self._all_below = len(below.tier.slots) >= self._layers * self._experts
        self._guessing = bool(model.moe_layers)  # without routers nothing is guessed: what comes next is certain
        self._copied = 0, 0.0  # bytes and seconds of the bus so far
        self._found: dict[int, dict[int, int]] = {}  # by layer: the slots of its experts that begin's work found

    @property
    def resident(self) -> bool:
        """Whether the device never has to ask. A trace wants each layer's guesses, so then it does."""
        return self._all_here and self._by_slot and not self.traces

    def __call__(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, step: Step,
                 ahead: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        if self.prompts is None or step.phase == "decode":
            self._device.synchronize()
            return super().__call__(layer, x, ids, topk_weights, step, ahead, wanted)
        _check(step)
        rank = self._rank[layer]
        if rank == 0:
            self._choices.begin()
        self.refresh(rank)
        self._device.synchronize()
        sent = self._choices.send(ids)
        chosen, used = (ids, topk_weights) if wanted is None else (ids[wanted], topk_weights[wanted])
        routed = self.prompts.begin(x if wanted is None else x[wanted], chosen)
        self.prompts.in_slots(routed, self._table.row(rank))

        def watch(ids: Tensor) -> Tensor:
            """Tell the statistics; how many of the tokens that are computed chose each expert [E]."""
            traced = self.traces  # else neither weights nor guesses of a prompt are read
            self._watch.layer(rank, step, ids, topk_weights.cpu() if traced else topk_weights,
                              ahead.cpu() if traced and ahead is not None else None)
            own = ids if wanted is None else ids[wanted.cpu()]
            return torch.bincount(own.reshape(-1), minlength=self._experts)

        if self._all_here:
            assert len(self._table.here(rank)) == self._experts
            self._choices.later(sent, lambda ids: self._hits("prefill", int(watch(ids).count_nonzero())),
                                rank == self._layers - 1)
        else:
            here = dict(self._table.here(rank))
            self._tier.read(here.values(), self._device.compute.record())
            counts = watch(self._choices.read(sent)).tolist()
            self._prompt_misses(rank, routed, counts, here, len(ids), step)
        return self.prompts.combine(routed.rows, used)

    def _prompt_misses(self, layer: int, routed: RoutedPrompt, counts: Sequence[int], here: Mapping[int, int],
                       tokens: int, step: Step) -> None:
        """The rows of the experts that were in no slot when the others were given to the device. counts [E]: tokens of
        each expert; here: what the table had; tokens: that were routed."""
        assert self.prompts is not None
        experts = [expert for expert, count in enumerate(counts) if count]
        self._end_layer(layer, step, (), (), experts, tokens)
        missing = [expert for expert in experts if expert not in here]
        self._hits(step.phase, len(experts) - len(missing))
        tiles = tiles_by_expert(counts, routed.tiles.size)
        if not missing:
            self._look_ahead(layer, experts, step, None)
            self._lookahead.pursue()
        for some in self._in_turn(layer, missing, step, None) if missing else ():
            for key in some:
                _check(step)
                self.prompts.one(routed, self._tier.cache.kind_of(key), self._tier.slot(key), tiles[key.expert],
                                 partial(self._await_all, key, step))

    def _hits(self, phase: str, count: int) -> None:
        self.figures[phase].chosen += count
        self.figures[phase].hits += count

    def _in_turn(self, layer: int, experts: Sequence[int], step: Step, ahead: Guesses | None,
                 together: bool = False) -> Iterator[list[ExpertKey]]:
        keys = [ExpertKey(layer, expert) for expert in experts]
        self.figures[step.phase].below += sum(
            self._below.tier.ready(key) for key in keys if not self._tier.ready(key))
        return super()._in_turn(layer, experts, step, ahead, together)

    def begin(self, layer: int, routed: Routed) -> Work | None:
        """See forward.run_graph.DeviceExperts."""
        return self._in_slots(routed, self._table.row(layer)) if self._by_slot else None

    def _in_slots(self, routed: Routed, table: Tensor) -> Work:
        def work() -> None:
            for one in self._slots:
                self._ops.experts(routed.x, one, routed.ids, table, routed.rows)

        return work

    def refresh(self, layer: int) -> None:
        """Enter into the table what has arrived."""
        for key in self._tier.arrived(layer):
            self._table.enter(key, self._tier.slot(key))

    def launched(self, layer: int) -> None:
        """Begin's work was given to the device: what leaves from now on was still there for it, and its slot is not
        filled before that work is over."""
        here = self._found[layer] = dict(self._table.here(layer))
        if not self._all_here:
            self._tier.read(here.values(), self._device.compute.record())

    def lacking(self, layer: int, routed: Routed) -> bool:
        """See forward.run_graph.DeviceExperts."""
        here = self._found.get(layer, {})
        return any(expert not in here for token in routed.host_ids.tolist() for expert in token)

    def count(self, layer: int, ids: Tensor, topk_weights: Tensor, step: Step) -> None:
        """All were there: what was chosen, ids and topk_weights [T, K] on the host."""
        self._watch.layer(layer, step, ids, topk_weights, None)
        chosen = len(set(ids.reshape(-1).tolist()))
        self.figures[step.phase].chosen += chosen
        self.figures[step.phase].hits += chosen

    def finish(self, layer: int, routed: Routed, step: Step) -> None:
        """See forward.run_graph.DeviceExperts. Interrupted while a record is waited for, or StoreError: then the pass
        is lost, and everything is ready for another one."""
        ids, topk_weights = routed.host_ids.tolist(), routed.host_topk_weights.tolist()
        look = min(self.depth, self._layers - 1 - layer)
        guessed = look > 0 and self.ahead and self._guessing
        ahead = [token[:look] for token in routed.host_ahead.tolist()] if guessed else None
        self._watch.decoded(layer, step, ids, topk_weights, ahead)
        experts = list(dict.fromkeys(chain.from_iterable(zip(*ids, strict=True))))  # best ranks first
        if not self._all_here:
            self._end_layer(layer, step, list(chain.from_iterable(ids)), list(chain.from_iterable(topk_weights)),
                            experts, routed.tokens)
        here = self._found.pop(layer, {})
        missing = [ExpertKey(layer, expert) for expert in experts if expert not in here]
        absent = [key for key in missing if not self._tier.ready(key)]  # the others have come since `refresh`
        figures = self.figures[step.phase]
        figures.chosen += len(experts)
        figures.hits += len(experts) - len(absent)
        figures.misses += len(absent)
        figures.below += sum(map(self._below.tier.ready, absent))
        if missing or not self._all_here:
            self._bring(layer, experts, missing, ahead, routed, step)

    def _bring(self, layer: int, experts: Sequence[int], missing: Sequence[ExpertKey], ahead: Guesses | None,
               routed: Routed, step: Step) -> None:
        """The rows of `missing`: some copied up and computed by the device, some computed by the CPU, at once."""
        tier = self._tier
        copied, computed = divide(missing, self._tier, self._below, self._nbytes)
        self._host.begin()
        for key in copied:
            tier.pin(key)
        waiting, coming = deque(copied), list[ExpertKey]()
        looked = False
        try:
            while True:
                while waiting and tier.want(waiting[0], "demand"):
                    coming.append(waiting.popleft())
                if not (waiting or looked):
                    looked = True
                    self._look_ahead(layer, experts, step, ahead)
                self._lookahead.pursue()
                if computed:
                    some = self._at_once(computed)
                    self._on_host(some, routed, step)
                    computed = [key for key in computed if key not in some]
                elif coming:
                    key = self._next([], coming)
                    self._await(key, len(tier.bytes_of(key)), step)
                    self._on_device(key, routed)
                    coming.remove(key)
                    tier.unpin([key])
                else:
                    assert not waiting, "no slot is free"
                    break
        finally:
            tier.unpin(copied)
        self._measure()

    def _on_device(self, key: ExpertKey, routed: Routed) -> None:
        """A record has come up: have its rows made."""
        slot = self._tier.slot(key)
        if not self._by_slot:
            self._each(key, slot, routed)
        else:
            def name() -> None:
                self._late.fill_(NOWHERE)
                self._late[key.expert].fill_(slot)

            self._device.compute.run(name)
            if routed not in self._late_works:
                self._late_works[routed] = Repeated(self._device, self._in_slots(routed, self._late))
            self._late_works[routed].launch()
        self._launched(key)

    def _each(self, key: ExpertKey, slot: int, routed: Routed) -> None:
        """In formats that the device does not compute by slot: one expert."""
        places, views = (routed.host_ids == key.expert).nonzero().tolist(), self._views[slot]

        def work() -> None:  # by slices: an index would have to go up, and the host to wait for it
            x = torch.cat([routed.x[token:token + 1] for token, _ in places])
            for (token, rank), row in zip(places, self._ops.expert(x, *views), strict=True):
                routed.rows[token, rank].copy_(row)

        self._device.compute.run(work)

    def _at_once(self, computed: Sequence[ExpertKey]) -> Sequence[ExpertKey]:
        """What the CPU computes next: of small records all that are in RAM, else one. Between two large ones the device
        is given what has come up meanwhile."""
        below = self._below.tier
        ready = [key for key in computed if below.ready(key)] if self._small else []
        return ready or computed[:1]

    def _on_host(self, keys: Sequence[ExpertKey], routed: Routed, step: Step) -> None:
        """Compute experts where their records are, and send their rows up."""
        below, split = self._below.tier, self._below.split
        assert split is not None
        ours = [key for key in keys if below.pin(key)]  # the others are going up, and stay pinned until they are there
        try:
            if not all(below.want(key, "demand") for key in keys):  # all slots below are on their way up
                below.unpin(ours)
                ours = []
                for key in keys:
                    self._wait_up(key, routed, step)
                return
            for key in keys:
                self._await_in(below, key, step)
            start = self._clock()
            self._host.compute(routed, [(key.expert, below.slot(key)) for key in keys])
            seconds = self._clock() - start
            split.computed(sum(map(self._nbytes, keys)), seconds)
            self.figures[step.phase].computed += len(keys)
            self.figures[step.phase].host_seconds += seconds
        finally:
            below.unpin(ours)
        self._promotion.consider(keys)

    def _wait_up(self, key: ExpertKey, routed: Routed, step: Step) -> None:
        self._tier.pin(key)
        try:
            while not self._tier.want(key, "demand"):
                _check(step)
                time.sleep(0.0005)
            self._await(key, len(self._tier.bytes_of(key)), step)
            self._on_device(key, routed)
        finally:
            self._tier.unpin([key])

    def _look_ahead(self, layer: int, chosen: Sequence[int], step: Step, ahead: Guesses | None) -> None:
        """A guess is worth its host's work where it saves more: not where all records are in RAM, and each comes up or
        is computed in less time."""
        split = self._below.split
        if step.phase == "prefill" or not self._guessing or self._prefetcher.asked or split is None \
                or not self._all_below \
                or split.quickest(max(self._sizes)) >= TRIP:
            super()._look_ahead(layer, chosen, step, ahead)

    def _await_in(self, tier: Tier, key: ExpertKey, step: Step) -> None:
        """Wait for a record in another tier than the fast one, on the stall clock."""
        if tier.ready(key):
            return
        start = self._clock()
        try:
            tier.wait(key, self._nbytes(key), step.cancel)
        finally:
            self.figures[step.phase].stalled_seconds += self._clock() - start

    def _launched(self, key: ExpertKey) -> None:
        self._tier.used([key], self._device.compute.record())

    def _measure(self) -> None:
        """What the bus did since the last layer, for the split."""
        split, copies = self._below.split, self._below.copies
        if split is not None:
            before, self._copied = self._copied, (sum(copies.bytes_up), copies.busy_seconds)
            split.copied(self._copied[0] - before[0], self._copied[1] - before[1])

    def _nbytes(self, key: ExpertKey) -> int:
        return self._sizes[self._tier.cache.kind_of(key)]


def _check(step: Step) -> None:
    if step.cancel:
        raise Interrupted("cancelled")
