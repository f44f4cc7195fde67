"""`qmix doctor --tune`: tries configurations of the GPU's kernels on this card and keeps those that are faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qmix.device import Device
from qmix.device.cuda import open_cuda
from qmix.errors import DoesNotFit, QmixError, UsageError
from qmix.kernels import tuned
from qmix.kernels.configs import KERNELS, Config, Configs, built_in, capability
from qmix.kernels.tuning import Outcome, Timer, candidates, choose
from qmix.store import MANIFEST, Store

CURE = "run it on a machine with a GPU: without a GPU there is nothing to tune"


def tune(folder: Path | None, *, file: Path, say: Callable[[str], None], today: date | None = None,
         device: Device | None = None, timer: Timer | None = None,
         options: Callable[[str], Sequence[Config]] = candidates) -> dict[str, Any]:
    """Measure, for the shapes of the store in `folder` (None: Mixtral 8x7B), and keep what gains in `file`; what was
    found, a row a kernel, as nested plain data.

    device, timer: for tests; else the first GPU, and its events. UsageError without a GPU or Triton, or where `folder`
    is no store; QmixError where a built-in configuration fails here, or the file cannot be written.
    """
    device = device or _gpu()
    from qmix.kernels import trials

    shapes = trials.mixtral() if folder is None else _shapes(folder)
    on_card = device.torch_device.type == "cuda"
    cache = torch.cuda.get_device_properties(device.torch_device).L2_cache_size if on_card else 1
    at = trials.TrialDevice(device.torch_device, device.half, cache, device.memory()[0] // 2)
    timer = timer or trials.event_timer(device.torch_device, cache)
    default = built_in(capability(device.torch_device))
    say(f"tuning for {shapes.model} on {device.name}: a few minutes, most of them for compiling")
    outcomes = []
    for kernel in KERNELS:
        found = _tried(kernel, default, shapes, at, options(kernel), timer)
        if found is not None:
            outcomes.append(found)
            say(_line(found))
    taken = {found.kernel: found.chosen for found in outcomes}
    card = tuned.Card.of(device.name, device.torch_device)
    measured = (today or date.today()).isoformat()
    tuned.save(tuned.Tuned(card, shapes.model, measured, replace(default, **taken)),  # type: ignore[arg-type]
               file)
    return {"file": str(file), "card": asdict(card), "model": shapes.model,
            "kernels": [_row(found) for found in outcomes],
            "skipped": [{"kernel": found.kernel, "configuration": _text(config), "reason": reason}
                        for found in outcomes for config, reason in found.skipped]}


def _gpu() -> Device:
    if not torch.cuda.is_available():
        raise UsageError("--tune: torch sees no NVIDIA GPU here", CURE)
    if find_spec("triton") is None:
        raise UsageError("--tune: the GPU's kernels need Triton, which is not installed", "pip install triton")
    try:
        return open_cuda(0)
    except QmixError as e:
        raise type(e)(f"--tune: {e.message.removeprefix('--device cuda:0: ')}", e.cure) from None


def _tried(kernel: str, default: Configs, shapes: Any, at: Any, options: Sequence[Config],
           timer: Timer) -> Outcome | None:
    """None where the model has no use for the kernel. Its weights are gone afterwards."""
    from qmix.kernels import trials

    try:
        cases = trials.cases(kernel, shapes, at)
    except torch.OutOfMemoryError:
        raise DoesNotFit(f"--tune: the GPU's memory is too small for the weights of {kernel}",
                         "close other programs that use the GPU") from None
    return choose(kernel, default, options, cases, timer) if cases else None


def _shapes(folder: Path) -> Any:
    from qmix.kernels import trials

    if not (folder / MANIFEST).is_file():
        raise UsageError(f"--tune {folder}: not a store", "name one, or none for the shapes of Mixtral 8x7B")
    with Store.open(folder) as store:
        name = "".join(c if c.isprintable() else "?" for c in folder.resolve().name[:tuned.LONGEST])
        return trials.Shapes.of(name, store.model, store.quant)


def _row(found: Outcome) -> dict[str, Any]:
    return {"kernel": found.kernel, "configuration": _text(found.chosen),
            "instead_of": _text(found.default) if found.changed else "-",
            "gain_percent": round(100 * found.gain, 1), "tried": found.tried, "skipped": len(found.skipped)}


def _line(found: Outcome) -> str:
    what = f"{_text(found.chosen)}, {100 * found.gain:.0f} % faster" if found.changed else "the built-in configuration"
    return f"{found.kernel}: {what} ({found.tried} tried, {len(found.skipped)} skipped)"


def _text(config: Config) -> str:
    """Gemv() -> "threads 128, unroll 4"."""
    return ", ".join(f"{name} {value}" for name, value in asdict(config).items())
