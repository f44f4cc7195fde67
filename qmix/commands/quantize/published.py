"""What becomes of a checkpoint whose experts are published in a 4-bit format: they stay as they are, bit for bit,
unless another format is asked for, which is said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qmix import render
from qmix.commands.options import quant_config
from qmix.config import CALIBRATED, GROUPED_BITS, QuantConfig
from qmix.errors import UsageError

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint
    from qmix.quantize.fit import Wanted


class Flags(NamedTuple):
    """As they were given, None where they were not; method: gptq too where --calibration implies it."""

    format: str | None
    dense: str
    method: str | None
    group_size: int | None
    block: str | None
    calibration: Path | None


def choose_for_published(checkpoint: Checkpoint, quant: QuantConfig, wanted: Wanted | None,
                         flags: Flags) -> tuple[QuantConfig, Wanted | None]:
    """How to quantize a checkpoint that has an `expert_format`, and the size of a mix, None where none is to be found.
    quant: as for any other checkpoint. UsageError for flags of a format that was not asked for."""
    kind = checkpoint.expert_format
    assert kind is not None
    if wanted is not None:
        kept = _kept(kind, flags if flags.dense in GROUPED_BITS else flags._replace(method=None, block=None))
        if _fits(checkpoint, kept, wanted):
            unread = "" if kept.method in CALIBRATED else ", and the text is not read"
            render.say(f"experts: {kind} as published, kept bit for bit: {wanted.flag} has room for them, so no mix is "
                       f"made{unread}")
            return kept, None
    elif flags.format in (None, kind):
        if flags.calibration is not None and flags.dense not in GROUPED_BITS:
            raise UsageError(f"--calibration {flags.calibration}: the experts are {kind} already and stay so: there "
                             "are no codes to choose", "drop it, or choose --format int4")
        render.say(f"experts: {kind} as published, kept bit for bit")
        return _kept(kind, flags), None
    if quant.experts == "keep":
        render.say(f"note: the experts are published as {kind}; --format keep decodes them, exactly, to more bytes")
    else:
        how = f"--format {flags.format}" if wanted is None else wanted.flag
        render.say(f"note: the experts are published as {kind}; {how} quantizes them a second time, which adds to "
                   f"their error (without it they stay {kind}, bit for bit)")
    return quant, wanted


def _kept(kind: str, flags: Flags) -> QuantConfig:
    try:
        return quant_config(kind, flags.dense, flags.method, flags.group_size, flags.block, False)
    except UsageError as e:
        raise UsageError(f"the experts are {kind} already and stay so; {e.message}", e.cure) from None


def _fits(checkpoint: Checkpoint, kept: QuantConfig, wanted: Wanted) -> bool:
    from qmix.quantize.fit import expert_weights
    from qmix.store import StoreLayout

    layout, model = StoreLayout.of(checkpoint.model, kept), checkpoint.model
    if wanted.nbytes:
        return layout.nbytes <= wanted.nbytes
    return 8 * layout.record_bytes * len(model.expert_keys) <= wanted.bits * expert_weights(model)
