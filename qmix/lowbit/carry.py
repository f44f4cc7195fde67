"""Quantized weights that a format of a store holds as they are, to the last bit of every number.

Integer weights w = (code - zero) scale have a q = code - zero of few values, and scales for whole groups of 32 columns
or more. So they are blocks of ggml's, w = d q with an fp16 d for 32 columns, where the scales are fp16 or can be:

    q from   -8 to   7     q4_0    symmetric codes of up to 4 bits, and asymmetric ones of 2 and 3
            -16 to  15     q5_0    asymmetric codes of 4 bits (AWQ, GPTQ)
           -128 to 127     q8_0    symmetric codes of up to 8 bits

and int4 of qmix, w = (q - 8) scale + zero with zero = 0, where they are symmetric codes of 4 bits with bf16 scales.
Columns in the order of desc_act have no such groups, unless they move in blocks that are as large as the format's.
MXFP4 is mxfp4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.config import GROUP_SIZES
from qmix.formats import carried, grouped, mxfp4
from qmix.lowbit.codes import stream
from qmix.lowbit.decode import levels
from qmix.lowbit.matrix import PIECE, Matrix
from qmix.schemes import Awq, Fp4, Gptq, PackedInts, Scaled, Scheme

COLUMNS = 32  # of a block of ggml's
RANGES = (("Q4_0", -8, 7), ("Q5_0", -16, 15), ("Q8_0", -128, 127))


def fits(matrix: Matrix, grouped_too: bool) -> str | None:
    """The type of ggml's that has a matrix's numbers, "INT4G64" of qmix's int4 where `grouped_too`, "MXFP4", or None.
    Reads its scales and zero points, not its codes."""
    scheme, columns = matrix.scheme, matrix.entry.shape[-1]
    if isinstance(scheme, Fp4):
        return "MXFP4" if scheme.kind == "mxfp4" else None
    if isinstance(scheme, Scaled) and scheme.number == "fp8":
        return None
    group = _group(scheme)
    if columns % COLUMNS or group % COLUMNS:
        return None
    low, high = _range(matrix)
    bf16 = matrix.parts["scales"].entry.dtype == "BF16"
    if grouped_too and bf16 and low >= -8 and high <= 7 and _in_order(matrix, store_group(group)):
        return f"INT4G{store_group(group)}"
    kind = next((kind for kind, least, most in RANGES if low >= least and high <= most), None)
    if kind is None or not _in_order(matrix, COLUMNS):
        return None
    scales = matrix.part("scales").float()
    return kind if torch.equal(scales, scales.half().float()) else None


def _group(scheme: Scheme) -> int:
    """Columns that share a scale, 0 = all."""
    assert not isinstance(scheme, Fp4)
    return scheme.block[1] if isinstance(scheme, Scaled) else scheme.group


def store_group(group: int) -> int:
    """The group of qmix's int4 in which one of `group` columns, 0 = all, comes out whole."""
    return max(size for size in GROUP_SIZES if group % size == 0)


def ggml_blocks(matrix: Matrix, kind: str, at: int | None) -> carried.Blocks:
    """A matrix that `fits` the type `kind`, as GGUF files would have it."""
    rows, columns = matrix.entry.shape[-2:]
    parts, found = matrix.load(at), []
    step = max(1, PIECE // columns // 64) * 64
    for begin in range(0, rows, step):
        piece = levels(matrix.scheme, parts, (rows, columns), begin, min(rows, begin + step))
        d = piece.columns(COLUMNS).half().unsqueeze(-1).view(torch.uint8)
        found.append(torch.cat((d, _blocks(kind, piece.integers().unflatten(1, (-1, COLUMNS)))), -1))
    return carried.Blocks(kind.lower(), torch.cat(found))


def int4_blocks(matrix: Matrix, at: int | None) -> grouped.Blocks:
    """A matrix that `fits` int4."""
    rows, columns = matrix.entry.shape[-2:]
    scheme, parts = matrix.scheme, matrix.load(at)
    group = store_group(_group(scheme))
    found = [levels(scheme, parts, (rows, columns), begin, min(rows, begin + 1024)) for begin in range(0, rows, 1024)]
    scales = torch.cat([piece.columns(group) for piece in found])
    codes = torch.cat([(piece.integers() + 8).to(torch.uint8) for piece in found])
    return grouped.Blocks(codes, scales.bfloat16(), group)


def mxfp4_blocks(matrix: Matrix, at: int | None = None) -> mxfp4.Blocks:
    """A matrix in MXFP4."""
    parts = matrix.load(at)
    return mxfp4.Blocks(parts["codes"].unflatten(1, (-1, 16)), parts["scales"].view(torch.uint8))


def _blocks(kind: str, q: Tensor) -> Tensor:
    """The codes of blocks of ggml's, behind their scale: int16 [n, blocks, 32] -> uint8 [n, blocks, bytes]."""
    if kind == "Q8_0":
        return q.to(torch.int8).view(torch.uint8)
    codes = (q + (8 if kind == "Q4_0" else 16)).to(torch.uint8)
    nibbles = codes[..., :16] & 15 | (codes[..., 16:] & 15) << 4
    if kind == "Q4_0":
        return nibbles
    fifth = codes.unflatten(-1, (4, 8)) >> 4
    return torch.cat(((fifth << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8), nibbles), -1)


def _range(matrix: Matrix) -> tuple[int, int]:
    """The least and the largest that code - zero may be."""
    scheme = matrix.scheme
    if isinstance(scheme, Awq):
        return -15, 15
    if isinstance(scheme, Gptq):
        most = 2**scheme.bits - 1
        least, largest = _gptq_zeros(matrix, scheme)
        return -largest, most - least
    assert isinstance(scheme, PackedInts | Scaled)
    bits = scheme.bits if isinstance(scheme, PackedInts) else 8
    return (-(2**bits - 1), 2**bits - 1) if scheme.zeros else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _gptq_zeros(matrix: Matrix, scheme: Gptq) -> tuple[int, int]:
    """The least and the largest zero point. Where all are the middle the codes are symmetric, whatever `sym` says."""
    zeros = stream(matrix.part("zeros").T, scheme.bits)
    offset = 1 if scheme.version == 1 else 0
    return int(zeros.min()) + offset, int(zeros.max()) + offset


def _in_order(matrix: Matrix, columns: int) -> bool:
    """Whether each so many columns lie in one group."""
    if "order" not in matrix.parts:
        return True
    order = matrix.part("order")
    return torch.equal(order, order[torch.arange(len(order)) // columns * columns])
