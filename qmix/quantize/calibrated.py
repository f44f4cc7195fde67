"""GPTQ on whole matrices, and its stream: the forward pass follows the stream of experts and gives each matrix its
inputs.

An expert to which the text sent fewer than LEAST tokens is quantized by hqq, because so few tokens say next to nothing.
The manifest has the method and the number of tokens for each expert, and the report names those that fell back.

N padded rows, K columns, R rows of a strip, W columns of a group, G groups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Executor

import torch
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey
from qmix.formats import Packed
from qmix.formats.grouped import store_codes
from qmix.formats.packed import refuse_nonfinite
from qmix.quantize.calibration import CHUNK, LENGTH, SEQUENCES, Calibration, ForwardPass, Inputs
from qmix.quantize.gptq import DegenerateInputs, Fit, Walked, walk
from qmix.quantize.methods import Error, blank, fit_group, quantize_measured
from qmix.sizes import MatrixSpec, round_up
from qmix.spec import Model
from qmix.spec.model import layer_of

FALLBACK = "hqq"
LEAST = 32  # tokens; fewer say too little of what an expert's inputs are like
STRIP = 1024  # rows that one task walks through
TILE = 512  # columns of them that are transposed at a time


class Guide:
    """The forward pass beside the stream of work, whose regions must come in the order of `stage`.

    measured: layers of which attention's inputs will be asked for.
    """

    def __init__(self, source: Checkpoint, calibration: Calibration, measured: Collection[int], pool: Executor):
        self._forward = ForwardPass(source, calibration, pool)
        self._measured = measured
        self._attention: Mapping[str, Inputs] = {}

    def inputs(self, key: ExpertKey | str, weights: Mapping[str, Tensor], measure: bool) -> Mapping[str, Inputs]:
        """What the matrices of an expert, {"w13", "w2"}, or of a dense tensor, {""}, were given. Empty where the text
        was sent elsewhere, and with `measure` off, where it only passes through."""
        if isinstance(key, ExpertKey):
            self._enter(key.layer)
            return self._forward.expert(key, weights["w13"], weights["w2"], measure)
        layer = layer_of(key)
        if layer is None:
            assert key == "head", key
            return {"": self._forward.head(weights[""])}
        self._enter(layer)
        return {"": self._attention[key.split(".")[-1]]}

    def _enter(self, layer: int) -> None:
        if layer > self._forward.layer:
            self._attention = {}  # goes before the next layer's comes
            self._attention = self._forward.attention(layer, layer in self._measured)


def peak_bytes(model: Model, tokens: int, threads: int) -> int:
    """The most memory that quantizing with a calibration takes, about: 4.1 GiB for 65536 tokens of Mixtral 8x7B and
    two threads."""
    hidden, inner, item = model.hidden, model.expert_inner, 4 if model.dtype == "float32" else 2
    attention, _ = model.alike()
    heads = 2 * (attention.heads + attention.kv_heads) * attention.head_dim
    kept = tokens * (hidden * (4 + item) + model.top_k * 12)
    expert = 4 * (hidden**2 + inner**2) + 2 * 3 * hidden * inner * item + 3 * hidden * inner  # sums, two read, packed
    strips = threads * 3 * 4 * STRIP * max(hidden, inner)
    passing = 4 * CHUNK * (hidden * 2 + inner) + 4 * SEQUENCES * LENGTH * 2 * hidden + 4 * heads * hidden
    return kept + expert + strips + passing + model.vocab * hidden * item


def stage(key: ExpertKey | str, layers: int) -> int:
    """When the forward pass needs a region: the embedding before all layers, -1; final norm and head after them."""
    layer = key.layer if isinstance(key, ExpertKey) else layer_of(key)
    return layer if layer is not None else -1 if key == "embedding" else layers


def choose_calibrated(weight: Tensor, spec: MatrixSpec, inputs: Inputs | None,
                      pool: Executor | None = None) -> tuple[Mapping[str, Tensor], Error, float | None]:
    """quantize_calibrated's tensors, error and output error; where there are too few inputs FALLBACK's, and None."""
    if inputs is not None and inputs.count >= LEAST:
        try:
            packed, distance, output_error = quantize_calibrated(weight, spec, inputs, pool)
            return packed.tensors, distance, output_error
        except DegenerateInputs:
            pass  # an expert whose gate is shut tells nothing either
    packed, distance = quantize_measured(weight, spec, FALLBACK, pool)
    return packed.tensors, distance, None


def quantize_calibrated(weight: Tensor, spec: MatrixSpec, inputs: Inputs,
                        pool: Executor | None = None) -> tuple[Packed, Error, float]:
    """`weight` [rows, cols], any float dtype, in a grouped format by GPTQ: (packed, its error, the relative rms error
    of its outputs on `inputs`).

    The same bytes for every pool. QmixError names the position of an inf or NaN; DegenerateInputs where all inputs are
    zero.
    """
    packed, factor, bits = blank(weight, spec), inputs.factor(pool), spec.bits

    def work(place: tuple[int, int, int]) -> tuple[Error, float]:
        row, padded_row, rows = place
        strip = _transposed(weight[row:row + rows], round_up(rows, spec.block), row)
        squares = torch.linalg.vector_norm(strip, dtype=torch.float64).item() ** 2
        walked = walk(strip, factor, spec.group_size, bits, _fit(bits))
        _store(walked, packed, padded_row)
        return Error(walked.sum_sq_err, squares), walked.damage

    found, damage = Error(0.0, 0.0), 0.0
    for error, more in (map if pool is None else pool.map)(work, _strips(spec)):
        found, damage = found + error, damage + more
    seen = max(0.0, damage - factor.damping * found.sum_sq_err)  # the damping was never an input
    return packed, found, (seen / inputs.energy) ** 0.5 if inputs.energy else 0.0


def _strips(spec: MatrixSpec) -> Iterator[tuple[int, int, int]]:
    """(first row, where it lands among the padded rows, rows)."""
    rows, padded = spec.rows // spec.parts, spec.padded_rows // spec.parts
    for part in range(spec.parts):
        for start in range(0, rows, STRIP):
            yield part * rows + start, part * padded + start, min(STRIP, rows - start)


def _transposed(weight: Tensor, padded_rows: int, first_row: int) -> Tensor:
    """weight [rows, K] as fp32 [K, padded_rows], the rest zero."""
    rows, cols = weight.shape
    out = torch.zeros(cols, padded_rows)
    for begin in range(0, cols, TILE):
        out[begin:begin + TILE, :rows] = weight[:, begin:begin + TILE].float().T
    if not torch.isfinite(out.sum()):
        refuse_nonfinite(weight, first_row)
    return out


def _fit(bits: int) -> Fit:
    """hqq's grid, which measures better than rounding to nearest's also where GPTQ chooses the codes."""
    def fit(weights: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(weights, dim=0)
        scale, zero = fit_group(weights[None], low[None], high[None], bits, torch.empty(3, 1, *weights.shape))
        return scale[0], zero[0]

    return fit


def _store(walked: Walked, packed: Packed, padded_row: int) -> None:
    """Put a strip into its place."""
    cols, rows = walked.codes.shape
    block = packed.spec.block
    store_codes(walked.codes, packed["qweight"][padded_row // block:(padded_row + rows) // block, :cols])
    params = packed["qparams"][:, padded_row:padded_row + rows]
    params[..., 0], params[..., 1] = walked.scale, walked.zero
