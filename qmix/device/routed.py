"""What one layer's router decides about a few tokens, on the device and in host memory, and where the experts put their
results.

The model writes it on the device. The experts read it there and, after a readback, on the host.

T tokens, H hidden, K experts chosen per token, D layers looked ahead, A experts guessed for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.device.device import Device


class Routed:
    """Buffers for T tokens, the same for every layer.

    On the device: x fp32 [T, H], what the experts read; ids int32 [T, K], topk_weights fp32 [T, K]; ahead int32
    [T, D, A]; rows fp32 [T, K, H], what each expert gives. All but rows lie in one piece, so that one copy brings it to
    the host: host_x, host_ids, host_topk_weights, host_ahead. There are two of these, for layers of even and odd
    number, so that the next layer may speak while the host still reads what this one said; `look` says which of them is
    read.
    """

    def __init__(self, device: Device, tokens: int, hidden: int, top_k: int, depth: int, guesses: int):
        shapes = ((tokens, hidden), (tokens, top_k), (tokens, top_k), (tokens, depth, guesses))
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self.tokens = tokens
        self._here = torch.zeros(sum(sizes), dtype=torch.int32, device=device.torch_device)
        self._there = [device.host(sum(sizes), dtype=torch.int32) for _ in range(2)]
        self.rows = torch.zeros(tokens, top_k, hidden, device=device.torch_device)
        self.x, self.topk_weights, self.ids, self.ahead = _parts(self._here, shapes, sizes)
        self._views = [_parts(there, shapes, sizes) for there in self._there]
        self.look(0)

    def look(self, layer: int) -> None:
        """From now on host_x and the others are what this layer's readback brought."""
        self.host_x, self.host_topk_weights, self.host_ids, self.host_ahead = self._views[layer % 2]

    def read_back(self, layer: int) -> None:
        """Work for a stream: all of it to the host."""
        self._there[layer % 2].copy_(self._here, non_blocking=True)


def _parts(whole: Tensor, shapes: tuple[tuple[int, ...], ...], sizes: list[int]) -> tuple[Tensor, ...]:
    x, topk_weights, ids, ahead = (part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True))
    return x.view(torch.float32), topk_weights.view(torch.float32), ids, ahead
