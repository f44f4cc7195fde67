"""One side of offload_peers.py: runs qmix or llama.cpp over given tokens and prints what it took as a JSON line.

    python benchmarks/offload_side.py qmix TASK.json        with qmix's interpreter
    python benchmarks/offload_side.py llama TASK.json       with one that has llama-cpp-python, and need have no more

TASK.json: model, tokens, warm, seconds, threads, for qmix ram, margin and prefetch, for llama gpu_layers. Every token
is given (teacher forcing), one a step, the first `warm` of them untimed; both phases end early after `seconds`.
Where TASK.json says no more, llama.cpp runs at its best under a limit: mapped weights, not repacked (repacking copies
them all).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sides import LlamaModel, faults, from_disk, high_water, known_options, say


def timed(step: Callable[[int], object], tokens: Sequence[int], seconds: float) -> tuple[int, float]:
    """(tokens done, seconds) of `step` on each token, until the time is up."""
    start, done, spent = time.perf_counter(), 0, 0.0
    while done < len(tokens) and spent < seconds:
        step(tokens[done])
        done, spent = done + 1, time.perf_counter() - start
    return done, spent


def measure(step: Callable[[int], object], task: dict[str, Any], warmed: Callable[[], None]) -> dict[str, Any]:
    """Warm up, call `warmed`, and time the rest."""
    tokens, warm = task["tokens"], task["warm"]
    warm_done, warm_seconds = timed(step, tokens[:warm], task["seconds"])
    warmed()
    before, hits = from_disk(), faults()
    done, seconds = timed(step, tokens[warm:], task["seconds"])
    return {"tokens": done, "seconds": seconds, "warm_tokens": warm_done, "warm_seconds": warm_seconds,
            "disk_bytes": from_disk() - before, "major_faults": faults() - hits}


def run_qmix(task: dict[str, Any]) -> dict[str, Any]:
    import qmix.engine
    from qmix.errors import QmixError

    given = known_options(qmix.engine.load, {name: task[name] for name in (
        "threads", "context", "ram", "margin", "prefetch", "policy")})
    start = time.perf_counter()
    try:
        with qmix.engine.load(task["model"], say=say, **given) as engine:
            session = engine.session()
            loaded = time.perf_counter() - start
            found = measure(session.decode, task, getattr(engine, "reset_stats", lambda: None))
            return {**found, "load_seconds": loaded, "record_bytes": engine.store.layout.record_bytes,
                    "stats": engine.stats()}
    except QmixError as e:
        say(str(e))
        sys.exit(e.exit_code)


def run_llama(task: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    model = LlamaModel(task["model"], load_mode=task.get("load_mode", "mmap"), repack=task.get("repack", False),
                       gpu_layers=task.get("gpu_layers", 0))
    context = model.context(task["context"], task["threads"], batch=32, ubatch=32)
    loaded = time.perf_counter() - start
    found = measure(lambda token: float(context.step([token])[0]), task, lambda: None)
    return {**found, "load_seconds": loaded, "version": model.ll.__version__}


def main() -> None:
    side, task = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    found = {"qmix": run_qmix, "llama": run_llama}[side](task)
    found["hwm_bytes"] = high_water()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
