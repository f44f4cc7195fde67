"""`qmix stats`: what a model's routers choose. analysis/ has the analysis of a text."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qmix import paths, render, streams
from qmix.commands.loading import Loading, load_engine
from qmix.commands.options import Margin, ModelArgument, Ram, Threads, model_folder
from qmix.commands.prompt import read_prompt
from qmix.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="As one JSON document, with every count.")]
Files = Annotated[list[Path] | None, typer.Option(
    "-f", "--file", help="Run this text through the model and analyse its routing, instead of what earlier runs have "
    "gathered; may be repeated.", show_default=False)]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="OUT", show_default=False, help="-f: a folder for plots, "
                                           "stats.json, routing.csv and text.html, the text coloured by expert.")]
Layer = Annotated[int | None, typer.Option("--view", metavar="LAYER", min=0, show_default=False, help="-f: print the "
                                           "beginning of the text coloured by the first choice of this layer.")]


def stats(
    context: typer.Context, model: ModelArgument = None, file: Files = None,
    reset: Annotated[bool, typer.Option("--reset", help="Forget what earlier runs have gathered.")] = False,
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", min=0, help="-f: tokens of a window; windows share "
                                          "nothing.")] = 512,
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=0, help="-f: how many of each text; 0 = all.")] = 0,
    plot: Plot = None, view: Layer = None, ram: Ram = "auto", margin: Margin = None, threads: Threads = None,
    csv: Annotated[bool, typer.Option("--csv", help="-f: as rows of text, layer, metric, key, value.")] = False,
    json: Json = False,
) -> None:
    """Show what a model's routers choose: by layer, how evenly, how sticky, what goes with what."""
    from qmix.commands import routing
    from qmix.offload import router_stats
    from qmix.store import Store

    folder = model_folder(model)
    if file:
        if reset:
            raise UsageError("--reset with -f: a text is not part of what earlier runs have gathered")
        if sum((json, csv, view is not None)) > 1:
            raise UsageError("--json, --csv and --view: stdout has room for one of them", "--plot writes all of it")
        _analyse(folder, file, Loading(ctx_size, threads, ram, margin), tokens, plot, view, csv, json)
        return
    for name in ("ctx_size", "ram", "margin", "threads", "tokens", "plot", "view", "csv"):
        source = context.get_parameter_source(name)  # by name: typer brings a click of its own
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{name.replace('_', '-')}: without -f nothing is loaded", "drop it, or give -f TEXT")
    with Store.open(folder) as store:
        config, identity = store.model, store.identity
    saved = router_stats.stats_file(paths.routing_folder(), identity)
    if reset:
        saved.unlink(missing_ok=True)
        render.say(f"forgotten: {saved}")
        return
    gathered = router_stats.load(paths.routing_folder(), identity, len(config.record_layers), config.num_experts,
                                 render.say)
    if not any(gathered.total(phase).tokens for phase in router_stats.PHASES):
        render.say("no run has gathered statistics of this store yet: chat or generate with it, or give -f TEXT")
    print(render.document(routing.describe(gathered, json, config.record_layers), as_json=json))


def _analyse(folder: Path, files: list[Path], how: Loading, tokens: int, plot: Path | None, view: int | None,
             csv: bool, json: bool) -> None:
    """The routing of texts: into the folder `plot`, and to stdout in the form asked for."""
    from qmix.analysis import folder as output
    from qmix.analysis import report, texts
    from qmix.analysis.recorder import Collector
    from qmix.store import Store

    streams.check_stdout()
    if plot is not None:
        from qmix.analysis import plots

        plots.check()
        output.prepare(plot)
    named = list(zip(texts.names(files), (read_prompt(None, file, sys.stdin) for file in files), strict=True))
    with Store.open(folder) as store:
        layers = store.model.record_layers
    if view is not None and view not in layers:
        whole = layers == tuple(range(len(layers)))
        raise UsageError(f"--view {view}: the model has layers 0 to {layers[-1]}" if whole else
                         f"--view {view}: the layers with experts are {', '.join(map(str, layers))}")
    collector = Collector()
    with load_engine(folder, how, keep_statistics=False, recorder=collector) as engine, \
            render.byte_bar("routing") as progress:
        subject, figures, views = texts.run(engine, collector, named, tokens, progress, render.say)
    found = report.document(subject, figures)
    if plot is not None:
        written = output.contents(found, views)
        output.write(plot, written)
        render.say(f"written: {plot}: {', '.join(sorted(written))}")
    if view is not None:
        _show_views(views, view, layers.index(view), subject.experts)
    elif csv:
        print(render.table(list(report.tidy(found)), "csv"))
    else:
        print(render.document(found if json else report.people(found), as_json=json))


def _show_views(views: list[Any], layer: int, at: int, experts: int) -> None:
    """Coloured texts where the terminal has colours, else with the experts' numbers in them. at: which one of the
    layers with experts `layer` is."""
    from qmix.analysis.view import coloured, plain

    colours = render.wants_color(sys.stdout, os.environ)
    for view in views:
        print(f"{view.name}, layer {layer}, {view.limit()}:")
        if colours:
            from rich.console import Console

            Console(force_terminal=True, highlight=False).print(coloured(view, at, experts), soft_wrap=True)
        else:
            print(plain(view, at))
