"""`qmix doctor`: the flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmix import paths, render
from qmix.commands.options import Json


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
    from qmix.commands.doctor import report as examination
    from qmix.commands.doctor.tuning import tune as tune_kernels

    named = None if model is None else paths.resolve(model, render.say, "store")
    found = {"tuning": tune_kernels(named, file=paths.kernels_file(), say=render.say)} if tune else {}
    cache = paths.if_any(paths.hardware_file)
    with render.byte_bar("doctor") as progress:
        report = examination.run(named or Path.cwd(), bandwidth=bandwidth, cache_file=cache,
                                 say=render.say, progress=progress)
    print(render.document({**found, **report}, as_json=json))
