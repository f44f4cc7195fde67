"""The calibration results of the experts in a store's manifest, as rows for `qmix show` and the quantizer's report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qmix.store.manifest import Calibrated, Manifest, RecordEntry


def expert_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Each expert with its relative rms errors; in a calibrated store also with the tokens that the text sent to it,
    the method that chose its codes, and how far its outputs are off on these, None where that was not looked at."""
    return [{"layer": r.key.layer, "expert": r.key.expert, "error": r.error["all"], "w13": r.error["w13"],
             "w2": r.error["w2"], **({} if r.calibrated is None else {
                 "tokens": r.calibrated.tokens, "method": r.calibrated.method,
                 "output_w13": r.calibrated.output_error.get("w13"), "output_w2": r.calibrated.output_error.get("w2")})}
            for r in manifest.records.values()]


def layer_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Each layer of a calibrated store: tokens sent to its experts, how many of these fell back, mean errors of
    weights, and of outputs where they were looked at."""
    layers: dict[int, list[tuple[RecordEntry, Calibrated]]] = {}
    for record in manifest.records.values():
        if record.calibrated is not None:
            layers.setdefault(record.key.layer, []).append((record, record.calibrated))
    return [{"layer": layer, "tokens_min": min(c.tokens for _, c in found),
             "tokens_mean": round(sum(c.tokens for _, c in found) / len(found)),
             "tokens_max": max(c.tokens for _, c in found),
             "fell_back": sum(c.method != manifest.quant.method for _, c in found),
             "weight_error": _mean(r.error["all"] for r, _ in found),
             "output_w13": _mean(c.output_error.get("w13") for _, c in found),
             "output_w2": _mean(c.output_error.get("w2") for _, c in found)} for layer, found in sorted(layers.items())]


def fell_back(manifest: Manifest) -> list[str]:
    """What the text said too little of, and what was done: "layer 3 expert 5: 0 tokens, so hqq"."""
    entries = [*((str(r.key), r.calibrated) for r in manifest.records.values()),
               *((d.name, d.calibrated) for d in manifest.dense.values())]
    return [f"{name}: {c.tokens} token{'' if c.tokens == 1 else 's'}, so {c.method}" for name, c in entries
            if c is not None and c.method != manifest.quant.method]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.6g}") if known else None
