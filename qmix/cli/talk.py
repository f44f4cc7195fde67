"""Commands that talk: chat, generate, demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from qmix import paths, render, streams
from qmix.cli.options import (
    Activations,
    CachePolicy,
    Context,
    Device,
    Draft,
    Exact,
    KvCache,
    Loading,
    Margin,
    MaxTokens,
    MinP,
    ModelArgument,
    NoPrefetch,
    Penalty,
    Pin,
    Prefetch,
    Ram,
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
    checked,
    load_engine,
    model_folder,
    sampling,
)
from qmix.config import SamplingParams
from qmix.errors import UsageError


def chat(
    model: ModelArgument = None, system: System = None, think: Think = None,
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
    how = Loading(ctx_size, threads, ram, margin, cache_policy, prefetch, no_prefetch, verify, activations, kv_cache,
                  trace, device, vram, pin, exact)
    _chat(model_folder(model), model or "", params, system, resume, stats, how, draft, think)


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


def _chat(folder: Path, name: str, params: SamplingParams, system: str | None, resume: str | None, stats: bool,
          how: Loading, draft: int, think: bool | None = None) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("chat needs a terminal", "for pipes and scripts: qmix generate MODEL -p \"...\"")
    from qmix import chat as chat_package

    with load_engine(folder, how) as engine:
        raise typer.Exit(chat_package.run(engine, model_name=name or folder.name, params=params, system=system,
                                          resume=resume, stats=stats, draft=draft, thinking=think,
                                          state_dir=paths.if_any(paths.state_folder)))


def generate(
    model: ModelArgument = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt; - or none reads stdin.",
                                               show_default=False)] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.",
                                              show_default=False)] = None,
    system: System = None, think: Think = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document: text, token_ids, finish_reason, "
                                       "timings, tiers.")] = False,
    temp: Temp = 0.7, top_p: TopP = 0.95, top_k: TopK = 0, min_p: MinP = 0.0, repeat_penalty: Penalty = 1.0,
    seed: Seed = None, stop: Stop = None, max_tokens: MaxTokens = -1, ctx_size: Context = 0, threads: Threads = None,
    ram: Ram = "auto", margin: Margin = None, cache_policy: CachePolicy = "auto", prefetch: Prefetch = "auto",
    no_prefetch: NoPrefetch = False, verify: Verify = "first", activations: Activations = "auto", trace: Trace = None,
    draft: Draft = 7, kv_cache: KvCache = "bf16",
    device: Device = "auto", vram: Vram = "auto", pin: Pin = "auto", exact: Exact = False,
) -> None:
    """Answer one prompt: the text on stdout, everything else on stderr."""
    from qmix import oneshot

    params = sampling(temp, top_p, top_k, min_p, repeat_penalty, seed, max_tokens, stop)
    how = Loading(ctx_size, threads, ram, margin, cache_policy, prefetch, no_prefetch, verify, activations, kv_cache,
                  trace, device, vram, pin, exact)
    streams.check_stdout()
    folder = model_folder(model)
    text = oneshot.read_prompt(prompt, file, sys.stdin)
    with load_engine(folder, how) as engine:
        raise typer.Exit(oneshot.run(engine, text, params, system=system, raw=raw, as_json=json, draft=draft,
                                     thinking=think))


def demo(
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and exit, instead of a chat.",
                                               show_default=False)] = None,
    temp: Temp = 0.7, seed: Seed = None, threads: Threads = None, device: Device = "auto",
) -> None:
    """Quantize the small bundled model (once) and chat with it: a toy for trying the machinery."""
    from qmix import oneshot
    from qmix.demo import demo_store

    folder = demo_store(paths.models_folder() / "demo", render.say)
    params = checked(SamplingParams, temp, seed=seed)
    if prompt is None:
        _chat(folder, "demo", params, None, None, False, Loading(threads=threads, device=device), 7)
    else:
        streams.check_stdout()
        with load_engine(folder, Loading(threads=threads, device=device)) as engine:
            raise typer.Exit(oneshot.run(engine, prompt, params, draft=7))
