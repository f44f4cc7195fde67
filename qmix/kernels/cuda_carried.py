"""The GPU's kernels for ggml's formats (qmix/formats/carried.py), in Triton: what cuda.py does with int4, on the bytes
that a store has. Tested under Triton's interpreter and compiled for cards from sm_75 up; they have not run on one.

    gemv      up to FEW tokens: pieces of the columns, in fp32
    matmul    more tokens: codes are exact in the dtype of the product
    decode    rows as numbers, those of ggml where they are not rounded further
    rows      the rows of an embedding that a few tokens ask for, ggml's numbers; nothing is allocated, so that a CUDA
              graph can have it

cuda.py calls these where a matrix is in such a format, and has the meaning of each argument.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qmix.formats.packed import Packed
from qmix.kernels.configs import Gemv, Matmul
from qmix.kernels.device_scratch import CARRIED_WORDS, lanes_of
from qmix.sizes import CARRIED, MatrixSpec

if TYPE_CHECKING:
    from qmix.kernels.cuda import Jobs, Matrices

WIDEST = 64  # rows of a tile of a product, at most: codes of four columns are taken apart in registers
PIECE = 512  # columns of a row that a program of `rows` has
WITH_ZERO = ("q4_1", "q5_1", "q4_k", "q5_k")
PARAMS = {"q4_k": "k", "q5_k": "k", "q6_k": "q6_k", "iq4_xs": "iq4_xs"}  # of the others "half"


def format_of(spec: MatrixSpec) -> dict[str, Any]:
    """What the kernels are told of a format."""
    layout = CARRIED[spec.format]
    return {"GROUP": layout.group, "BITS": layout.bits, "TABLE": layout.table, "MIDDLE": layout.middle,
            "ZERO": spec.format in WITH_ZERO, "PARAMS": PARAMS.get(spec.format, "half")}


def tensors_of(weights: Matrices) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as words, parameters as bytes and as fp16, each from slot 0 on."""
    return weights.qweight.view(torch.int32), weights.qparams, weights.qparams.view(torch.float16)


def gemv(jit: ModuleType, x: Tensor, weights: Matrices, jobs: Jobs, partial: Tensor, config: Gemv) -> None:
    spec, (count, width, splits, _) = weights.spec, partial.shape
    group = spec.group_size
    lanes = lanes_of(spec, config)
    jit.gemv[spec.padded_rows // spec.block, splits, count](
        x, *tensors_of(weights), jobs.slots, jobs.rows, partial, weights.slot_bytes // 4, x.stride(0), spec.cols,
        spec.padded_cols // group, spec.padded_rows, M=width, LANES=lanes,
        STEPS=max(1, min(config.unroll // 2, group // 16)), RAGGED=spec.cols < spec.padded_cols, **format_of(spec),
        num_warps=max(1, lanes * CARRIED_WORDS // 32), enable_fp_fusion=True)


def matmul(jit: ModuleType, x: Tensor, weights: Matrices, slot: int, y: Tensor, operands: Any, block_m: int,
           config: Matmul) -> None:
    spec = weights.spec
    blocks, rows = spec.padded_rows // spec.block, min(config.rows, WIDEST)
    jit.matmul[-(-len(x) // block_m), -(-spec.padded_rows // rows)](
        x, *tensors_of(weights), y, slot, len(x), weights.slot_bytes // 4, x.stride(0), y.stride(0), spec.cols,
        spec.padded_cols // spec.group_size, spec.padded_rows, blocks, BLOCK_M=block_m, ROWS=rows, DOT=operands,
        **format_of(spec), num_stages=config.stages, enable_fp_fusion=True,
        num_warps=config.warps if block_m == config.tokens else 4)


def decode(jit: ModuleType, weights: Matrices, first: int, blocks: int, out: Tensor) -> None:
    spec = weights.spec
    groups = spec.padded_cols // spec.group_size
    jit.decode[blocks, groups](*tensors_of(weights), out, first, groups, out.stride(0), **format_of(spec), num_warps=4,
                               enable_fp_fusion=False)


def rows(jit: ModuleType, tokens: Tensor, embedding: Packed, out: Tensor, factor: float) -> None:
    """The rows `tokens` int64 [T] of embedding [V, H], times factor, into out fp32 [T, H]."""
    spec, scales = embedding.spec, embedding["scales"].view(-1)
    assert out.dtype == torch.float32 and out.shape == (len(tokens), spec.cols) and out.stride(1) == 1
    jit.rows[len(tokens), -(-spec.cols // PIECE)](
        tokens, embedding["qweight"].view(-1), scales, scales.view(torch.float16), out, float(factor), spec.cols,
        spec.padded_cols // spec.group_size, out.stride(0), SIZE=PIECE, **format_of(spec), num_warps=4,
        enable_fp_fusion=False)
