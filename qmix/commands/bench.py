"""`qmix bench`: how fast a store runs. bench/ has the measurement."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from qmix import render, streams
from qmix.commands.loading import Loading, load_engine
from qmix.commands.options import (
    Activations,
    CachePolicy,
    Device,
    Exact,
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
    model_folder,
    size_or_auto,
)
from qmix.commands.prompt import read_prompt
from qmix.errors import UsageError

OUTPUTS = ("md", "json", "jsonl", "csv")


def bench(
    model: ModelArgument = None,
    prompt_tokens: Annotated[str, typer.Option("-p", "--prompt-tokens", help="Prompts to prefill, in tokens, as "
                                               "128,512; 0 = none.")] = "512",
    gen_tokens: Annotated[str, typer.Option("-n", "--gen-tokens", help="Generations to decode, the same.")] = "128",
    depth: Annotated[str, typer.Option("-d", "--depth", help="Positions that are in the context before, as "
                                       "0,2048.")] = "0",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, max=1000, help="Warm repetitions; a cold "
                                             "one comes before them.")] = 5,
    output: Annotated[str, typer.Option("-o", "--output", help="md, json, jsonl or csv.")] = "md",
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Run this text instead of the recorded one.",
                                              show_default=False)] = None,
    threads: Threads = None, ram: Ram = "auto", margin: Margin = None, cache_policy: CachePolicy = "auto",
    prefetch: Prefetch = "auto", no_prefetch: NoPrefetch = False, verify: Verify = "first",
    activations: Activations = "auto", kv_cache: KvCache = "bf16",
    device: Device = "auto", vram: Vram = "auto", pin: Pin = "auto", exact: Exact = False,
) -> None:
    """Measure prefill and decoding, cold and warm, and what limits them: GPU memory, bus, memory, disk, compute or
    overhead."""
    if output not in OUTPUTS:
        raise UsageError(f"-o {output}: want {', '.join(OUTPUTS)}")
    from qmix import bench as benchmark

    streams.check_stdout()
    cases = benchmark.make_cases(*(benchmark.numbers(flag, text) for flag, text in (
        ("-p", prompt_tokens), ("-n", gen_tokens), ("-d", depth))))
    text = benchmark.recorded_text() if file is None else read_prompt(None, file, sys.stdin)
    how = Loading(0, threads, ram, margin, cache_policy, prefetch, no_prefetch, verify, activations, kv_cache,
                  None, device, vram, pin, exact)
    request = benchmark.Request(model_folder(model), cases, repetitions, text, "recorded" if file is None else
                                str(file), size_or_auto("--ram", ram), size_or_auto("--pin", pin))
    rows: list[dict[str, Any]] = []
    try:
        document = benchmark.run(request, _loader(request.folder, how), today=date.today(), say=render.say,
                                 emit=rows.append if output == "json" else _printer(output))
    except BaseException:
        if rows:  # a later case failed: what was measured is printed all the same
            print(render.document({"interrupted": True, "rows": rows}, as_json=True))
        raise
    if output == "json":
        print(render.document(document, as_json=True))
    if document["interrupted"]:
        render.say(f"interrupted: {len(document['rows']) // 2} of {len(cases)} tests are complete")
        raise typer.Exit(130)


def _loader(folder: Path, how: Loading) -> Callable[[int, Any], Any]:
    """load(context, the plan of an earlier load or None) -> engine; what each load would say again is said once."""
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            render.say(line)

    def load(context: int, like: Any) -> Any:
        fixed = how if like is None else _again(how, like)
        base, vram_base = (None, None) if like is None else (like.ram.base, like.tiers[0].base)
        return load_engine(folder, replace(fixed, ctx_size=context), keep_statistics=False, base=base, say=once,
                           vram_base=vram_base)

    return load


def _again(how: Loading, like: Any) -> Loading:
    """What leads to the budgets of the plan `like` once more, and to the device that `how` led to."""
    fixed = replace(how, ram=str(like.ram.budget), margin=None)
    if len(like.tiers) == 1:
        return replace(fixed, device="cpu")
    return replace(fixed, device="cuda" if how.device == "auto" else how.device, vram=str(like.tiers[0].budget))


def _printer(output: str) -> Callable[[dict[str, Any]], None]:
    """Prints a row at a time; of md and csv the head with the first."""
    from qmix.bench import cells

    first = True

    def emit(row: dict[str, Any]) -> None:
        nonlocal first
        lines = render.table([cells(row) if output == "md" else row], output).splitlines()
        print("\n".join(lines if first else lines[-1:]), flush=True)
        first = False

    return emit
