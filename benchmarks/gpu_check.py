"""Does the device say what the CPU says? gpu.py asks before it times anything.

The demo's small trained Mixtral is quantized on the spot and reads a text, a prompt and then token by token: once with
everything on the CPU, then on the device with all experts there; with few of them there, everything computed by the
device; and with few, some computed by the CPU. Logits are compared token by token: relative error, Euclidean. The
prompt is so long that its products and its attention use the largest tiles; what follows reads the keys and values
that it left. A case that dies is kept with its traceback, and the others run.

Both sides round to 16 bits in different places, and a router's near tie may go the other way, which changes one token's
logits for good reason. So the median token may differ by TYPICAL, and one in ten by more than STRAY.
"""

from __future__ import annotations

import gc
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from gpu_device import budget_for, open_device
from gpu_sections import emit, emit_failure
from torch import Tensor

from qmix.demo import demo_store
from qmix.engine import load
from qmix.engine.machine import Placement
from qmix.offload.needs import Needs
from qmix.store import Store

TYPICAL, STRAY, STRAYS = 0.02, 0.1, 0.1
CONTEXT, PROMPT, DECODED = 768, 520, 40
FEW = 0.4  # of the experts, where few are on the device


def judge(errors: Tensor) -> str | None:
    """errors [T], relative, of each token's logits: what is wrong with them, None where nothing is."""
    if not bool(errors.isfinite().all()):
        return "logits that are no numbers"
    median, strays = float(errors.median()), float((errors > STRAY).float().mean())
    if median > TYPICAL:
        return f"the median error of a token's logits is {median:.2g}, more than {TYPICAL}"
    if strays > STRAYS:
        return f"{strays:.0%} of the tokens have an error of more than {STRAY}"
    return None


def logits(store: Path, placement: Placement | None, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """[T, V]: after the prompt, and after each token behind it; and the engine's figures."""
    with load(store, threads=1, context=CONTEXT, activations="bf16", verify="never", placement=placement,
              **options) as engine:
        text = files("qmix.bench").joinpath("recorded.txt").read_text(encoding="utf-8")
        ids = engine.tokenizer.encode(text)[:PROMPT + DECODED]
        assert len(ids) == PROMPT + DECODED, len(ids)
        session = engine.session()
        found = [session.prefill(ids[:PROMPT]).float().cpu().clone()]
        found += [session.decode(token).float().cpu().clone() for token in ids[PROMPT:]]
        return torch.stack(found), engine.stats()["offload"]


def run(task: dict[str, Any]) -> None:
    """task: stand_in, work (a folder)."""
    store = demo_store(Path(task["work"]) / "demo", say=lambda line: None)
    want, _ = logits(store, None)
    emit(tolerance=f"median <= {TYPICAL}, at most {STRAYS:.0%} of the tokens above {STRAY}", tokens=len(want),
         prompt=PROMPT)
    with Store.open(store) as opened:
        needs = Needs.of(opened.model, opened.quant, CONTEXT)

    for name, share, exact in (("all experts on the device", 1.0, True), ("few there, the device computes", FEW, True),
                               ("few there, the CPU computes some", FEW, False)):
        gc.collect()  # of the engine before
        try:
            problem = _case(name, store, needs, want, share, exact, task["stand_in"])
        except Exception as e:  # the others may show more
            emit_failure(name, e)
            continue
        if problem:
            emit(wrong=f"{name}: {problem}")


def _case(name: str, store: Path, needs: Needs, want: Tensor, share: float, exact: bool, stand_in: bool) -> str | None:
    """What is wrong with the logits where a share of the experts is on the device."""
    device = open_device(stand_in)
    # What the process takes of the card by then counts as it does now: in so small a budget every MiB shows.
    base = device.taken()
    got, stats = logits(store, Placement(device, budget_for(needs, device, share), exact=exact, base=base),
                        prefetch="ahead")
    errors = (got - want).norm(dim=1) / want.norm(dim=1)
    decode = stats["decode"]
    emit(row={"what": "check", "case": name, "median": float(errors.median()), "largest": float(errors.max()),
              "same_best": float((got.argmax(1) == want.argmax(1)).float().mean()),
              "misses": decode["misses"], "computed": decode["computed"]})
    return judge(errors)
