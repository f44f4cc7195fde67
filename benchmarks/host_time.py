"""Host time of paging, in microseconds of the calling thread's CPU time, so that other programs disturb it little.

    python benchmarks/host_time.py            a cache's choice of what leaves, and the note of a choice, by shape
    python benchmarks/host_time.py STORE      also of a layer on the stand-in for a GPU, with nine tenths of the slots;
                                              and of a token on the CPU, what it takes outside of the native library

Compare two versions with PYTHONPATH, alternating: on a busy machine only ratios mean anything.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmix import hardware
from qmix.config import ExpertKey
from qmix.device import StandIn
from qmix.engine import Placement, load
from qmix.kernels import native
from qmix.offload.cache import Cache, make_policy
from qmix.offload.device_experts import DeviceExperts
from qmix.offload.needs import Needs
from qmix.offload.plan import RESERVE
from qmix.store import Store

# (layers, experts, chosen, slots, tokens)
SHAPES = {"Mixtral 8x7B, 200 slots of 256": (32, 8, 2, 200, 60),
          "Qwen3-30B-A3B, 3072 slots of 6144": (48, 128, 8, 3072, 12),
          "Qwen3-30B-A3B, 6000 slots of 6144": (48, 128, 8, 6000, 12)}


def cache_row(layers: int, experts: int, top_k: int, slots: int, tokens: int) -> tuple[float, float, int]:
    """(microseconds a miss, a use, misses), decoding with a few experts that are chosen often."""
    dice, clock = random.Random(7), time.thread_time
    cache = Cache(slots, layers, make_policy("lfu", {}))
    keys = [[ExpertKey(layer, e) for e in range(experts)] for layer in range(layers)]
    for key in [row[e] for e in range(experts) for row in keys][:slots]:
        cache.admit(key, "warm")
    missing = using = 0.0
    misses = 0
    for _ in range(tokens):
        cache.begin_token()
        for layer in range(layers):
            chosen: dict[ExpertKey, None] = {}
            while len(chosen) < top_k:
                expert = min(int(dice.expovariate(3 / experts)), experts - 1)
                chosen[keys[layer][(expert + layer) % experts]] = None
            start = clock()
            for key in chosen:
                cache.use(key)
            using += clock() - start
            for key in chosen:
                if key not in cache:
                    start = clock()
                    cache.admit(key, "demand", set(chosen))
                    missing += clock() - start
                    misses += 1
            cache.end_layer(layer)
    return missing / max(1, misses) * 1e6, using / (tokens * layers * top_k) * 1e6, misses


def layer_rows(folder: Path, tokens: int = 80) -> dict[tuple[str, int], list[float]]:
    """{(refresh or finish, misses): microseconds of each call}."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)

    def timed(name: str) -> None:
        real = getattr(DeviceExperts, name)

        def call(self: DeviceExperts, *how: Any) -> None:
            before, start = self.figures["decode"].misses, time.thread_time()
            real(self, *how)
            spent = time.thread_time() - start
            found[name, self.figures["decode"].misses - before].append(spent * 1e6)

        setattr(DeviceExperts, name, call)

    timed("refresh")
    timed("finish")
    hardware.resident_bytes = lambda: 0
    with Store.open(folder) as store:
        needs = Needs.of(store.model, store.quant, 128)
    there = needs.on_device
    vram = RESERVE + there.dense + there.kv + there.workspace + needs.records * 9 // 10 * needs.record
    with load(folder, context=128, threads=1, ram=RESERVE + needs.expert_bytes, activations="bf16",
              placement=Placement(StandIn(), vram, exact=True)) as engine:
        session = engine.session()
        session.prefill([3 + i for i in range(20)])
        found.clear()
        for i in range(tokens):
            session.decode((i * 37) % engine.model.vocab)
    return found


def outside_library(folder: Path, tokens: int = 60) -> list[float]:
    """Microseconds of each decoded token outside of the native library's calls; all experts in memory, one thread."""
    library = native.library()
    assert library is not None, "no native kernels"
    inside = 0.0

    def timed(call: Any) -> Callable[..., Any]:
        def run(*how: Any) -> Any:
            nonlocal inside
            start = time.thread_time()
            try:
                return call(*how)
            finally:
                inside += time.thread_time() - start

        return run

    for name in ("qmix_sequence", "qmix_products", "qmix_attend"):
        setattr(library, name, timed(getattr(library, name)))
    found = []
    with load(folder, context=128, threads=1) as engine:
        assert engine.plan.resident
        session = engine.session()
        session.prefill([3 + i for i in range(20)])
        for i in range(tokens):
            inside, start = 0.0, time.thread_time()
            session.decode((i * 37) % engine.model.vocab)
            found.append((time.thread_time() - start - inside) * 1e6)
    return found


def main() -> None:
    for name, shape in SHAPES.items():
        runs = [cache_row(*shape) for _ in range(3)]
        print(f"{name}: {statistics.median(run[0] for run in runs):.1f} us a miss ({runs[0][2]} of them), "
              f"{statistics.median(run[1] for run in runs):.2f} us a use")
    for folder in sys.argv[1:]:
        for (name, misses), spent in sorted(layer_rows(Path(folder)).items()):
            print(f"{folder}: {name}, {misses} misses: median {statistics.median(spent):.1f} us of {len(spent)} layers")
        with Store.open(Path(folder)) as store:
            layers, chosen = store.model.num_layers, store.model.top_k
        token = statistics.median(outside_library(Path(folder)))
        print(f"{folder}: a token outside of the library: median {token:.0f} us, {token / layers:.2f} a layer, "
              f"{token / layers / chosen:.2f} a record")


if __name__ == "__main__":
    main()
