"""`--fit auto`: what size of mix suits this machine. `qmix quantize` makes it, `qmix plan` forecasts it.

The memory is that of the plan which loading makes (offload/plan.py), with its margin: VRAM where there is a GPU, else
RAM, less the program, dense weights, KV cache of the context, workspace and reserve. A multi-token-prediction head is
not counted: a mix has none, and loading leaves out the default format's where experts need its room (offload/head.py).
In this order:

1. The default format, where all experts fit into that memory, or where they fit into VRAM and RAM and no mix does into
   VRAM alone.
2. A mix that fills that memory; with a GPU, VRAM, else VRAM and RAM.
3. Where not even the smallest mix fits, the disk is read for every token. Then the default format, or the smallest mix
   where the plan forecasts at least FASTER times its speed, which is where little of that mix is missing. Fewer bits
   alone give less than twice the speed, at some twenty times the divergence (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qmix.commands.plan.report import Machine, Planned, at_once, find_gpu, plan_trunk, speeds_of
from qmix.commands.quantization import Described, Flags, choose
from qmix.config import QuantConfig
from qmix.errors import DoesNotFit
from qmix.offload.forecast import Forecast, Speeds, forecast
from qmix.offload.needs import Needs, choose_context
from qmix.offload.plan import STAGING, Plan
from qmix.sizes import format_bytes
from qmix.spec import Model
from qmix.store import StoreLayout

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint
    from qmix.quantize.fit import Wanted

Say = Callable[[str], None]
FASTER = 4.0  # times the speed, for which so much error is accepted
TRIES = 8  # at a room from which a plan takes more than was thought


@dataclass(frozen=True, slots=True)
class Fitted:
    """wanted: the size of the mix, None for the default format; fits: whether a store of some formats is as it was
    meant to be here: all experts in the memory that was filled, where any memory could be; carried: whether the
    default format is that of the source, of which no codes are chosen."""

    wanted: Wanted | None
    fits: Callable[[QuantConfig], bool]
    carried: bool = False


def fit_auto(source: Checkpoint | Described, flags: Flags, machine: Machine, context: int, kv: str,
             known: Speeds | None, say: Say) -> Fitted:
    """What suits `machine`, whose vram is given where it has a GPU (find_gpu); said. known: measured speeds. DoesNotFit
    where nothing that qmix makes of `source` runs there."""
    here = _Here(source, flags, machine, choose_context(source.model, context), kv, known, say)
    found = here.fit()
    return replace(found, carried=not here.default_is_grouped)


def fit_here(source: Checkpoint, flags: Flags, say: Say) -> Fitted:
    """fit_auto for this machine, as `qmix chat` without flags would load."""
    from qmix import paths
    from qmix.commands.loading import known_speeds
    from qmix.commands.plan.report import known_gpu

    speeds = known_speeds(paths.if_any(paths.hardware_file), say)
    machine = find_gpu(Planned("", source.model.trunk, _default(source, flags), {}),
                       Machine(gpu=known_gpu(paths.if_any(paths.gpu_memory_file), say)), "auto", say)
    return fit_auto(source, flags, machine, 0, "bf16", speeds, say)


def forecast_fit(source: Checkpoint | Described, flags: Flags, machine: Machine, device: str, context: int, kv: str,
                 known: Speeds | None, say: Say) -> QuantConfig:
    """The formats that fit_auto would choose, those of a mix as far as their sizes go; said as there."""
    from qmix.quantize.fit import even

    here = find_gpu(Planned("", source.model.trunk, _default(source, flags), {}), machine, device, lambda line: None)
    wanted = fit_auto(source, flags, here, context, kv, known, say).wanted
    if wanted is None:
        return choose(source, flags, None, say)[0]
    say("fit: what such a mix costs in KL divergence, `qmix quantize --fit auto` measures and says")
    return even(source.model.trunk, replace(flags, format=None).config(), wanted)


def _default(source: Checkpoint | Described, flags: Flags) -> QuantConfig:
    return choose(source, flags, None, lambda line: None)[0]


def everything(quant: QuantConfig) -> bool:
    """Fits."""
    return True


class _Here:
    """A machine, and what is to fit there."""

    def __init__(self, source: Checkpoint | Described, flags: Flags, machine: Machine, context: int, kv: str,
                 known: Speeds | None, say: Say):
        from qmix.quantize.fit import Wanted, even, smallest

        self._say, self._context, self._kv, self._known = say, context, kv, known
        self._model: Model = source.model.trunk
        self._default = _default(source, flags)
        self._make, self._wanted = even, Wanted
        self._base = replace(flags, format=None, calibration=None).config()
        self._least = smallest(self._model, self._base)
        self._machine = at_once(machine)  # what measuring itself takes later is no reason for a smaller mix

    @property
    def default_is_grouped(self) -> bool:
        """Whether the default format's codes are chosen by a method."""
        return bool(self._default.grouped)

    def fit(self) -> Fitted:
        default, least = self._try(self._default), self._plan(self._least)
        gpu = self._machine.vram is not None
        first = "VRAM" if gpu else "RAM"
        if default is not None and _all_in_first(default):
            self._say(f"fit: {self._named()} fits into {first} as it is: no mix is made, and nothing is measured "
                      f"({default.lines()[0]})")
            return Fitted(None, self._first)
        if _all_in_first(least):
            return self._mix(least, first, self._first, _room(least, 0))
        if gpu and default is not None and default.resident:
            self._say(f"fit: not even the smallest mix ({format_bytes(least.needs.expert_bytes)} of experts) fits into "
                      f"VRAM, and {self._named()} fits into VRAM and RAM: no mix is made, and the disk is not read")
            return Fitted(None, self._anywhere)
        if gpu and least.resident:
            largest = max(nbytes for _, nbytes in least.needs.by_kind)
            return self._mix(least, "VRAM and RAM", self._anywhere, sum(
                _room(least, i) for i in range(2)) - STAGING * largest)
        return self._page(default, least)

    def _mix(self, least: Plan, where: str, fits: Callable[[QuantConfig], bool], room: int) -> Fitted:
        """A mix of `room` bytes, or a little less, so that all its records are there."""
        floor = least.needs.expert_bytes
        for _ in range(TRIES):
            wanted = self._wanted(records=max(floor, room))
            quant = self._make(self._model, self._base, wanted)
            if room <= floor or fits(quant):
                break
            room -= max(room - floor, 0) // 8 + 1
        self._say(f"fit: {self._named()} does not fit into {where}; a mix of {format_bytes(wanted.records)} of experts "
                  f"does, {self._bits(wanted.records):.2f} bits a weight: {least_line(least)}")
        self._say(f"fit: all weight files {format_bytes(StoreLayout.of(self._model, quant).nbytes)}; "
                  f"{self._forecast(self._plan(quant)).line()}")
        return Fitted(wanted, fits)

    def _page(self, default: Plan | None, least: Plan) -> Fitted:
        """Nothing fits: the default from the disk, or the smallest mix where that is worth it."""
        mixed = self._forecast(least)
        small = f"the smallest mix, {self._bits(least.needs.expert_bytes):.2f} bits a weight"
        self._say(f"fit: not even {small}, fits into memory ({format_bytes(least.needs.expert_bytes)} of experts, "
                  f"{least.slots} of {least.needs.records} in memory): experts are read from the disk for every token")
        if default is not None:
            plain = self._forecast(default)
            if mixed.least < FASTER * plain.least:
                self._say(f"fit: {self._named()} is kept: {plain.line().removeprefix('forecast: ')}; {small}, would "
                          f"run at {mixed.least:.2f} to {mixed.most:.2f} tok/s, which is not worth its error "
                          f"(--bpw {self._bits(least.needs.expert_bytes) + 0.01:.2f} makes it)")
                return Fitted(None, everything)
            self._say(f"fit: {small}, is made: {mixed.line().removeprefix('forecast: ')}; {self._named()} would run at "
                      f"{plain.least:.2f} to {plain.most:.2f} tok/s (without --fit, that is made)")
        else:
            self._say(f"fit: {small}, is made: {self._named()} would not run at all here")
        return Fitted(self._wanted(records=least.needs.expert_bytes), everything)

    def _named(self) -> str:
        quant = self._default
        layout = StoreLayout.of(self._model, quant)
        total = sum(layout.record(key).nbytes for key in self._model.expert_keys)
        name = "the file's own mix of formats" if quant.experts == "mixed" else quant.experts
        return f"{name} ({format_bytes(total)} of experts, {self._bits(total):.2f} bits a weight)"

    def _bits(self, nbytes: int) -> float:
        return 8 * nbytes / (self._model.expert_numbers * len(self._model.expert_keys))

    def _forecast(self, plan: Plan) -> Forecast:
        return forecast(plan, speeds_of(self._machine, self._known)[0])

    def _plan(self, quant: QuantConfig) -> Plan:
        return plan_trunk(Needs.of(self._model, quant, self._context, self._kv), self._machine)

    def _try(self, quant: QuantConfig) -> Plan | None:
        try:
            return self._plan(quant)
        except DoesNotFit:
            return None

    def _first(self, quant: QuantConfig) -> bool:
        plan = self._try(quant)
        return plan is not None and _all_in_first(plan)

    def _anywhere(self, quant: QuantConfig) -> bool:
        plan = self._try(quant)
        return plan is not None and plan.resident


def least_line(plan: Plan) -> str:
    """What the fastest memory holds beside experts."""
    tier = plan.tiers[0]
    return f"{tier.name} {format_bytes(tier.budget)}, of which " + ", ".join(
        f"{name} {format_bytes(nbytes)}" for name, nbytes in tier.parts() if name != "expert slots")


def _all_in_first(plan: Plan) -> bool:
    return plan.tiers[0].slots >= plan.needs.records


def _room(plan: Plan, tier: int) -> int:
    """Bytes for records."""
    return plan.tiers[tier].budget - plan.tiers[tier].fixed
