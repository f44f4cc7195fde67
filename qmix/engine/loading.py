"""Opens a store, plans, and loads the parts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from qmix import process
from qmix.engine import vram
from qmix.engine.budgets import budget, mapping_limits, needs_of
from qmix.engine.device_choice import choose_device_and_plan
from qmix.engine.engine import Engine
from qmix.engine.kernels import select_kernels
from qmix.engine.machine import Placement
from qmix.engine.parts import Parts, on_device, on_host
from qmix.engine.threads import Threads, parallel_loop
from qmix.errors import DoesNotFit
from qmix.hardware.allocator import keep_freed_memory
from qmix.kernels.kv_size import position_bytes
from qmix.kernels.table import KernelTable
from qmix.offload import router_stats
from qmix.offload.forecast import Speeds, forecast, known_shares
from qmix.offload.needs import compute_bytes
from qmix.offload.setup import OffloadOptions
from qmix.offload.trace import TraceHeader, TraceWriter
from qmix.offload.watch import Recorder
from qmix.render import Progress
from qmix.sizes import format_bytes, kv_owners
from qmix.store import Store
from qmix.tokenizer import load as load_tokenizer


def load(folder: str | Path, *, threads: int | None = None, context: int = 0, ram: int | None = None,
         margin: int | None = None, policy: str = "auto", prefetch: str = "auto", verify: str = "first",
         activations: str = "auto", kv: str = "bf16", trace: Path | Recorder | None = None,
         state: Path | None = None, speeds: Speeds | None = None, base: int | None = None, scoring: bool = False,
         placement: Placement | None = None, mtp: bool = False, say: Callable[[str], None] = lambda line: None,
         progress: Progress | None = None) -> Engine:
    """Open a store and bring it into memory, within a budget.

    threads: compute threads, None = as engine.threads has it; context: tokens,
    0 = min(model, 8192); ram: bytes for the whole process, None = what is free but for `margin` bytes; policy,
    prefetch, verify: see OffloadOptions; activations: see kernels.table.select; kv: how keys and values are kept,
    "bf16" (that is, in the compute dtype) or "int8", in about half the bytes; trace: a file, or an object, that gets
    every routing decision; state: the folder that keeps router statistics, None = nowhere; speeds: this machine's, for
    a forecast; base: bytes that the process counts as taken already, None = what it holds now; scoring: with room for
    what Session.read needs; placement: on which device, and how much of it; say: told every choice a user should know
    of, a line each. mtp: with the multi-token-prediction head, where the store has one, for drafts; it is left out, and
    a line says so, where it does not fit or a device computes. placement None: on the CPU. With placement.exact no
    expert that belongs on the device is computed by the CPU, and the configurations in placement.tuned are ignored.
    Raises DoesNotFit or UsageError before anything large is loaded, StoreError where the store is damaged.
    """
    options = OffloadOptions(policy, prefetch, verify)
    with ExitStack() as opened:
        store = opened.enter_context(Store.open(Path(folder), mtp))
        compute = Threads(threads, store.layout.record_bytes)
        compute.count(False)  # a wrong number is told before anything else is
        process.check_threads_work(compute.count(False), partial(parallel_loop, compute.count(False)))
        keep_freed_memory()
        needs = needs_of(store, context, kv, scoring)
        tokenizer = load_tokenizer(store.path, store.model.vocab)

        def on_cpu(beside: bool) -> KernelTable:
            torch.set_num_threads(compute.count(beside))
            return select_kernels(store.model, store.quant, say, activations)

        try:
            plan, device, there, host = choose_device_and_plan(store, needs, placement, on_cpu,
                                                               partial(budget, ram, margin, base), say, opened)
        except DoesNotFit as error:
            raise DoesNotFit(error.message, mapping_limits() or error.cure) from None
        spec = store.model
        stats = router_stats.load(state, store.identity, len(spec.record_layers), spec.num_experts, say)
        writer = opened.enter_context(_trace_writer(trace, store)) if isinstance(trace, Path) else trace
        for line in plan.lines():
            say(line)
        if kv == "int8":
            item_bytes = compute_bytes(spec, store.quant)
            each, without = (sum(position_bytes(a, item_bytes, kind) for a in kv_owners(spec))
                             for kind in (kv, "bf16"))
            say(f"int8 KV cache: {format_bytes(each)} a token, {format_bytes(without)} without")
        exact = placement is not None and placement.exact
        say(compute.line(device is not None and not exact) + (
            "; " + forecast(plan, speeds, known_shares(stats), exact).line() if speeds and not plan.resident else ""))
        parts = Parts(store, plan, options, stats, writer, say, progress)
        if placement is not None and device is not None and there is not None:
            kernels, model, offload = on_device(parts, device, there, placement, speeds, kv)
        else:
            kernels, model, offload = on_host(parts, host, kv)
        opened.callback(offload.close)
        if state is not None:
            opened.callback(router_stats.save, state, store.identity, stats, say)
        engine = Engine(store, plan, tokenizer, kernels, model, offload, opened.pop_all(), device, exact, say)
        if device is not None and device.torch_device.type == "cuda":
            engine.warm_up()
        if device is not None and placement is not None:
            vram.check(placement, device, plan.tiers[0], say)
        return engine


def _trace_writer(path: Path, store: Store) -> TraceWriter:
    spec = store.model
    return TraceWriter(path, TraceHeader(len(spec.record_layers), spec.num_experts, spec.top_k,
                                         spec.top_k, store.identity, store.path.resolve().name))
