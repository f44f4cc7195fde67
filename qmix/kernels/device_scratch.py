"""What the kernels of a GPU take beside weights, caches and results, in integers: a plan counts it, and the kernels cut
their work by the same functions. No torch here.

A prompt's products decode weights a tile at a time (cuda_prompt.py). Decoding passes partial sums and the like from one
launch to the next, in buffers that stay (cuda_ops.py).

T tokens, K experts per token, E experts, F expert inner, S positions of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from qmix.config import DTYPES, QuantConfig
from qmix.kernels.configs import Gemv
from qmix.kernels.op import FEW
from qmix.sizes import (
    BNB_BLOCK,
    CARRIED,
    MIB,
    TILE_BYTES,
    MatrixSpec,
    dense_spec,
    kv_owners,
    record_layouts,
    round_up,
    tile_rows,
)
from qmix.spec import Model

DECODED_BYTES = 64 * MIB  # the most that a decoded tile of a prompt's product takes
# Attention is split over positions: the grid depends on the cache's capacity alone, what is beyond a token's position
# ends at once. A split takes at least LEAST_SPLIT positions, so that a short context has several; there are at most
# SPLITS, so that they are merged in little time.
LEAST_SPLIT, SPLITS = 64, 128
CARRIED_WORDS = 8  # see words_of
BNB_CODES = 256  # that bitsandbytes' 8-bit scales have
NUMBER = 4  # bytes of a number in any of the buffers: fp32 or int32


@dataclass(frozen=True, slots=True)
class Scratch:
    """Numbers in each buffer of TritonOps, by its use: of the pieces of products, of attention (sums, then maxima and
    totals of the softmax), of the experts' jobs and what lies between their halves, of routers' logits."""

    partial: int = 0
    attended: int = 0
    softmax: int = 0
    jobs: int = 0
    inner: int = 0
    logits: int = 0

    @classmethod
    def of(cls, model: Model, quant: QuantConfig, context: int, gemv: Gemv, ahead: int) -> Scratch:
        """For caches of up to `context` positions and guesses of up to `ahead` layers. Mixtral 8x7B with experts in
        int4, groups of 64, and 8192 positions: 45 MiB, 28 of them for the experts' products and 16 for attention."""
        k, experts = model.top_k, model.num_experts
        chosen = min(FEW * k, experts)
        records = [spec for layout in record_layouts(model, quant) for spec in (layout.w13, layout.w2)]
        by_slot = all(spec.in_blocks for spec in records)
        pieces = [partial_numbers(spec, 1, gemv) for spec in (*device_matrices(model, quant), head_matrix(model, quant))
                  if spec.in_blocks]
        pieces += [partial_numbers(spec, chosen, gemv) for spec in records if spec.in_blocks]
        pieces += [partial_numbers(half, 1, gemv) for spec in records for half in spec.halves]
        splits = most_splits(context)
        heads = [(a.heads, a.head_dim) for a in kv_owners(model)]
        return cls(max(pieces, default=0), max((FEW * count * splits * size for count, size in heads), default=0),
                   max((2 * FEW * count * splits for count, _ in heads), default=0),
                   chosen * (1 + 2 * FEW) if by_slot else 0, FEW * k * model.expert_inner if by_slot else 0,
                   FEW * (1 + ahead) * experts if model.moe_layers else 0)

    @property
    def nbytes(self) -> int:
        return NUMBER * sum(getattr(self, field.name) for field in fields(self))


def device_matrices(model: Model, quant: QuantConfig) -> list[MatrixSpec]:
    """The dense matrices of the layers as a device has them, each spec once: q, k and v of a layer as one."""
    found: dict[MatrixSpec, None] = {}
    stacks: dict[str, list[MatrixSpec]] = {}
    for tensor in model.tensors():
        spec, (stem, _, part) = dense_spec(model, quant, tensor), tensor.name.rpartition(".")
        if spec is not None and stem.endswith("attention") and part in ("q", "k", "v"):
            stacks.setdefault(stem, []).append(spec)
        elif spec is not None and tensor.role != "head":
            found[spec] = None
    for specs in stacks.values():
        if len({spec.format for spec in specs}) > 1:  # then they stay apart
            found |= dict.fromkeys(specs)
            continue
        first, rows = specs[0], sum(spec.rows for spec in specs)
        found[MatrixSpec(first.format, rows, first.cols, group_size=first.group_size, block=first.block)] = None
    return list(found)


def head_matrix(model: Model, quant: QuantConfig) -> MatrixSpec:
    """Of the logits: the embedding as it is, where they are tied."""
    tensor = next(t for t in model.tensors() if t.role == ("embedding" if model.tied else "head"))
    rows, cols = tensor.shape
    return dense_spec(model, quant, tensor) or MatrixSpec(DTYPES[model.dtype], rows, cols)


def partial_numbers(spec: MatrixSpec, experts: int, gemv: Gemv) -> int:
    """Of the pieces of FEW tokens' products with so many matrices in blocks of rows."""
    return experts * FEW * splits_of(spec, gemv) * spec.padded_rows


def splits_of(spec: MatrixSpec, gemv: Gemv) -> int:
    """Into how many pieces cuda.few cuts the columns; each has results of its own for all rows."""
    return -(-(spec.padded_cols // spec.group_size) // lanes_of(spec, gemv))


def lanes_of(spec: MatrixSpec, gemv: Gemv) -> int:
    """Groups that a program of gemv has."""
    return min(gemv.threads // words_of(spec), power_of_two(spec.padded_cols // spec.group_size))


def words_of(spec: MatrixSpec) -> int:
    """Lanes beside each other: the 32-bit words of the low bits of a block's column; of ggml's formats a quarter of
    those of four columns. Two codes of a byte are 4 bits apart, or 2."""
    return CARRIED_WORDS if spec.format in CARRIED else spec.block * (4 if spec.code_bits == 4 else 2) // 32


def split_of(capacity: int) -> tuple[int, int]:
    """Positions of a split of attention, and how many splits a cache of `capacity` positions has."""
    split = max(LEAST_SPLIT, power_of_two(-(-capacity // SPLITS)))
    return split, -(-capacity // split)


def most_splits(context: int) -> int:
    """That a cache of up to `context` positions has: 65 with 8193 positions, 128 with 8192."""
    return min(SPLITS, -(-context // LEAST_SPLIT))


def decoded_bytes(spec: MatrixSpec, item_bytes: int, tokens: int) -> int:
    """What cuda_prompt.linear_many takes beside x and the result, at most, on any card, computing in numbers of so many
    bytes: a decoded tile and its product, which int8 then scales in fp32."""
    rows = min(spec.rows // spec.parts, tile_rows(spec, item_bytes, DECODED_BYTES))
    product = tokens * rows * item_bytes
    if spec.format == "int8":
        return 4 * rows + product + max(rows * spec.cols * item_bytes, tokens * rows * 4)
    if spec.format in ("nf4", "fp4"):
        scales = 4 * (spec.padded_rows * spec.padded_cols // BNB_BLOCK + BNB_CODES) if spec.double_quant else 0
        few = min(spec.rows * spec.padded_cols * 4, TILE_BYTES) + (FEW * spec.cols + rows) * 4  # cuda_ops has fp32
        return scales + max(few, rows * spec.padded_cols * item_bytes + product)
    return round_up(rows, spec.block or 1) * spec.padded_cols * item_bytes + product


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
