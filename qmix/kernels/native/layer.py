"""What a layer does to a few tokens beside products and attention, through the library: norm, router, rotary embedding
and the weighted sum of expert outputs. torch takes some 25 operations for it, which cost more to start than to compute.

T tokens, H hidden, E experts, K chosen of them, A guessed, Q query heads, KV key-value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.kernels.native import jobs
from qmix.kernels.native.loader import levels, library


class LayerOps:
    """The library at one level (see levels()); the same methods as kernels.layer.TorchLayerOps. By the calling thread;
    the bits of a token do not depend on the others."""

    def __init__(self, level: str):
        opened = library()
        assert opened is not None, "no library"
        self._library = opened
        self._number = levels()[level]
        self.level = level
        self.name = f"native {level}"

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight: x [T, H] and weight [H] fp32 -> [T, H] of `dtype`, fp32 or bf16."""
        x, weight = _plain(x), _plain(weight)
        out = torch.empty(x.shape, dtype=dtype)
        _check(self._library.qmix_norms(self._number, jobs.norm(x, weight, eps, out), x.shape[0]))
        return out

    def route(self, x: Tensor, weight: Tensor, router: Tensor, eps: float, normed: Tensor, ids: Tensor,
              weights: Tensor) -> None:
        """norm(x) into normed [T, H], fp32 or bf16; the K experts with the largest logits router norm(x), which are
        summed in fp64, into ids [T, K] int64, the largest first; softmax over these logits into weights [T, K] fp32.
        x [T, H], weight [H] fp32; router [E, H] fp64."""
        x, weight, router = _plain(x), _plain(weight), _plain(router, torch.float64)
        assert normed.is_contiguous() and weights.is_contiguous() and ids.stride(1) == 1, "rows with gaps"
        _check(self._library.qmix_routes(self._number, jobs.route(x, weight, router, eps, normed, ids, weights),
                                         x.shape[0]))

    def guess(self, x: Tensor, weight: Tensor, router: Tensor, eps: float, ids: Tensor) -> None:
        """What `route` would put into ids, [T, A] of any strides between tokens."""
        x, weight, router = _plain(x), _plain(weight), _plain(router, torch.float64)
        assert ids.stride(1) == 1, "rows with gaps"
        _check(self._library.qmix_routes(self._number, jobs.route(x, weight, router, eps, None, ids, None), x.shape[0]))

    def angles(self, positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine, fp32 [T, 1, D], of position * inverse [D / 2], for positions [T] int64."""
        cos, sin = torch.empty(2, len(positions), 1, 2 * len(inverse))
        positions = positions.contiguous()
        _check(self._library.qmix_angles_of(self._number, jobs.angles(positions, inverse, cos, sin), len(positions)))
        return cos, sin

    def rotate(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding: queries [T, Q * D] and keys [T, KV * D], fp32 or bf16; cos, signed sin [T, 1, D] fp32 ->
        [T, Q, D] and [T, KV, D], fp32."""
        count, _, size = cos.shape
        queries, keys, cos, sin = (x if x.is_contiguous() else x.contiguous() for x in (queries, keys, cos, sin))
        heads, kv_heads = queries.shape[1] // size, keys.shape[1] // size
        out = torch.empty(count, heads + kv_heads, size)
        _check(self._library.qmix_rotations(self._number, jobs.rotate(queries, keys, cos, sin, out), count))
        return out[:, :heads], out[:, heads:]

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """sum_k weights[:, k] * rows[:, k], strictly in order: rows [T, K, H], weights [T, K] -> [T, H], all fp32."""
        rows, weights = _plain(rows), _plain(weights)
        out = torch.empty(rows.shape[0], rows.shape[2])
        _check(self._library.qmix_combines(self._number, jobs.combine(rows, weights, out), rows.shape[0]))
        return out


def _plain(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    assert x.dtype == dtype, x.dtype
    return x if x.is_contiguous() else x.contiguous()


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for a row of hidden states")
