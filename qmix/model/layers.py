"""What the layers of a transformer are made of: norm, rotary embedding, attention.

Plain functions on tensors. Norm, router and rotation take and give fp32 whatever the compute dtype.

T query positions, S key positions, H hidden, E experts, D head size, Q query heads, KV key-value heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.kernels.cpu import FEW, few_rows


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, fp32 (Zhang & Sennrich 2019). x [T, H]; weight [H], None for 1."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """fp32 [T, E]; x [T, H] fp32, router [E, H] fp64. Summed in fp64: in fp32 the last bits, and with
    them now and then a choice, would depend on how many tokens are routed together. Of few tokens even the
    last bit of the fp64 sum does not."""
    return few_rows(x.double(), router).float() if 1 < len(x) <= FEW else F.linear(x.double(), router).float()


def rotation(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """What rotates heads at `positions` [T]: (cos, signed sin), fp32 [T, 1, D], for `rotate`.

    Angle i of position p is p * theta^(-2i/D), in fp32 as transformers has it. The cosine goes through
    fp64, so that its last bit does not depend on how many positions are computed together.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = (positions[:, None, None].float() * inverse).double()
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021), Hugging Face's half-split order: dimension i turns with
    i + D/2. x [T, heads, D] fp32, overwritten and returned; cos, sin from `rotation`.

    D = 4: (a, b, c, d) -> (a cos0 - c sin0, b cos1 - d sin1, c cos0 + a sin0, d cos1 + b sin1).
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(swapped, sin)


def attend(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Causal attention of the last T of S positions over all S, or over the last `window` of each.

    q [T, Q, D]; keys, values [KV, S, D], rotated, of the same dtype; returns [T, Q * D]. Query head h
    reads key-value head h // (Q / KV); keys and values are read in place.
    Example: S 5, T 2, window 3: position 3 attends to 1, 2, 3; position 4 to 2, 3, 4.
    """
    count, heads, size = q.shape
    start = keys.shape[1] - count  # position of the first query
    first = 0 if window is None else max(0, start - window + 1)
    keys, values = keys[None, :, first:], values[None, :, first:]
    if count == 1:
        # One token sees every key: the query heads of a key-value head pass as rows of one small
        # product. enable_gqa would run them one by one, at 1/2 (fp32) to 1/13 (bf16) of this speed.
        grouped = q.view(1, keys.shape[1], -1, size)
        return F.scaled_dot_product_attention(grouped, keys, values).view(1, heads * size)
    rows, columns = torch.arange(start, start + count)[:, None], torch.arange(first, start + count)
    mask = columns <= rows
    if window is not None:
        mask &= columns > rows - window
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, mask, enable_gqa=True)
    return out[0].transpose(0, 1).reshape(count, heads * size)
