"""`qmix chat`: a conversation in the terminal. chat/ has the conversation itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from qmix import paths, render
from qmix.commands.loading import Loading, load_engine
from qmix.commands.options import (
    Activations,
    CachePolicy,
    Context,
    Device,
    Draft,
    Exact,
    KvCache,
    Margin,
    MaxTokens,
    MinP,
    ModelArgument,
    NoPrefetch,
    Penalty,
    Pin,
    Prefetch,
    Ram,
    Reasoning,
    Seed,
    Stop,
    System,
    Temp,
    Think,
    Threads,
    TopK,
    TopP,
    Trace,
    Verify,
    Vram,
    model_folder,
    reasoning_effort,
    sampling,
)
from qmix.config import SamplingParams
from qmix.errors import UsageError


def chat(
    model: ModelArgument = None, system: System = None, think: Think = None, reasoning: Reasoning = None,
    resume: Annotated[str | None, typer.Option("--continue", metavar="[=NAME]", help="Go on with the last "
                                               "conversation, or with this one.", show_default=False)] = None,
    saved: Annotated[bool, typer.Option("--list", help="List the saved conversations, of all models or with MODEL, and "
                                        "exit.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="More figures after each answer.")] = False,
    temp: Temp = 0.7, top_p: TopP = 0.95, top_k: TopK = 0, min_p: MinP = 0.0, repeat_penalty: Penalty = 1.0,
    seed: Seed = None, stop: Stop = None, max_tokens: MaxTokens = -1, ctx_size: Context = 0, threads: Threads = None,
    ram: Ram = "auto", margin: Margin = None, cache_policy: CachePolicy = "auto", prefetch: Prefetch = "auto",
    no_prefetch: NoPrefetch = False, verify: Verify = "first", activations: Activations = "auto", trace: Trace = None,
    draft: Draft = 7, kv_cache: KvCache = "bf16",
    device: Device = "auto", vram: Vram = "auto", pin: Pin = "auto", exact: Exact = False,
) -> None:
    """Talk with a model in the terminal; /help inside lists the commands."""
    if saved:
        _list_saved(model)
        return
    params = sampling(temp, top_p, top_k, min_p, repeat_penalty, seed, max_tokens, stop)
    effort = reasoning_effort(reasoning)
    how = Loading(ctx_size, threads, ram, margin, cache_policy, prefetch, no_prefetch, verify, activations, kv_cache,
                  trace, device, vram, pin, exact, mtp=draft > 0)
    run_chat(model_folder(model), model or "", params, system, resume, stats, how, draft, think,
             effort)


class ChatCommand(TyperCommand):
    """`--continue` takes a name only as --continue=NAME: in `--continue mixtral` the model follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [f"{arg}=" if arg == "--continue" and n < end else arg
                                        for n, arg in enumerate(args)])


def _list_saved(model: str | None) -> None:
    from qmix.chat.savefile import rows

    found = rows(paths.state_folder(), model)
    if not found:
        render.say("no saved conversations" + (f" with {model}" if model else ""))
        return
    print(render.table([{key: render.clean(str(value)) for key, value in row.items()} for row in found]))


def run_chat(folder: Path, name: str, params: SamplingParams, system: str | None, resume: str | None, stats: bool,
             how: Loading, draft: int, think: bool | None = None, effort: str | None = None) -> None:
    """Load the model in `folder` and chat with it. name: how the user named it; resume: see --continue."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("chat needs a terminal", "for pipes and scripts: qmix generate MODEL -p \"...\"")
    from qmix import chat as chat_package

    with load_engine(folder, how) as engine:
        raise typer.Exit(chat_package.run(engine, model_name=name or folder.name, params=params, system=system,
                                          resume=resume, stats=stats, draft=draft, thinking=think, effort=effort,
                                          state_dir=paths.if_any(paths.state_folder)))
