"""What the layers of a transformer are made of, as plain functions on tensors: speeds of the rotary embedding,
attention. kernels/layer.py has the rest.

A head's sink (Xiao et al. 2023, arXiv 2309.17453) is one score more in its softmax, which brings no value: it adds to
the sum of weights and to nothing else.

T query positions, S key positions, D head size, Q query heads, KV key-value heads, G = Q / KV.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from qmix.spec import Attention

SCORES = 64 * 2**20  # the most bytes of scores that attention in tiles has at once, in fp32 and twice
# Not cuDNN's attention, which makes a plan for each new length.
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@dataclass(frozen=True, slots=True)
class Softmax:
    """What a model asks for beside softmax(q . k / sqrt(D)): sinks [Q] fp32, contiguous; scale: of scores, None for
    1 / sqrt(D); softcap: a score s becomes softcap * tanh(s / softcap)."""

    sinks: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None

    @property
    def fused(self) -> bool:
        """Whether torch's attention computes it."""
        return self.sinks is None and self.softcap is None


PLAIN = Softmax()


def softmax_of(a: Attention, sinks: Tensor | None) -> Softmax:
    return Softmax(sinks, None if a.scale == a.head_dim**-0.5 else a.scale, a.softcap)


def default_inv_freq(head_dim: int, theta: float) -> Tensor:
    """Radians a position by which the pairs of dimensions of a head turn: theta^(-2i/D), fp32 [D / 2]."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def causal_attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float | None = None) -> Tensor:
    """Causal attention of the last T of S positions over all S, or over the last `window` of each.

    q [T, Q, D]; keys, values [KV, S, D], rotated, of the same dtype; returns [T, Q * D]. Query head h
    reads key-value head h // (Q / KV); keys and values are read in place. scale: of scores, None for D^-0.5.
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
        return F.scaled_dot_product_attention(grouped, keys, values, scale=scale).view(1, heads * size)
    rows, columns = torch.arange(start, start + count)[:, None], torch.arange(first, start + count)
    mask = columns <= rows
    if window is not None:
        mask &= columns > rows - window
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1).reshape(count, heads * size)


def softmax_attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None, softmax: Softmax = PLAIN) -> Tensor:
    """`causal_attention`, with all that a Softmax may ask for."""
    if softmax.fused:
        return causal_attention(q, keys, values, window, softmax.scale)
    first = 0 if window is None else max(0, keys.shape[1] - len(q) - window + 1)
    return _written_out(q, keys[:, first:], values[:, first:], window, softmax)


def _written_out(q: Tensor, keys: Tensor, values: Tensor, window: int | None, softmax: Softmax) -> Tensor:
    """In fp32, with at most SCORES bytes of scores at once. Positions that no query sees may be left out."""
    count, heads, size = q.shape
    kv, positions, _ = keys.shape
    scale, softcap, sinks = size**-0.5 if softmax.scale is None else softmax.scale, softmax.softcap, softmax.sinks
    keys, values, grouped = keys.float(), values.float(), q.float().view(count, kv, -1, size)
    out = q.new_empty(count, heads * size)
    tile = max(1, SCORES // (heads * positions * 3 * torch.float32.itemsize))
    column = torch.arange(positions, device=q.device)
    for begin in range(0, count, tile):
        part = grouped[begin:begin + tile].permute(1, 2, 0, 3)  # [KV, G, T, D]
        start = positions - count + begin  # position of the tile's first query
        own = torch.arange(start, start + part.shape[2], device=q.device)[:, None]
        hidden = (column > own) if window is None else (column > own) | (column <= own - window)
        scores = part @ keys[:, None].transpose(-1, -2) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.view(kv, -1, 1, 1).expand(*scores.shape[:-1], 1)), -1)
        found = torch.softmax(scores, -1)[..., :positions] @ values[:, None]
        out[begin:begin + tile] = found.permute(2, 0, 1, 3).reshape(-1, heads * size)
    return out


def attend_torch(query: Tensor, keys: Tensor, values: Tensor, window: int | None = None, softmax: Softmax = PLAIN
                 ) -> Tensor:
    """What `softmax_attention` computes, for prompts on a GPU, through torch's kernels and in bounded memory.

    query [T, Q, D], rounded to the dtype of keys and values [KV, S, D]; -> [T, Q * D] in query's dtype. Where the
    window leaves nothing out, one call of flash attention, or of torch's memory-efficient kernel where the card or the
    dtype has no flash attention (sm_75): nothing is allocated but the result. With a window, and where torch has
    neither kernel for these tensors, tiles of the queries with a mask each: beside the result at most about SCORES
    bytes, and a copy of keys and values in fp32: also with sinks or a cap. Keys and values are never repeated for the
    G heads that read them. A row's bits may depend on T.
    """
    if not softmax.fused:
        return softmax_attention(query.to(keys.dtype).to(query.dtype), keys, values, window, softmax)
    count, heads, size = query.shape
    kv, positions, _ = keys.shape
    asked = query.to(keys.dtype).view(count, kv, heads // kv, size).permute(1, 2, 0, 3)  # [KV, G, T, D]
    if window is None or window >= positions:
        shared, given = (t[:, None].expand(-1, heads // kv, -1, -1) for t in (keys, values))
        if has_fused_kernel(asked, shared, given):
            # Here, since it imports torch's compiler: seconds at each start, also where no GPU ever asks for it.
            from torch.nn.attention.bias import causal_lower_right

            with sdpa_kernel(FUSED):
                out = F.scaled_dot_product_attention(asked, shared, given, causal_lower_right(count, positions),
                                                     scale=softmax.scale)
            return out.permute(2, 0, 1, 3).reshape(count, heads * size).to(query.dtype)
    out = query.new_empty(count, kv, heads // kv, size)
    tile = max(1, SCORES // (heads * min(positions, (window or positions) + count) * 2 * torch.float32.itemsize))
    for begin in range(0, count, tile):
        piece = asked[:, :, begin:begin + tile]
        start = positions - count + begin  # position of the tile's first query
        end = start + piece.shape[2]
        first = 0 if window is None else max(0, start - window + 1)
        rows, columns = (torch.arange(*ends, device=query.device) for ends in ((start, end), (first, end)))
        mask = columns <= rows[:, None]
        if window is not None:
            mask &= columns > rows[:, None] - window
        # The G heads of a key-value head are rows of one product, each with the mask of its token.
        done = F.scaled_dot_product_attention(piece.flatten(1, 2)[None], keys[None, :, first:end],
                                              values[None, :, first:end], mask.repeat(heads // kv, 1),
                                              scale=softmax.scale)
        out[begin:begin + tile] = done.view(kv, heads // kv, -1, size).permute(2, 0, 1, 3)
    return out.view(count, heads * size)


def has_fused_kernel(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether torch has a kernel for these, [., heads, ., D], that makes no matrix of scores. Head sizes that it would
    pad, and so copy, do not count."""
    params = SDPAParams(query, keys, values, None, 0.0, False, False)
    return query.shape[-1] % 8 == 0 and (can_use_flash_attention(params) or can_use_efficient_attention(params))
