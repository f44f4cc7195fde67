"""The numbers in GGUF's blocks, exactly as ggml computes them: in fp32, one rounding for each product and difference,
in ggml's order. simple.py has the types with one scale a block of 32, k_quants.py those with scales of scales in blocks
of 256, tables.py those whose codes are places in a table.

    dequantize("Q4_K", raw)     raw uint8 [n, 144] -> fp32 [n, 256]

These are formats that are read, not formats of a store: rows lie as in the file, and no kernel computes on them.
Source: the structs and dequantize_row functions of ggml (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qmix.formats.ggml import k_quants, simple, tables
from qmix.gguf.types import BY_NAME

PIECE = 2**20  # weights that are decoded at a time
PLAIN = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({
    "Q4_0": simple.q4_0, "Q4_1": simple.q4_1, "Q5_0": simple.q5_0, "Q5_1": simple.q5_1, "Q8_0": simple.q8_0,
    "Q2_K": k_quants.q2_k, "Q3_K": k_quants.q3_k, "Q4_K": k_quants.q4_k, "Q5_K": k_quants.q5_k, "Q6_K": k_quants.q6_k,
    "IQ4_NL": tables.iq4_nl, "IQ4_XS": tables.iq4_xs, "MXFP4": tables.mxfp4})
READ = (*PLAIN, *DECODERS)  # the types that qmix takes


def dequantize(kind: str, raw: Tensor) -> Tensor:
    """fp32 [n, weights of a block] of uint8 [n, bytes of a block]; kind: one of READ."""
    if kind in PLAIN:
        return raw.contiguous().view(PLAIN[kind]).float()
    return DECODERS[kind](raw)


def decode_into(kind: str, raw: Tensor, out: Tensor) -> None:
    """The numbers of uint8 [bytes], whole blocks, into `out` [weights] of any float dtype, piece by piece."""
    block = BY_NAME[kind]
    blocks, target = raw.view(-1, block.nbytes), out.view(-1, block.weights)
    step = max(1, PIECE // block.weights)
    for start in range(0, len(blocks), step):
        target[start:start + step] = dequantize(kind, blocks[start:start + step])
