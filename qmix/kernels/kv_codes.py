"""Keys and values in 8 bits: a head's vector of a position has one scale, x = code * scale, codes -127 to 127, scale =
max |x| / 127. So no number is off by more than half a scale. native/attention.h and cuda_attend_jit.py do the same, the
former to the bit, the latter up to the last bit of a scale, and of a code where x / scale is half a number.

KV key-value heads, D head size, T new positions, S positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # a vector below this is kept as zeros, so that 1 / max |x| is finite


def quantize(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """x [T, KV, D] of any float dtype into codes [KV, T, D] int8 and scales [KV, T] fp32. native/attention.h does the
    same to the bit. A vector with a NaN or an infinity decodes to numbers that are not finite."""
    wide = x.transpose(0, 1).float()
    largest = wide.abs().amax(-1)
    inverse = largest.clamp(min=TINY).reciprocal() * 127
    codes.copy_((wide * inverse[..., None]).round_())
    scales.copy_(largest / 127)


def decoded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [KV, S, D] int8 times scales [KV, S] fp32, in `dtype`: on a GPU nothing else is allocated."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return torch.mul(codes, scales[..., None], out=out)
