"""nf4 and fp4 on the CPU: bitsandbytes decodes a tile of rows, torch multiplies it. Second class here: the
decoding costs more than the product for a few tokens. (bitsandbytes' own CPU product wants the
weights in yet another order, and takes 30 times as long on the stored one.)

T tokens, N rows.
"""

from __future__ import annotations

from torch import Tensor

from qmix.formats import nf4
from qmix.formats.packed import Packed
from qmix.kernels.cpu import decoded_linear


def linear(x: Tensor, m: Packed) -> Tensor:
    """x [T, cols] bf16 or fp32 -> [T, rows] in x's dtype, computed in x's dtype."""
    return decoded_linear(x, m, nf4.tiles)
