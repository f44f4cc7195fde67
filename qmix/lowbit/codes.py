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
    if bits == 8:
        return words.contiguous().view(torch.uint8)
    if bits == 4:
        return _nibbles(words).flatten(1)
    return torch.stack([_field(words, bits * i, bits) for i in range(32 // bits)], -1).flatten(1)


def stream(words: Tensor, bits: int) -> Tensor:
    """int32 [W, C], along the first dimension -> uint8 [at least 32 W / bits, C]."""
    if 32 % bits == 0:
        found = torch.empty(len(words), 32 // bits, words.shape[1], dtype=torch.uint8)
        for i in range(32 // bits):
            found[:, i] = _field(words, bits * i, bits)
        return found.flatten(0, 1)
    rows = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % bits)).unflatten(0, (-1, bits))  # of 32 codes
    parts = []
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = _field(rows[:, word], shift, min(bits, 32 - shift))
        if shift + bits > 32:
            code = code | _field(rows[:, word + 1], 0, shift + bits - 32) << 32 - shift
        parts.append(code)
    return torch.stack(parts, 1).flatten(0, 1)


def awq(words: Tensor) -> Tensor:
    """int32 [R, W] -> uint8 [R, 8 W]."""
    found, nibbles = torch.empty(*words.shape, 8, dtype=torch.uint8), _nibbles(words)
    for place, column in enumerate(AWQ_ORDER):
        found[..., column] = nibbles[..., place]
    return found.flatten(1)


def _nibbles(words: Tensor) -> Tensor:
    """int32 [...] -> uint8 [..., 8], the lowest first. All machines that qmix runs on have the lowest byte first."""
    both = words.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.stack((both & 15, both >> 4), -1).flatten(-2)


def _field(words: Tensor, shift: int, bits: int) -> Tensor:
    """uint8, so many bits of each word."""
    return (words >> shift & 2**bits - 1).to(torch.uint8)
