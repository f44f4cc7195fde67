"""All of `qmix bench`: measure the machine, then each case on an engine of its own.

Every case starts from a fresh load, so its cold row is really cold and no case depends on those before it. All loads
use the plan of the first one, and its device: memory that the libraries allocate at their first use must not cost later
cases slots. They neither use the router statistics of earlier runs nor add to them: a benchmark must not depend on
earlier chats. The machine is measured anew before each case, a device after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from qmix import __version__, hardware
from qmix.bench import roofline
from qmix.bench.cases import Case, context_of
from qmix.bench.device import let_go, with_device
from qmix.bench.measure import Repetition, repeat
from qmix.bench.report import figures, short
from qmix.bench.text import encode, piece
from qmix.bench.work import Workload
from qmix.engine import Engine
from qmix.forward.weights import compute_dtype
from qmix.hardware.cores import cpu_model
from qmix.hardware.memory import reset_peak
from qmix.offload.plan import Plan
from qmix.sizes import format_bytes
from qmix.store import Store, describe

Row = dict[str, Any]
OpenEngine = Callable[[int, Plan | None], Engine]  # (context in tokens, the plan to repeat, None at first)


@dataclass(frozen=True, slots=True)
class Request:
    """cases: what to time, each once cold and `repetitions` times warm, on `text`, called text_name in the report.
    ram: bytes for the process, pin: of them page-locked, None where the flags leave it to the engine."""

    folder: Path
    cases: Sequence[Case]
    repetitions: int
    text: str
    text_name: str
    ram: int | None
    pin: int | None = None


def run(request: Request, load: OpenEngine, *, today: date, say: Callable[[str], None],
        emit: Callable[[Row], None]) -> dict[str, Any]:
    """The report as one document; `emit` gets each of its rows as soon as it is complete, `say` lines on the way.

    On Ctrl-C it ends early, "interrupted" is true in it and the rows of the unfinished case are missing. UsageError
    where a case is longer than the model's context or the text is empty; whatever `load` raises.
    """
    with Store.open(request.folder) as store:
        model, quant, about = store.model, store.quant, describe(store)
    context = context_of(request.cases, model.max_positions)
    document: dict[str, Any] = {"qmix": __version__, "date": today.isoformat(), "machine": {}, "model": _model(about),
                                "text": request.text_name, "context": context, "interrupted": False, "rows": []}
    try:
        plan: Plan | None = None
        for case in request.cases:
            peaks = roofline.measure(compute_dtype(model, quant), request.ram, say)
            reset_peak()
            with load(context, plan) as engine:
                plan, device = engine.plan, engine.device
                workload = Workload.of(model, quant, plan.needs)
                found = _repetitions(engine, workload, case, request, say)
                placed = _placement(engine)
                document["machine"] = _machine(engine)
                if engine.native is not None and device is None:
                    peaks = roofline.with_native(peaks, engine.native)
            del engine  # its memory must be free before the next load takes stock
            if device is not None:
                let_go(device.torch_device)
                fast = plan.tiers[0]
                peaks = with_device(peaks, device.torch_device, compute_dtype(model, quant, device.half),
                                    vram=fast.budget - fast.base, ram=request.ram, pin=request.pin, say=say)
            if not plan.resident:
                peaks = roofline.with_disk(peaks, request.folder, say)
            say(f"{case.name}: {peaks.line()}")
            for state, part in (("cold", found[:1]), ("warm", found[1:])):
                row = {**figures(case, state, part, peaks), **peaks.columns(), **placed}
                # Counted before it is shown: who sees it and interrupts must not be told that it is missing.
                document["rows"].append({**row, "seconds": [one.seconds for one in part]})
                emit(row)
    except KeyboardInterrupt:
        document["interrupted"] = True
    return document


def _repetitions(engine: Engine, workload: Workload, case: Case, request: Request, say: Callable[[str], None],
                 ) -> list[Repetition]:
    """The cold repetition, then the warm ones."""
    head, ids = encode(request.text, engine.tokenizer)
    session = engine.session()
    found = []
    for number in range(1 + request.repetitions):
        found.append(repeat(engine, session, workload, case, piece(head, ids, number, case.positions)))
        which = f"{number} of {request.repetitions}" if number else "cold"
        say(f"{case.name}: {which}, {short(found[-1].rate)} tok/s")
    memory = engine.stats()["memory"]
    device = "" if engine.device is None else (
        f"; GPU memory {format_bytes(memory['vram_taken'])} of {format_bytes(memory['vram_budget'])}")
    say(f"{case.name}: peak memory {format_bytes(memory['peak'])} of {format_bytes(memory['budget'])}{device}")
    return found


def _placement(engine: Engine) -> dict[str, Any]:
    """What a row says of where the model was, and with which options."""
    stats, plan = engine.stats(), engine.plan
    memory = stats["memory"]
    placed = {"model": engine.store.path.resolve().name, "threads": torch.get_num_threads(), "slots": plan.slots,
            "records": plan.needs.records, "cache_policy": stats["offload"]["policy"],
            "prefetch": stats["offload"]["prefetch"], "kv_cache": plan.needs.kv_cache,
            "budget_bytes": memory["budget"], "peak_bytes": memory["peak"]}
    if engine.device is not None:
        placed |= {"device": engine.device.name, "exact": engine.exact, "vram_slots": plan.tiers[0].slots,
                   "vram_budget_bytes": memory["vram_budget"], "vram_taken_bytes": memory["vram_taken"]}
    return placed


def _machine(engine: Engine) -> dict[str, Any]:
    about = {"cpu": cpu_model(), "physical_cores": hardware.physical_cores(), "memory_bytes": hardware.memory().total,
             "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(),
             "kernels": dict(engine.kernels)}
    return about if engine.device is None else {**about, "device": engine.device.name}


def _model(about: dict[str, Any]) -> dict[str, Any]:
    """Of what `qmix show` knows, that which decides the speed, and which store it is."""
    names = ("store", "source", "fingerprint", "parameters", "active_parameters", "layers", "experts",
             "experts_per_token", "hidden_size", "intermediate_size", "record_bytes", "bits_per_weight")
    formats = {row["class"]: row["format"] for row in about["classes"]}
    return {**{name: about[name] for name in names}, "formats": formats}
