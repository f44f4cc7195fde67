"""Blocks of 32 weights with one scale d, fp16, and for the _1 types one minimum m, fp16.

    Q4_0  d, 16 bytes: w = d (q - 8)             Q4_1  d, m, 16 bytes: w = d q + m
    Q5_0  d, 4 bytes, 16 bytes: w = d (q - 16)   Q5_1  d, m, 4 bytes, 16 bytes: w = d q + m
    Q8_0  d, 32 int8: w = d q

Byte j of the 16 has code j in its low nibble and code j + 32 / 2 in its high one; bit j of the 4 bytes is the fifth bit
of code j. raw uint8 [n, bytes of a block] -> fp32 [n, 32].
"""

from __future__ import annotations

import torch
from torch import Tensor


def half(raw: Tensor, at: int) -> Tensor:
    """The fp16 at byte `at` of each block, fp32 [n, 1]."""
    return raw[:, at:at + 2].contiguous().view(torch.float16).float()


def nibbles(raw: Tensor) -> Tensor:
    """The low nibbles of uint8 [..., b], then the high ones: [..., 2 b]."""
    return torch.cat((raw & 15, raw >> 4), -1)


def bits(raw: Tensor) -> Tensor:
    """Every bit of uint8 [n, b], the lowest of each byte first: uint8 [n, 8 b]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (raw.unsqueeze(-1) >> shifts & 1).flatten(1)


def q4_0(raw: Tensor) -> Tensor:
    return nibbles(raw[:, 2:]).float().sub_(8).mul_(half(raw, 0))


def q4_1(raw: Tensor) -> Tensor:
    return nibbles(raw[:, 4:]).float().mul_(half(raw, 0)).add_(half(raw, 2))


def q5_0(raw: Tensor) -> Tensor:
    return (nibbles(raw[:, 6:]) | bits(raw[:, 2:6]) << 4).float().sub_(16).mul_(half(raw, 0))


def q5_1(raw: Tensor) -> Tensor:
    return (nibbles(raw[:, 8:]) | bits(raw[:, 4:8]) << 4).float().mul_(half(raw, 0)).add_(half(raw, 2))


def q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float().mul_(half(raw, 0))
