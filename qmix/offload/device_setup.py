"""Sets experts up on a device: slots in its memory, slots in host memory below them, and what moves records between
them.

The slots on the device are filled before the first token, the most frequent experts first if the router statistics
know them. The slots in host memory are warmed in the background.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qmix.config import ExpertKey
from qmix.device import Device
from qmix.device.pinning import pin_pool
from qmix.errors import DoesNotFit
from qmix.formats.packed import Packed
from qmix.kernels.device_ops import ExpertSlots
from qmix.kernels.device_table import DeviceKernels
from qmix.kernels.table import KernelTable
from qmix.offload.below import Below
from qmix.offload.cache import warm_order
from qmix.offload.copies import LARGE, Copies
from qmix.offload.device_experts import DeviceExperts
from qmix.offload.device_prompts import DevicePrompts
from qmix.offload.figures import Meter
from qmix.offload.plan import Plan, TierPlan
from qmix.offload.prefetch import Prefetcher
from qmix.offload.router_stats import RouterStats
from qmix.offload.setup import Choices, Offload, OffloadOptions, fill, half, open_pools, open_readers, read_so_far
from qmix.offload.slot_table import SlotTable
from qmix.offload.split import Split
from qmix.offload.tiers import Tier
from qmix.offload.watch import Recorder, RoutingWatch
from qmix.render import Progress
from qmix.sizes import format_bytes
from qmix.store import Store

PRODUCTS = 4  # by which the CPU is measured; the first one wakes its threads
UPWARD = 4  # records on their way to the device at a time while its slots are filled


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """pin: bytes of host memory that may be page-locked; exact: nothing is computed by the CPU that belongs on the
    device; copy_gbps, host_gbps: what is known of the bus and of the CPU's products."""

    pin: int
    exact: bool = False
    copy_gbps: float | None = None
    host_gbps: float | None = None


def open_device_offload(store: Store, device: Device, kernels: DeviceKernels, plan: Plan, options: OffloadOptions,
                        how: DeviceOptions, stats: RouterStats, trace: Recorder | None = None,
                        say: Callable[[str], None] = lambda line: None, progress: Progress | None = None) -> Offload:
    """StoreError where a record that is read at the start is damaged; DoesNotFit where the device has not the memory;
    UsageError for a wrong option."""
    model, kind_of = store.model, store.kind_of
    fast, slow = plan.tiers
    choices = Choices.of(store, plan, options, stats, say)
    with ExitStack() as opened:
        readers = open_readers(store, options, say, opened)
        pools, touched = open_pools(slow, opened)
        for touching in touched:
            touching.wait()
        _pin(device, pools, how.pin, say, opened)
        low = Tier(pools, choices.cache(model, slow, kind_of), readers)
        copies = Copies(low, device, large=LARGE)
        opened.callback(copies.close)
        slabs = _slabs(device, fast)
        table = SlotTable(device, len(model.record_layers), model.num_experts)

        def left(key: ExpertKey, slot: Tensor, comes: ExpertKey | None) -> None:
            table.leave(key)
            copies.take_back(key, slot, comes)

        high = Tier(slabs, choices.cache(model, fast, kind_of), copies, left)
        slots = [ExpertSlots(slab, record, [store.expert_views(kind, slot) for slot in slab], first)
                 for kind, (slab, record, first) in enumerate(zip(
                     slabs, store.layout.kinds, accumulate(map(len, slabs[:-1]), initial=0), strict=True))]
        views = [store.expert_views(kind, slot) for kind, pool in enumerate(pools) for slot in pool]
        _fill(high, low, plan, choices, progress, kind_of, len(model.record_layers), model.num_experts)
        split = None if how.exact else measured(how, low, copies, views, kernels.host, model.hidden)
        below = Below(low, copies, views, kernels.host, split)
        prefetcher = Prefetcher(choices.mode, len(model.record_layers), model.top_k, stats.next_probabilities)
        prompts = None
        if all(kernels.experts.handles(one, device.half) for one in slots):  # in fp32 no expert is in such a format
            prompts = DevicePrompts(kernels.experts, slots, model.num_experts)
        experts = DeviceExperts(
            device, kernels.ops, slots, table, below, prompts, model, kernels.prompts, high,
            [views for one in slots for views in one.views],
            [half(one.record) for one in slots for _ in one.views], prefetcher,
            RoutingWatch(len(model.record_layers), model.num_experts, stats, trace, say), choices.depth, choices.window)
        for layer in range(len(model.record_layers)):
            experts.refresh(layer)

        def meter() -> Meter:
            return Meter(*read_so_far(readers)[:2], sum(copies.bytes_up), copies.bytes_down, copies.busy_seconds,
                         device.launches, device.waits)

        def extra() -> dict[str, Any]:
            return {"device": {"name": device.name, "slots": len(high.slots), "slots_below": len(low.slots), **(
                {} if split is None else {"copy_gbps": split.copy_gbps, "host_gbps": split.host_gbps})}}

        return Offload(experts, high, readers, prefetcher, stats, choices.policy, opened.pop_all(), meter, extra,
                       low)


def measured(how: DeviceOptions, low: Tier, copies: Copies, views: Sequence[tuple[Packed, Packed]], host: KernelTable,
             hidden: int) -> Split:
    """From what is known of bus and CPU; what is not known is measured: by the copies that filled the device's slots,
    and by products of one token with the records that these left in RAM, each once, since the next one is cold too."""
    up, busy = sum(copies.bytes_up), copies.busy_seconds
    bus = how.copy_gbps or (up / busy / 1e9 if up and busy else Split.COPY)
    rates, x = [], torch.randn(1, hidden, generator=torch.Generator().manual_seed(0))
    for key in [key for key in low if low.ready(key)][:PRODUCTS] if how.host_gbps is None else []:
        start = time.perf_counter()
        host.expert(x, *views[low.slot(key)])
        rates.append(len(low.bytes_of(key)) / 1e9 / max(1e-9, time.perf_counter() - start))
    return Split(bus, how.host_gbps or (statistics.median(rates[1:]) if rates[1:] else Split.HOST))


def _pin(device: Device, pools: list[Tensor], limit: int, say: Callable[[str], None], opened: ExitStack) -> None:
    if device.torch_device.type != "cuda":
        return
    for pool in pools:
        pinned = pin_pool(pool, limit, say)
        opened.callback(pinned.close)
        limit -= pinned.nbytes
        if pinned.slots < len(pool) and limit < pool.shape[1]:
            say(f"--pin: {len(pool) - pinned.slots} of {len(pool)} slots in RAM are not page-locked: copies from them "
                "are slower")


def _slabs(device: Device, fast: TierPlan) -> list[Tensor]:
    try:
        torch_device = device.torch_device
        return [torch.empty(count, nbytes, dtype=torch.uint8, device=torch_device) for count, nbytes in fast.kinds]
    except RuntimeError as e:  # torch's out-of-memory errors are RuntimeErrors
        raise DoesNotFit(f"the GPU did not allocate {format_bytes(fast.experts)} for expert slots: "
                         f"{str(e).splitlines()[0]}",
                         "choose a smaller --vram, or close other programs that use the GPU") from None


def _fill(high: Tier, low: Tier, plan: Plan, choices: Choices, progress: Progress | None,
          kind_of: Callable[[ExpertKey], int], layers: int, experts: int) -> None:
    """The device's slots now, through those below; then those below, in the background."""
    fast, slow = plan.tiers
    above = warm_order(layers, experts, [count for count, _ in fast.kinds], choices.prior, kind_of)
    fill(high, above, progress, max(1, min(UPWARD, len(low.slots) - 1)))
    both = [min(records, a + b) for (records, _), (a, _), (b, _) in zip(
        plan.needs.by_kind, fast.kinds, slow.kinds, strict=True)]
    taken = set(above)
    for key in warm_order(layers, experts, both, choices.prior, kind_of):
        if key not in taken:
            low.want(key, "warm")
