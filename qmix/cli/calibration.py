"""--calibration: a text file as the tokens that a calibrated method reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qmix import render
from qmix.config import CALIBRATED, QuantConfig
from qmix.errors import UsageError
from qmix.sizes import MIB, format_bytes

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint
    from qmix.quantize import Calibration

MOST = 64 * MIB  # bytes of a text that are read


def check_calibration(quant: QuantConfig, file: Path | None, tokens: int | None) -> None:
    """UsageError unless method and flags go together."""
    if quant.method in CALIBRATED:
        if file is None:
            raise UsageError(f"--method {quant.method}: wants a text to calibrate on",
                             "name one with --calibration FILE, of the kind that the model will meet")
        return
    for flag, value in (("--calibration", file), ("--calibration-tokens", tokens)):
        if value is not None:
            raise UsageError(f"{flag} {value}: only --method gptq reads a text",
                             f"drop {flag}, or choose --method gptq")


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
        render.say(f"{file}: only the first {format_bytes(MOST)} are looked at")
        data = data[:MOST]
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        if len(data) < MOST or e.start < MOST - 4:
            raise UsageError(f"--calibration {file}: byte {e.start} is not UTF-8", "name a text file") from None
        text = data[:e.start].decode()  # a character cut in two
    tokenizer = load(checkpoint.path, checkpoint.config.vocab_size)
    plain = tokenizer.encode(text, bos=False)
    head = tokenizer.encode("", bos=True)
    wanted = TOKENS if tokens is None else tokens
    found = Calibration.cut(head, plain, wanted, checkpoint.config.max_positions)
    short = f", all that it gives of {wanted}" if found.tokens < wanted - found.length else ""
    render.say(f"calibrating on {found.tokens} tokens of {file}: {len(found.ids)} sequences of {found.length}{short}")
    return found
