"""What gpu.py measures of a loaded model: decoding behind prompts of several lengths, and prompts, in one placement.

Every token is given (teacher forcing), so all placements do the same work. Each stretch of decoding has a warm-up, in
which kernels are compiled, work is captured and the cache settles.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_device import Watched, open_device, vram_budget
from gpu_sections import emit
from offload_side import timed
from synthetic_recipe import tokens_of

from qmix.engine import Engine, Session, load
from qmix.engine.machine import Placement
from qmix.errors import DoesNotFit
from qmix.store import Store

Row = dict[str, Any]
SHARE = 0.7  # of the seconds left after loading, that may go into the warm-ups and stretches of decoding


def run(task: dict[str, Any]) -> None:
    """task: store, stand_in, vram (GiB, None for all), whole (whether all records fit into that), exact, prefetch,
    contexts, prompts, kinds, warm, timed, seed, threads, ends (of the section, in seconds since the epoch). Prints what
    loading said, then a row a measurement."""
    small = task["stand_in"]
    device = open_device(small)
    longest = max(*task["contexts"], *task["prompts"], 1)
    context = -(-(longest + task["warm"] + task["timed"] + 1) // 256) * 256
    with Store.open(Path(task["store"])) as store:
        config, quant = store.model, store.quant
        dense = sum(region.nbytes for region in store.layout.dense.values())
        embedding = store.layout.dense["embedding"].nbytes
    try:
        vram = vram_budget(device, config, quant, context, None if small and task.get("whole") else task["vram"])
    except DoesNotFit as e:
        emit(unavailable=e.message)
        return
    said: list[str] = []
    start = time.perf_counter()
    with load(task["store"], threads=task["threads"], context=context, prefetch=task["prefetch"], verify="never",
              placement=Placement(device, vram, exact=task["exact"]), say=said.append) as engine:
        plan = engine.plan
        emit(load_seconds=time.perf_counter() - start, said=said, slots=plan.tiers[0].slots,
             records=plan.needs.records, record_bytes=plan.needs.record, context=context, vram=plan.tiers[0].budget,
             split=not task["exact"], threads=engine.threads, kernels=dict(engine.kernels),
             dense_bytes=dense - embedding + embedding // config.vocab)
        if (task["vram"] is None or task.get("whole")) and plan.tiers[0].slots < plan.needs.records:
            emit(unavailable=f"{plan.tiers[0].slots} of {plan.needs.records} experts fit")
            return
        _Bench(engine, device, task).all()


class _Bench:
    def __init__(self, engine: Engine, device: Watched, task: dict[str, Any]):
        self._engine, self._device, self._task = engine, device, task
        self._session: Session = engine.session()
        stretches = 2 * len(task["contexts"]) * len(task["kinds"])
        self._limit = SHARE * max(1.0, task["ends"] - time.time()) / max(1, stretches)

    def all(self) -> None:
        for kind in self._task["kinds"]:
            for depth in self._task["contexts"]:
                emit(row=self._decode(kind, depth))
        for first, count in enumerate(self._task["prompts"]):
            if first == 0:
                self._prompt(count)  # compiles, and does not count
            emit(row=self._prompt(count))

    def _decode(self, kind: str, depth: int) -> Row:
        task, session, engine = self._task, self._session, self._engine
        tokens = tokens_of(kind, depth + task["warm"] + task["timed"], task["seed"])
        session.trim(0)
        session.prefill(tokens[:depth])
        warm, _ = timed(session.decode, tokens[depth:depth + task["warm"]], self._limit)
        engine.reset_stats()
        before = self._counters()
        done, seconds = timed(session.decode, tokens[depth + task["warm"]:], self._limit)
        counted = _difference(before, self._counters())
        report = engine.stats()["offload"]
        return {"what": "decode", "tokens_kind": kind, "depth": depth, "warm": warm, "tokens": done,
                "rate": done / seconds, **decode_row(report["decode"], counted, done, seconds),
                "kv_bytes": session.cache.nbytes // session.context * (depth + warm + done // 2),
                "prefetcher": {key: report["prefetcher"].get(key) for key in ("issued", "used", "late", "recall",
                                                                              "wasted_bytes")},
                "reported": report.get("device")}

    def _prompt(self, count: int) -> Row:
        task, session, engine = self._task, self._session, self._engine
        tokens = tokens_of("local", count, task["seed"] + 1)
        session.trim(0)
        engine.reset_stats()
        before = self._counters()
        start = time.perf_counter()
        session.prefill(tokens)
        seconds = time.perf_counter() - start
        counted = _difference(before, self._counters())
        figures = engine.stats()["offload"]["prefill"]
        return {"what": "prefill", "tokens": count, "seconds": seconds, "rate": count / seconds,
                "misses": figures["misses"], "bytes_up": counted["bytes_up"], "bytes_down": counted["bytes_down"],
                "stalled": figures["stalled_seconds"]}

    def _counters(self) -> dict[str, float]:
        """What was given to the device and waited for, and what went over the bus, up to now."""
        report = self._engine.stats()["offload"]
        moved = {name: report["decode"][name] + report["prefill"][name] for name in ("bytes_up", "bytes_down")}
        return {**moved, "launches": self._device.launches, "waits": self._device.waits, "waited": self._device.waited}


def _difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after}


def decode_row(figures: dict[str, Any], counted: dict[str, float], tokens: int, seconds: float) -> Row:
    """What PhaseFigures and the device counted, per token; times in milliseconds, which add up to ms. hit_rate: chosen
    records that were in VRAM without having been read ahead for this; found_rate: those that were there at all."""
    chosen = max(1, figures["chosen"])
    parts = {"device": counted["waited"], "copies": figures["stalled_seconds"], "cpu": figures["host_seconds"]}
    rest = max(0.0, seconds - sum(parts.values()))
    return {"hit_rate": (figures["hits"] - figures["prefetched"]) / chosen, "found_rate": figures["hits"] / chosen,
            "chosen": figures["chosen"] / tokens, "computed": figures["computed"] / tokens,
            "missing": (figures["misses"] + figures["prefetched"]) / tokens,
            "bytes_up": counted["bytes_up"] / tokens, "bytes_down": counted["bytes_down"] / tokens,
            "launches": counted["launches"] / tokens, "waits": counted["waits"] / tokens,
            "ms": 1000 * seconds / tokens,
            "ms_parts": {name: 1000 * value / tokens for name, value in {**parts, "rest": rest}.items()}}


def rows_of(found: dict[str, Any], what: str) -> Sequence[Row]:
    """Those rows of a section's results."""
    return [row for row in found.get("rows", ()) if row.get("what") == what]
