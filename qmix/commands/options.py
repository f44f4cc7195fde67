"""The flags that several commands share, as annotated types, and the functions that turn their text into values."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from qmix import hub, paths, render
from qmix.config import EFFORTS, GROUPED_BITS, QuantConfig, SamplingParams
from qmix.errors import ConfigError, UsageError
from qmix.sizes import parse_bytes

Record = TypeVar("Record")

ModelArgument = Annotated[str | None, typer.Argument(
    metavar="[MODEL]", help="A store folder, an alias (see `qmix list`) or a hub id.", show_default=False)]
Context = Annotated[int, typer.Option("-c", "--ctx-size", min=0,
                                      help="Context in tokens; 0 = the model's own, at most 8192.")]
MaxTokens = Annotated[int, typer.Option("-n", "--max-tokens", help="Longest answer; -1 = until the context is full.")]
Temp = Annotated[float, typer.Option("--temp", help="Temperature; 0 = always the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens that add up to this share.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep this many tokens; 0 = all.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest one.")]
Penalty = Annotated[float, typer.Option("--repeat-penalty", help="Above 1: tokens already said become less likely.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same text; random and reported by default.",
                                          show_default=False)]
Draft = Annotated[int, typer.Option("--draft", min=0, max=7, help="Tokens guessed at a time from what the text "
                                    "repeats, or by the model's multi-token-prediction head where the store has one, "
                                    "while that is measured to pay; 0 = never, and no head is loaded. The answer is "
                                    "the same.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the answer before this text; may be repeated.",
                                                show_default=False)]
Think = Annotated[bool | None, typer.Option("--think/--no-think", help="Whether the model thinks before it answers; an "
                                            "error where its chat template has no switch for it. Default: as the "
                                            "model does it.", show_default=False)]
Reasoning = Annotated[str | None, typer.Option(
    "--reasoning", metavar="|".join(EFFORTS), show_default=False,
    help="How much the model thinks before it answers; an error where its chat template has no place for it. Default: "
         "as the model does it.")]
System = Annotated[str | None, typer.Option("--system", help="System prompt.", show_default=False)]
Threads = Annotated[int | None, typer.Option(
    "-t", "--threads", min=1, help="Compute threads; default: the fast physical cores, one less beside a GPU, or 1 for "
                                   "a very small model.", show_default=False)]
Ram = Annotated[str, typer.Option("--ram", help="Memory for the whole process (8G, 512M); auto = what is free, "
                                  "less --margin.")]
Margin = Annotated[str | None, typer.Option("--margin", help="What --ram auto leaves to other programs; 1G, less on a "
                                            "small machine.", show_default=False)]
CachePolicy = Annotated[str, typer.Option("--cache-policy", help="Which expert leaves when a slot is needed: auto, "
                                          "lru, lfu or static (by router statistics).")]
Prefetch = Annotated[str, typer.Option("--prefetch", help="Where guesses come from: auto, ahead (the next routers), "
                                       "transitions (statistics), both or off.")]
NoPrefetch = Annotated[bool, typer.Option("--no-prefetch", help="The same as --prefetch off.")]
Verify = Annotated[str, typer.Option("--verify", help="Which reads of experts are checked by checksum: first, always "
                                     "or never.")]
Activations = Annotated[str, typer.Option("--activations", help="How activations are rounded for int4 and int8 "
                                          "products: auto (the fastest), int8 or bf16.")]
KvCache = Annotated[str, typer.Option("--kv-cache", help="How keys and values are kept: bf16, or int8 in half the "
                                      "memory at a small error.")]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU where there is one), cpu, cuda, or cuda:1.")]
Vram = Annotated[str, typer.Option("--vram", help="GPU memory for the whole process (24G); auto = what is free, less "
                                   "half a GiB.")]
Pin = Annotated[str, typer.Option("--pin", help="How much RAM may be page-locked for fast copies to the GPU; "
                                  "auto = all, under WSL less.")]
Exact = Annotated[bool, typer.Option("--exact", help="The same bits wherever an expert was: nothing that belongs on "
                                     "the GPU is computed by the CPU, no KV cache is kept from turn to turn, what "
                                     "doctor --tune found is ignored.")]
Trace = Annotated[Path | None, typer.Option("--trace", help="Record every routing decision in this file, for qmix "
                                            "replay.", show_default=False)]
Revision = Annotated[str | None, typer.Option("--revision", help="Of a hub id: a branch, tag or commit; the same as "
                                              "org/name@REVISION.", show_default=False)]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the hub: what its cache on this machine holds must "
                                       "do.")]
DiscardSource = Annotated[bool, typer.Option("--discard-source", help="Of a hub id: free what is downloaded while "
                                             "it is quantized. What was in the hub's cache before stays.")]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]
Json = Annotated[bool, typer.Option("--json", help="As one JSON document.")]


def margin_bytes(text: str | None) -> int | None:
    """--margin, which may also be 0."""
    return None if text is None else 0 if text.strip() == "0" else flag_bytes("--margin", text)


def size_or_auto(flag: str, text: str) -> int | None:
    """Bytes; None for auto."""
    return None if text == "auto" else flag_bytes(flag, text)


def flag_bytes(flag: str, text: str) -> int:
    """parse_bytes; the error names the flag."""
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{flag} {error.message}", error.cure) from None


def checked(record: Callable[..., Record], *values: Any, **named: Any) -> Record:
    """A config record made from flags; what it refuses is told by the flag's name, not the field's."""
    try:
        return record(*values, **named)
    except ConfigError as error:
        field, _, rest = error.message.partition(":")
        flag = {"temperature": "temp"}.get(field, field).replace("_", "-")
        raise UsageError(f"--{flag}:{rest}", error.cure or "see --help for what it takes") from None


def sampling(temp: float, top_p: float, top_k: int, min_p: float, repeat_penalty: float, seed: int | None,
             max_tokens: int, stop: list[str] | None) -> SamplingParams:
    return checked(SamplingParams, temp, top_p, top_k, min_p, repeat_penalty, seed, max_tokens, tuple(stop or ()))


def agreed(question: str) -> None:
    """Return if the user says yes; the command ends otherwise. UsageError where nobody can be asked."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{question} No terminal to ask on", "say yes beforehand: -y")
    print(f"{question} [Y/n] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer or answer.strip().lower() not in ("", "y", "yes"):
        render.say("nothing was done")
        raise typer.Exit(1)


def hub_access(revision: str | None = None, offline: bool = False) -> hub.Access:
    """How the hub is asked, by these flags; what is fetched is shown."""
    return hub.Access(revision, offline, render.byte_bar)


def model_folder(model: str | None) -> Path:
    if model is None:
        known = ", ".join(p.name for p in paths.local_stores())
        raise UsageError("MODEL is missing", f"aliases here: {known}" if known else
                         "quantize one: qmix quantize SRC OUT, or try qmix demo")
    return paths.resolve(model, render.say, "store", hub_access())


def quant_config(format: str, dense: str, method: str | None, group_size: int | None, block: str | None,
                  double_quant: bool) -> QuantConfig:
    """Fill in what the grouped formats need; a flag that does not apply to the chosen formats is an error."""
    if format == "mixed":
        raise UsageError("--format mixed: a mix needs a target size", "use qmix quantize with --fit or --bpw instead")
    if GROUPED_BITS.keys() & {format, dense}:
        return checked(QuantConfig, format, dense, method or "hqq", 64 if group_size is None else group_size,
                        _block(block or "auto"), double_quant)
    for flag, value in (("--method", method), ("--group-size", group_size), ("--block", block)):
        if value is not None:
            raise UsageError(f"{flag} {value}: only int4, int3 and int2 have it, got --format {format} --dense {dense}",
                             f"drop {flag} or choose --format int4")
    return checked(QuantConfig, format, dense, "", 0, 0, double_quant)


def _block(text: str) -> int:
    if text == "auto":
        from qmix.kernels.table import native_block

        return native_block()
    if text not in ("64", "32"):
        raise UsageError(f"--block {text}: want 64, 32 or auto")
    return int(text)


def reasoning_effort(text: str | None) -> str | None:
    """What --reasoning says; UsageError for another word, before anything is loaded."""
    if text not in (None, *EFFORTS):
        raise UsageError(f"--reasoning: got {text!r}, want {' or '.join(EFFORTS)}")
    return text
