"""Sets up the experts of a store within a plan: pool, cache, readers, tier and the callable, joined.

If everything fits, every record is read and checked here, and nothing is fetched later. Otherwise the slots are warmed
in the background, the most frequent experts first if the router statistics know them, and the first prompt has priority
over the warming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from qmix.config import ExpertKey
from qmix.errors import StoreError, UsageError
from qmix.kernels.table import KernelTable
from qmix.offload.cache import Cache, make_policy, warm_order
from qmix.offload.device_needs import FARTHEST
from qmix.offload.experts import PagedExperts
from qmix.offload.figures import Meter, PhaseFigures
from qmix.offload.plan import Plan, TierPlan
from qmix.offload.pool import Touching, begin_pool
from qmix.offload.prefetch import MODES, Prefetcher
from qmix.offload.reads import CHUNK, THREADS, Readers
from qmix.offload.router_stats import RouterStats
from qmix.offload.tiers import Tier
from qmix.offload.watch import Recorder, RoutingWatch
from qmix.render import Progress
from qmix.sizes import MIB, RecordLayout, format_bytes
from qmix.spec import Model
from qmix.store import VERIFY, Store

AUTO_POLICY = "lfu"  # docs/cache-policy.md
AHEAD_BYTES = THREADS * CHUNK  # read ahead at a time: without a gap until the next layer asks
SMALL = MIB  # bytes of a record below which guessing (0.2 ms a layer) takes longer than the read it saves


@dataclass(frozen=True, slots=True)
class OffloadOptions:
    """policy: how a record is chosen to leave; prefetch: where guesses come from; verify: which reads are checked."""

    policy: str = "auto"
    prefetch: str = "auto"
    verify: str = "first"

    def __post_init__(self) -> None:
        if self.policy != "auto":
            make_policy(self.policy, {})
        for flag, value, allowed in (("--prefetch", self.prefetch, MODES), ("--verify", self.verify, VERIFY)):
            if value not in allowed:
                raise UsageError(f"{flag} {value}: want " + ", ".join(allowed))


class Offload:
    """The running parts. experts: what the model calls; meter: what moved and ran so far, None for the readers alone;
    extra: more to report; below: the tier from which `tier` is filled, where that is not the disk. Close it; reads that
    have begun are waited for."""

    def __init__(self, experts: PagedExperts, tier: Tier, readers: Readers, prefetcher: Prefetcher,
                 stats: RouterStats, policy: str, closing: ExitStack,
                 meter: Callable[[], Meter] | None = None, extra: Callable[[], dict[str, Any]] = dict,
                 below: Tier | None = None):
        self.experts = experts
        self.tier = tier
        self.tiers = (tier,) if below is None else (tier, below)  # fastest first; what is in none is on the disk
        self.stats = stats
        self._readers = readers
        self._prefetcher = prefetcher
        self._policy = policy
        self._closing = closing
        self._meter = meter or partial(read_so_far, readers)
        self._extra = extra
        self._mark = self._meter()

    def end_pass(self, phase: str, tokens: int, seconds: float) -> None:
        """A pass is over: to whose account its reading goes."""
        figures, before = self.experts.figures[phase], self._mark
        self._mark = self._meter()
        figures.tokens += tokens
        figures.add(before, self._mark, seconds)

    def end_draft(self, seconds: float) -> None:
        """A draft of the multi-token-prediction head is over, which is no pass: its time and reading are decoding's."""
        self.end_pass("decode", 0, seconds)
        self.experts.figures["decode"].passes -= 1

    def discard_drafts(self, rejected: int) -> None:
        """Of the drafts of the last pass, the last `rejected` were wrong."""
        self.experts.discard_drafts(rejected)

    def report(self) -> dict[str, Any]:
        """Slots, policy, figures of both phases and of the prefetcher, as plain data."""
        figures = self.experts.figures
        return {"slots": len(self.tier.slots), "policy": self._policy, "prefetch": self._prefetcher.mode,
                "warmed_bytes": self._readers.bytes_read[2], "decode": figures["decode"].report(),
                "prefill": figures["prefill"].report(), "prefetcher": self._prefetcher.report(),
                **self._extra()}

    def reset(self) -> None:
        """Start all figures anew; caches and estimates stay."""
        self.experts.figures = {"prefill": PhaseFigures(), "decode": PhaseFigures()}
        self._prefetcher.reset()
        self._mark = self._meter()

    def close(self) -> None:
        self._closing.close()


def read_so_far(readers: Readers) -> Meter:
    return Meter(sum(readers.bytes_read[:2]), readers.busy_seconds)


@dataclass(frozen=True, slots=True)
class Choices:
    """What the options come to for a store and a plan. prior: share of tokens that chose each expert in earlier
    runs."""

    policy: str
    prior: Mapping[ExpertKey, float]
    mode: str
    depth: int
    window: int

    @classmethod
    def of(cls, store: Store, plan: Plan, options: OffloadOptions, stats: RouterStats,
           say: Callable[[str], None]) -> Choices:
        model, fast = store.model, plan.tiers[0]
        policy = AUTO_POLICY if options.policy == "auto" else options.policy
        prior = stats.share("decode") or stats.share("prefill")
        if policy == "static" and not any(prior.values()):
            say("--cache-policy static: there are no router statistics of this store yet, so all experts have "
                "equal priority")
        mode = options.prefetch
        if mode == "auto" and plan.needs.record < SMALL and fast.slots < plan.needs.records:
            mode = "off"
            say(f"prefetch off: records of {format_bytes(plan.needs.record)} take less time to read than "
                "to predict (--prefetch ahead prefetches anyway)")
        if policy == "lru" and len(fast.kinds) > 1 and _tight(model, fast):
            say("--cache-policy lru: in a mixed store layers have no share of their own, so with few slots it evicts "
                "the records that are needed next; lfu does not")
        return cls(policy, prior, mode,
                   *reach(fast.slots, len(model.paged_layers), model.top_k, plan.needs.record))

    def cache(self, model: Model, tier: TierPlan, kind_of: Callable[[ExpertKey], int]) -> Cache:
        """For a tier. Only plain LRU throws out the layers that come next (docs/cache-policy.md)."""
        return Cache([count for count, _ in tier.kinds], len(model.paged_layers), make_policy(self.policy, self.prior),
                     quotas=self.policy == "lru" and len(tier.kinds) == 1 and _tight(model, tier),
                     probation=max(1, min(2 * model.top_k, tier.slots // 8)), kind_of=kind_of)


def _tight(model: Model, tier: TierPlan) -> bool:
    return tier.slots < 2 * model.top_k * len(model.paged_layers)


def open_offload(store: Store, kernels: KernelTable, plan: Plan, options: OffloadOptions, stats: RouterStats,
                 trace: Recorder | None = None, say: Callable[[str], None] = lambda line: None,
                 progress: Progress | None = None) -> Offload:
    """StoreError where a record that is read at the start is damaged; UsageError for a wrong option."""
    model, kind_of = store.model, store.kind_of
    layers = len(model.record_layers)
    choices = Choices.of(store, plan, options, stats, say)
    with ExitStack() as opened:
        readers = open_readers(store, options, say, opened)
        pools, touched = open_pools(plan.ram, opened)
        tier = Tier(pools, choices.cache(model, plan.ram, kind_of), readers)
        prefetcher = Prefetcher(choices.mode, layers, model.top_k, stats.next_probabilities)
        views = [store.expert_views(kind, slot) for kind, pool in enumerate(pools) for slot in pool]
        halves = [half(record) for record, pool in zip(store.layout.kinds, pools, strict=True) for _ in pool]
        experts = PagedExperts(model, kernels, tier, views, halves, prefetcher,
                               RoutingWatch(layers, model.num_experts, stats, trace, say), choices.depth,
                               choices.window)
        order = warm_order(len(model.paged_layers), model.num_experts, [count for count, _ in plan.ram.kinds],
                           choices.prior, kind_of)
        if plan.resident:
            try:
                fill(tier, order, progress)
            except StoreError:
                for touching in touched:
                    touching.wait()  # a read into memory that is not there fails too
                raise
        else:
            for key in order:
                tier.want(key, "warm")
        for touching in touched:
            touching.wait()
        return Offload(experts, tier, readers, prefetcher, stats, choices.policy, opened.pop_all())


def open_readers(store: Store, options: OffloadOptions, say: Callable[[str], None], opened: ExitStack) -> Readers:
    """What reads records from the disk; closed with `opened`."""
    records = store.records(options.verify, say)  # type: ignore[arg-type]
    opened.callback(records.close)
    readers = Readers(records)
    opened.callback(readers.close)
    return readers


def open_pools(tier: TierPlan, opened: ExitStack) -> tuple[list[Tensor], list[Touching]]:
    """Slots of each kind in host memory, and what still touches them; ended with `opened`."""
    pools, touched = [], []
    for count, nbytes in tier.kinds:
        pool, touching = begin_pool(count, nbytes)
        opened.callback(touching.close)
        pools.append(pool)
        touched.append(touching)
    return pools, touched


def reach(slots: int, layers: int, top_k: int, record: int) -> tuple[int, int]:
    """(layers to look ahead, guesses to read at a time), for records of so many bytes. What is read ahead holds slots;
    beyond the working set of a token there must be room for it. docs/paging.md has the measurements."""
    spare = slots - layers * top_k
    window = max(2, min(top_k, -(-AHEAD_BYTES // record)))
    return max(1, min(FARTHEST, spare // layers)), window if spare >= layers else 1


def half(record: RecordLayout) -> int:
    """Bytes of a record up to the end of its w13."""
    return max(p.offset + p.tensor.nbytes for p in record.placed if p.matrix == "w13")


def fill(tier: Tier, keys: Sequence[ExpertKey], progress: Progress | None, window: int | None = None) -> None:
    """Bring everything in now, `window` records at a time; the first error ends it. There are slots for all."""
    done, total, window = 0, sum(map(len, tier.slots)), len(keys) if window is None else window
    for index in range(len(keys) + window):
        if index < len(keys):
            tier.want(keys[index], "demand")
        if index < window:
            continue
        key = keys[index - window]
        nbytes = len(tier.bytes_of(key))
        tier.wait(key, nbytes)
        done += nbytes
        if progress is not None:
            progress(done, total, "")
