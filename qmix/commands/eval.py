"""`qmix eval`: how good a store is. evaluate/ has the measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qmix import paths, render, streams
from qmix.commands.interrupt import cancel_on_interrupt
from qmix.commands.loading import Loading, load_engine
from qmix.commands.options import (
    Activations,
    CachePolicy,
    Device,
    Exact,
    Json,
    KvCache,
    Margin,
    ModelArgument,
    NoPrefetch,
    Pin,
    Prefetch,
    Ram,
    Threads,
    Verify,
    Vram,
    flag_bytes,
    margin_bytes,
    model_folder,
    size_or_auto,
)
from qmix.errors import UsageError
from qmix.textfile import read_text


def evaluate(
    model: ModelArgument = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="The text, UTF-8.", show_default=False)] = None,
    against: Annotated[str | None, typer.Option("--against", metavar="REF", help="The original checkpoint, which "
                                                "transformers and accelerate run, or a store of it (quantize --format "
                                                "keep --dense keep): also KL divergence and top-1 agreement.",
                                                show_default=False)] = None,
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", min=0, help="Tokens of a window; 0 = 2048, or what the "
                                          "model was trained for.")] = 0,
    stride: Annotated[int, typer.Option("--stride", min=0, help="A window begins every so many tokens; 0 = the window, "
                                        "without overlap.")] = 0,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Score this many tokens; -1 = all.")] = -1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run has finished.")] = False,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Tasks of the lm-eval harness, as arc_easy,hellaswag.",
                                              show_default=False)] = None,
    include_path: Annotated[Path | None, typer.Option("--include-path", help="--tasks: a folder with your "
                                                      "own tasks.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="--tasks: only the first N samples of each.",
                                              show_default=False)] = None,
    json: Json = False,
    threads: Threads = None, ram: Ram = "auto", margin: Margin = None, cache_policy: CachePolicy = "auto",
    prefetch: Prefetch = "auto", no_prefetch: NoPrefetch = False, verify: Verify = "first",
    activations: Activations = "auto", kv_cache: KvCache = "bf16",
    device: Device = "auto", vram: Vram = "auto", pin: Pin = "auto", exact: Exact = False,
) -> None:
    """Measure quality: perplexity on a text, distance from a reference store, tasks of the lm-eval harness."""
    _check_flags(file, tasks, {"--against": against is not None, "--stride": stride != 0, "-n/--max-tokens":
                               max_tokens != -1, "--fresh": fresh},
                 {"--include-path": include_path is not None, "--limit": limit is not None})
    from qmix import evaluate as evaluation

    streams.check_stdout()
    how = Loading(ctx_size, threads, ram, margin, cache_policy, prefetch, no_prefetch, verify, activations, kv_cache,
                  device=device, vram=vram, pin=pin, exact=exact)
    folder = model_folder(model)
    prepared = None if tasks is None else _prepare(folder, tasks, ctx_size, include_path, limit)
    document: dict[str, Any] = {}
    try:
        if file is not None:
            document = _text(evaluation.Request(
                folder, _read(file), str(file), paths.if_any(paths.evaluations_folder),
                None if against is None else paths.resolve(against, render.say), ctx_size, stride, max_tokens, fresh,
                activations, kv_cache, None if ram == "auto" else flag_bytes("--ram", ram), margin_bytes(margin),
                _gpu_for_both(how)), how)
        if prepared is not None:
            _tasks(folder, how, prepared, document)
    finally:  # what is known is printed, whatever ended the rest
        if document:
            print(render.document(document if json else evaluation.lines(document), as_json=json))


def _check_flags(file: Path | None, tasks: str | None, of_text: dict[str, bool], of_tasks: dict[str, bool]) -> None:
    """What was given must have an effect."""
    if file is None and tasks is None:
        raise UsageError("nothing to measure", "name a text with -f FILE, or tasks of the lm-eval harness with --tasks")
    for given, needed, flags in ((file, "-f FILE", of_text), (tasks, "--tasks", of_tasks)):
        for flag, used in flags.items():
            if given is None and used:
                raise UsageError(f"{flag}: has no effect without {needed}", f"drop it, or give {needed}")


def _gpu_for_both(how: Loading) -> Callable[[int], Any]:
    """See suite.FindGpu."""
    def find(record: int) -> Any:
        from qmix.engine import Placement
        from qmix.evaluate.memory import Gpu

        placement = Placement(how.device, size_or_auto("--vram", how.vram), size_or_auto("--pin", how.pin))
        device = placement.open(record, render.say)
        if device is None:
            return None
        try:
            return Gpu(device.name, placement.vram_budget(device), how.device != "auto" or how.vram != "auto",
                       str(device.torch_device))
        finally:
            device.close()

    return find


def _share_of(how: Loading, part: Any) -> Loading:
    """The flags with which one of two models gets its part. What may be page-locked is halved, where it is limited."""
    from qmix import hardware
    from qmix.engine import Placement

    fixed = replace(how, ram=str(part.ram[0]), margin=None)
    if part.vram is None:
        return replace(fixed, device="cpu", vram="auto", pin="auto")
    pin = size_or_auto("--pin", how.pin)
    if pin is not None or hardware.is_wsl():
        fixed = replace(fixed, pin=str(Placement(pin=pin).pin_budget() // 2))
    return replace(fixed, device="cuda" if how.device == "auto" else how.device, vram=str(part.vram[0]))


def _read(file: Path) -> str:
    """The file's text as it is, line ends included."""
    text = read_text(file, f"-f {file}")
    if not text.strip():
        raise UsageError(f"-f {file}: the file is empty")
    return text


def _text(request: Any, how: Loading) -> dict[str, Any]:
    from qmix import evaluate as evaluation

    with cancel_on_interrupt() as cancel, render.byte_bar("eval") as progress:
        return evaluation.run(request, _loader(request, how), cancel=cancel, say=render.say, progress=progress)


def _prepare(folder: Path, names: str, ctx_size: int, include: Path | None, limit: int | None) -> Any:
    """The tasks, checked before any model is loaded."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UsageError(f"--tasks {names!r}: names no task")
    try:
        from qmix.evaluate import tasks
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UsageError("--tasks: the lm-eval harness is not installed", "pip install 'qmix[eval]'") from None
    return tasks.prepare(wanted, folder, ctx_size, include, limit)


def _tasks(folder: Path, how: Loading, prepared: Any, document: dict[str, Any]) -> None:
    """Add the tasks' rows to `document`, each as soon as it is known, and which model it was."""
    from qmix import __version__
    from qmix.evaluate import about
    from qmix.store import Store

    def load() -> Any:
        return load_engine(folder, how, keep_statistics=False, scoring=True)

    with Store.open(folder) as store:
        model = about(store)
    for row in prepared.run(load, render.say):
        document.update({"qmix": __version__, "model": model, "tasks": [*document.get("tasks", []), row]})


def _loader(request: Any, how: Loading) -> Callable[..., Any]:
    """See suite.OpenEngine. What the reference's load says is marked as its own."""
    def load(folder: Path, context: int, part: Any) -> Any:
        fixed = how if part is None else _share_of(how, part)
        base, vram_base = (None, None) if part is None else (part.ram[1], None if part.vram is None else part.vram[1])
        mark = "reference: " if folder == request.reference and folder != request.model else ""
        return load_engine(folder, replace(fixed, ctx_size=context), keep_statistics=False, base=base, scoring=True,
                           say=lambda line: render.say(mark + line), vram_base=vram_base)

    return load
