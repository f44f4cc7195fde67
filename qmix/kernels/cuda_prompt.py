"""Products and attention of many tokens at once, as prompts have them, on a GPU. Tested on the CPU, with Triton's
interpreter where Triton is used, and not yet run on a card.

Products are made in the dtype of x, of weights decoded to it a tile at a time; a row's bits may depend on how many
there are.

T tokens, N rows out, Q query heads, KV key-value heads, D head size, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.errors import UsageError
from qmix.formats import nf4
from qmix.formats.packed import Packed, row_tiles
from qmix.kernels import cuda
from qmix.kernels.attend import PLAIN, Softmax, attend_torch
from qmix.kernels.configs import (
    HOPPER,
    TENSOR_CORES,
    WGMMA_TOKENS,
    WGMMA_WARPS,
    WIDE,
    Attention,
    Matmul,
    built_in,
    capability,
)
from qmix.kernels.cuda import DTYPES, Matrices, device_code
from qmix.kernels.cuda_ops import EVERYTHING, exponents
from qmix.kernels.device_scratch import DECODED_BYTES, power_of_two

TILE_BYTES = DECODED_BYTES
LEAST = 16  # what a product of Triton's has in each direction, at least


def linear_many(x: Tensor, m: Packed, out_dtype: torch.dtype | None = None, config: Matmul | None = None) -> Tensor:
    """x [T, cols] fp32, bf16 or fp16 -> [T, rows] in `out_dtype` (x's), padding and gaps between parts removed.

    int8: codes are exact in bf16 and fp32, and their product is scaled; in fp16, where products of codes would
    overflow, weights are scaled first, and so rounded. The grouped formats: on a card for which Triton's products have
    no tensor cores (sm_75), and in fp32, as `linear_decoded` has them: Triton's tiles would not fit the registers.
    """
    spec, dtype = m.spec, out_dtype or x.dtype
    if x.dim() != 2 or x.shape[1] != spec.cols or x.dtype not in DTYPES:
        raise UsageError(f"x: got {x.dtype} {list(x.shape)}, want fp32, bf16 or fp16 [T, {spec.cols}]")
    card = capability(x.device)
    if spec.in_blocks and card and (without_tensor_cores(card) or x.dtype == torch.float32):
        return linear_decoded(x, m, dtype)
    if spec.in_blocks:
        y = x.new_empty(len(x), spec.padded_rows, dtype=dtype)
        if len(x):
            cuda.many(x.contiguous(), Matrices.of(m), 0, y, config=config)
        return y.view(len(x), spec.parts, -1)[:, :, :spec.rows // spec.parts].reshape(len(x), spec.rows)
    if "weight" in m.tensors and m["weight"].dtype == x.dtype == dtype:
        return F.linear(x, m["weight"])
    y = x.new_empty(len(x), spec.rows, dtype=dtype)
    if spec.format in ("nf4", "fp4"):
        for start, tile in nf4.tiles(m, x.dtype, TILE_BYTES):
            y[:, start:start + len(tile)] = F.linear(x, tile)
            del tile  # else it would live until the next one is decoded
        return y
    for start, row, rows in row_tiles(spec, x.dtype.itemsize, TILE_BYTES):
        out, here = y[:, start:start + rows], slice(row, row + rows)
        if spec.format == "int8":
            out.copy_(_int8(x, m["qweight"][here, :spec.cols], m["scale"][here].float()))
        else:
            out.copy_(F.linear(x, m["weight"][here].to(x.dtype)))
    return y


def linear_decoded(x: Tensor, m: Packed, out_dtype: torch.dtype) -> Tensor:
    """`linear_many` of a grouped format through torch's product, of rows that are decoded TILE_BYTES at a time.

    Products are made in x's dtype, or in fp32 for bf16, which cards that need this do not have; weights are rounded to
    that, where `cuda.many` has them exact.
    """
    spec, weights = m.spec, Matrices.of(m)
    y = x.new_empty(len(x), spec.rows, dtype=out_dtype)
    x = x.float() if x.dtype == torch.bfloat16 else x
    for start, row, rows in row_tiles(spec, x.dtype.itemsize, TILE_BYTES) if len(x) else ():
        tile = cuda.decoded(weights, row // spec.block, -(-rows // spec.block), x.dtype)
        y[:, start:start + rows] = F.linear(x, tile[:rows, :spec.cols])
        del tile  # else it would live until the next one is decoded
    return y


def _int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x [T, cols] times codes int8 [n, cols] times scale fp32 [n]: [T, n], fp16 or fp32."""
    if x.dtype == torch.float16:
        return F.linear(x, torch.mul(codes, scale[:, None], out=x.new_empty(codes.shape)))
    return F.linear(x, codes.to(x.dtype)) * scale


def attend_many(query: Tensor, keys: Tensor, values: Tensor, window: int | None = None, softmax: Softmax = PLAIN,
                config: Attention | None = None) -> Tensor:
    """Causal attention of the last T of S positions over all S, or over the last `window` of each: as
    softmax_attention.

    query [T, Q, D]; keys, values [KV, S, D] of one dtype, in which products are made; -> [T, Q * D] in query's dtype.
    Nothing is allocated but the result.

    UsageError for a tile that Triton would multiply by WGMMA on Hopper. The weights of values are made in registers,
    and from there WGMMA would read them; ptxas before CUDA 13.3, which Triton up to 3.7 brings, may use these
    registers again too early (triton-lang/triton#11781).
    """
    tokens, heads, size = query.shape
    kv, positions, _ = keys.shape
    if keys.dtype not in DTYPES or values.dtype != keys.dtype or values.shape != keys.shape or heads % kv \
            or keys.shape[2] != size or not 0 < tokens <= positions \
            or not query.stride(2) == keys.stride(2) == values.stride(2) == 1:
        raise UsageError(f"attend_many: got {query.dtype} {list(query.shape)}, {keys.dtype} {list(keys.shape)} and "
                         f"{values.dtype} {list(values.shape)}, want [T, Q, D] and twice [KV, S, D], T up to S")
    tile, card = _tile_of(keys, config), capability(keys.device)
    if card and card[0] == HOPPER and tile.tokens >= WGMMA_TOKENS and tile.warps >= WGMMA_WARPS:
        raise UsageError(f"attend_many: got tiles of {tile.tokens} tokens in {tile.warps} warps, want fewer than "
                         f"{WGMMA_TOKENS} or {WGMMA_WARPS} on Hopper, where larger ones may give wrong numbers")
    block, (scale, softcap) = max(LEAST, min(tile.tokens, power_of_two(tokens))), exponents(softmax, size)
    assert softmax.sinks is None or softmax.sinks.is_contiguous()
    out = query.new_empty(tokens, heads * size)
    device_code("cuda_attend_jit").attend_many[-(-tokens // block), heads](
        query, keys, values, softmax.sinks, out, window or EVERYTHING, query.stride(0), query.stride(1), keys.stride(0),
        keys.stride(1), values.stride(0), values.stride(1), out.stride(0), tokens, positions - tokens, heads // kv,
        size, scale, softcap, BLOCK_M=block, BLOCK_N=tile.positions, WIDTH=max(LEAST, power_of_two(size)),
        num_warps=tile.warps if block == tile.tokens else min(4, tile.warps), num_stages=tile.stages,
        enable_fp_fusion=True)
    return out


def without_tensor_cores(card: tuple[int, int] | None) -> bool:
    """Whether Triton compiles products for this compute capability without tensor cores, where torch's have them."""
    return card is not None and card < TENSOR_CORES


def choose_prompt_attention(card: tuple[int, int] | None, config: Attention) -> Callable[..., Tensor]:
    """What attends in prompts on a card of this compute capability: torch's kernels on Hopper, where `attend_many` may
    not have the tiles that would make it fast, and where it has no tensor cores; else `attend_many`, cut as `config`
    says."""
    by_torch = without_tensor_cores(card) or (card is not None and card[0] == HOPPER)
    return attend_torch if by_torch else partial(attend_many, config=config)


def _tile_of(keys: Tensor, config: Attention | None) -> Attention:
    return WIDE if keys.dtype == torch.float32 else config or built_in(capability(keys.device)).attention
