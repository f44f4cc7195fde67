"""The keys and values of one session's past positions.

Allocated once, for `capacity` positions, and touched at once, so that a session which starts can also
finish. What lies beyond `length` is scratch: a pass writes there, layer by layer, and `length` moves
only when the pass is complete, so a cancelled pass leaves the cache as it was.

L layers, Q query heads, KV key-value heads, D head size, T new positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.hardware.memory import prefer_huge_pages
from qmix.kernels.attend import attend
from qmix.kernels.native import Attention, Kept
from qmix.spec import Model

CPU = torch.device("cpu")
Attend = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]  # kernels.attend.attend has the meaning


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, place: torch.device) -> Tensor:
    made = torch.empty(shape, dtype=dtype, device=place)
    if place.type == "cpu":
        prefer_huge_pages(made.data_ptr(), made.nbytes)
    return made.fill_(0)


class KVCache:
    """Room for `capacity` positions, `length` of them filled. Keys are stored rotated. native: attends for one token
    where `dtype` is bf16; `attend`, torch's or the device's, does the rest. place: where they lie."""

    __slots__ = ("__weakref__", "_addresses", "_attend", "_keys", "_values", "capacity", "length", "native")

    def __init__(self, model: Model, capacity: int, dtype: torch.dtype, native: Attention | None = None,
                 place: torch.device = CPU, attend: Attend = attend):
        attention, _ = model.alike()
        shape = (model.num_layers, attention.kv_heads, capacity, attention.head_dim)
        # Positions of one head are adjacent: attention reads them as one block. fill_ touches every page.
        self._keys = _zeros(shape, dtype, place).unbind()
        self._values = _zeros(shape, dtype, place).unbind()
        self._attend = attend
        self.native = native if dtype == torch.bfloat16 else None
        self._addresses: list[tuple[int, int, int, int]] = []
        self.capacity = capacity
        self.length = 0

    @property
    def nbytes(self) -> int:
        return 2 * len(self._keys) * self._keys[0].nbytes

    def kept(self, layer: int) -> Kept:
        """What a layer has: of every position, in place."""
        return Kept(self._keys[layer], self._values[layer])

    @property
    def places(self) -> tuple[int, ...]:
        """Addresses of keys and values: no other living cache has them, and with them all of `kept` is known."""
        return self._keys[0].data_ptr(), self._values[0].data_ptr()

    @property
    def addresses(self) -> list[tuple[int, int, int, int]]:
        """Where `kept` is, by layer: it never moves."""
        if not self._addresses:
            self._addresses = [self.kept(layer).addresses for layer in range(len(self._keys))]
        return self._addresses

    def need(self, count: int) -> None:
        """UsageError unless `count` more positions fit."""
        if self.length + count > self.capacity:
            raise UsageError(f"{self.length} + {count} tokens do not fit a context of {self.capacity}",
                             "raise -c/--ctx-size, or start over")

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [T, KV, D] (any float dtype) of positions start, start + 1, ...;
        returns all keys and all values up to there, [KV, start + T, D], as views."""
        end = start + keys.shape[0]
        all_keys, all_values = self._keys[layer][:, :end], self._values[layer][:, :end]
        all_keys[:, start:].copy_(keys.transpose(0, 1))
        all_values[:, start:].copy_(values.transpose(0, 1))
        return all_keys, all_values

    def attend(self, layer: int, start: int, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """`write` keys and values, and let q [T, Q, D] of the same positions attend to all up to its own, or to the
        last `window` of them: [T, Q * D], in q's dtype where the native kernel does it, else in the cache's."""
        end = start + len(q)
        if len(q) == 1 and self.native is not None:
            first = 0 if window is None else max(0, end - window)
            return self.native.append(self.kept(layer), q, keys, values, first, end)
        return self._attend(q.to(self._keys[0].dtype), *self.write(layer, start, keys, values), window)

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on; what follows overwrites them."""
        if not 0 <= length <= self.length:
            raise ValueError(f"trim: got {length}, want 0 to {self.length}")
        self.length = length
