"""`qmix quantize`: a checkpoint becomes a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmix import paths, render
from qmix.commands.options import Threads, quant_config
from qmix.commands.quantize.calibration import check_calibration, mixed_config, read_calibration, wanted_size
from qmix.commands.quantize.published import Flags, choose_for_published
from qmix.commands.skipped import skipped_lines
from qmix.config import CALIBRATED, GROUPED_BITS, QuantConfig
from qmix.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face checkpoint, folder or hub id; or a GGUF "
                                          "file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The store to write, a new folder.")],
    format: Annotated[str | None, typer.Option("--format", help="Experts: int8, int4 (default), int3, int2, mxfp4, "
                                               "nf4, fp4, q8_0 or keep (unquantized); or auto, the default for a "
                                               "quantized GGUF file: all matrices stay as they are that can. Experts "
                                               "that are MXFP4 already stay so by default.",
                                               show_default=False)] = None,
    fit: Annotated[str | None, typer.Option("--fit", help="Or: the mix of int4, int3 and int2 that suits a "
                                            "--calibration text best, all weights in this size (22G).",
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
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the store at OUT once the new one is whole.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written and exit; "
                                        "--fit and --bpw still measure.")] = False,
) -> None:
    """Convert a checkpoint into a store of quantized experts; run it again after a break and it resumes."""
    from qmix.checkpoint import Checkpoint
    from qmix.quantize import quantize_checkpoint
    from qmix.quantize.carried import dense_formats, dense_lines, quantized_types
    from qmix.quantize.job import check_out

    format, auto = (None, True) if format == "auto" else (format, False)
    wanted = wanted_size(fit, bpw, "auto" if auto else format, group_size, dense or "int8")
    if method is None and calibration is not None and (format or "int4") in GROUPED_BITS:
        method = "gptq"
    quant = quant_config(format or "int4", dense or "int8", method, group_size, block, double_quant)
    check_calibration(quant, wanted, calibration, calibration_tokens)
    head = mtp and wanted is None  # no text says what the experts of a head are worth
    with Checkpoint.open(paths.resolve(source, render.say, "checkpoint"), head) as checkpoint:
        for line in skipped_lines(checkpoint, asked=not head):
            render.say(f"skipped: {line}")
        for note in checkpoint.notes:
            render.say(f"note: {note}")
        if checkpoint.expert_format is not None:
            asked = Flags(format, dense or "int8", method, group_size, block, calibration)
            quant, wanted = choose_for_published(checkpoint, quant, wanted, asked)
            calibration = calibration if wanted is not None or quant.method in CALIBRATED else None
            if quant.experts == checkpoint.expert_format and dense is None and checkpoint.types:
                quant = replace(quant, dense_formats=dense_formats(checkpoint))
                for line in dense_lines(checkpoint, quant):
                    render.say(line)
        elif quantized := quantized_types(checkpoint):
            if format is None and wanted is None and calibration is None:
                flags = {"--method": method, "--group-size": group_size, "--block": block}
                quant = _carry_all(checkpoint, quant, dense, flags)
            else:
                render.say(f"note: {checkpoint.path}: the weights are quantized already ({', '.join(quantized)}); they "
                           f"are read as {checkpoint.model.dtype}, and what is quantized again adds to their error "
                           "(--format auto keeps all that can stay as it is)")
        _check_tokenizer(checkpoint)
        text = None if calibration is None else read_calibration(checkpoint, calibration, calibration_tokens)
        if wanted is not None:
            assert text is not None
            if not dry_run:
                check_out(checkpoint, out, force)
            quant = mixed_config(checkpoint, quant, wanted, text, threads)
            text = text if quant.method in CALIBRATED else None
        with render.byte_bar("quantize") as progress:
            report = quantize_checkpoint(checkpoint, out, quant, calibration=text, threads=threads, force=force,
                                         dry_run=dry_run, progress=progress)
    for line in report.lines():
        render.say(line)


def _carry_all(checkpoint: Checkpoint, quant: QuantConfig, dense: str | None,
               flags: Mapping[str, object]) -> QuantConfig:
    """--format auto, said. flags: those of int4, None where they were not given; UsageError where it has no use for
    them."""
    from qmix.quantize import carried

    found = carried.carry_all(checkpoint, quant, dense)
    if not found.grouped and (given := [flag for flag, value in flags.items() if value is not None]):
        raise UsageError(f"{given[0]}: there are no codes to choose: all experts stay as the file has them",
                         f"drop {given[0]}, or choose --format int4")
    for line in carried.lines(checkpoint, found):
        render.say(line)
    return found


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """Damaged tokenizer, template or generation files are an error now, not after hours of quantizing."""
    from qmix.tokenizer import load

    if not any((checkpoint.folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        render.say(f"warning: {checkpoint.path} holds neither tokenizer.model nor tokenizer.json: chat and "
                   "generate will refuse the store until the original model's is copied into it")
        return
    try:
        load(checkpoint.folder, checkpoint.model.vocab)
    except ModelFileError as e:  # of a GGUF file, the folder is one that nobody knows
        raise ModelFileError(e.message.replace(str(checkpoint.folder), str(checkpoint.path)), e.cure) from None
