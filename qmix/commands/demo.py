"""`qmix demo`: chat with the bundled model. demo/ holds the model."""

from __future__ import annotations

from typing import Annotated

import typer

from qmix import paths, render, streams
from qmix.commands.chat import run_chat
from qmix.commands.loading import Loading, load_engine
from qmix.commands.options import Device, Seed, Temp, Threads, checked
from qmix.config import SamplingParams


def demo(
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and exit, instead of a chat.",
                                               show_default=False)] = None,
    temp: Temp = 0.7, seed: Seed = None, threads: Threads = None, device: Device = "auto",
) -> None:
    """Quantize the small bundled model (once) and chat with it: a toy for trying the machinery."""
    from qmix.commands import oneshot
    from qmix.demo import demo_store

    folder = demo_store(paths.models_folder() / "demo", render.say)
    params = checked(SamplingParams, temp, seed=seed)
    if prompt is None:
        run_chat(folder, "demo", params, None, None, False, Loading(threads=threads, device=device), 7)
    else:
        streams.check_stdout()
        with load_engine(folder, Loading(threads=threads, device=device)) as engine:
            raise typer.Exit(oneshot.run(engine, prompt, params, draft=7))
