"""Rewrites int3 and int2 codes as int4 codes and back, exactly.

Code that reads int4 then reads them too: a code of 3 or 2 bits becomes the nibble 8 + (q - 2^(bits - 1)), which has the
same distance from the middle. Per block and column, B rows, c = 8 - 2^(bits - 1) in each nibble:

    int4   byte j, j < B/2           row j in the low nibble, row j + B/2 in the high one
    int2   byte i, i < B/4           row i + s B/4 in bits 2s and 2s + 1
    int3   byte i, i < B/4           the low two bits of the code, as int2 has them
           byte B/4 + i, i < B/8     the third bit of row i + b B/8 in bit b

So a quarter of the nibbles is one mask and one shift of the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS = 0x33  # two bits of each nibble
MIDDLES = {3: 0x44, 2: 0x66}  # what the nibbles have more than the codes


def widen(qweight: Tensor, bits: int) -> Tensor:
    """uint8 [..., bits * B/8] codes of `bits` -> uint8 [..., B/2] nibbles as int4 has them; itself for 4 bits."""
    if bits == 4:
        return qweight
    pairs = qweight if bits == 2 else qweight[..., :qweight.shape[-1] * 2 // 3]
    quarter = pairs.shape[-1]
    out = qweight.new_empty(*qweight.shape[:-1], 2 * quarter)
    torch.bitwise_and(pairs, PAIRS, out=out[..., :quarter])
    torch.bitwise_and(pairs >> 2, PAIRS, out=out[..., quarter:])
    if bits == 3:
        thirds = qweight[..., quarter:]
        for bit, part in enumerate(out.split(quarter // 2, -1)):
            part |= ((thirds >> bit) & 0x11) << 2
    return out.add_(MIDDLES[bits])


def narrow(nibbles: Tensor, bits: int) -> Tensor:
    """The way back: the nibbles, uint8 [..., B/2], must hold codes of `bits`."""
    if bits == 4:
        return nibbles
    codes = nibbles - MIDDLES[bits]
    low, high = (codes & PAIRS).chunk(2, -1)
    pairs = low | (high << 2)
    if bits == 2:
        return pairs
    thirds = torch.zeros_like(pairs[..., :pairs.shape[-1] // 2])
    for bit, part in enumerate(codes.split(thirds.shape[-1], -1)):
        thirds |= ((part >> 2) & 0x11) << bit
    return torch.cat((pairs, thirds), -1)
