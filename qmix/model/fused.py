"""One token of one session through the native kernels: all that a layer does before its experts is one call.

It computes what model.mixtral computes step by step, to the bit; drafts, which go there, rely on it.

H hidden, K experts chosen per token, Q query heads, KV key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qmix.config import Step
from qmix.errors import Interrupted
from qmix.kernels import native
from qmix.kernels.attend import rotation
from qmix.kernels.native import Native, Product, jobs
from qmix.kernels.native.sequence import ADD, ANGLES, ATTEND, NORM, PRODUCTS, ROTATE, ROUTE, Sequence, addition
from qmix.kernels.table import KernelTable
from qmix.model.kvcache import KVCache
from qmix.model.weights import LayerWeights, Weights
from qmix.spec import Model

Experts = Callable[[int, Tensor, Tensor, Tensor, Step, Tensor | None, Tensor | None], Tensor]

FIRST, ATTENTION = 0, 4  # calls of a layer's sequence that are patched


def fits(weights: Weights, kernels: KernelTable, cache: KVCache) -> bool:
    """Whether the native kernels, all at one level, have everything that a layer of this model does."""
    own, layer, attention = kernels.native, kernels.layer, cache.native
    matrices = [m for lw in weights.layers for m in (*lw.heads, lw.o)]
    return own is not None and isinstance(layer, native.LayerOps) and attention is not None and \
        own.level == layer.level == attention.level and all(m.spec.format in own.formats for m in matrices)


class FusedToken:
    """The buffers of one token, and each layer's calls over them. For one token at a time."""

    def __init__(self, model: Model, weights: Weights, kernels: KernelTable, cache: KVCache, ahead: int,
                 depth: int):
        assert fits(weights, kernels, cache) and kernels.native is not None
        self._model = model
        self._weights = weights
        self._native: Native = kernels.native
        hidden, k = model.hidden, model.top_k
        self._shape, _ = model.alike()
        assert self._shape.rope is not None
        heads, kv_heads, size = self._shape.heads, self._shape.kv_heads, self._shape.head_dim
        dtype = weights.dtype
        self._position = torch.zeros(1, dtype=torch.int64)
        self._inverse = rotation(size, self._shape.rope.theta)
        self._cos, self._sin = torch.empty(2, 1, 1, size)
        self.residual = torch.empty(1, hidden)
        self._x = torch.empty(1, hidden, dtype=dtype)
        self._query, self._key, self._value = (torch.empty(1, n * size, dtype=dtype)
                                               for n in (heads, kv_heads, kv_heads))
        self._rotated = torch.empty(1, heads + kv_heads, size)
        self._attended = torch.empty(1, heads * size)
        self._normed = torch.empty(1, hidden, dtype=dtype)
        self._ids = torch.empty(1, k, dtype=torch.int64)
        self._chances = torch.empty(1, k)
        self._ahead = torch.empty(1, max(1, depth), ahead, dtype=torch.int64)
        self._layers = [self._layer(index, cache, depth) for index in range(model.num_layers)]
        self._last = Sequence(self._native.level, self._native.code, self._native.threads,
                              [(ADD, addition(self.residual, self.residual))])

    def __call__(self, token: int, cache: KVCache, experts: Experts, step: Step) -> Tensor:
        """Append `token` to the session of `cache`; the residual [1, H] behind the last layer, overwritten by the next
        token. Interrupted when step.cancel is set; then, as on any error, the cache is as it was."""
        start, window = cache.length, self._shape.window
        begin = 0 if window is None else max(0, start + 1 - window)
        self.residual.copy_(self._weights.embedding[token])
        self._position.fill_(start)
        out = self.residual
        for index, (sequence, ahead) in enumerate(self._layers):
            if step.cancel:
                raise Interrupted("cancelled")
            if index:
                sequence.patch_source(FIRST, out.data_ptr())
            sequence.patch_cache(ATTENTION, cache.addresses[index], cache.capacity, begin, start + 1)
            sequence.run()
            out = experts(index, self._normed, self._ids, self._chances, step, ahead, None)
            assert out.dtype == torch.float32 and out.is_contiguous(), "experts return fp32 rows"
        self._last.patch_source(FIRST, out.data_ptr())
        self._last.run()
        cache.length = start + 1
        return self.residual

    def _layer(self, index: int, cache: KVCache, depth: int) -> tuple[Sequence, Tensor | None]:
        """(the calls of layer `index`, the guesses that they make)."""
        layer, native, eps = self._weights.layers[index], self._native, self._model.final_norm.eps
        heads = self._shape.heads
        assert cache.native is not None
        first = (ADD, addition(self.residual, self.residual)) if index else (
            ANGLES, jobs.angles(self._position, self._inverse, self._cos, self._sin))
        calls: list[tuple[int, list[bytes] | bytes]] = [
            first,
            (NORM, jobs.norm(self.residual, layer.input_norm, eps, self._x)),
            (PRODUCTS, [native.job(Product(self._x, w, y)) for w, y in zip(
                layer.heads, (self._query, self._key, self._value), strict=True)]),
            (ROTATE, jobs.rotate(self._query, self._key, self._cos, self._sin, self._rotated)),
            (ATTEND, cache.native.job(cache.kept(index), self._rotated[:, :heads], self._rotated[:, heads:],
                                      self._value.view(1, -1, self._shape.head_dim), self._attended, 0, 1)),
            (PRODUCTS, native.job(Product(self._attended, layer.o, self.residual, add=True))),
            (ROUTE, jobs.route(self.residual, layer.post_norm, layer.router, eps, self._normed, self._ids,
                               self._chances))]
        later = self._weights.layers[index + 1:index + 1 + depth]
        calls += [(ROUTE, self._guess(following, distance)) for distance, following in enumerate(later)]
        return Sequence(native.level, native.code, native.threads, calls), (
            self._ahead[:, :len(later)] if later else None)

    def _guess(self, later: LayerWeights, distance: int) -> bytes:
        return jobs.route(self.residual, later.post_norm, later.router, self._model.final_norm.eps, None,
                          self._ahead[:, distance], None)
