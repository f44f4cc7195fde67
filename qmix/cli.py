"""The command line: parse, call, map a QmixError to its exit code.

Heavy imports stand inside the commands, so that `qmix --help` answers without torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from qmix import __version__, paths, render, settings
from qmix.config import QuantConfig, SamplingParams
from qmix.errors import ConfigError, QmixError, UsageError

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint

Record = TypeVar("Record")

HELP = """Run Mixture-of-Experts models on one machine: 4-bit experts, one command to quantize, one to chat.

Exit codes: 0 done, 1 runtime error, 2 usage, 3 does not fit, 4 model files missing or corrupt, 130 interrupted.
Every flag can stand in the environment as QMIX_COMMAND_FLAG (QMIX_CHAT_TEMP=0.3), or in qmix.toml."""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=True, rich_markup_mode=None,
                  context_settings={"help_option_names": ["-h", "--help"]})

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
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the answer before this text; may be repeated.",
                                                show_default=False)]
System = Annotated[str | None, typer.Option("--system", help="System prompt.", show_default=False)]
Threads = Annotated[int | None, typer.Option(
    "-t", "--threads", min=1, help="Compute threads; default: physical cores, or 1 for a very small model.",
    show_default=False)]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(f"qmix {__version__}")
        raise typer.Exit


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face checkpoint: folder or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The store to write, a new folder.")],
    format: Annotated[str, typer.Option("--format", help="Experts: int4, nf4, fp4 or keep (unquantized).")] = "int4",
    dense: Annotated[str, typer.Option(
        "--dense", help="Attention and output head: int8, int4, bf16 or keep.")] = "int8",
    method: Annotated[str | None, typer.Option(
        "--method", help="int4: hqq (default) or rtn.", show_default=False)] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", help="int4: 32, 64 (default) or 128.",
                                                   show_default=False)] = None,
    block: Annotated[str | None, typer.Option("--block", help="int4: rows per block, 64, 32 or auto (default: what "
                                              "this CPU reads).", show_default=False)] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf4, fp4: quantize the scales too.")] = False,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the store at OUT once the new one is whole.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written and leave.")] = False,
) -> None:
    """Convert a checkpoint into a store of quantized experts; run it again after a break and it resumes."""
    from qmix.checkpoint import Checkpoint
    from qmix.quantize import quantize_checkpoint

    quant = _quant_config(format, dense, method, group_size, block, double_quant)
    with Checkpoint.open(paths.resolve(source, render.say)) as checkpoint:
        for name in checkpoint.skipped:
            render.say(f"skipped: {name} (the model does not need it)")
        _check_tokenizer(checkpoint)
        with render.byte_bar("quantize") as progress:
            report = quantize_checkpoint(checkpoint, out, quant, threads=threads, force=force,
                                         dry_run=dry_run, progress=progress)
    for line in report.lines():
        render.say(line)


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """Damaged tokenizer, template or generation files are an error now, not after hours of quantizing."""
    from qmix.tokenizer import load

    if not any((checkpoint.path / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        render.say(f"warning: {checkpoint.path} holds neither tokenizer.model nor tokenizer.json: chat and "
                   "generate will refuse the store until the original model's is copied into it")
        return
    load(checkpoint.path, checkpoint.config.vocab_size)


def _quant_config(format: str, dense: str, method: str | None, group_size: int | None, block: str | None,
                  double_quant: bool) -> QuantConfig:
    """Fill in what int4 needs; a flag that does not apply to the chosen formats is an error."""
    if "int4" in (format, dense):
        return _checked(QuantConfig, format, dense, method or "hqq", 64 if group_size is None else group_size,
                        _block(block or "auto"), double_quant)
    for flag, value in (("--method", method), ("--group-size", group_size), ("--block", block)):
        if value is not None:
            raise UsageError(f"{flag} {value}: only int4 has it, got --format {format} --dense {dense}",
                             f"drop {flag} or choose --format int4")
    return _checked(QuantConfig, format, dense, "", 0, 0, double_quant)


def _checked(record: Callable[..., Record], *values: Any, **named: Any) -> Record:
    """A config record made from flags; what it refuses is told by the flag's name, not the field's."""
    try:
        return record(*values, **named)
    except ConfigError as error:
        field, _, rest = error.message.partition(":")
        flag = {"temperature": "temp"}.get(field, field).replace("_", "-")
        raise UsageError(f"--{flag}:{rest}", error.cure or "see --help for what it takes") from None


def _block(text: str) -> int:
    if text == "auto":
        from qmix.kernels.table import native_block

        return native_block()
    if text not in ("64", "32"):
        raise UsageError(f"--block {text}: want 64, 32 or auto")
    return int(text)


@app.command()
def chat(
    model: ModelArgument = None, system: System = None,
    resume: Annotated[bool, typer.Option("--continue", help="Go on with the last conversation.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="More figures after each answer.")] = False,
    temp: Temp = 0.7, top_p: TopP = 0.95, top_k: TopK = 0, min_p: MinP = 0.0, repeat_penalty: Penalty = 1.0,
    seed: Seed = None, stop: Stop = None, max_tokens: MaxTokens = -1, ctx_size: Context = 0, threads: Threads = None,
) -> None:
    """Talk with a model in the terminal; /help inside lists the commands."""
    params = _checked(SamplingParams, temp, top_p, top_k, min_p, repeat_penalty, seed, max_tokens, tuple(stop or ()))
    _chat(_model_folder(model), model or "", params, system, resume, stats, ctx_size, threads)


def _chat(folder: Path, name: str, params: SamplingParams, system: str | None, resume: bool, stats: bool,
          ctx_size: int, threads: int | None) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("chat needs a terminal", "for pipes and scripts: qmix generate MODEL -p \"...\"")
    from qmix import chat as chat_package

    with _load(folder, ctx_size, threads) as engine:
        raise typer.Exit(chat_package.run(engine, model_name=name or folder.name, params=params, system=system,
                                          resume=resume, stats=stats, state_dir=paths.state_folder()))


@app.command()
def generate(
    model: ModelArgument = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt; - or none reads stdin.",
                                               show_default=False)] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.",
                                              show_default=False)] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document: text, token_ids, finish_reason, "
                                       "timings, tiers.")] = False,
    temp: Temp = 0.7, top_p: TopP = 0.95, top_k: TopK = 0, min_p: MinP = 0.0, repeat_penalty: Penalty = 1.0,
    seed: Seed = None, stop: Stop = None, max_tokens: MaxTokens = -1, ctx_size: Context = 0, threads: Threads = None,
) -> None:
    """Answer one prompt: the text on stdout, everything else on stderr."""
    from qmix import oneshot

    params = _checked(SamplingParams, temp, top_p, top_k, min_p, repeat_penalty, seed, max_tokens, tuple(stop or ()))
    folder = _model_folder(model)
    text = oneshot.read_prompt(prompt, file, sys.stdin)
    with _load(folder, ctx_size, threads) as engine:
        raise typer.Exit(oneshot.run(engine, text, params, system=system, raw=raw, as_json=json))


@app.command()
def show(model: ModelArgument = None,
         json: Annotated[bool, typer.Option("--json", help="As one JSON document.")] = False) -> None:
    """Print a store's shape, formats, sizes and quantization errors."""
    from qmix.store import Store, describe

    with Store.open(_model_folder(model)) as store:
        print(render.document(describe(store), as_json=json))


@app.command("list")
def list_models(json: Annotated[bool, typer.Option("--json", help="As one JSON document.")] = False) -> None:
    """List the stores that have an alias."""
    rows = [{"alias": p.name, "size": _folder_bytes(p) if json else render.format_bytes(_folder_bytes(p)),
             "folder": str(p)} for p in paths.local_stores()]
    if not rows and not json:
        render.say(f"no stores in {paths.models_folder()}; a store is found there by its folder's name")
    else:
        print(render.table(rows, "json" if json else "table"))


def _folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file())


@app.command()
def verify(model: ModelArgument = None,
           deep: Annotated[bool, typer.Option("--deep", help="Also read every byte and check its checksum.")] = False,
           ) -> None:
    """Check a store; exit 4 names what is damaged."""
    from qmix.errors import StoreError
    from qmix.store import Store

    folder = _model_folder(model)
    with Store.open(folder) as store, render.byte_bar("verify") as progress:
        problems = store.verify(deep, progress)
    for problem in problems:
        render.say(f"damaged: {problem}")
    if problems:
        raise StoreError(f"{folder}: {len(problems)} of its parts are damaged", "quantize it again, or copy it again")
    depth = "every checksum agrees" if deep else "structure agrees; --deep also checks every byte"
    print(f"{folder}: {depth}")


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and leave, instead of a chat.",
                                               show_default=False)] = None,
    temp: Temp = 0.7, seed: Seed = None, threads: Threads = None,
) -> None:
    """Quantize the small bundled model (once) and chat with it: a toy for trying the machinery."""
    from qmix import oneshot
    from qmix.demo import demo_store

    folder = demo_store(paths.models_folder() / "demo", render.say)
    params = _checked(SamplingParams, temp, seed=seed)
    if prompt is None:
        _chat(folder, "demo", params, None, False, False, 0, threads)
    else:
        with _load(folder, 0, threads) as engine:
            raise typer.Exit(oneshot.run(engine, prompt, params))


def _model_folder(model: str | None) -> Path:
    if model is None:
        known = ", ".join(p.name for p in paths.local_stores())
        raise UsageError("which model? MODEL is missing", f"aliases here: {known}" if known else
                         "quantize one: qmix quantize SRC OUT, or try qmix demo")
    return paths.resolve(model, render.say)


def _load(folder: Path, ctx_size: int, threads: int | None) -> Any:
    from qmix.engine import load

    with render.byte_bar("load") as progress:
        return load(folder, threads=threads, context=ctx_size, say=render.say, progress=progress)


COMMANDS = {"quantize": quantize, "chat": chat, "generate": generate, "show": show, "list": list_models,
            "verify": verify, "demo": demo}


def main(argv: list[str] | None = None) -> None:
    """The console script: run a command and leave with its exit code."""
    command = typer.main.get_command(app)
    try:
        kinds = {}
        for name, one in command.commands.items():  # type: ignore[attr-defined]
            kinds[name] = get_type_hints(COMMANDS[name])
            for parameter in one.params:
                parameter.show_envvar = False  # the rule stands once, in the help of qmix itself
        defaults = settings.read_file(settings.xdg_folder("config") / "qmix.toml", kinds)
        settings.check_environment(kinds)
        command.main(argv, prog_name="qmix", default_map=defaults, auto_envvar_prefix=settings.ENV_PREFIX)
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # typer's way out when a reader left early
            sys.exit(0)
        raise
    except QmixError as error:
        render.fail(error)
        sys.exit(error.exit_code)
    except OSError as error:
        # Files of ours raise QmixErrors; what is left is the terminal, the disk or a pipe.
        render.say(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
        sys.exit(1)
    except MemoryError:
        render.say("error: out of memory\n  close other programs or choose a smaller -c/--ctx-size")
        sys.exit(1)
    finally:
        _flush_stdout()


def _flush_stdout() -> None:
    """A reader that left early (`| head`, a closed terminal) is no error; point stdout elsewhere so that
    exit stays quiet."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
