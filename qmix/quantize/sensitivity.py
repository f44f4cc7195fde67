"""How much the format of each matrix of each expert matters: measured on a text, in one walk through the checkpoint.

A format's damage to a matrix is the change in the output of its expert, on the tokens that the router sends there,
weighed by the router: sum of |gain (y' - y)|^2, with the other matrix unchanged. So an expert that is seldom chosen is
damaged little. The effect of a layer's damage on the end result is measured too. For every layer a copy of the text
passes through a model in which only that layer's experts are in PROBE. At the head, the distance of the copy from the
original, the Kullback-Leibler divergence of the next token's probabilities, is divided by the damage that the copy
took. Damage times this quotient is in nats a token, and adds up over experts and layers as long as it is small
(docs/quality.md compares).

Memory at Mixtral's width: the forward pass of calibration.py with all its copies; beside it, per thread, one packed
matrix and the activations of ROWS tokens, 90 MiB. `Calibration` should have TOKENS / (L + 1) tokens.

n tokens of an expert, at most ROWS; T tokens of the text; H hidden, F expert inner, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix import formats
from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey, QuantConfig
from qmix.errors import QmixError
from qmix.formats import Packed
from qmix.quantize.calibration import Calibration, ForwardPass
from qmix.quantize.methods import quantize
from qmix.quantize.mix import FORMATS, one_kind
from qmix.sizes import MatrixSpec, record_layouts

PROBE = "int3g64"
ROWS = 256  # tokens of an expert on which damage is measured
SEEN = 0.02  # of the tokens: a share below which an expert counts as though it had that
WIDTH = 4096  # rows of a weight that are widened to fp32 at a time
HEAD_ROWS = 128  # tokens whose logits are there at a time
Matrices = Mapping[str, Mapping[str, float]]  # {"w13" | "w2": {format: damage}}


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """damages: {expert: {matrix: {format: nats a token}}}; tokens: how many were sent to each expert; layers: nats a
    token that PROBE in this layer's experts alone costs."""

    damages: Mapping[ExpertKey, Matrices]
    tokens: Mapping[ExpertKey, int]
    layers: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        """Plain data, a row an expert."""
        return {"layers": list(self.layers), "experts": [
            {"layer": key.layer, "expert": key.expert, "tokens": self.tokens[key], **damage}
            for key, damage in self.damages.items()]}

    @classmethod
    def from_json(cls, data: Any) -> Sensitivity:
        """What to_json gave; ValueError, KeyError or TypeError where it is not that."""
        damages, tokens = {}, {}
        for row in data["experts"]:
            key = ExpertKey(int(row["layer"]), int(row["expert"]))
            tokens[key] = int(row["tokens"])
            damages[key] = {matrix: {name: float(row[matrix][name]) for name in FORMATS} for matrix in ("w13", "w2")}
        return cls(damages, tokens, [float(value) for value in data["layers"]])


def measure(source: Checkpoint, calibration: Calibration, method: str, block: int, pool: Executor,
            progress: Callable[[int, int, str], None] = lambda done, total, label: None) -> Sensitivity:
    """Walk through the checkpoint once. method: how codes are chosen, "rtn" or "hqq"; block: of the matrices.

    torch must be set to one thread, so that no bit depends on how many the pool has. progress: expert bytes.
    """
    model = source.model
    copies = _Copies(source, calibration, pool)
    specs = {name: _specs(source, name, block) for name in FORMATS}
    buffer = torch.empty(3 * model.hidden * model.expert_inner * copies.item, dtype=torch.uint8)
    raw: dict[ExpertKey, Matrices] = {}
    tokens: dict[ExpertKey, int] = {}
    per_layer = []
    for layer in range(model.num_layers):
        copies.enter(layer)
        for expert in range(model.experts_in(layer)):
            key = ExpertKey(layer, expert)
            w13, w2 = source.stacked_expert(key, buffer)
            raw[key], tokens[key] = _expert_damages(copies, key, w13, w2, specs, method, pool)
            probe = [quantize(w, spec, method, pool) for w, spec in zip((w13, w2), specs[PROBE], strict=True)]
            copies.expert(key, w13, w2, probe)
            progress(len(raw) * buffer.nbytes, len(model.expert_keys) * buffer.nbytes, str(key))
        per_layer.append(copies.damage())
    nats = copies.divergences()
    found: dict[ExpertKey, Matrices] = {}
    for layer, (kl, damage) in enumerate(zip(nats, per_layer, strict=True)):
        keys = [key for key in raw if key.layer == layer]
        factor = kl / damage if damage > 0 else 0.0
        found.update(_in_nats(keys, raw, tokens, factor, calibration.tokens))
    return Sensitivity(found, tokens, nats)


def _specs(source: Checkpoint, name: str, block: int) -> tuple[MatrixSpec, MatrixSpec]:
    quant = QuantConfig("mixed", method="rtn", block=block, kinds=((name, name),),
                        mix=one_kind(source.model))
    record = record_layouts(source.model, quant)[0]
    return record.w13, record.w2


def _in_nats(keys: Sequence[ExpertKey], raw: Mapping[ExpertKey, Matrices], tokens: Mapping[ExpertKey, int],
             factor: float, count: int) -> Iterator[tuple[ExpertKey, Matrices]]:
    """Damages of a layer's experts, times `factor`. One that the text seldom chose is taken to be chosen by SEEN of
    the tokens, and to be damaged by each as the others are."""
    whole = sum(tokens[key] for key in keys)
    mean = {m: {name: sum(raw[key][m][name] for key in keys) / whole for name in FORMATS} for m in ("w13", "w2")}
    for key in keys:
        more = max(0.0, SEEN * count - tokens[key])
        yield key, {m: {name: factor * (raw[key][m][name] + more * mean[m][name]) for name in FORMATS}
                    for m in ("w13", "w2")}


def _expert_damages(copies: _Copies, key: ExpertKey, w13: Tensor, w2: Tensor,
                    specs: Mapping[str, tuple[MatrixSpec, MatrixSpec]], method: str,
                    pool: Executor) -> tuple[Matrices, int]:
    """The damage that each format does to w13 [2F, H] and to w2 [H, F] on the original text; tokens sent there."""
    x, gain, count = copies.inputs(key.expert)
    if not count:
        return {m: dict.fromkeys(FORMATS, 0.0) for m in ("w13", "w2")}, 0
    middle = _gated(_product(x, w13))
    y = _product(middle, w2)
    scale = count / len(x) / copies.tokens

    def damage(task: tuple[str, str]) -> float:
        name, matrix = task
        first, second = specs[name]
        if matrix == "w13":
            changed = _product(_gated(_product(x, quantize(w13, first, method))), w2)
        else:
            changed = _product(middle, quantize(w2, second, method))
        return scale * torch.linalg.vector_norm(changed.sub_(y).mul_(gain[:, None]), dtype=torch.float64).item() ** 2

    tasks = [(name, matrix) for matrix in ("w13", "w2") for name in FORMATS]
    found = dict(zip(tasks, pool.map(damage, tasks), strict=True))
    return {m: {name: found[name, m] for name in FORMATS} for m in ("w13", "w2")}, count


class _Copies(ForwardPass):
    """The text, and behind it a copy for every layer entered so far, perturbed in that one."""

    def __init__(self, source: Checkpoint, calibration: Calibration, pool: Executor):
        super().__init__(source, calibration, pool)
        self.tokens = calibration.tokens
        self.item = source.dense("final_norm").element_size()
        rows = self.tokens * (source.model.num_layers + 1)
        self._whole = {name: getattr(self, name).new_empty(rows, getattr(self, name).shape[1])
                       for name in ("residual", "normed", "ids", "gains")}
        for name, whole in self._whole.items():
            whole[:self.tokens] = getattr(self, name)
        self._show(self.tokens)

    def enter(self, layer: int) -> None:
        """Attention of the next layer, then one more copy."""
        self.attention(layer)
        before, after = len(self.residual), len(self.residual) + self.tokens
        for whole in self._whole.values():
            whole[before:after] = whole[:self.tokens]
        self._show(after)

    def expert(self, key: ExpertKey, w13: Tensor, w2: Tensor, probe: Sequence[Packed]) -> None:  # type: ignore[override]
        """The original for all copies but the last, which is given `probe`, packed w13 and w2."""
        last = len(self.residual) - self.tokens
        super().expert(key, w13, w2, False, last)
        rows, rank = (self.ids[last:] == key.expert).nonzero(as_tuple=True)
        for some, gain in zip(rows.split(ROWS), self.gains[last:][rows, rank].split(ROWS), strict=True):
            out = _product(_gated(_product(self.normed[last:][some].float(), probe[0])), probe[1])
            self.residual[last:].index_add_(0, some, out.mul_(gain[:, None]))

    def inputs(self, expert: int) -> tuple[Tensor, Tensor, int]:
        """(x [n, H] fp32, gains [n]) of up to ROWS tokens of the original text, spread evenly over those that are
        sent to an expert of this layer, and how many these are."""
        rows, rank = (self.ids[:self.tokens] == expert).nonzero(as_tuple=True)
        some = torch.arange(min(ROWS, len(rows))) * len(rows) // max(1, min(ROWS, len(rows)))
        return self.normed[rows[some]].float(), self.gains[rows[some], rank[some]], len(rows)

    def damage(self) -> float:
        """What the last copy's experts changed in the residual, a token."""
        off = self.residual[len(self.residual) - self.tokens:] - self.residual[:self.tokens]
        return torch.linalg.vector_norm(off, dtype=torch.float64).item() ** 2 / self.tokens

    def divergences(self) -> list[float]:
        """KL(original || copy), nats a token, for each layer's copy; after the last layer."""
        head = self._source.dense("embedding" if self._model.tied else "head")
        copies = len(self.residual) // self.tokens - 1

        def some(begin: int) -> list[float]:
            rows = slice(begin, min(begin + HEAD_ROWS, self.tokens))
            want = _product(self.final(rows), head).log_softmax(-1)
            found = []
            for copy in range(1, copies + 1):
                shift = copy * self.tokens
                got = _product(self.final(slice(rows.start + shift, rows.stop + shift)), head).log_softmax(-1)
                found.append(want.exp().mul_(want - got).sum(dtype=torch.float64).item())
            return found

        sums = [0.0] * copies
        for found in self._map(some, range(0, self.tokens, HEAD_ROWS)):
            sums = [total + value for total, value in zip(sums, found, strict=True)]
        for layer, total in enumerate(sums):
            if not math.isfinite(total):
                raise QmixError(f"{self._source.path}: its output is not a number with {PROBE} in layer {layer}",
                                "quantize to a --format, and see with qmix eval if the model is sound")
        return [max(0.0, total / self.tokens) for total in sums]

    def _show(self, rows: int) -> None:
        self.residual, self.normed, self.ids, self.gains = (self._whole[name][:rows] for name in (
            "residual", "normed", "ids", "gains"))


def _product(x: Tensor, weight: Tensor | Packed) -> Tensor:
    """x [n, K] fp32 times weight^T, [N, K]: fp32 [n, N], piece by piece."""
    if isinstance(weight, Packed):
        out, pieces = x.new_empty(len(x), weight.spec.rows), formats.tiles(weight)
    else:
        out = x.new_empty(len(x), len(weight))
        pieces = ((start, weight[start:start + WIDTH].float()) for start in range(0, len(weight), WIDTH))
    for start, piece in pieces:
        out[:, start:start + len(piece)] = F.linear(x, piece)
    return out


def _gated(both: Tensor) -> Tensor:
    """silu(gate) * up of [n, 2F]: [n, F]."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate).mul_(up)
