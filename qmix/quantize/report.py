"""What a run of the quantizer did, or would do, as data; `lines` is its short form for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix.config import ExpertKey
from qmix.render import table
from qmix.sizes import format_bytes
from qmix.store import CalibrationEntry, ClassSummary


@dataclass(frozen=True, slots=True)
class Report:
    """files: {name: bytes} of the store, its manifest left out of a dry run; nbytes: their sum.
    source_bytes: of the checkpoint's weights, all of them accounted for; skipped: what was not needed.
    resumed: regions (dense tensors and experts) taken over from an earlier run, of `regions`.
    seconds, mb_per_s: of this run; decimal MB of source weights that this run quantized.
    classes: errors are None in a dry run. worst: the experts with the largest relative rms error.
    calibration: the text, where there was one; layers: see store.layer_rows; fell_back: the experts and dense matrices
    that it said too little of.
    """

    out: Path
    dry_run: bool
    files: Mapping[str, int]
    source_bytes: int
    skipped: tuple[str, ...]
    classes: tuple[ClassSummary, ...]
    worst: tuple[tuple[ExpertKey, float], ...] = ()
    regions: int = 0
    resumed: int = 0
    seconds: float = 0.0
    mb_per_s: float = 0.0
    calibration: CalibrationEntry | None = None
    layers: tuple[Mapping[str, Any], ...] = ()
    fell_back: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def lines(self) -> list[str]:
        """For the terminal: where, how large, how good."""
        verb = "would write" if self.dry_run else "wrote"
        manifest = " and a manifest" if self.dry_run else ""
        found = [f"{verb} {self.out}: {format_bytes(self.nbytes)} in {len(self.files)} files{manifest}, from "
                 f"{format_bytes(self.source_bytes)} of weights"]
        rows = [{"class": c.name, "format": c.format, "size": format_bytes(c.nbytes),
                 "bits/weight": f"{c.bits_per_weight:.3f}", "error": _number(c.error_mean),
                 "worst": _number(c.error_max)} for c in self.classes]
        found += ["  " + line for line in table(rows).splitlines()]
        if self.worst and self.worst[0][1] > 0:
            found.append("  worst experts: " + ", ".join(f"{key} {error:.4f}" for key, error in self.worst))
        found += self._calibration_lines()
        if self.resumed:
            found.append(f"  resumed: {self.resumed} of {self.regions} parts were there already")
        if not self.dry_run:
            found.append(f"  {self.seconds:.1f} s, {self.mb_per_s:.0f} MB/s of source weights")
        return found

    def _calibration_lines(self) -> list[str]:
        """What the text was and, where it was used by now, what each layer's experts saw of it."""
        if self.calibration is None:
            return []
        found = [f"  calibrated on {self.calibration.tokens} tokens in sequences of {self.calibration.length}"]
        rows = [{"layer": row["layer"], "tokens": f"{row['tokens_min']} to {row['tokens_max']}",
                 "fell back": row["fell_back"], "weight error": _number(row["weight_error"]),
                 "output error: w13": _number(row["output_w13"]), "w2": _number(row["output_w2"])}
                for row in self.layers]
        found += ["    " + line for line in table(rows).splitlines()]
        if self.layers and not self.fell_back:
            found.append("  every expert had enough tokens")
        if self.fell_back:
            found.append(f"  {len(self.fell_back)} saw too few tokens to be calibrated, or nothing but zeros:")
            found += ["    " + line for line in self.fell_back]
        return found


def _number(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"
