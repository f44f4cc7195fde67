"""Model and experts, joined: on the CPU, or on a device together with the CPU.

Dense weights are read in the gaps between the experts' large reads. If they are damaged, the rest is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from qmix.device import Device
from qmix.engine.compiling import compile_prompts
from qmix.engine.machine import Placement
from qmix.forward.kv_cache import SessionCache
from qmix.forward.run_eager import Guesses
from qmix.forward.run_graph import DeviceDecode
from qmix.forward.runner import Runner
from qmix.forward.weights import DenseWeights, compute_dtype, load_dense
from qmix.kernels.attention import choose_native_attentions
from qmix.kernels.device_table import DeviceKernels
from qmix.kernels.table import KernelTable
from qmix.offload.device_experts import DeviceExperts
from qmix.offload.device_setup import DeviceOptions, open_device_offload
from qmix.offload.forecast import Speeds
from qmix.offload.plan import Plan
from qmix.offload.router_stats import RouterStats
from qmix.offload.setup import Offload, OffloadOptions, open_offload
from qmix.offload.watch import Recorder
from qmix.render import Progress
from qmix.store import Store


@dataclass(frozen=True, slots=True)
class Parts:
    """What is known before anything is loaded."""

    store: Store
    plan: Plan
    options: OffloadOptions
    stats: RouterStats
    writer: Recorder | None
    say: Callable[[str], None]
    progress: Progress | None

    def watched(self, dense: Future[DenseWeights]) -> Progress:
        """`progress`, which ends the load where the dense part turns out to be damaged."""

        def report(done: int, total: int, label: str) -> None:
            if dense.done():
                dense.result()
            if self.progress is not None:
                self.progress(done, total, label)

        return report


def on_host(parts: Parts, kernels: KernelTable, kv: str) -> tuple[KernelTable, Runner, Offload]:
    """All on the CPU."""
    store = parts.store
    attention = choose_native_attentions(store.model, kv, parts.say)
    dtype = compute_dtype(store.model, store.quant)
    with ThreadPoolExecutor(1, "qmix-dense") as beside:
        dense = beside.submit(load_dense, store.model, dtype, store.dense)
        offload = open_offload(store, kernels, parts.plan, parts.options, parts.stats, parts.writer, parts.say,
                               parts.watched(dense))
        weights = _result(dense, offload)
    experts = offload.experts
    return kernels, Runner(store.model, weights, kernels, experts, _guesses(offload),
                           partial(SessionCache, kv=kv, native=attention),
                           resident=experts if experts.resident else None), offload


def _guesses(offload: Offload) -> Guesses:
    experts = offload.experts
    return Guesses(experts.depth, experts.ahead, experts.guesses_prompts)


def on_device(parts: Parts, device: Device, kernels: DeviceKernels, placement: Placement,
              speeds: Speeds | None, kv: str) -> tuple[KernelTable, Runner, Offload]:
    """All on the device but for the experts that do not fit there."""
    store, say = parts.store, parts.say
    model = store.model
    dtype = compute_dtype(model, store.quant, device.half)
    say(f"{device.name}: prompts compute in {str(dtype).removeprefix('torch.')}" + (
        ", since it has no bf16 products" if str(dtype) == "torch.float16" else ""))
    fast = parts.plan.tiers[0]
    device.limit(fast.budget - fast.base - fast.beside)
    how = DeviceOptions(placement.pin_budget(), placement.exact, *((speeds.pcie, speeds.ram) if speeds else ()))
    with ThreadPoolExecutor(1, "qmix-dense") as beside:
        dense = beside.submit(load_dense, store.model, dtype, store.dense, device)
        offload = open_device_offload(store, device, kernels, parts.plan, parts.options, how, parts.stats,
                                      parts.writer, say, parts.watched(dense))
        weights = _result(dense, offload)
    if device.torch_device.type == "cuda":
        say("compiling the GPU's kernels (up to a minute, the first time)")
        compile_prompts(kernels, weights, offload, model, device, dtype, say)
    device.tidy()
    experts = offload.experts
    assert isinstance(experts, DeviceExperts)
    caches = partial(SessionCache, kv=kv, device=device.torch_device, attend=kernels.attend, placed=True)
    decode = DeviceDecode(model, weights, device, kernels.ops, experts, experts.depth, experts.ahead)
    if not placement.exact and fast.slots < parts.plan.needs.records:
        say("experts that are not on the GPU are computed by the CPU where that is faster, so the last bits depend on "
            "where an expert was (--exact forbids it)")
    return kernels.prompts, Runner(model, weights, kernels.prompts, experts, _guesses(offload), caches, device,
                                   decode), offload


def _result(dense: Future[DenseWeights], offload: Offload) -> DenseWeights:
    try:
        return dense.result()
    except BaseException:
        offload.close()
        raise
