"""What `qmix run` would do, in lines: what comes from the hub, how it is quantized, how long that takes, how fast the
model should run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix import hardware, hub, json_cache, paths
from qmix.commands.plan import report as planning
from qmix.commands.quantization import Flags
from qmix.config import QuantConfig
from qmix.errors import ConfigError, DoesNotFit
from qmix.offload.forecast import Speeds
from qmix.sizes import format_bytes
from qmix.spec import Model
from qmix.store import StoreLayout

Say = Callable[[str], None]
RATES, VERSION = "qmix_rates", 1
# MB/s of source weights with 2 cores of a Zen 4, by method; "" is for formats that no method chooses codes for.
STATED = {"hqq": 150.0, "rtn": 460.0, "": 400.0}
STATED_CORES = 2
STATED_LINE = 12.5  # MB/s of a download: 100 Mbit/s


@dataclass(frozen=True, slots=True)
class Proposal:
    """nbytes: of the store; source_bytes: of the weights that are quantized, 0 where that is not known; outlook: what
    `qmix plan` says of the store."""

    model: Model
    quant: QuantConfig
    nbytes: int
    source_bytes: int
    outlook: dict[str, Any]

    @property
    def kind(self) -> str:
        """The format, for the store's name; of matrices that stay as their file has them that is said by its name."""
        return "" if self.quant.dense_formats or self.quant.experts == "mixed" else self.quant.experts


def choose_format(flags: Flags) -> Flags:
    """How the model is to be quantized where no flag says so: today as `qmix quantize` does by default. What sizes a
    mix for the machine belongs here."""
    return flags


def propose(path: Path, source_bytes: int, flags: Flags, context: int, kv: str, machine: planning.Machine, device: str,
            known: Speeds | None, say: Say) -> Proposal:
    """path: of the source, or of a preview of it. DoesNotFit where this machine has no room for the model."""
    planned = planning.find_model(path, flags, None, say)
    machine = planning.find_gpu(planned, machine, device, say)
    outlook = planning.describe(planned, context, machine, known, say, kv)
    layout = StoreLayout.of(planned.model, planned.quant)
    return Proposal(planned.model, planned.quant, layout.nbytes, source_bytes, outlook)


def lines(proposal: Proposal, found: hub.Found | None, out: Path, rates: dict[str, float], discard: bool) -> list[str]:
    """What is to be done, for the user to agree to. Figures are estimates, and called so."""
    fetched = 0 if found is None else found.to_fetch
    said = []
    if found is not None:
        said.append(f"download   {format_bytes(fetched)} of {format_bytes(found.nbytes)} from the hub, "
                    f"about {_time(fetched / 1e6 / STATED_LINE)} at 100 Mbit/s"
                    + ("; deleted as it is quantized" if discard else f"; kept in {found.storage}")
                    if fetched else f"download   nothing: {format_bytes(found.nbytes)} are in the hub's cache")
    size = proposal.source_bytes or proposal.nbytes
    rate, measured = quantize_rate(proposal.quant, rates)
    experts = "as the file has them" if proposal.quant.experts == "mixed" else f"to {proposal.quant.experts}"
    said += [f"quantize   experts {experts}, {format_bytes(proposal.nbytes)} in {out}: about "
             f"{_time(size / 1e6 / rate)} ({rate:.0f} MB/s, {'as measured here' if measured else 'an assumption'})",
             *(f"run        {line}" for line in proposal.outlook["plan"]),
             f"speed      {proposal.outlook['forecast']} (an estimate)"]
    return said


def check_room(proposal: Proposal, found: hub.Found | None, out: Path) -> None:
    """DoesNotFit where the disk cannot take the store, or, on the same disk, download and store."""
    place = _existing(out)
    there = _tree_bytes(out.with_name(out.name + ".partial"))
    needed, free = max(0, proposal.nbytes - there), shutil.disk_usage(place).free
    both = found is not None and found.to_fetch > 0 and _same_disk(place, found.storage)
    total = needed + (found.to_fetch if both and found is not None else 0)
    if total > free:
        what = f"download and store need {format_bytes(total)}" if both else f"the store needs {format_bytes(needed)}"
        raise DoesNotFit(f"{out}: {what} of disk; {format_bytes(free)} free, short of {format_bytes(total - free)}",
                         "make room, or set QMIX_HOME or HF_HOME to a folder on another disk")


def quantize_rate(quant: QuantConfig, rates: dict[str, float]) -> tuple[float, bool]:
    """(MB/s of source weights, whether this machine measured them)."""
    if quant.method in rates:
        return rates[quant.method], True
    stated = STATED.get(quant.method, STATED["hqq"])
    return stated * (max(1, hardware.compute_cores()) / STATED_CORES if quant.method in ("hqq", "rtn") else 1), False


def load_rates(say: Say) -> dict[str, float]:
    """MB/s of earlier runs on this machine, by method."""
    def make(values: dict[str, Any]) -> dict[str, float]:
        if not all(isinstance(rate, int | float) and 0.001 < rate < 1e6 for rate in values.values()):
            raise ConfigError("want MB/s by method")
        return values

    file = paths.if_any(paths.rates_file)
    return (json_cache.load(file, RATES, VERSION, make, "qmix run", say) if file is not None else None) or {}


def save_rate(quant: QuantConfig, mb_per_s: float, source_bytes: int) -> None:
    """Of a run that took long enough to tell."""
    file = paths.if_any(paths.rates_file)
    if file is None or mb_per_s <= 0 or source_bytes < 10 * 1e6 * mb_per_s:  # ten seconds
        return
    rates = load_rates(lambda line: None) | {quant.method: round(mb_per_s, 1)}
    json_cache.save(file, RATES, VERSION, rates)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _same_disk(one: Path, two: Path) -> bool:
    return _existing(one).stat().st_dev == _existing(two).stat().st_dev


def _tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*") if path.is_file()) if folder.is_dir() else 0
