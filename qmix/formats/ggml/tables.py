"""Types whose 4-bit codes are places in a table of 16 numbers.

    IQ4_NL  d, 16 bytes: w = d table[q], blocks of 32
    IQ4_XS  d, 2 bytes of upper bits of s, 4 bytes of lower ones, 128 bytes: w = d (s - 32) table[q], blocks of 256 in
            groups of 32
    MXFP4   a power of two e, 16 bytes: w = 2^(e - 127) e2m1[q], blocks of 32 (qmix/formats/mxfp4.py)

In each run of 16 bytes, byte j has code j in its low nibble and code j + 16 in its high one. raw uint8 [n, bytes of a
block] -> fp32 [n, weights of a block].
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.formats.ggml.simple import half, nibbles
from qmix.formats.mxfp4 import E2M1, Blocks

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TWICE_E2M1 = tuple(2 * abs(x) if x == 0 else 2 * x for x in E2M1)  # ggml's are int8, which has no -0


def _looked_up(table: tuple[float, ...], codes: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.float32).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def iq4_nl(raw: Tensor) -> Tensor:
    return _looked_up(VALUES, nibbles(raw[:, 2:])).mul_(half(raw, 0))


def xs_scales(raw: Tensor) -> Tensor:
    """s of IQ4_XS: uint8 [n, 8]."""
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8)
    high = (raw[:, 2:4].unsqueeze(-1) >> shifts & 3).flatten(1)  # of eight groups
    low = torch.stack((raw[:, 4:8] & 15, raw[:, 4:8] >> 4), -1).flatten(1)
    return low | high << 4


def iq4_xs(raw: Tensor) -> Tensor:
    scale = half(raw, 0) * xs_scales(raw).float().sub_(32)
    numbers = _looked_up(VALUES, nibbles(raw[:, 8:].unflatten(1, (8, 16))))
    return numbers.mul_(scale.unsqueeze(-1)).flatten(1)


def mxfp4(raw: Tensor) -> Tensor:
    e = raw[:, :1].int()
    # 2^(e - 128), e = 0 and 1 of which are subnormal; the table has twice the numbers.
    power = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1).clamp(min=0) << 23).view(torch.float32)
    return _looked_up(TWICE_E2M1, nibbles(raw[:, 1:])).mul_(power)


def mxfp4_blocks(raw: Tensor) -> Blocks:
    """Codes and scales of a matrix uint8 [rows, groups, 17], in the order of columns that `Blocks` has."""
    codes = nibbles(raw[..., 1:])
    return Blocks(codes[..., 0::2] | codes[..., 1::2] << 4, raw[..., 0].contiguous())
