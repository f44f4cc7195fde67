"""native.h's structures, packed from tensors. A job holds addresses: who keeps one keeps its tensors.

T tokens, H hidden, E experts, K chosen, Q query heads, KV key-value heads, D head size.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

PRODUCT = struct.Struct("@6P7q8i")    # qmix_job: pointers, sizes, layout
ATTENTION = struct.Struct("@8P6q4i")  # qmix_attention
NORM = struct.Struct("@3Pqfi")        # qmix_norm
ROUTE = struct.Struct("@3Pqfi3P3q")   # qmix_route, which begins with a qmix_norm
ROTATE = struct.Struct("@5P3qi4x")    # qmix_rotate
ANGLES = struct.Struct("@4Pq")        # qmix_angles
COMBINE = struct.Struct("@3P2q")      # qmix_combine
ADDITION = struct.Struct("@2Pq")      # qmix_addition
CALL = struct.Struct("@P2i")          # qmix_call
TYPES = {torch.float32: 0, torch.bfloat16: 1}
KEPT = {torch.int8: 0, torch.bfloat16: 1}


def norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> bytes:
    """x, out [T, H], weight [H]; x and weight fp32, out fp32 or bf16; all contiguous."""
    return NORM.pack(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[1], eps, TYPES[out.dtype])


def route(x: Tensor, weight: Tensor, router: Tensor, eps: float, normed: Tensor | None, ids: Tensor,
          weights: Tensor | None) -> bytes:
    """x, normed [T, H], weight [H], router [E, H] fp64, ids [T, K] int64, weights [T, K] fp32; all contiguous but for
    the rows of ids."""
    out, kind = (0, 0) if normed is None else (normed.data_ptr(), TYPES[normed.dtype])
    return ROUTE.pack(x.data_ptr(), weight.data_ptr(), out, x.shape[1], eps, kind, router.data_ptr(), ids.data_ptr(),
                      0 if weights is None else weights.data_ptr(), ids.stride(0), router.shape[0], ids.shape[1])


def rotate(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> bytes:
    """queries [T, Q * D] and keys [T, KV * D] of one type, cos, sin [T, 1, D] fp32, out [T, Q + KV, D] fp32; all
    contiguous."""
    size = cos.shape[2]
    return ROTATE.pack(queries.data_ptr(), keys.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
                       queries.shape[1] // size, keys.shape[1] // size, size, TYPES[queries.dtype])


def angles(positions: Tensor, inverse: Tensor, cos: Tensor, sin: Tensor) -> bytes:
    """positions [T] int64, inverse [D / 2], cos, sin [T, 1, D] fp32; all contiguous."""
    return ANGLES.pack(positions.data_ptr(), inverse.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[2])


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> bytes:
    """rows [T, K, H], weights [T, K], out [T, H]; all fp32, contiguous."""
    return COMBINE.pack(rows.data_ptr(), weights.data_ptr(), out.data_ptr(), rows.shape[1], rows.shape[2])
