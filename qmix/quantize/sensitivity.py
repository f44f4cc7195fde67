"""How much the format of each matrix of each expert matters: measured on a text, in one walk through the checkpoint.

A format's damage to a matrix is the change in the output of its expert, on the tokens that the router sends there,
weighed by the router: sum of |w (y' - y)|^2, w the token's topk_weight, with the other matrix unchanged. So an expert
that is seldom chosen is damaged little. The effect of a layer's damage on the end result is measured too. For every
layer with experts a copy of the text passes through a model in which only that layer's experts are in PROBE. At the
head, the distance of the copy from the original, the Kullback-Leibler divergence of the next token's probabilities, is
divided by the damage that the copy took. Damage times this quotient is in nats a token, and adds up over experts and
layers as long as it is small (docs/quality.md compares). In a model without experts the MLP of each layer is one, and
every token is sent there.

Memory at Mixtral's width: the forward pass (forward_pass.py) with all its copies; beside it, per thread, one packed
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
from qmix.config import DTYPES, ExpertKey, QuantConfig
from qmix.errors import QmixError
from qmix.formats import TORCH_DTYPES, Packed
from qmix.kernels import torch_ops
from qmix.quantize.calibration import Calibration
from qmix.quantize.forward_pass import ForwardPass
from qmix.quantize.inputs import squares
from qmix.quantize.layer_weights import Source
from qmix.quantize.methods import quantize
from qmix.quantize.mix import FORMATS, one_kind
from qmix.sizes import PLAIN_DTYPES, MatrixSpec, record_layouts

PROBE = "int3g64"
ROWS = 256  # tokens of an expert on which damage is measured
SEEN = 0.02  # of the tokens: a share below which an expert counts as though it had that
WIDTH = 4096  # rows of a weight that are widened to fp32 at a time
HEAD_ROWS = 128  # tokens whose logits are there at a time
Matrices = Mapping[str, Mapping[str, float]]  # {"w13" | "w2": {format: damage}}


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """damages: {expert: {matrix: {format: nats a token}}}; tokens: how many were sent to each expert; layers: nats a
    token that PROBE in this layer's experts alone costs, 0 in a layer without."""

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


def measure(source: Source, calibration: Calibration, method: str, block: int, pool: Executor,
            progress: Callable[[int, int, str], None] = lambda done, total, label: None) -> Sensitivity:
    """Walk through the checkpoint once. method: how codes are chosen, "rtn" or "hqq"; block: of the matrices.

    torch must be set to one thread, so that no bit depends on how many the pool has. progress: expert bytes.
    """
    model = source.model
    copies = _Copies(source, calibration, pool)
    specs = {name: specs_of(source, name, block) for name in FORMATS}
    item = TORCH_DTYPES[PLAIN_DTYPES[DTYPES[model.dtype]]].itemsize
    buffer = torch.empty(3 * model.hidden * model.expert_inner * item, dtype=torch.uint8)
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
        if model.experts_in(layer):
            per_layer.append(copies.damage())
    nats = divergences(copies.forward, source, model.record_layers, pool)
    found: dict[ExpertKey, Matrices] = {}
    for layer, kl, damage in zip(model.record_layers, nats, per_layer, strict=True):
        keys = [key for key in raw if key.layer == layer]
        factor = kl / damage if damage > 0 else 0.0
        found.update(in_nats(keys, raw, tokens, factor, calibration.tokens))
    by_layer = dict(zip(model.record_layers, nats, strict=True))
    return Sensitivity(found, tokens, [by_layer.get(layer, 0.0) for layer in range(model.num_layers)])


def specs_of(source: Source, name: str, block: int) -> tuple[MatrixSpec, MatrixSpec]:
    quant = QuantConfig("mixed", method="rtn", block=block, kinds=((name, name),),
                        mix=one_kind(source.model))
    record = record_layouts(source.model, quant)[0]
    return record.w13.without_bias, record.w2.without_bias


def in_nats(keys: Sequence[ExpertKey], raw: Mapping[ExpertKey, Matrices], tokens: Mapping[ExpertKey, int],
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
    x, topk_weights, count = copies.inputs(key.expert)
    if not count:
        return {m: dict.fromkeys(FORMATS, 0.0) for m in ("w13", "w2")}, 0
    biases = copies.biases(key)
    middle = copies.activated(x, w13, biases)
    y = product(middle, w2)
    scale = count / len(x) / copies.tokens

    def damage(task: tuple[str, str]) -> float:
        name, matrix = task
        first, second = specs[name]
        if matrix == "w13":
            changed = product(copies.activated(x, quantize(w13, first, method), biases), w2)
        else:
            changed = product(middle, quantize(w2, second, method))
        return scale * squares(changed.sub_(y).mul_(topk_weights[:, None]))

    tasks = [(name, matrix) for matrix in ("w13", "w2") for name in FORMATS]
    found = dict(zip(tasks, pool.map(damage, tasks), strict=True))
    return {m: {name: found[name, m] for name in FORMATS} for m in ("w13", "w2")}, count


class _Copies:
    """The text, and behind it a copy for every layer with records entered so far, perturbed in that one."""

    def __init__(self, source: Source, calibration: Calibration, pool: Executor):
        self._model, self._source, self._pool = source.model, source, pool
        self.forward = ForwardPass(source, calibration, pool, copies=len(source.model.record_layers))
        self.tokens = calibration.tokens

    @property
    def _last(self) -> int:
        """The first row of the last copy."""
        return len(self.forward.residual) - self.tokens

    def enter(self, layer: int) -> None:
        """The next layer up to its experts, then one more copy where it has any."""
        self.forward.enter(layer)
        if self._model.experts_in(layer):
            self.forward.add_copy()

    def expert(self, key: ExpertKey, w13: Tensor, w2: Tensor, probe: Sequence[Packed]) -> None:
        """The original for all copies but the last, which is given `probe`, packed w13 and w2."""
        forward, last = self.forward, self._last
        forward.expert(key, w13, w2, False, last)
        rows, rank = (forward.ids[last:] == key.expert).nonzero(as_tuple=True)
        topk_weights, biases = forward.topk_weights[last:][rows, rank], self.biases(key)
        for some, weight in zip(rows.split(ROWS), topk_weights.split(ROWS), strict=True):
            out = product(self.activated(forward.normed[last:][some].float(), probe[0], biases), probe[1])
            if biases is not None:
                out += biases[1]
            forward.add(some, out.mul_(weight[:, None]), last)

    def biases(self, key: ExpertKey) -> tuple[Tensor, Tensor] | None:
        """Of the expert's w13 and w2."""
        return self._source.expert_biases(key)

    def activated(self, x: Tensor, w13: Tensor | Packed, biases: tuple[Tensor, Tensor] | None) -> Tensor:
        """What w2 reads [n, F] where w13 [2F, H] reads x [n, H]."""
        op = self.forward.pieces.experts
        assert op is not None
        both = product(x, w13)
        if biases is not None:
            both += biases[0]
        return torch_ops.activate(op.activation, *both.chunk(2, -1))

    def inputs(self, expert: int) -> tuple[Tensor, Tensor, int]:
        """(x [n, H] fp32, topk_weights [n]) of up to ROWS tokens of the original text, spread evenly over those that
        are sent to an expert of this layer, and how many these are."""
        forward = self.forward
        rows, rank = (forward.ids[:self.tokens] == expert).nonzero(as_tuple=True)
        some = torch.arange(min(ROWS, len(rows))) * len(rows) // max(1, min(ROWS, len(rows)))
        return forward.normed[rows[some]].float(), forward.topk_weights[rows[some], rank[some]], len(rows)

    def damage(self) -> float:
        """What the last copy's experts changed in the residual, a token; this ends the layer."""
        self.forward.leave()
        off = self.forward.residual[self._last:] - self.forward.residual[:self.tokens]
        return torch.linalg.vector_norm(off, dtype=torch.float64).item() ** 2 / self.tokens


def divergences(forward: ForwardPass, source: Source, layers: Sequence[int], pool: Executor) -> list[float]:
    """KL(original || copy), nats a token, for each copy, which was perturbed in one of `layers`; after the last layer
    of the model. QmixError where one is not a number."""
    forward.leave()
    model, tokens, copied = source.model, forward.tokens, forward.copied
    head = source.dense("embedding" if model.tied else "head")

    def logits(rows: slice, first: int) -> Tensor:
        found = product(forward.final(slice(first + rows.start, first + rows.stop)), head)
        cap = model.logit_softcap
        return (found if cap is None else cap * torch.tanh(found / cap)).log_softmax(-1)

    def some(begin: int) -> list[float]:
        rows = slice(begin, min(begin + HEAD_ROWS, copied))
        want = logits(rows, 0)
        return [want.exp().mul_(want - logits(rows, tokens + copy * copied)).sum(dtype=torch.float64).item()
                for copy in range(len(layers))]

    sums = [0.0] * len(layers)
    for found in pool.map(some, range(0, copied, HEAD_ROWS)):
        sums = [total + value for total, value in zip(sums, found, strict=True)]
    for layer, total in zip(layers, sums, strict=True):
        if not math.isfinite(total):
            raise QmixError(f"{source.path}: its output is not a number with {PROBE} in layer {layer}",
                            "quantize to a --format, and see with qmix eval if the model is sound")
    return [max(0.0, total / copied) for total in sums]


def product(x: Tensor, weight: Tensor | Packed) -> Tensor:
    """x [n, K] fp32 times weight^T, [N, K]: fp32 [n, N], piece by piece."""
    if isinstance(weight, Packed):
        out, pieces = x.new_empty(len(x), weight.spec.rows), formats.tiles(weight)
    else:
        out = x.new_empty(len(x), len(weight))
        pieces = ((start, weight[start:start + WIDTH].float()) for start in range(0, len(weight), WIDTH))
    for start, piece in pieces:
        out[:, start:start + len(piece)] = F.linear(x, piece)
    return out
