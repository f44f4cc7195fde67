"""--calibration turns a text file into the tokens that a calibrated method reads; --fit and --bpw measure on them."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from qmix import paths, render
from qmix.commands.options import flag_bytes
from qmix.config import CALIBRATED, QuantConfig
from qmix.errors import DoesNotFit, UsageError
from qmix.sizes import MIB, format_bytes
from qmix.textfile import decode

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint
    from qmix.quantize import Calibration
    from qmix.quantize.fit import Wanted

AUTO = "auto"  # of --fit
MOST = 64 * MIB  # bytes of a text that are read


def check_calibration(quant: QuantConfig, wanted: Wanted | None, file: Path | None, tokens: int | None,
                      auto: bool = False) -> None:
    """UsageError unless method and flags go together. wanted: the size of a mixed store; auto: as suits the machine,
    which has a text of its own to measure on."""
    if auto and (quant.method not in CALIBRATED or file is not None):
        if file is None and tokens is not None:
            raise UsageError(f"--calibration-tokens {tokens}: of a --calibration FILE, and there is none", "drop it")
        return
    if quant.method in CALIBRATED or wanted is not None:
        if file is None:
            raise UsageError(f"{wanted.flag if wanted else f'--method {quant.method}'}: needs a text to calibrate on",
                             "name one with --calibration FILE, similar to what the model will read")
        return
    for flag, value in (("--calibration", file), ("--calibration-tokens", tokens)):
        if value is not None:
            raise UsageError(f"{flag} {value}: only --method gptq, --fit and --bpw read a text",
                             f"drop {flag}, or choose --method gptq")


def wanted_size(fit: str | None, bpw: float | None, format: str | None, group_size: int | None,
                dense: str) -> Wanted | None:
    """--fit or --bpw, None for neither and for --fit auto; UsageError for both, and for flags that they decide."""
    if fit is None and bpw is None:
        return None
    flag = f"--fit {fit}" if fit is not None else f"--bpw {bpw:g}"
    if bpw is not None and not isfinite(bpw):
        raise UsageError(f"{flag}: want a number, as 3.7")
    if fit is not None and bpw is not None:
        raise UsageError(f"{flag} and --bpw {bpw:g}: one size is enough", "drop one of them")
    if format is not None:
        raise UsageError(f"{flag}: chooses the formats itself, got --format {format}", "drop --format")
    if group_size is not None and dense != "int4":
        raise UsageError(f"{flag}: chooses the groups itself, got --group-size {group_size}", "drop --group-size")
    if fit == AUTO:
        return None
    from qmix.quantize.fit import Wanted

    return Wanted(nbytes=flag_bytes("--fit", fit)) if fit is not None else Wanted(bits=bpw or 0.0)


def full_measure(sensitivity: str, measured: bool) -> bool:
    """--sensitivity; UsageError for another word, and for full where nothing is measured."""
    if sensitivity not in ("sampled", "full"):
        raise UsageError(f"--sensitivity: got {sensitivity!r:.40}, want sampled or full")
    if sensitivity == "full" and not measured:
        raise UsageError("--sensitivity full: only --fit and --bpw measure sensitivities", "drop it, or choose a size")
    return sensitivity == "full"


def mixed_config(checkpoint: Checkpoint, quant: QuantConfig, wanted: Wanted, text: Calibration, threads: int | None,
                 full: bool = False, fits: Callable[[QuantConfig], bool] = lambda quant: True,
                 name: str = "the text") -> QuantConfig:
    """`quant` with a mix of that size; measures what is not known of the checkpoint, in full or on a sample, and says
    what to expect. fits: whether a mix is small enough, where its bytes alone do not tell; name: of the text.
    DoesNotFit where not even the smallest is."""
    from qmix import hardware
    from qmix.quantize import fit, job
    from qmix.quantize.fit import Wanted

    model = checkpoint.model
    threads = hardware.compute_cores() if threads is None else hardware.check_threads(threads)
    sizes = fit.Sizes.of_model(model, quant, wanted)  # a size that cannot be is refused now
    job.check_memory(checkpoint, fit.rows_of(model, text, full), threads, fit.beside_bytes(model, threads))
    with render.byte_bar("measure") as progress:
        found = fit.sensitivity(checkpoint, text, quant, threads,
                                paths.if_any(paths.sensitivity_folder), render.say, progress, full)
    mixed, choice = fit.mixed(model, quant, found, wanted)
    floor = len(model.expert_keys) * min(sizes.of.values())
    while not fits(mixed):
        if choice.nbytes <= floor:
            raise DoesNotFit(f"--fit {AUTO}: not even the smallest mix, {format_bytes(floor)} of experts, fits with "
                             "what it takes besides", "free memory, or drop --fit")
        smaller = max(choice.nbytes - choice.nbytes // 100 - 1, floor)
        render.say(f"this mix takes more beside its experts than was thought: a mix of {format_bytes(smaller)} instead")
        mixed, choice = fit.mixed(model, quant, found, Wanted(records=smaller))
    measured = fit.sensitivity_text(model, text, full).tokens
    for line in fit.lines(model, quant, found, choice, measured, name):
        render.say(line)
    return mixed


def own_text(checkpoint: Checkpoint) -> Calibration:
    """The text that qmix brings along, in short sequences, where none was named."""
    from qmix.bench.text import encode, recorded_text
    from qmix.quantize import TOKENS, Calibration
    from qmix.quantize.extent import LENGTH
    from qmix.tokenizer import load

    head, plain = encode(recorded_text(), load(checkpoint.folder, checkpoint.model.vocab))
    found = Calibration.of_text(head, plain, TOKENS, min(LENGTH, checkpoint.model.max_positions))
    render.say(f"no --calibration FILE: {found.tokens} tokens of the short text that qmix brings along (prose, Python, "
               "German) are read; a text like those that the model will read measures better")
    return found


def read_calibration(checkpoint: Checkpoint, file: Path, tokens: int | None) -> Calibration:
    """The first 64 MiB of `file` in the checkpoint's own tokens, cut into sequences; says how many there are."""
    from qmix.quantize import TOKENS, Calibration
    from qmix.tokenizer import load

    try:
        with open(file, "rb") as opened:
            data = opened.read(MOST + 1)
    except OSError as e:
        raise UsageError(f"--calibration {file}: {e.strerror}", "name a text file that can be read") from None
    if len(data) > MOST:
        render.say(f"{file}: only the first {format_bytes(MOST)} are read")
    text = decode(data[:MOST], f"--calibration {file}", cut=len(data) > MOST)
    tokenizer = load(checkpoint.folder, checkpoint.model.vocab)
    plain = tokenizer.encode(text, bos=False)
    head = tokenizer.encode("", bos=True)
    wanted = TOKENS if tokens is None else tokens
    found = Calibration.of_text(head, plain, wanted, checkpoint.model.max_positions)
    short = f", fewer than the {wanted} wanted: the text is too short" if found.tokens < wanted - found.length else ""
    render.say(f"calibrating on {found.tokens} tokens of {file}: {len(found.ids)} sequences of {found.length}{short}")
    return found
