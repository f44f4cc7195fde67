"""GPTQ on whole matrices, by what they were given.

An expert to which the text sent fewer than LEAST tokens is quantized by hqq, because so few tokens say next to nothing.
The manifest has the method and the number of tokens for each expert, and the report names those that fell back.

N padded rows, K columns, R rows of a strip, W columns of a group, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor

import torch
from torch import Tensor

from qmix.formats import Packed
from qmix.formats.grouped import store_codes
from qmix.formats.packed import refuse_nonfinite
from qmix.quantize.gptq import DegenerateInputs, Fit, Walked, walk
from qmix.quantize.inputs import Inputs
from qmix.quantize.methods import Error, blank, fit_group, quantize_measured
from qmix.sizes import MatrixSpec, round_up

FALLBACK = "hqq"
LEAST = 32  # tokens; fewer say too little of what an expert's inputs are like
STRIP = 1024  # rows that one task walks through
TILE = 512  # columns of them that are transposed at a time


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
