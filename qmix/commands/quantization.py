"""How a model is quantized, from the flags: `qmix quantize` does so, `qmix plan` forecasts the same.

What is quantized already (experts that are published in a 4-bit format, the matrices of a quantized GGUF file) stays as
it is, bit for bit, unless a flag asks for another format, which is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qmix.commands.options import quant_config
from qmix.config import CALIBRATED, GROUPED_BITS, QuantConfig
from qmix.errors import UsageError
from qmix.spec import Model

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint
    from qmix.quantize.fit import Wanted

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Flags:
    """As they were given, None where they were not; method: gptq too where --calibration implies it. UsageError where
    they do not go together, whatever the model."""

    format: str | None = None
    dense: str | None = None
    method: str | None = None
    group_size: int | None = None
    block: str | None = None
    double_quant: bool = False
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.format == "auto" and (self.calibration is not None or self.method in CALIBRATED):
            flag = f"--method {self.method}" if self.calibration is None else f"--calibration {self.calibration}"
            raise UsageError(f"--format auto: keeps the codes that the file has, and {flag} would choose new ones",
                             "drop one of the two, or choose --format int4")
        self.config()

    @property
    def experts(self) -> str | None:
        """The format asked for by name."""
        return None if self.format == "auto" else self.format

    @property
    def dense_or_default(self) -> str:
        return self.dense or "int8"

    def config(self, default: str = "int4") -> QuantConfig:
        """Of a model of which nothing is quantized; default: the experts' format where none is asked for."""
        return quant_config(self.experts or default, self.dense_or_default, self.method, self.group_size, self.block,
                            self.double_quant)


@dataclass(frozen=True, slots=True)
class Described:
    """A model without its weights, as config.json has it: what `choose` asks of a Checkpoint."""

    model: Model
    expert_format: str | None


def choose(source: Checkpoint | Described, flags: Flags, wanted: Wanted | None,
           say: Say) -> tuple[QuantConfig, Wanted | None]:
    """How the flags have `source` quantized, and the size of a mix, None where none is to be found. UsageError for
    flags of a format that was not asked for."""
    if source.expert_format is not None:
        quant, wanted = _of_published(source, source.expert_format, flags, wanted, say)
        if quant.experts == source.expert_format and flags.dense is None and not isinstance(source, Described):
            quant = _keep_dense(source, quant, say)
        return quant, wanted
    if isinstance(source, Described):
        return flags.config(), wanted
    return _of_weights(source, flags, wanted, say), wanted


def _of_weights(checkpoint: Checkpoint, flags: Flags, wanted: Wanted | None, say: Say) -> QuantConfig:
    """Of experts that are not in a format of their own, all of them, but may be in several of ggml's."""
    from qmix.quantize import carried

    quant = flags.config()
    types = carried.quantized_types(checkpoint)
    if not types:
        return quant
    asked = flags.experts is not None or wanted is not None or flags.calibration is not None
    if checkpoint.lowbit and flags.format != "auto":
        # Of FP8 and the like nothing can stay: quantizing it is what the user came for. So it is with flags of int4.
        asked = asked or flags.method is not None or flags.group_size is not None or not carried.all_experts(checkpoint)
    if asked:
        say(carried.again_line(checkpoint, quant))
        return quant
    found = carried.carry_all(checkpoint, quant, flags.dense)
    if not found.grouped:
        for flag, value in (("--method", flags.method), ("--group-size", flags.group_size), ("--block", flags.block)):
            if value is not None:
                raise UsageError(f"{flag}: there are no codes to choose: all experts stay as the file has them",
                                 f"drop {flag}, or choose --format int4")
    for line in carried.lines(checkpoint, found):
        say(line)
    if checkpoint.lowbit:
        say("these formats have exactly the numbers of the checkpoint's codes and scales; --format int4 takes 4.5 bits "
            "a weight and adds an error")
    return found


def _keep_dense(checkpoint: Checkpoint, quant: QuantConfig, say: Say) -> QuantConfig:
    """`quant` with the dense matrices of a GGUF file as they are, where that can be."""
    from qmix.quantize.carried import dense_formats, dense_lines

    if not checkpoint.types:
        return quant
    quant = replace(quant, dense_formats=dense_formats(checkpoint))
    for line in dense_lines(checkpoint, quant):
        say(line)
    return quant


def _of_published(source: Checkpoint | Described, kind: str, flags: Flags, wanted: Wanted | None,
                  say: Say) -> tuple[QuantConfig, Wanted | None]:
    """Of a model whose experts are all published as `kind`."""
    dense = flags.dense_or_default
    if wanted is not None:
        kept = _kept(kind, flags if dense in GROUPED_BITS else replace(flags, method=None, block=None))
        if _fits(source.model, kept, wanted):
            unread = "" if kept.method in CALIBRATED else ", and the text is not read"
            say(f"experts: {kind} as published, kept bit for bit: {wanted.flag} has room for them, so no mix is "
                f"made{unread}")
            return kept, None
    elif flags.experts in (None, kind):
        if flags.calibration is not None and dense not in GROUPED_BITS:
            raise UsageError(f"--calibration {flags.calibration}: the experts are {kind} already and stay so: there "
                             "are no codes to choose", "drop it, or choose --format int4")
        kept = _kept(kind, flags)
        say(f"experts: {kind} as published, kept bit for bit")
        return kept, None
    quant = flags.config()
    if quant.experts == "keep":
        say(f"note: the experts are published as {kind}; --format keep decodes them, exactly, to more bytes")
    else:
        how = f"--format {flags.format}" if wanted is None else wanted.flag
        say(f"note: the experts are published as {kind}; {how} quantizes them a second time, which adds to "
            f"their error (without it they stay {kind}, bit for bit)")
    return quant, wanted


def _kept(kind: str, flags: Flags) -> QuantConfig:
    try:
        return replace(flags, format=kind, double_quant=False).config()
    except UsageError as e:
        raise UsageError(f"the experts are {kind} already and stay so; {e.message}", e.cure) from None


def _fits(model: Model, kept: QuantConfig, wanted: Wanted) -> bool:
    from qmix.quantize.fit import expert_weights
    from qmix.store import StoreLayout

    layout = StoreLayout.of(model, kept)
    if wanted.nbytes:
        return layout.nbytes <= wanted.nbytes
    return 8 * layout.record_bytes * len(model.expert_keys) <= wanted.bits * expert_weights(model)
