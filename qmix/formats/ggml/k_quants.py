"""The K types: blocks of 256 weights in groups of 16 or 32, whose scales s (and minima m) are small integers times an
fp16 d (and dmin) of the block.

    Q2_K  16 bytes of s and m, 64 bytes of 2 bits, d, dmin: w = d s q - dmin m, groups of 16
    Q3_K  32 bytes of third bits, 64 bytes of 2 bits, 12 bytes of s, d: w = d (s - 32) (q - 4), groups of 16
    Q4_K  d, dmin, 12 bytes of s and m, 128 bytes: w = d s q - dmin m, groups of 32
    Q5_K  d, dmin, 12 bytes of s and m, 32 bytes of fifth bits, 128 bytes: the same
    Q6_K  128 bytes of 4 bits, 64 bytes of 2 bits, 16 int8 s, d: w = d s (q - 32), groups of 16

Codes of two bits lie in runs of 32 bytes, each of which holds four times 32 codes, lowest bits first; codes of four
bits in runs of 32 bytes with twice 32 codes, in Q6_K of 64 bytes with twice 64. raw uint8 [n, bytes of a block] -> fp32
[n, 256].
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.formats.ggml.simple import half


def planes(raw: Tensor, run: int, width: int) -> Tensor:
    """Codes of `width` bits out of runs of `run` bytes: uint8 [n, b] -> [n, 8 b / width]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).view(1, 1, -1, 1)
    return (raw.unflatten(1, (-1, 1, run)) >> shifts & (1 << width) - 1).flatten(1)


def six_bits(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and the minima, 6 bits each, of uint8 [n, 12]: uint8 [n, 8] each.

    Bytes 0 to 3 have the first four scales and the upper two bits of the last four; 4 to 7 the same for the minima;
    8 to 11 the lower four bits of the last four scales, then of the last four minima."""
    s, m, rest = raw.split(4, 1)
    return (torch.cat((s & 63, rest & 15 | s >> 2 & 48), 1), torch.cat((m & 63, rest >> 4 | m >> 2 & 48), 1))


def _grouped(q: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """scale q - minimum, of codes [n, 256] and fp32 [n, groups]."""
    found = q.float().view(len(q), scale.shape[1], -1).mul_(scale.unsqueeze(-1))
    if minimum is not None:
        found.sub_(minimum.unsqueeze(-1))
    return found.flatten(1)


def q2_k(raw: Tensor) -> Tensor:
    both = raw[:, :16]
    scale, minimum = half(raw, 80) * (both & 15).float(), half(raw, 82) * (both >> 4).float()
    return _grouped(planes(raw[:, 16:80], 32, 2), scale, minimum)


def q3_k(raw: Tensor) -> Tensor:
    q = planes(raw[:, 32:96], 32, 2) | planes(raw[:, :32], 32, 1) << 2
    low, high = planes(raw[:, 96:104], 8, 4), planes(raw[:, 104:108], 4, 2)
    scale = half(raw, 108) * (low | high << 4).float().sub_(32)
    return _grouped(q.to(torch.int8) - 4, scale)


def q4_k(raw: Tensor) -> Tensor:
    s, m = six_bits(raw[:, 4:16])
    return _grouped(planes(raw[:, 16:], 32, 4), half(raw, 0) * s.float(), half(raw, 2) * m.float())


def q5_k(raw: Tensor) -> Tensor:
    s, m = six_bits(raw[:, 4:16])
    q = planes(raw[:, 48:], 32, 4) | planes(raw[:, 16:48], 32, 1) << 4
    return _grouped(q, half(raw, 0) * s.float(), half(raw, 2) * m.float())


def q6_k(raw: Tensor) -> Tensor:
    q = planes(raw[:, :128], 64, 4) | planes(raw[:, 128:192], 32, 2) << 4
    scale = half(raw, 208) * raw[:, 192:208].contiguous().view(torch.int8).float()
    return _grouped(q.to(torch.int8) - 32, scale)
