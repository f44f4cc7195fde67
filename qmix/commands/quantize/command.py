"""`qmix quantize`: a checkpoint becomes a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmix import paths, render
from qmix.commands.options import Threads
from qmix.commands.quantization import Flags, choose
from qmix.commands.quantize.calibration import check_calibration, mixed_config, read_calibration, wanted_size
from qmix.commands.skipped import skipped_lines
from qmix.config import CALIBRATED, GROUPED_BITS
from qmix.errors import ModelFileError

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face checkpoint, folder or hub id; or a GGUF "
                                          "file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The store to write, a new folder.")],
    format: Annotated[str | None, typer.Option("--format", help="Experts: int8, int4 (default), int3, int2, mxfp4, "
                                               "nf4, fp4, q8_0 or keep (unquantized); or auto, the default for a "
                                               "quantized GGUF file, and where all experts of a quantized safetensors "
                                               "file can: all matrices stay as they are that can. Experts "
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
    from qmix.quantize.job import check_out

    wanted = wanted_size(fit, bpw, format, group_size, dense or "int8")
    if method is None and calibration is not None and (format or "int4") in GROUPED_BITS:
        method = "gptq"
    flags = Flags(format, dense, method, group_size, block, double_quant, calibration)
    check_calibration(flags.config(), wanted, calibration, calibration_tokens)
    head = mtp and wanted is None  # no text says what the experts of a head are worth
    with Checkpoint.open(paths.resolve(source, render.say, "checkpoint"), head) as checkpoint:
        for line in skipped_lines(checkpoint, asked=not head):
            render.say(f"skipped: {line}")
        for note in checkpoint.notes:
            render.say(f"note: {note}")
        quant, wanted = choose(checkpoint, flags, wanted, render.say)
        calibration = calibration if wanted is not None or quant.method in CALIBRATED else None
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
