"""What a layer does to a few tokens beside products and attention, through the library: norm, router, rotary embedding
and the weighted sum of expert outputs. torch takes some 25 operations for it, which cost more to start than to compute.

T tokens, H hidden, E experts, K chosen, Q query heads, KV key-value heads, D head size.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from qmix.kernels.native.loader import levels, library

NORM = struct.Struct("@3Pqfi")          # native.h's qmix_norm
ROUTE = struct.Struct("@3Pqfi3P3q")     # qmix_route
ROTATE = struct.Struct("@5P3qi4x")      # qmix_rotate
COMBINE = struct.Struct("@3P2q")        # qmix_combine
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class LayerOps:
    """The library at one level (see levels()); the same methods as kernels.layer.TorchLayerOps. By the calling thread;
    the bits of a token do not depend on the others."""

    def __init__(self, level: str):
        opened = library()
        assert opened is not None, "no library"
        self._norms, self._routes = opened.qmix_norms, opened.qmix_routes
        self._rotations, self._combines = opened.qmix_rotations, opened.qmix_combines
        self._level = levels()[level]
        self.name = f"native {level}"

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight: x [T, H] and weight [H] fp32 -> [T, H] of `dtype`, fp32 or bf16."""
        x, weight = _plain(x), _plain(weight)
        out = torch.empty(x.shape, dtype=dtype)
        _check(self._norms(self._level, NORM.pack(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[1], eps,
                                                  _TYPES[dtype]), x.shape[0]))
        return out

    def route(self, x: Tensor, weight: Tensor, router: Tensor, eps: float, normed: Tensor, ids: Tensor,
              weights: Tensor) -> None:
        """norm(x) into normed [T, H], fp32 or bf16; the K experts with the largest logits router norm(x), which are
        summed in fp64, into ids [T, K] int64, the largest first; softmax over these logits into weights [T, K] fp32.
        x [T, H], weight [H] fp32; router [E, H] fp64."""
        x, weight, router = _plain(x), _plain(weight), _plain(router)
        assert normed.is_contiguous() and weights.is_contiguous() and ids.stride(1) == 1, "rows with gaps"
        (count, size), (experts, _) = x.shape, router.shape
        job = ROUTE.pack(x.data_ptr(), weight.data_ptr(), normed.data_ptr(), size, eps, _TYPES[normed.dtype],
                         router.data_ptr(), ids.data_ptr(), weights.data_ptr(), ids.stride(0), experts, ids.shape[1])
        _check(self._routes(self._level, job, count))

    def guess(self, x: Tensor, weight: Tensor, router: Tensor, eps: float, ids: Tensor) -> None:
        """What `route` would put into ids, [T, A] of any strides between tokens."""
        x, weight, router = _plain(x), _plain(weight), _plain(router)
        assert ids.stride(1) == 1, "rows with gaps"
        (count, size), (experts, _) = x.shape, router.shape
        job = ROUTE.pack(x.data_ptr(), weight.data_ptr(), 0, size, eps, 0, router.data_ptr(), ids.data_ptr(), 0,
                         ids.stride(0), experts, ids.shape[1])
        _check(self._routes(self._level, job, count))

    def rotate(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding: queries [T, Q * D] and keys [T, KV * D], fp32 or bf16; cos, signed sin [T, 1, D] fp32 ->
        [T, Q, D] and [T, KV, D], fp32."""
        count, _, size = cos.shape
        queries, keys, cos, sin = (x if x.is_contiguous() else x.contiguous() for x in (queries, keys, cos, sin))
        heads, kv_heads = queries.shape[1] // size, keys.shape[1] // size
        out = torch.empty(count, heads + kv_heads, size)
        job = ROTATE.pack(queries.data_ptr(), keys.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), heads,
                          kv_heads, size, _TYPES[queries.dtype])
        _check(self._rotations(self._level, job, count))
        return out[:, :heads], out[:, heads:]

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """sum_k weights[:, k] * rows[:, k], strictly in order: rows [T, K, H], weights [T, K] -> [T, H], all fp32."""
        rows, weights = _plain(rows), _plain(weights)
        count, chosen, size = rows.shape
        out = torch.empty(count, size)
        job = COMBINE.pack(rows.data_ptr(), weights.data_ptr(), out.data_ptr(), chosen, size)
        _check(self._combines(self._level, job, count))
        return out


def _plain(x: Tensor) -> Tensor:
    assert x.dtype in (torch.float32, torch.float64), x.dtype
    return x if x.is_contiguous() else x.contiguous()


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for a row of hidden states")
