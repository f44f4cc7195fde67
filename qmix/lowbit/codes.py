"""Codes of a few bits, out of the int32 words that checkpoints pack them in.

    stream          the codes of a column lie one behind the other as a stream of bits, the lowest bits first; a code of
                    3 bits may go on in the next word
    lowest_first    word j of a row holds codes j c .. j c + c - 1, c = 32 / bits rounded down, from its lowest bits on
    awq             eight codes a word; from the lowest bits on they are columns 0 2 4 6 1 3 5 7
"""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def lowest_first(words: Tensor, bits: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, W * (32 // bits)]."""
    mask = 2**bits - 1
    parts = [(words >> bits * i & mask).to(torch.uint8) for i in range(32 // bits)]
    return torch.stack(parts, -1).flatten(1)


def stream(words: Tensor, bits: int) -> Tensor:
    """int32 [W, C], along the first dimension -> uint8 [at least 32 W / bits, C]."""
    mask = 2**bits - 1
    if 32 % bits == 0:
        parts = [(words >> bits * i & mask).to(torch.uint8) for i in range(32 // bits)]
        return torch.stack(parts, 1).flatten(0, 1)
    rows = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % bits)).unflatten(0, (-1, bits))  # of 32 codes
    parts = []
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        low = (rows[:, word] >> shift) & (2**min(bits, 32 - shift) - 1)
        if shift + bits > 32:
            low = low | rows[:, word + 1] << 32 - shift
        parts.append((low & mask).to(torch.uint8))
    return torch.stack(parts, 1).flatten(0, 1)


def awq(words: Tensor) -> Tensor:
    """int32 [R, W] -> uint8 [R, 8 W]."""
    found = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for place, column in enumerate(AWQ_ORDER):
        found[..., column] = words >> 4 * place & 15
    return found.flatten(1)
