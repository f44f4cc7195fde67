"""What the layers of a transformer are made of, as plain functions on tensors: speeds of the rotary embedding,
attention. kernels/layer.py has the rest.

T query positions, S key positions, D head size, Q query heads, KV key-value heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotation(head_dim: int, theta: float) -> Tensor:
    """Radians a position by which the pairs of dimensions of a head turn: theta^(-2i/D), fp32 [D / 2]."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


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
