"""One side of peers.py: qmix or llama.cpp, everything resident, over given tokens; prints what it took as a JSON line.

    python benchmarks/peers_side.py {qmix,llama} TASK.json

TASK.json: do ("speed", "turns", "routing", for llama "quantize"), model, tokens, threads, context and what the
functions below read. Before and after each stretch of decoding it prints {"probe": name} and waits for a line on stdin:
the caller measures the memory's bandwidth meanwhile, while nothing runs here.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from sides import LlamaModel, high_water, known_options, say

Task = dict[str, Any]
WARM = 4  # steps before the clock starts


class Runner(Protocol):
    """best appends tokens and gives the likeliest next one; clear forgets them all."""

    def best(self, tokens: Sequence[int]) -> int: ...
    def clear(self) -> None: ...


class Qmix:
    """qmix as a Runner."""

    def __init__(self, engine: Any):
        self._session = engine.session()

    def best(self, tokens: Sequence[int]) -> int:
        if len(tokens) == 1:
            return int(self._session.decode(tokens[0]).argmax())
        return int(self._session.prefill(tokens).argmax())

    def clear(self) -> None:
        self._session.trim(0)


def probe(name: str) -> None:
    print(json.dumps({"probe": name}), flush=True)
    sys.stdin.readline()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decode(runner: Runner, tokens: Sequence[int], name: str) -> dict[str, float]:
    """One token a step behind WARM untimed ones; median_step is the step in the middle."""
    for token in tokens[:WARM]:
        runner.best([token])
    probe(name)
    steps = [seconds(lambda token=token: runner.best([token])) for token in tokens[WARM:]]  # type: ignore[misc]
    probe(name)
    return {"tokens": len(steps), "seconds": sum(steps), "median_step": sorted(steps)[len(steps) // 2]}


def speed(task: Task, first: Runner, loaded: float, others: Callable[[int], AbstractContextManager[Runner]],
          ) -> dict[str, Any]:
    """The first token of a short prompt, then decoding from an empty context, then each prefill length, in each of
    the batch sizes that could matter to it (qmix has one), and decoding behind those named in `depths`."""
    tokens, more = task["tokens"], task["decode"] + WARM
    found: dict[str, Any] = {"load_seconds": loaded, "first_token_seconds": seconds(
        lambda: first.best(tokens[:task["short"]])), "command_seconds": time.time() - task["started"]}
    first.clear()
    found["decode"] = {"0": decode(first, tokens[:more], "0")}
    found["prefill"] = {}
    for count in task["prefill"]:
        first.clear()
        took = [seconds(lambda count=count: first.best(tokens[:count]))]  # type: ignore[misc]
        if count in task["depths"]:
            found["decode"][str(count)] = decode(first, tokens[count:count + more], str(count))
        for before, ubatch in zip(task["ubatch"], task["ubatch"][1:], strict=False):
            if before < count:
                with others(ubatch) as runner:
                    took.append(seconds(lambda runner=runner, count=count: runner.best(  # type: ignore[misc]
                        tokens[:count])))
        found["prefill"][str(count)] = {"tokens": count, "seconds": min(took), "all_seconds": took}
    return found


def turns(task: Task, runner: Runner) -> dict[str, Any]:
    """Behind a prompt of `depth` tokens, as many steps as the line on stdin says, for each line, and prints their
    seconds; until the lines end. With `prompt` a prompt of so many tokens in their place."""
    tokens, at = task["tokens"], task["depth"] + WARM
    if task["depth"]:
        runner.best(tokens[:task["depth"]])
    for token in tokens[task["depth"]:at]:
        runner.best([token])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if task["prompt"]:
            runner.clear()
            took = seconds(lambda: runner.best(tokens[:task["prompt"]]))
            print(json.dumps({"tokens": task["prompt"], "seconds": took}), flush=True)
            continue
        steps = tokens[at:at + int(line)]
        took = seconds(lambda steps=steps: [runner.best([token]) for token in steps])  # type: ignore[misc]
        at += len(steps)
        print(json.dumps({"tokens": len(steps), "seconds": took}), flush=True)
    return {}


def run_qmix(task: Task) -> dict[str, Any]:
    import qmix.engine
    from qmix.errors import QmixError

    if task["do"] == "routing":
        from synthetic_check import figures, route

        from qmix.store import Store

        with Store.open(Path(task["model"])) as store:
            return {"largest": [figures(ids, None)[0] / 100 for ids in route(store, task["tokens"]).ids]}
    lines: list[str] = []
    given = known_options(qmix.engine.load, {name: task[name] for name in ("threads", "context", "activations")} |
                          ({"kv": task["kv"]} if "kv" in task else {}))
    start = time.perf_counter()
    try:
        with qmix.engine.load(task["model"], say=lines.append, **given) as engine:
            runner = Qmix(engine)
            loaded = time.perf_counter() - start
            if not engine.plan.resident:
                raise SystemExit("qmix: the model is not resident: free some memory")
            if task["do"] == "turns":
                return turns(task, runner)
            found = speed({**task, "ubatch": []}, runner, loaded, lambda ubatch: nullcontext(runner))
            return {**found, "said": lines, "options": given,
                    "kernels": dict(qmix.engine.select_kernels(engine.model, engine.store.quant, say).names)}
    except QmixError as e:
        say(str(e))
        sys.exit(e.exit_code)


def run_llama(task: Task) -> dict[str, Any]:
    if task["do"] == "quantize":
        return quantize_llama(task)
    start = time.perf_counter()
    model = LlamaModel(task["model"], load_mode=task["load_mode"])
    batch = max(task["context"], 512)

    def context(ubatch: int, **options: Any) -> Any:
        return model.context(task["context"], task["threads"], batch=batch, ubatch=ubatch, **options)

    if task["do"] == "routing":
        return routing_llama(task, context)

    @contextmanager
    def other(ubatch: int) -> Any:
        made = context(ubatch)
        try:
            yield made
        finally:
            made.close()

    kind = {"f16": model.ll.GGML_TYPE_F16, "q8_0": model.ll.GGML_TYPE_Q8_0}[task.get("peer_kv", "f16")]
    first = context(task["ubatch"][0], type_k=kind, type_v=kind)
    if task["do"] == "turns":
        return turns(task, first)
    loaded = time.perf_counter() - start
    found = speed(task, first, loaded, other)
    return {**found, "version": model.ll.__version__, "system": model.ll.llama_print_system_info().decode().strip()}


def routing_llama(task: Task, context: Callable[..., Any]) -> dict[str, Any]:
    """The largest share of an expert in each layer, out of the tensors named ffn_moe_topk-<layer>."""
    import llama_cpp as ll

    ggml = ctypes.CDLL(str(Path(ll.__file__).parent / "lib" / "libggml-base.so"))
    for name, result in (("ggml_get_name", ctypes.c_char_p), ("ggml_get_data", ctypes.c_void_p)):
        getattr(ggml, name).restype, getattr(ggml, name).argtypes = result, [ctypes.c_void_p]
    counts: dict[int, Counter[int]] = {}

    def look(tensor: int, ask: bool, data: object) -> bool:
        name = ggml.ggml_get_name(tensor).decode()
        if not name.startswith("ffn_moe_topk-"):
            return not ask
        if not ask:
            # struct ggml_tensor: type (8 bytes with padding), buffer, int64 ne[4], size_t nb[4]
            shape, strides = (ctypes.c_int64 * 4).from_address(tensor + 16), (ctypes.c_size_t * 4).from_address(
                tensor + 48)
            start, seen = ggml.ggml_get_data(tensor), counts.setdefault(int(name.rpartition("-")[2]), Counter())
            for token in range(shape[1]):
                seen.update((ctypes.c_int32 * shape[0]).from_address(start + token * strides[1]))
        return True

    held = ll.ggml_backend_sched_eval_callback(look)  # called for as long as the context is used
    made = context(512, cb_eval=held)
    made.step(task["tokens"], every=True)
    return {"largest": [max(seen.values()) / sum(seen.values()) for _, seen in sorted(counts.items())]}


def quantize_llama(task: Task) -> dict[str, Any]:
    """llama-quantize's own function, and the file brought to the disk, as qmix does."""
    import llama_cpp as ll

    quiet = ll.llama_log_callback(lambda level, text, data: say(text.decode().strip()) if level == 4 else None)
    ll.llama_log_set(quiet, None)
    params = ll.llama_model_quantize_default_params()
    params.nthread, params.ftype = task["threads"], getattr(ll, f"LLAMA_FTYPE_MOSTLY_{task['type']}")
    start = time.perf_counter()
    code = ll.llama_model_quantize(task["model"].encode(), task["out"].encode(), params)
    if code:
        raise SystemExit(f"llama_model_quantize: {code}")
    fd = os.open(task["out"], os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    return {"seconds": time.perf_counter() - start}


def main() -> None:
    side, task = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    found = {"qmix": run_qmix, "llama": run_llama}[side](task)
    print(json.dumps({**found, "hwm_bytes": high_water()}), flush=True)


if __name__ == "__main__":
    main()
