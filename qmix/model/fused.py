"""One token of one session through the native kernels: all that a layer does before its experts is one call, and where
all experts are in memory so is all that several layers do.

It computes what model.mixtral computes step by step, to the bit; drafts, which go there, rely on it.

H hidden, L layers, K experts chosen per token, A guessed for each of D layers ahead, Q query heads, KV key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qmix.config import ModelConfig, Step
from qmix.errors import Interrupted
from qmix.kernels import native
from qmix.kernels.attend import rotation
from qmix.kernels.native import Native, Product, jobs
from qmix.kernels.native import Sequence as CallSequence
from qmix.kernels.native.sequence import ADD, ANGLES, ATTEND, EXPERTS, NORM, PRODUCTS, ROTATE, ROUTE, addition
from qmix.kernels.table import KernelTable
from qmix.model.kvcache import KVCache
from qmix.model.weights import Weights

Experts = Callable[[int, Tensor, Tensor, Tensor, Step, Tensor | None, Tensor | None], Tensor]

Calls = list[tuple[int, list[bytes] | bytes]]  # kinds, and their jobs

FIRST, ATTENTION = 0, 4  # calls of a layer that are patched
AT_ONCE = 4  # layers of a call where all experts are in memory: cancelling waits for them


class Resident(Protocol):
    """Experts that are all in memory; offload.experts.PagedExperts has the meaning of each call."""

    def job(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, out: Tensor) -> bytes: ...

    def end_token(self, step: Step, ids: Tensor, topk_weights: Tensor, ahead: Sequence[Tensor | None]) -> None: ...


def fits(weights: Weights, kernels: KernelTable, cache: KVCache) -> bool:
    """Whether the native kernels, all at one level, have everything that a layer of this model does."""
    own, layer, attention = kernels.native, kernels.layer, cache.native
    matrices = [m for lw in weights.layers for m in (*lw.heads, lw.o)]
    return own is not None and isinstance(layer, native.LayerOps) and attention is not None and \
        own.level == layer.level == attention.level and all(m.spec.format in own.formats for m in matrices)


class FusedToken:
    """The buffers of one token, and the layers' calls over them. For one token at a time.

    resident: the experts, where all of them are in memory: they are calls too, and are told of a token at its end.
    """

    def __init__(self, config: ModelConfig, weights: Weights, kernels: KernelTable, cache: KVCache, ahead: int,
                 depth: int, resident: Resident | None = None):
        assert fits(weights, kernels, cache) and kernels.native is not None
        self._config = config
        self._weights = weights
        self._native: Native = kernels.native
        self._resident = resident
        hidden, k, layers = config.hidden_size, config.experts_per_token, config.num_layers
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        dtype = weights.dtype
        self._position = torch.zeros(1, dtype=torch.int64)
        self._inverse = rotation(size, config.rope_theta)
        self._cos, self._sin = torch.empty(2, 1, 1, size)
        self.residual = torch.empty(1, hidden)
        self._x = torch.empty(1, hidden, dtype=dtype)
        self._query, self._key, self._value = (torch.empty(1, n * size, dtype=dtype)
                                               for n in (heads, kv_heads, kv_heads))
        self._rotated = torch.empty(1, heads + kv_heads, size)
        self._attended = torch.empty(1, heads * size)
        self._normed = torch.empty(1, hidden, dtype=dtype)
        self._ids = torch.empty(layers, 1, k, dtype=torch.int64)
        self._topk_weights = torch.empty(layers, 1, k)
        self._out = torch.empty(1, hidden)  # of a layer's experts, if they are calls
        guesses = torch.empty(layers, 1, max(1, depth), ahead, dtype=torch.int64)
        looked = [min(depth, layers - 1 - index) for index in range(layers)]
        self._ahead = [guesses[index, :, :count] if count else None for index, count in enumerate(looked)]
        self._starts, calls = [0], Calls()
        for index in range(layers):
            calls += self._layer(index, cache)
            self._starts.append(len(calls))
        calls.append((ADD, addition(self._out, self.residual)))
        self._sequence = CallSequence(self._native.level, self._native.code, self._native.threads, calls)

    def __call__(self, token: int, cache: KVCache, experts: Experts, step: Step) -> Tensor:
        """Append `token` to the session of `cache`; the residual [1, H] behind the last layer, overwritten by the next
        token. Interrupted when step.cancel is set; then, as on any error, the cache is as it was."""
        start, window = cache.length, self._config.sliding_window
        begin = 0 if window is None else max(0, start + 1 - window)
        self.residual.copy_(self._weights.embedding[token])
        self._position.fill_(start)
        for first, addresses in zip(self._starts, cache.addresses, strict=False):
            self._sequence.patch_cache(first + ATTENTION, addresses, cache.capacity, begin, start + 1)
        if self._resident is None:
            self._run_by_layers(experts, step)
        else:
            self._run_at_once(self._resident, step)
        cache.length = start + 1
        return self.residual

    def _run_at_once(self, resident: Resident, step: Step) -> None:
        layers = self._config.num_layers
        for first in range(0, layers, AT_ONCE):
            if step.cancel:
                raise Interrupted("cancelled")
            last = min(first + AT_ONCE, layers)
            missing = self._sequence.run(self._starts[first], self._starts[last])
            assert missing is None, "an expert that is chosen is not in memory"
        self._sequence.run(self._starts[layers])
        resident.end_token(step, self._ids, self._topk_weights, self._ahead)

    def _run_by_layers(self, experts: Experts, step: Step) -> None:
        for index, first in enumerate(self._starts[:-1]):
            if step.cancel:
                raise Interrupted("cancelled")
            self._sequence.run(first, self._starts[index + 1])
            out = experts(index, self._normed, self._ids[index], self._topk_weights[index], step, self._ahead[index],
                          None)
            assert out.dtype == torch.float32 and out.is_contiguous(), "experts return fp32 rows"
            self._sequence.patch_source(self._starts[index + 1] + FIRST, out.data_ptr())
        self._sequence.run(self._starts[-1])

    def _layer(self, index: int, cache: KVCache) -> Calls:
        """The calls of layer `index`; the first adds what the experts before it gave."""
        layer, native, eps = self._weights.layers[index], self._native, self._config.rms_norm_eps
        heads = self._config.num_heads
        assert cache.native is not None
        first = (ADD, addition(self._out, self.residual)) if index else (
            ANGLES, jobs.angles(self._position, self._inverse, self._cos, self._sin))
        calls: Calls = [
            first,
            (NORM, jobs.norm(self.residual, layer.input_norm, eps, self._x)),
            (PRODUCTS, [native.job(Product(self._x, w, y)) for w, y in zip(
                layer.heads, (self._query, self._key, self._value), strict=True)]),
            (ROTATE, jobs.rotate(self._query, self._key, self._cos, self._sin, self._rotated)),
            (ATTEND, cache.native.job(cache.kept(index), self._rotated[:, :heads], self._rotated[:, heads:],
                                      self._value.view(1, -1, self._config.head_dim), self._attended, 0, 1)),
            (PRODUCTS, native.job(Product(self._attended, layer.o, self.residual, add=True))),
            (ROUTE, jobs.route(self.residual, layer.post_norm, layer.router, eps, self._normed, self._ids[index],
                               self._topk_weights[index]))]
        ahead = self._ahead[index]
        for distance in range(0 if ahead is None else ahead.shape[1]):
            assert ahead is not None
            later = self._weights.layers[index + 1 + distance]
            calls.append((ROUTE, jobs.route(self.residual, later.post_norm, later.router, eps, None,
                                            ahead[:, distance], None)))
        if self._resident is not None:
            calls.append((EXPERTS, self._resident.job(index, self._normed, self._ids[index], self._topk_weights[index],
                                                      self._out)))
        return calls
