"""inv_freq of the rotary embedding by its scalings (spec/rope.py): how far a pair of dimensions is rotated by a
position.

D dimensions that are rotated, in D / 2 pairs. Formulas in fp32, as transformers has them: its bits are the model's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qmix.kernels.attend import default_inv_freq
from qmix.spec import Linear, Llama3, LongRope, Proportional, Rope, Yarn


def inv_freq(rope: Rope, max_positions: int, context: int) -> tuple[Tensor, float]:
    """(radians a position by which each pair turns, fp32 [D / 2]; what cos and sin are multiplied by).

    max_positions: of the model, from which some scalings take their factor; context: positions that a session is made
    for, by which LongRope chooses once, so that keys of one cache never mix two speeds.
    """
    match rope.scaling:
        case None:
            return default_inv_freq(rope.dim, rope.theta), 1.0
        case Linear(factor):
            return default_inv_freq(rope.dim, rope.theta) / factor, 1.0
        case Yarn() as yarn:
            return _yarn(rope, yarn, max_positions)
        case Llama3() as llama:
            return _llama3(rope, llama), 1.0
        case LongRope() as long:
            return _long(rope, long, max_positions, context)
        case Proportional() as part:
            whole = torch.zeros(rope.dim // 2)
            whole[:part.rotated // 2] = default_inv_freq(rope.dim, rope.theta)[:part.rotated // 2]
            return whole / part.factor, 1.0
    raise AssertionError(rope.scaling)


def _yarn(rope: Rope, yarn: Yarn, max_positions: int) -> tuple[Tensor, float]:
    factor = yarn.factor or max_positions / yarn.original

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention = yarn.attention_factor
    if attention is None:
        both = yarn.mscale is not None and yarn.mscale_all_dim is not None
        attention = magnitude(yarn.mscale or 1) / magnitude(yarn.mscale_all_dim or 1) if both else magnitude(1)

    def dimension(turns: float) -> float:
        """Of the pair that turns so often over the original positions."""
        return rope.dim * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = torch.clamp((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    fast, blend = _powers(rope), 1 - ramp
    return 1.0 / (factor * fast) * (1 - blend) + 1.0 / fast * blend, attention


def _llama3(rope: Rope, llama: Llama3) -> Tensor:
    plain = default_inv_freq(rope.dim, rope.theta)
    wavelength = 2 * math.pi / plain
    slow = wavelength > llama.original / llama.low_freq_factor
    between = ~slow & (wavelength >= llama.original / llama.high_freq_factor)
    share = (llama.original / wavelength - llama.low_freq_factor) / (llama.high_freq_factor - llama.low_freq_factor)
    blended = (1 - share) * plain / llama.factor + share * plain
    return torch.where(between, blended, torch.where(slow, plain / llama.factor, plain))


def _long(rope: Rope, long: LongRope, max_positions: int, context: int) -> tuple[Tensor, float]:
    factor = long.factor or max_positions / long.original
    attention = long.attention_factor
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(long.original))
    factors = torch.tensor(long.long_factor if context > long.original else long.short_factor)
    return 1.0 / (factors * _powers(rope)), attention


def _powers(rope: Rope) -> Tensor:
    """theta^(2i/D), fp32."""
    return rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
