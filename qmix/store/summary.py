"""The contents of a store as plain data: for `qmix show`, and for the report at the end of quantizing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from qmix.config import DTYPES, GROUPED_BITS, ExpertKey, QuantConfig
from qmix.sizes import plain_format
from qmix.spec import Model
from qmix.store.calibrated import fell_back, layer_rows
from qmix.store.layout import MANIFEST, StoreLayout
from qmix.store.manifest import Manifest
from qmix.store.reader import Store

WORST = 5


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """One class of tensors: weights counts them, nbytes is what they take on disk with all padding;
    errors are relative rms, of the mean and of the worst record or matrix, None where not known."""

    name: str
    format: str
    weights: int
    nbytes: int
    error_mean: float | None = None
    error_max: float | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights

    def row(self) -> dict[str, Any]:
        return {"class": self.name, "format": self.format, "weights": self.weights, "bytes": self.nbytes,
                "bits_per_weight": round(self.bits_per_weight, 3), "error_mean": self.error_mean,
                "error_max": self.error_max}


def classes(model: Model, quant: QuantConfig, layout: StoreLayout,
            manifest: Manifest | None = None) -> tuple[ClassSummary, ...]:
    """Experts, dense matrices, and what is never quantized; with errors where there is a manifest."""
    expert_errors = [r.error["all"] for r in manifest.records.values()] if manifest else []
    dense_errors = [d.error for d in manifest.dense.values() if d.error is not None] if manifest else []
    count = len(model.expert_keys)
    found = [ClassSummary("experts", describe_format(model, quant, quant.experts),
                          count * expert_weights(model), sum(layout.record(key).nbytes for key in layout.records),
                          *_mean_max(expert_errors))]
    packed = layout.specs["embedding"] is not None
    parts = ["attention", *(["MLPs"] if any(t.role == "mlp" for t in model.tensors()) else []),
             *(["embedding"] if packed else [])]
    matrices = f"{', '.join(parts)} and head"
    for name, kind, plain, errors in (
            (matrices, dense_formats(model, quant, layout), False, dense_errors),
            ("routers, norms" if packed else "embedding, routers, norms", plain_formats(model, layout), True, [])):
        tensors = [t for t in model.tensors() if (layout.specs[t.name] is None) == plain]
        found.append(ClassSummary(name, kind, sum(prod(t.shape) for t in tensors),
                                  sum(layout.dense[t.name].nbytes for t in tensors), *_mean_max(errors)))
    return tuple(found)


def describe_format(model: Model, quant: QuantConfig, kind: str) -> str:
    """ "int4 g64 hqq, block 64", "nf4 double quantization", "keep (bf16)"; of a mixed store the share of matrices."""
    if kind == "mixed":
        counts = Counter(name for key in model.expert_keys for name in quant.kinds[quant.kind_of(key)])
        whole = 2 * len(model.expert_keys)
        grouped = GROUPED_BITS.keys() & quant.expert_formats
        how = f"mixed {quant.method}, block {quant.block}: " if grouped else ""
        return how + ", ".join(
            f"{100 * n / whole:.0f} % {name}" for name, n in sorted(counts.items(), reverse=True))
    if kind in GROUPED_BITS:
        return f"{kind} g{quant.group_size} {quant.method}, block {quant.block}"
    if kind == "keep":
        return f"keep ({DTYPES[model.dtype]})"
    return f"{kind} double quantization" if quant.double_quant and kind in ("nf4", "fp4") else kind


def dense_formats(model: Model, quant: QuantConfig, layout: StoreLayout) -> str:
    """As `describe_format`; where matrices stay in ggml's formats, how many are in each: "8 q4_k, 1 q6_k, 2 int8"."""
    if not quant.dense_formats:
        return describe_format(model, quant, quant.dense)
    counts = Counter(spec.format for spec in layout.specs.values() if spec is not None)
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))


def plain_formats(model: Model, layout: StoreLayout) -> str:
    """Of what stays plain: "bf16", or with what Model.wide names "bf16, fp32", that of most numbers first."""
    if not model.wide:
        return DTYPES[model.dtype]
    counts: Counter[str] = Counter()
    for tensor in model.tensors():
        if layout.specs[tensor.name] is None:
            counts[plain_format(model, tensor)] += prod(tensor.shape)
    return ", ".join(name for name, _ in counts.most_common())


def expert_weights(model: Model) -> int:
    """Weights of one expert, its biases among them."""
    return model.expert_numbers


def worst_experts(manifest: Manifest) -> list[tuple[ExpertKey, float]]:
    """The experts with the largest relative rms error, worst first."""
    ranked = sorted(manifest.records.values(), key=lambda r: (-r.error["all"], r.key))
    return [(r.key, r.error["all"]) for r in ranked[:WORST]]


def describe(store: Store) -> dict[str, Any]:
    """All that `qmix show` prints; bytes and errors as numbers, experts as {layer, expert, ...} rows."""
    model, manifest = store.model, store.manifest
    dense = sum(prod(t.shape) for t in model.tensors())
    per_expert, keys = expert_weights(model), len(model.expert_keys)
    active = sum(prod(t.shape) for t in model.trunk.tensors()) + model.chosen * per_expert
    layout = store.layout
    manifest_bytes = (store.path / MANIFEST).stat().st_size
    nbytes = layout.nbytes + sum(f.nbytes for f in manifest.files.values()) + manifest_bytes
    rows = classes(model, store.quant, layout, manifest)
    revision = f"@{manifest.revision}" if manifest.revision else ""
    return {
        "store": store.path.resolve().name, "format_version": manifest.version,
        "source": manifest.source + revision, "fingerprint": manifest.fingerprint,
        "architecture": model.architecture, "parameters": dense + keys * per_expert, "active_parameters": active,
        "layers": model.num_layers, **({"mtp_layers": 1} if model.mtp_head else {}), "experts": model.num_experts,
        "experts_per_token": model.top_k, "hidden_size": model.hidden,
        "intermediate_size": model.expert_inner, "vocab_size": model.vocab,
        "max_positions": model.max_positions, "dtype": model.dtype, "bytes": nbytes,
        "record_bytes": store.layout.record_bytes, "files": len(layout.files) + len(manifest.files) + 1,
        "bits_per_weight": round(8 * sum(row.nbytes for row in rows) / sum(row.weights for row in rows), 3),
        "classes": [row.row() for row in rows], "worst_experts": [
            {"layer": key.layer, "expert": key.expert, "error": error, **_parts(manifest, key)}
            for key, error in worst_experts(manifest)],
        **({} if manifest.calibration is None else {
            "calibration": asdict(manifest.calibration), "calibrated_layers": layer_rows(manifest),
            "fell_back": fell_back(manifest)}),
    }


def _parts(manifest: Manifest, key: ExpertKey) -> dict[str, float]:
    error = manifest.records[key].error
    return {"w13": error["w13"], "w2": error["w2"]}


def _mean_max(errors: Iterable[float]) -> tuple[float | None, float | None]:
    values = list(errors)
    return (float(f"{sum(values) / len(values):.6g}"), max(values)) if values else (None, None)
