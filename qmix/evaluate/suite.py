"""A whole evaluation on a text: cut the text, load the models within one budget, score window after window.

The scores of a window are written to the journal as soon as it is whole. So a run that is stopped or killed can
continue, and its figures are those of a run that never stopped. Router statistics are neither used nor added to.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from qmix import __version__
from qmix.config import Cancel
from qmix.engine import Engine, Session, budget, needs_of
from qmix.errors import Interrupted, QmixError, UsageError
from qmix.evaluate.journal import Journal
from qmix.evaluate.memory import (
    Gpu,
    Part,
    divide,
    divide_on_gpu,
    model_part,
    reference_part,
    tensors_beside,
    tensors_to_come,
)
from qmix.evaluate.reference import Original
from qmix.evaluate.score import Scores, score
from qmix.evaluate.tally import Tally
from qmix.evaluate.windows import Window, split_windows
from qmix.render import Progress
from qmix.sizes import format_bytes
from qmix.store import CONFIG, MANIFEST, Store, describe
from qmix.tokenizer import load as load_tokenizer

WINDOW = 2048  # tokens, where the models were trained for as many

# (store, context in tokens, its part of the memory that two models share; None = as the flags say) -> for scoring
OpenEngine = Callable[[Path, int, Part | None], Engine]
# (bytes of a record, the largest of both models) -> the GPU for two models; None for the CPU
FindGpu = Callable[[int], Gpu | None]
LoadOn = Callable[[Gpu | None, ExitStack, Callable[[str], None]], tuple[Engine | Original, Engine]]


@dataclass(frozen=True, slots=True)
class Request:
    """window: tokens, 0 = WINDOW or what the models were trained for; stride: 0 = window; most: tokens to score, -1 =
    all; fresh: forget what earlier runs finished; journals: the folder of the journals, None for no journal;
    activations, kv, ram, margin: as `load` will pass them to the engine; gpu: asked where two models are compared."""

    model: Path
    text: str
    text_name: str
    journals: Path | None
    reference: Path | None = None
    window: int = 0
    stride: int = 0
    most: int = -1
    fresh: bool = False
    activations: str = "auto"
    kv: str = "bf16"
    ram: int | None = None
    margin: int | None = None
    gpu: FindGpu = lambda record: None


@dataclass(frozen=True, slots=True)
class Text:
    """What is scored: its ids, and how they are cut."""

    ids: Sequence[int]
    window: int
    stride: int
    windows: Sequence[Window]

    @property
    def context(self) -> int:
        """Positions that the longest window needs: its last id is never read."""
        return max(window.end - window.begin for window in self.windows) - 1

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(array("I", self.ids).tobytes())


def run(request: Request, load: OpenEngine, *, cancel: Cancel, say: Callable[[str], None],
        progress: Progress) -> dict[str, Any]:
    """The report as one document: see tally.Tally.results, and what was measured how.

    UsageError where text, windows or the two models do not go together; Interrupted once `cancel` is set; QmixError
    where a model's output is not a number; whatever `load` raises.
    """
    with ExitStack() as opened:
        store = opened.enter_context(Store.open(request.model))
        other: Store | Original | None = None
        if request.reference is not None:
            other = _open_reference(request.reference, say)
            opened.push(other)
        text = _cut_text(request, store, other)
        say(f"{request.text_name}: {len(text.ids)} tokens; {sum(w.scored for w in text.windows)} scored in "
            f"{len(text.windows)} windows of {text.window} every {text.stride}")
        reference, model = _load(request, load, store, other, text.context, opened, say)
        arguments = _arguments(request, text, model, reference)
        sizes = [window.scored for window in text.windows]
        journal = opened.enter_context(Journal.open(request.journals, arguments, sizes, fresh=request.fresh, say=say))
        tally = _measure(request, text, model, reference, journal, cancel, say, progress)
        memory = model.stats()["memory"]
        say(f"peak memory {format_bytes(memory['peak'])} of {format_bytes(memory['budget'])}")
        return {"qmix": __version__, "model": about(store), "reference": about(other) if other else None,
                "text": request.text_name, "text_bytes": len(request.text.encode()), "text_tokens": len(text.ids),
                "tokens": tally.tokens, "windows": len(text.windows), "window": text.window, "stride": text.stride,
                **tally.results(), "threads": model.threads, "device": _device(model), "kernels": dict(model.kernels),
                "activations": request.activations, "kv_cache": request.kv}


def _open_reference(path: Path, say: Callable[[str], None]) -> Store | Original:
    """A store; or, of a folder that holds no store but a config.json, the checkpoint as transformers runs it."""
    if (path / MANIFEST).exists() or not (path / CONFIG).is_file():
        return Store.open(path)
    return Original.open(path, lambda line: say(f"reference: {line}"))


def _cut_text(request: Request, store: Store, other: Store | Original | None) -> Text:
    stores: list[Store | Original] = [store, *([other] if other else [])]
    ids = [load_tokenizer(one.path, one.model.vocab).encode(request.text) for one in stores]
    if other is not None and (store.model.vocab != other.model.vocab or ids[0] != ids[1]):
        raise UsageError(f"--against {other.path}: it has another vocabulary than {store.path}, so their distributions "
                         "cannot be compared", "name a reference made of the same model, as with qmix quantize SRC OUT "
                         "--format keep --dense keep")
    longest = min(one.model.max_positions for one in stores)
    window = request.window or min(WINDOW, longest)
    if window > longest:
        raise UsageError(f"--ctx-size {window}: the model was trained for {longest} positions",
                         f"choose at most {longest}")
    stride = request.stride or window
    return Text(ids[0], window, stride, split_windows(len(ids[0]), window, stride, request.most))


def _load(request: Request, load: OpenEngine, store: Store, other: Store | Original | None, context: int,
          opened: ExitStack, say: Callable[[str], None]) -> tuple[Engine | Original | None, Engine]:
    """(reference, model). Two are computed on the same device: on different ones their arithmetic would differ by
    more than a good quantization does."""
    if other is None:
        return None, opened.enter_context(load(store.path, context, None))
    if isinstance(other, Original):
        record = store.layout.record_bytes
        load_on: LoadOn = partial(_beside_original, request, load, store, other, context)
    else:
        record = max(store.layout.record_bytes, other.layout.record_bytes)
        load_on = partial(_load_both, request, load, store, other, context)
    gpu = request.gpu(record)
    if gpu is None:
        return load_on(None, opened, say)
    try:
        return load_on(gpu, opened, say)
    except QmixError as error:
        if gpu.chosen:
            raise
        say(f"not on {gpu.name}: {error.message}; the CPU computes both models")
    return load_on(None, opened, say)


def _beside_original(request: Request, load: OpenEngine, store: Store, other: Original, context: int, gpu: Gpu | None,
                     opened: ExitStack, say: Callable[[str], None]) -> tuple[Original, Engine]:
    """The model is loaded first; transformers takes its part of the memory when it reads the first window."""
    say(f"reference and model are both computed on {'the CPU' if gpu is None else gpu.name}")
    whole, base = budget(request.ram, request.margin)
    needs = needs_of(store, context, request.kv, scoring=True)
    least = other.least_bytes(context)
    if gpu is None:
        granted = divide((least, other.weight_bytes), needs, whole, base)
        other.plan(granted, context)
        return other, opened.enter_context(load(store.path, context, Part((whole, base + granted))))
    ram, vram = divide_on_gpu((least, other.weight_bytes), other.least_beside(context), needs, (whole, base),
                              gpu.budget)
    other.plan(ram, context, vram, torch.device(gpu.torch_device))
    part = Part((whole, base + ram), (gpu.budget[0], gpu.budget[1] + vram))
    model = opened.enter_context(load(store.path, context, part))
    if model.device is not None:
        model.device.limit(tensors_beside(vram, model.plan))
    return other, model


def _load_both(request: Request, load: OpenEngine, store: Store, other: Store, context: int, gpu: Gpu | None,
               opened: ExitStack, say: Callable[[str], None]) -> tuple[Engine, Engine]:
    """Each gets a share of the budget, and the second what the first left over; closed with `opened`."""
    ram, vram = budget(request.ram, request.margin), None if gpu is None else gpu.budget
    first, second = (needs_of(one, context, request.kv, scoring=True) for one in (other, store))
    with ExitStack() as both:
        say(f"reference and model are both computed on {'the CPU' if gpu is None else gpu.name}")
        reference = both.enter_context(load(other.path, context, reference_part(first, second, ram, vram)))
        model = both.enter_context(load(store.path, context, model_part(reference.plan, ram, vram)))
        if model.device is not None:
            model.device.limit(tensors_to_come(reference.plan, model.plan))
        opened.enter_context(both.pop_all())
    return reference, model


def _device(engine: Engine) -> str:
    return "CPU" if engine.device is None else engine.device.name


def _arguments(request: Request, text: Text, model: Engine, reference: Engine | Original | None) -> dict[str, Any]:
    """All that decides the bits of what a window gives."""
    def engine(one: Engine | Original) -> dict[str, Any]:
        if isinstance(one, Original):
            return one.identity
        return {"store": one.store.identity, "threads": one.threads, "kernels": dict(one.kernels),
                "device": _device(one), "exact": one.exact}

    return {"qmix": __version__, "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(),
            "model": engine(model), "reference": engine(reference) if reference else None, "ids": text.digest,
            "window": text.window, "stride": text.stride, "most": request.most, "kv": request.kv,
            "activations": request.activations}


def _measure(request: Request, text: Text, model: Engine, reference: Engine | Original | None, journal: Journal,
             cancel: Cancel, say: Callable[[str], None], progress: Progress) -> Tally:
    tally = Tally(text.windows, reference is not None)
    for window, scores in zip(text.windows, journal.done, strict=False):
        tally.add(window, scores)
    finished = len(journal.done)
    if finished:
        say(f"resumed: {finished} of {len(text.windows)} windows are finished already ({journal.path}); "
            "--fresh starts over")
    session, beside = model.session(), reference.session() if reference else None
    nbytes = len(request.text.encode())
    try:
        for window in text.windows[finished:]:
            scores = _score(text.ids, window, session, beside, cancel)
            journal.append(scores)
            tally.add(window, scores)
            finished += 1
            progress(nbytes * window.end // text.windows[-1].end, nbytes, f"perplexity {tally.perplexity:.4g}")
    except Interrupted:
        cure = "the same command continues from there" if journal.path else "none of them is kept: see above"
        raise Interrupted(f"interrupted: {finished} of {len(text.windows)} windows are finished", cure) from None
    return tally


def _score(ids: Sequence[int], window: Window, session: Session, beside: Session | Original | None,
           cancel: Cancel) -> Scores:
    """One window, read by one model after the other, from empty contexts."""
    if cancel:
        raise Interrupted("cancelled")
    skip, targets = window.first - 1 - window.begin, torch.tensor(ids[window.first:window.end])
    pieces = []
    for one in (session, beside):
        if one is not None:
            one.trim(0)
            pieces.append(one.read(ids[window.begin:window.end - 1], skip, cancel))
    try:
        return score(pieces[0], targets, pieces[1] if beside else None)
    except QmixError as error:
        raise QmixError(f"tokens {window.first} to {window.end - 1} of the text (window from {window.begin}): "
                        f"{error.message}", error.cure) from None


def about(store: Store | Original) -> dict[str, Any]:
    """Of what `qmix show` knows, which store it is and how it is quantized."""
    if isinstance(store, Original):
        return store.about()
    about = describe(store)
    names = ("store", "source", "fingerprint", "parameters", "bytes", "bits_per_weight", "dtype")
    return {**{name: about[name] for name in names},
            "formats": {row["class"]: row["format"] for row in about["classes"]}}
