"""One side of offload_peers.py: runs qmix or llama.cpp over given tokens and prints what it took as a JSON line.

    python benchmarks/offload_side.py qmix TASK.json        with qmix's interpreter
    python benchmarks/offload_side.py llama TASK.json       with one that has llama-cpp-python, and need have no more

TASK.json: model, tokens, warm, seconds, threads, and for qmix ram, margin and prefetch. Every token is given
(teacher forcing), one a step, the first `warm` of them untimed; both phases end early after `seconds`. llama.cpp
runs at its best under a limit: mapped weights, not repacked (repacking copies them all).
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


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

    wanted = {"threads": task["threads"], "context": task["context"], "ram": task["ram"], "margin": task["margin"],
              "prefetch": task["prefetch"], "policy": task["policy"]}
    known = inspect.signature(qmix.engine.load).parameters
    ignored = [name for name, value in wanted.items() if value is not None and name not in known]
    if ignored:
        say(f"this qmix does not know {', '.join(ignored)}: left out")
    given = {name: value for name, value in wanted.items() if value is not None and name in known}
    start = time.perf_counter()
    try:
        with qmix.engine.load(task["model"], say=say, **given) as engine:
            session = engine.session()
            loaded = time.perf_counter() - start
            found = measure(session.decode, task, getattr(engine, "reset_stats", lambda: None))
            return {**found, "load_seconds": loaded, "record_bytes": engine.store.layout.nbytes,
                    "stats": engine.stats()}
    except QmixError as e:
        say(str(e))
        sys.exit(e.exit_code)


def run_llama(task: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp as ll

    start = time.perf_counter()
    errors = ll.llama_log_callback(lambda level, text, data: say(text.decode().strip()) if level == 4 else None)
    ll.llama_log_set(errors, None)
    params = ll.llama_model_default_params()
    params.use_mmap, params.use_extra_bufts, params.n_gpu_layers = True, False, 0
    model = ll.llama_model_load_from_file(str(task["model"]).encode(), params)
    if not model:
        raise SystemExit(f"{task['model']}: llama.cpp cannot load it")
    options = ll.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = task["context"], 32, 32
    options.n_threads = options.n_threads_batch = task["threads"]
    context = ll.llama_init_from_model(model, options)
    if not context:
        raise SystemExit(f"{task['model']}: llama.cpp cannot make a context of {task['context']}")

    def step(token: int) -> float:
        code = ll.llama_decode(context, ll.llama_batch_get_one((ll.llama_token * 1)(token), 1))
        if code:
            raise SystemExit(f"llama_decode: {code}")
        return float(ll.llama_get_logits(context)[0])

    loaded = time.perf_counter() - start
    return {**measure(step, task, lambda: None), "load_seconds": loaded, "version": ll.__version__}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def from_disk() -> int:
    """Bytes that this process had the disk read, mapped pages included."""
    return number("/proc/self/io", r"^read_bytes: (\d+)")


def faults() -> int:
    """Pages waited for so far (majflt, the 12th field; counted behind the name, which may hold blanks)."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[9])


def number(path: str, pattern: str) -> int:
    found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def main() -> None:
    side, task = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    found = {"qmix": run_qmix, "llama": run_llama}[side](task)
    found["hwm_bytes"] = 1024 * number("/proc/self/status", r"VmHWM:\s+(\d+)")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
