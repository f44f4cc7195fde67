"""Commands on the routers: stats, replay."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qmix import paths, render
from qmix.cli.options import Loading, Margin, ModelArgument, Ram, Threads, load_engine, model_folder
from qmix.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="As one JSON document, with every count.")]


def stats(
    context: typer.Context, model: ModelArgument = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Run this text through the model and show its "
                                              "routing, instead of what earlier runs have gathered.",
                                              show_default=False)] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Forget what earlier runs have gathered.")] = False,
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", min=0, help="-f: tokens of a window; windows share "
                                          "nothing.")] = 512,
    ram: Ram = "auto", margin: Margin = None, threads: Threads = None, json: Json = False,
) -> None:
    """Show what a model's routers choose: by layer, how evenly, how sticky, what follows what."""
    from qmix import routing
    from qmix.offload import router_stats
    from qmix.store import Store

    folder = model_folder(model)
    if file is not None:
        if reset:
            raise UsageError("--reset with -f: a text is not part of what earlier runs have gathered")
        gathered, repeats = _measured(folder, file, Loading(ctx_size, threads, ram, margin))
        print(render.document(routing.describe(gathered, repeats, full=json), as_json=json))
        return
    for name in ("ctx_size", "ram", "margin", "threads"):
        source = context.get_parameter_source(name)  # by name: typer brings a click of its own
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{name.replace('_', '-')}: without -f nothing is loaded", "drop it, or give -f TEXT")
    with Store.open(folder) as store:
        config, identity = store.config, store.identity
    saved = router_stats.stats_file(paths.routing_folder(), identity)
    if reset:
        saved.unlink(missing_ok=True)
        render.say(f"forgotten: {saved}")
        return
    gathered = router_stats.load(paths.routing_folder(), identity, config.num_layers, config.num_experts, render.say)
    if not any(gathered.total(phase).tokens for phase in router_stats.PHASES):
        render.say("no run has gathered statistics of this store yet: chat or generate with it, or give -f TEXT")
    print(render.document(routing.describe(gathered, full=json), as_json=json))


def _measured(folder: Path, file: Path, how: Loading) -> Any:
    """(statistics, repeats) of a text's routing; windows of the context, each from an empty one."""
    from qmix import oneshot, routing
    from qmix.offload.trace import read_trace

    text = oneshot.read_prompt(None, file, sys.stdin)
    with tempfile.TemporaryDirectory(prefix="qmix-") as scratch:
        trace = Path(scratch) / "trace"
        with load_engine(folder, replace(how, trace=trace), keep_statistics=False) as engine, \
                render.byte_bar("routing") as progress:
            config, session, ids = engine.config, engine.session(), engine.tokenizer.encode(text)
            for start in range(0, len(ids), session.context):
                session.trim(0)
                session.prefill(ids[start:start + session.context])
                done = min(len(ids), start + session.context)
                progress(len(text) * done // len(ids), len(text), f"{done} tokens")
        return routing.watch(read_trace(trace, render.say).passes, config.num_layers, config.num_experts)


def replay(
    trace: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Recorded with --trace.")],
    train: Annotated[list[Path] | None, typer.Option("--train", help="A trace of other prompts, whose statistics the "
                                                     "caches start with; may be repeated.", show_default=False)] = None,
    slots: Annotated[str | None, typer.Option("--slots", help="Slot counts, as 16,32; default: shares of all records.",
                                              show_default=False)] = None,
    cache_policy: Annotated[str | None, typer.Option("--cache-policy", help="Policies, as lru,lfu:64,static (lfu:64 "
                                                     "forgets half in 64 tokens).", show_default=False)] = None,
    quotas: Annotated[bool, typer.Option("--quotas", help="Also with a fixed share of slots for each layer.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="The store, for bytes per token.",
                                              show_default=False)] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="table, md, csv, jsonl or json.")] = "table",
) -> None:
    """Replay recorded routing against caches of other sizes and policies, beside Belady's optimum."""
    from qmix import routing
    from qmix.store import Store

    if output not in ("table", "md", "csv", "jsonl", "json"):
        raise UsageError(f"-o {output}: want table, md, csv, jsonl or json")
    record, identity = 0, ""
    if model is not None:
        with Store.open(paths.resolve(model, render.say)) as store:
            record, identity = store.layout.record_bytes, store.identity
    policies = [policy.strip() for policy in (cache_policy or "").split(",") if policy.strip()]
    report = routing.replay_report(trace, train or [], render.say, slots=_numbers(slots), policies=policies,
                                   quotas=quotas, record=record, store=identity)
    if output in ("json", "table"):
        print(render.document(report, as_json=output == "json"))
    else:
        print(render.table(report["policies"], output))


def _numbers(text: str | None) -> list[int]:
    try:
        values = [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        values = [0]
    if any(not 1 <= value <= 10**6 for value in values):
        raise UsageError(f"--slots {text}: want whole numbers, as 16,32")
    return values
