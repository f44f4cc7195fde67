"""`qmix quantize`: a checkpoint becomes a store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qmix import render
from qmix.commands.options import DiscardSource, Offline, Revision, Threads, hub_access
from qmix.commands.quantization import Flags, choose
from qmix.commands.quantize.calibration import (
    AUTO,
    check_calibration,
    full_measure,
    mixed_config,
    own_text,
    read_calibration,
    wanted_size,
)
from qmix.commands.quantize.checks import check_tokenizer, say_notes
from qmix.commands.quantize.source import fetched_source
from qmix.config import CALIBRATED, GROUPED_BITS, QuantConfig
from qmix.errors import UsageError


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face checkpoint, folder or hub id "
                                          "(org/name, org/name:Q4_K_M, @revision); or a GGUF file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The store to write, a new folder.")],
    format: Annotated[str | None, typer.Option("--format", help="Experts: int8, int4 (default), int3, int2, mxfp4, "
                                               "nf4, fp4, q8_0 or keep (unquantized); or auto, the default for a "
                                               "quantized GGUF file, and where all experts of a quantized safetensors "
                                               "file can: all matrices stay as they are that can. Experts "
                                               "that are MXFP4 already stay so by default.",
                                               show_default=False)] = None,
    fit: Annotated[str | None, typer.Option("--fit", help="Or: the mix of int4, int3 and int2 that suits a "
                                            "--calibration text best, all weights in this size (22G); auto "
                                            "= as much as this machine holds, the default format where that fits.",
                                            show_default=False)] = None,
    bpw: Annotated[float | None, typer.Option("--bpw", min=0.1, max=100, help="Or: such a mix of this many bits per "
                                              "weight of the experts (3.7).", show_default=False)] = None,
    dense: Annotated[str | None, typer.Option(
        "--dense", help="Attention, output head, and MLPs that are no experts: int8 (default), int4, q8_0, bf16 or "
                        "keep. With --format auto they stay as the file has them by default.",
        show_default=False)] = None,
    method: Annotated[str | None, typer.Option(
        "--method", help="int4, int3, int2: hqq (default), rtn, or gptq (the default with --calibration).",
        show_default=False)] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", help="int4, int3, int2: 32, 64 (default) or 128.",
                                                   show_default=False)] = None,
    block: Annotated[str | None, typer.Option("--block", help="The same: rows per block, 64, 32 or auto (default: the "
                                              "fastest on this CPU).", show_default=False)] = None,
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="Whether to keep the multi-token-prediction head that a "
                                      "checkpoint may have, for drafts; a mix (--fit, --bpw) has none.")] = True,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf4, fp4: quantize the scales too.")] = False,
    calibration: Annotated[Path | None, typer.Option(
        "--calibration", help="gptq, --fit, --bpw: a text file; the model reads it to learn what each expert is given.",
        show_default=False)] = None,
    calibration_tokens: Annotated[int | None, typer.Option(
        "--calibration-tokens", min=1, help="Tokens of it, spread evenly; default 65536.",
        show_default=False)] = None,
    sensitivity: Annotated[str, typer.Option(
        "--sensitivity", help="--fit, --bpw: what formats do to experts is measured on a sample of rows and tokens "
                              "(sampled), or on all rows and more tokens, which takes twenty times as long (full).",
        )] = "sampled",
    threads: Threads = None, revision: Revision = None, offline: Offline = False,
    discard_source: DiscardSource = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the store at OUT once the new one is whole.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written and exit; "
                                        "--fit and --bpw still measure.")] = False,
) -> None:
    """Convert a checkpoint into a store of quantized experts; run it again after a break and it resumes."""
    from qmix.checkpoint import Checkpoint
    from qmix.commands.fitting import everything, fit_here
    from qmix.quantize import quantize_checkpoint
    from qmix.quantize.job import check_out, check_target

    wanted, auto = wanted_size(fit, bpw, format, group_size, dense or "int8"), fit == AUTO
    full = full_measure(sensitivity, wanted is not None or auto)
    implied = method is None and calibration is not None and (format or "int4") in GROUPED_BITS
    flags = Flags(format, dense, "gptq" if implied else method, group_size, block, double_quant, calibration)
    bare = replace(flags, method=method, calibration=None)
    check_calibration(flags.config(), wanted, calibration, calibration_tokens, auto)
    if discard_source and (wanted is not None or auto or dry_run):
        raise UsageError("--discard-source with " + ("--dry-run" if dry_run else "--bpw" if fit is None else "--fit")
                         + ": the weights are needed more than once", "drop one of the two")
    fits: Callable[[QuantConfig], bool] = everything
    with ExitStack() as opened:
        fetched = opened.enter_context(fetched_source(source, hub_access(revision, offline), discard_source,
                                                      lambda: None if dry_run else check_target(out, force)))
        if auto:
            with Checkpoint.open(fetched.path, False) as checkpoint:
                fitted = fit_here(checkpoint, bare, render.say)
            wanted, fits = fitted.wanted, fitted.fits
            if wanted is None and fitted.carried:
                flags = bare
        head = mtp and wanted is None  # no text says what the experts of a head are worth
        checkpoint = opened.enter_context(Checkpoint.open(fetched.path, head))
        discard = fetched.discard(checkpoint)  # first of all: what an earlier run discarded is refused from here on
        say_notes(checkpoint, without_head=not head)
        quant, wanted = choose(checkpoint, flags, wanted, render.say)
        if calibration is not None and wanted is None and quant.method not in CALIBRATED:
            render.say(f"--calibration {calibration}: not read, there is nothing to choose")
            calibration = None
        check_tokenizer(checkpoint)
        text = None if calibration is None else read_calibration(checkpoint, calibration, calibration_tokens)
        if wanted is not None:
            if not dry_run:
                check_out(checkpoint, out, force)
            name = "qmix's own text" if text is None else "the text"
            text = own_text(checkpoint) if text is None else text
            quant = mixed_config(checkpoint, quant, wanted, text, threads, full, fits, name)
            text = text if quant.method in CALIBRATED else None
        with render.byte_bar("quantize") as progress:
            report = quantize_checkpoint(checkpoint, out, quant, calibration=text, threads=threads, force=force,
                                         dry_run=dry_run, progress=progress, discard=discard)
        fetched.done()
    for line in report.lines():
        render.say(line)

