"""`qmix generate`: one prompt, one answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qmix import streams
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
from qmix.commands.prompt import read_prompt


def generate(
    model: ModelArgument = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt; - or none reads stdin.",
                                               show_default=False)] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.",
                                              show_default=False)] = None,
    system: System = None, think: Think = None, reasoning: Reasoning = None,
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
    from qmix.commands import oneshot

    params = sampling(temp, top_p, top_k, min_p, repeat_penalty, seed, max_tokens, stop)
    effort = reasoning_effort(reasoning)
    how = Loading(ctx_size, threads, ram, margin, cache_policy, prefetch, no_prefetch, verify, activations, kv_cache,
                  trace, device, vram, pin, exact, mtp=draft > 0)
    streams.check_stdout()
    folder = model_folder(model)
    text = read_prompt(prompt, file, sys.stdin)
    with load_engine(folder, how) as engine:
        raise typer.Exit(oneshot.run(engine, text, params, system=system, raw=raw, as_json=json, draft=draft,
                                     thinking=think, effort=effort))
