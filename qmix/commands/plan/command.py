"""Commands about machine and memory: doctor, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmix import paths, render
from qmix.commands.options import (
    Context,
    Device,
    KvCache,
    Margin,
    ModelArgument,
    Ram,
    margin_bytes,
    model_folder,
    quant_config,
    size_or_auto,
)

Json = Annotated[bool, typer.Option("--json", help="As one JSON document.")]


def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False, help="A store, or the folder "
                                                "that will hold one: its disk is examined too.")] = None,
    bandwidth: Annotated[bool, typer.Option("--bandwidth", help="Measure RAM, disk and GPU (half a minute), and "
                                            "remember it for forecasts.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Try configurations of the GPU's kernels for MODEL, a store (or "
                                       "for Mixtral 8x7B), some minutes long, and use the fastest from then on, but "
                                       "for --exact.")] = False,
    json: Json = False,
) -> None:
    """Examine this machine: cores, memory, libraries, kernels, disk; name what is wrong, with the cure."""
    from qmix.commands import doctor as examination

    named = None if model is None else paths.resolve(model, render.say, "store")
    found = {"tuning": examination.tune(named, file=paths.kernels_file(), say=render.say)} if tune else {}
    cache = paths.if_any(paths.hardware_file)
    with render.byte_bar("doctor") as progress:
        report = examination.run(named or Path.cwd(), bandwidth=bandwidth, cache_file=cache,
                                 say=render.say, progress=progress)
    print(render.document({**found, **report}, as_json=json))


def plan(
    model: ModelArgument = None, ctx_size: Context = 0,
    ram: Ram = "auto", margin: Margin = None,
    vram: Annotated[str, typer.Option("--vram", help="Memory of a GPU (24G): what the model would do there; auto = of "
                                      "this machine's, where it has one.")] = "auto",
    device: Device = "auto",
    disk: Annotated[float | None, typer.Option("--disk", min=0.001, max=1e5, show_default=False,
                                               help="Disk bandwidth, GB/s; default: as measured.")] = None,
    ram_speed: Annotated[float | None, typer.Option("--ram-speed", min=0.001, max=1e5, show_default=False,
                                                    help="Memory bandwidth, GB/s; default: as measured.")] = None,
    pcie: Annotated[float | None, typer.Option("--pcie", min=0.001, max=1e5, show_default=False,
                                               help="Host-to-GPU bandwidth, GB/s.")] = None,
    vram_speed: Annotated[float | None, typer.Option("--vram-speed", min=0.001, max=1e5, show_default=False,
                                                     help="GPU memory bandwidth, GB/s.")] = None,
    format: Annotated[str | None, typer.Option("--format", show_default=False,
                                               help="For an unquantized model: how it would be quantized.")] = None,
    dense: Annotated[str | None, typer.Option("--dense", show_default=False, help="The same for attention.")] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", show_default=False, help="The same.")] = None,
    kv_cache: KvCache = "bf16", json: Json = False,
) -> None:
    """Print where every byte of a model would go and how fast it should run; exit 3 if it cannot fit."""
    from qmix.commands.plan import report as planning

    quant = None
    if format or dense or group_size:
        quant = quant_config(format or "int4", dense or "int8", None, group_size, None, False)
    path = paths.resolve(model, render.say, "config") if model else model_folder(model)
    found = planning.find_model(path, quant, paths.if_any(paths.routing_folder), render.say)
    machine = planning.Machine(size_or_auto("--ram", ram), margin_bytes(margin),
                               size_or_auto("--vram", vram), ram_speed, vram_speed, pcie, disk,
                               gpu=planning.known_gpu(paths.if_any(paths.gpu_memory_file), render.say))
    machine = planning.find_gpu(found, machine, device, render.say)
    known = planning.known_speeds(paths.if_any(paths.hardware_file), render.say)
    print(render.document(planning.describe(found, ctx_size, machine, known, render.say, kv_cache), as_json=json))
