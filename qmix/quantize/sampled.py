"""How much the format of each matrix of each expert matters, measured on a sample: what sensitivity.py measures on all
rows and on a long text, in about the time that hqq takes to quantize the model.

Four things are sampled.

- Tokens. The text is short: SHARE tokens for each expert on average, in sequences of LENGTH.
- Rows. A format is tried on a few rows of each matrix. A row of w2 is a number of the output, so the damage to some of
  them is the damage to all times their share. An inner unit (its row of gate, of up, and its column of w2) adds to the
  output what is nearly independent of the other units, so the same holds there.
- Layers. Copies of the text pass with a perturbation in PROBES layers. Between them the logarithm of the quotient
  (nats for a squared change of the residual) is interpolated.
- Tokens of these copies: SHARE an expert for all copies together.

All choices depend on the model's shapes and on the text alone, and no sum depends on the number of threads: the same
input gives the same numbers.

n tokens of an expert, at most ROWS; T tokens of the text; H hidden, F expert inner, S rows of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.config import DTYPES, ExpertKey
from qmix.formats import TORCH_DTYPES, unpack
from qmix.kernels import torch_ops
from qmix.quantize.calibration import Calibration
from qmix.quantize.extent import Extent, interpolated, sampled_rows, spread
from qmix.quantize.forward_pass import CHUNK, ForwardPass
from qmix.quantize.inputs import squares
from qmix.quantize.layer_weights import Source
from qmix.quantize.methods import SMALLEST, quantize
from qmix.quantize.mix import FORMATS
from qmix.quantize.progress_file import ProgressFile
from qmix.quantize.sensitivity import Matrices, Sensitivity, divergences, in_nats, specs_of
from qmix.sizes import PLAIN_DTYPES, MatrixSpec
from qmix.spec import Activation

ROWS = 128  # tokens of an expert on which damage is measured
EVERY = 2**30  # bytes of experts between two times that the state is kept
GATHERED = 2**22  # weights of gates and ups that are quantized together, at most
TOGETHER = 2**18  # and at least, where layers are small
STEPS = 7  # of the perturbation's rounding between a group's extremes, as int3 has
PROBE_GROUP = 64


@dataclass(frozen=True)
class Piece:
    """What is kept of an expert until its formats are tried: some of its rows, and what they read.

    gate_up [2S, H], and |w|^2 of their columns of w2, column_squares [S]: of S inner units; down [S', F]: of w2's rows;
    x [n, H], middle [n, F], topk_weights [n]; energy: of what it gave for these, weighed, |y|^2; bias [2S]: of these
    units; count: tokens that were sent to it."""

    key: ExpertKey
    gate_up: Tensor
    column_squares: Tensor
    down: Tensor
    x: Tensor
    middle: Tensor
    topk_weights: Tensor
    energy: float
    bias: Tensor | None
    activation: Activation
    count: int

    def activated(self, gate_up: Tensor) -> Tensor:
        """What the inner units give [n, S] by these rows [2S, H], weighed."""
        both = F.linear(self.x, gate_up)
        if self.bias is not None:
            both += self.bias
        return torch_ops.activate(self.activation, *both.chunk(2, -1)).mul_(self.topk_weights[:, None])

    @cached_property
    def units(self) -> Tensor:
        """What they give by their own rows."""
        return self.activated(self.gate_up.float())


def measure_sampled(source: Source, calibration: Calibration, method: str, block: int, pool: Executor,
                    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
                    file: ProgressFile | None = None, every: int = EVERY) -> Sensitivity:
    """Walk through the checkpoint once; arguments and result as of sensitivity.measure. file: what an earlier run kept
    of the same measurement, from which this one goes on, and where it keeps its own state, each time `every` bytes of
    experts more were read."""
    model = source.model
    walk = _Walk(source, Extent.of(model, calibration), method, block, pool)
    item = TORCH_DTYPES[PLAIN_DTYPES[DTYPES[model.dtype]]].itemsize
    buffer = torch.empty(3 * model.hidden * model.expert_inner * item, dtype=torch.uint8)
    first, total, saved = walk.resume(file), len(model.expert_keys), len(walk.raw)
    for layer in range(first, model.num_layers):
        walk.enter(layer)
        for expert in range(model.experts_in(layer)):
            key = ExpertKey(layer, expert)
            walk.expert(key, *source.stacked_expert(key, buffer))
            progress(len(walk.tokens) * buffer.nbytes, total * buffer.nbytes, str(key))
        walk.leave()
        if file is not None and not walk.pending and (len(walk.raw) - saved) * buffer.nbytes >= every:
            file.save(walk.state(), walk.forward.residual)
            saved = len(walk.raw)
    return walk.result()


class _Walk:
    """The text's way through the model, with what was measured so far. raw, tokens: as of sensitivity.measure;
    damages: squared change of the residual, a token, of each copy."""

    def __init__(self, source: Source, extent: Extent, method: str, block: int, pool: Executor):
        self._source, self._extent, self._method, self._pool = source, extent, method, pool
        self.forward = ForwardPass(source, extent.text, pool, len(extent.layers), extent.copied)
        self._specs = {name: specs_of(source, name, block) for name in FORMATS}
        self._pieces: list[Piece] = []
        self.raw: dict[ExpertKey, Matrices] = {}
        self.tokens: dict[ExpertKey, int] = {}
        self.damages: list[float] = []

    def state(self) -> dict[str, Any]:
        """All that was found behind a layer, beside the residual."""
        found = Sensitivity(self.raw, self.tokens, ()).to_json()
        return {"layer": self.forward.layer, "damages": self.damages, "found": found}

    def resume(self, file: ProgressFile | None) -> int:
        """Take over what an earlier run kept in `file`; the layer to go on with."""
        kept = None if file is None else file.load(self._parsed)
        if kept is not None:
            layer, found, self.damages, residual = kept
            self.raw, self.tokens = dict(found.damages), dict(found.tokens)
            self.forward.resume(layer, residual)
        return self.forward.layer + 1

    def _parsed(self, state: Any, residual: Tensor) -> tuple[int, Sensitivity, list[float], Tensor]:
        """What `state` gave; ValueError, KeyError or TypeError where it is not that."""
        layer, found = int(state["layer"]), Sensitivity.from_json(state["found"])
        damages = [float(value) for value in state["damages"]]
        copies = sum(i <= layer for i in self._extent.layers)
        rows = self._extent.text.tokens + copies * self._extent.copied
        keys = {key for key in self._source.model.expert_keys if key.layer <= layer}
        shape = (rows, self._source.model.hidden)
        if residual.shape != shape or len(damages) != copies or found.damages.keys() != keys:
            raise ValueError("of another measurement")
        return layer, found, damages, residual

    def result(self) -> Sensitivity:
        """After the last layer."""
        model, extent = self._source.model, self._extent
        nats = divergences(self.forward, self._source, extent.layers, self._pool)
        factors = {layer: kl / damage if damage > 0 else 0.0
                   for layer, kl, damage in zip(extent.layers, nats, self.damages, strict=True)}
        found: dict[ExpertKey, Matrices] = {}
        for layer in model.record_layers:
            keys = [key for key in self.raw if key.layer == layer]
            found.update(in_nats(keys, self.raw, self.tokens, interpolated(factors, layer), extent.text.tokens))
        by_layer = dict(zip(extent.layers, nats, strict=True))
        return Sensitivity(found, self.tokens, [by_layer.get(layer, 0.0) for layer in range(model.num_layers)])

    def enter(self, layer: int) -> None:
        self.forward.enter(layer)
        if layer in self._extent.layers:
            self.forward.add_copy()

    @property
    def _last(self) -> int:
        """Rows in front of the copy that is perturbed in this layer; all where there is none."""
        rows = len(self.forward.residual)
        return rows - self._extent.copied if self.forward.layer in self._extent.layers else rows

    def expert(self, key: ExpertKey, w13: Tensor, w2: Tensor) -> None:
        """The next expert in order."""
        forward, text = self.forward, self._extent.text.tokens
        rows, rank = (forward.ids[:text] == key.expert).nonzero(as_tuple=True)
        self.tokens[key] = len(rows)
        some = spread(len(rows), ROWS)
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        wanted = torch.zeros(len(forward.ids), dtype=torch.bool)
        wanted[rows[some]] = True

        biases, op = self._source.expert_biases(key), forward.pieces.experts
        assert op is not None

        def watch(token: Tensor, x: Tensor, middle: Tensor, out: Tensor) -> None:
            here = wanted[token]
            kept.append((x[here], middle[here], out[here] if biases is None else out[here] - biases[1]))

        forward.expert(key, w13, w2, False, self._last, watch)
        if self._last < len(forward.ids):
            self._perturb(key, w13, w2)
        if not len(rows):
            self.raw[key] = {m: dict.fromkeys(FORMATS, 0.0) for m in ("w13", "w2")}
            return
        x, middle, out = (torch.cat(parts) for parts in zip(*kept, strict=True))
        topk_weights = forward.topk_weights[rows[some], rank[some]]
        units = spread(w2.shape[1], sampled_rows(w2.shape[1], 2), key.expert)
        both = torch.cat((units, units + w2.shape[1]))
        outs = spread(w2.shape[0], sampled_rows(w2.shape[0]), key.expert)
        self._pieces.append(Piece(
            key, w13[both], w2[:, units].float().square_().sum(0), w2[outs], x, middle,
            topk_weights, squares(out.mul_(topk_weights[:, None])),
            None if biases is None else biases[0][both], op.activation, len(rows)))
        if self._gathered >= GATHERED:
            self._try()

    @property
    def pending(self) -> bool:
        """Whether there are experts whose formats are not tried yet."""
        return bool(self._pieces)

    @property
    def _gathered(self) -> int:
        return sum(piece.gate_up.numel() for piece in self._pieces)

    def leave(self) -> None:
        """The end of the current layer. Small layers are tried together."""
        if self._gathered >= TOGETHER or self.forward.layer == self._source.model.num_layers - 1:
            self._try()
        self.forward.leave()
        if self.forward.layer in self._extent.layers:
            forward = self.forward
            off = forward.residual[self._last:] - forward.residual[:self._extent.copied]
            self.damages.append(squares(off) / self._extent.copied)

    def _perturb(self, key: ExpertKey, w13: Tensor, w2: Tensor) -> None:
        """What an expert with rounded weights gives to the last copy."""
        forward, last = self.forward, self._last
        rows, rank = (forward.ids[last:] == key.expert).nonzero(as_tuple=True)
        topk_weights, biases = forward.topk_weights[last:][rows, rank], self._source.expert_biases(key)
        for token, weight in zip(rows.split(CHUNK), topk_weights.split(CHUNK), strict=True):
            x = forward.normed[last:][token].float()
            out = forward.one_chunk(x, w13, w2, biases, False, rounded)[1]
            forward.add(token, out.mul_(weight[:, None]), last)

    def _try(self) -> None:
        """Every format on the pieces at hand."""
        pieces, self._pieces = self._pieces, []
        if not pieces:
            return
        for piece in pieces:
            piece.units  # noqa: B018 - made once, not by each of the tasks below
        w13 = torch.cat([piece.gate_up for piece in pieces])
        w2 = torch.cat([piece.down for piece in pieces])

        def damages(task: tuple[str, str]) -> list[float]:
            name, matrix = task
            first, second = self._specs[name]
            if matrix == "w13":
                changed = unpack(quantize(w13, _of_rows(first, len(w13)), self._method))
                return [self._of_w13(piece, some) for piece, some in
                        zip(pieces, changed.split([len(p.gate_up) for p in pieces]), strict=True)]
            changed = unpack(quantize(w2, _of_rows(second, len(w2)), self._method))
            return [self._of_w2(piece, some) for piece, some in
                    zip(pieces, changed.split([len(p.down) for p in pieces]), strict=True)]

        tasks = [(name, matrix) for matrix in ("w13", "w2") for name in FORMATS]
        found = dict(zip(tasks, self._pool.map(damages, tasks), strict=True))
        for i, piece in enumerate(pieces):
            self.raw[piece.key] = {m: {name: found[name, m][i] for name in FORMATS} for m in ("w13", "w2")}

    def _of_w13(self, piece: Piece, changed: Tensor) -> float:
        """The damage of an expert's w13, from what some inner units give instead of h [n, S]: h' = (1 + c) h + e. What
        is left over, e, is independent from unit to unit, so that its effects on the output add up in square. The
        shrinking c, of formats whose ranges are clipped, is common to all units and changes the output y by c y."""
        was, off = piece.units, piece.activated(changed).sub_(piece.units)
        energy = (was.square() @ piece.column_squares).sum(dtype=torch.float64).item()
        along = ((was * off) @ piece.column_squares).sum(dtype=torch.float64).item()
        shrunk = along / energy if energy > 0 else 0.0
        left = (off.sub_(was, alpha=shrunk).square_() @ piece.column_squares).sum(dtype=torch.float64).item()
        all_units = left * piece.middle.shape[1] / len(piece.column_squares)
        return self._scaled(piece, all_units + shrunk**2 * piece.energy)

    def _of_w2(self, piece: Piece, changed: Tensor) -> float:
        """That of its w2, from some rows: of some numbers of the output."""
        out = F.linear(piece.middle, changed.sub(piece.down.float())).mul_(piece.topk_weights[:, None])
        return self._scaled(piece, squares(out) * piece.x.shape[1] / len(piece.down))

    def _scaled(self, piece: Piece, damage: float) -> float:
        """A token of the text, where `damage` is of the tokens that are looked at."""
        return damage * piece.count / len(piece.x) / self._extent.text.tokens


def rounded(weight: Tensor) -> Tensor:
    """`weight` [N, K] in fp32, rounded to STEPS steps between the extremes of each PROBE_GROUP columns of a row."""
    rows, cols = weight.shape
    w = weight.to(torch.float32, copy=True)
    whole = cols // PROBE_GROUP * PROBE_GROUP
    for piece in (w[:, :whole].view(rows, -1, PROBE_GROUP), w[:, whole:].view(rows, 1, -1)):
        if piece.numel():
            low, high = torch.aminmax(piece, dim=-1, keepdim=True)
            scale = (high - low).div_(STEPS).clamp_(min=SMALLEST)
            piece.sub_(low).div_(scale).round_().mul_(scale).add_(low)
    return w


def _of_rows(spec: MatrixSpec, rows: int) -> MatrixSpec:
    return replace(spec, rows=rows, parts=1)
