"""The experts of a prompt's tokens on a GPU, in Triton: prompt_experts.PromptExperts for the formats in blocks of rows
(int4, int3, int2, mxfp4, ggml's), every activation, with biases or without; tested under Triton's interpreter and
compiled for cards from sm_80 up.

A layer takes one launch to sort, two for each kind of record, and one to add up. The two are launched several times
where what lies between them would take more than prompt_tiles.INNER_BYTES, and again for each expert that comes later.
The products are those of cuda.many: x is rounded to 16 bits, codes are exact, sums are fp32. Biases are added and gate
and up are joined in fp32; the result is rounded once. A tile has the same bits in whatever slot its expert is and
whenever it is computed; as in cuda.many, a row's may depend on how many rows a pass has.

T tokens, K experts per token, E experts, H hidden, F expert inner.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.kernels import cuda, cuda_carried
from qmix.kernels.configs import TENSOR_CORES, Matmul, built_in, capability
from qmix.kernels.cuda import INDEX, Matrices, device_code
from qmix.kernels.cuda_ops import matrices_of
from qmix.kernels.device_ops import ExpertSlots
from qmix.kernels.device_scratch import power_of_two
from qmix.kernels.prompt_experts import Tiles, computed_many
from qmix.kernels.prompt_tiles import SIZES, most_tiles, tile_of
from qmix.sizes import CARRIED, MatrixSpec

SORTED = 1024  # pairs that a program of `sort` looks at together
# Of a thread, for the smallest tiles: four programs of four warps run at once. Left to itself, ptxas for sm_120 takes
# 72 and spills.
REGISTERS = 128
PIECE = 1024  # numbers of a row that a program of `combine` has
LEAST_BINS = 32  # of a histogram of Triton's
LEAST = 16  # rows of a product of Triton's, at least


class TritonPromptExperts:
    """See PromptExperts. config: how products are cut, None for what is built in for the card of each call."""

    def __init__(self, config: Matmul | None = None):
        self._config = config

    def handles(self, slots: ExpertSlots, dtype: torch.dtype) -> bool:
        card = capability(slots.slab.device)
        suits = card is None or (card >= TENSOR_CORES and dtype != torch.float32)
        return computed_many(slots.record) and suits

    def sizes(self, device: torch.device) -> tuple[int, ...]:
        return tuple(dict.fromkeys(min(size, self._cut(device).tokens) for size in SIZES))

    def sort(self, ids: Tensor, experts: int, size: int = 0) -> Tiles:
        tokens, top_k = ids.shape
        size = size or tile_of(tokens * top_k, experts, self._cut(ids.device).tokens)
        count = most_tiles(tokens * top_k, experts, size)
        room = torch.empty(count * (size + 1), dtype=INDEX, device=ids.device)
        order, expert_of = room[:count * size], room[count * size:]
        _code().sort[experts,](ids.contiguous(), order, expert_of, tokens * top_k, count, TILE=size,
                               BINS=max(LEAST_BINS, power_of_two(experts)), SIZE=SORTED, num_warps=4)
        return Tiles(order, expert_of, size, top_k)

    def gate_up(self, x: Tensor, slots: ExpertSlots, tiles: Tiles, part: range, table: Tensor,
                slot: int = -1) -> Tensor:
        w13, w2 = matrices_of(slots)
        spec, config = w13.spec, self._cut(x.device)
        if x.dim() != 2 or x.shape[1] != spec.cols or x.stride(1) != 1 or not len(part):
            raise UsageError(f"x: got {list(x.shape)}, strides {x.stride()}, want [T, {spec.cols}], rows contiguous")
        dot, rows, how = _dot(x), max(LEAST, _rows_of(spec, config) // 2), spec.activation
        inner = x.new_empty(len(part) * tiles.size, w2.spec.cols)
        _code().gate_up[len(part), -(-(spec.padded_rows // 2) // rows)](
            x, *_tensors_of(w13), x if w13.bias is None else w13.bias, inner, tiles.order, tiles.expert_of,
            table, part.start, slot, slots.first, w13.slots, w13.slot_bytes, x.stride(0), spec.cols,
            spec.padded_cols // spec.group_size, spec.padded_rows,
            inner.shape[1], K=tiles.top_k, ROWS=rows, DOT=dot, KIND=how.kind, ALPHA=how.alpha or 0.0,
            LIMIT=how.limit or 0.0, **_cut_of(spec, tiles, config))
        return inner

    def down(self, inner: Tensor, slots: ExpertSlots, tiles: Tiles, part: range, table: Tensor, rows: Tensor,
             slot: int = -1) -> None:
        _, w2 = matrices_of(slots)
        spec, config = w2.spec, self._cut(inner.device)
        assert rows.is_contiguous() and rows.dtype == torch.float32 and rows.shape[2] == spec.rows
        assert inner.shape == (len(part) * tiles.size, spec.cols) and inner.is_contiguous()
        rows_of = _rows_of(spec, config)
        _code().down[len(part), -(-spec.padded_rows // rows_of)](
            inner, *_tensors_of(w2), rows if w2.bias is None else w2.bias, rows, tiles.order, tiles.expert_of,
            table, part.start, slot, slots.first, w2.slots, w2.slot_bytes, spec.cols,
            spec.padded_cols // spec.group_size, spec.padded_rows, spec.rows,
            ROWS=rows_of, DOT=_dot(inner), **_cut_of(spec, tiles, config))

    def combine(self, rows: Tensor, topk_weights: Tensor) -> Tensor:
        tokens, top_k, hidden = rows.shape
        out = rows.new_empty(tokens, hidden)
        if tokens:
            _code().combine[tokens, -(-hidden // PIECE)](
                rows, topk_weights, out, topk_weights.stride(0), hidden, K=top_k, SIZE=PIECE, num_warps=4,
                enable_fp_fusion=False)
        return out

    def _cut(self, device: torch.device) -> Matmul:
        return self._config or built_in(capability(device)).matmul


def _rows_of(spec: MatrixSpec, config: Matmul) -> int:
    """Of a tile of a product."""
    return min(config.rows, cuda_carried.WIDEST) if spec.format in CARRIED else config.rows


def _tensors_of(weights: Matrices) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and parameters, and these as fp16 where a format has such."""
    if weights.spec.format in CARRIED:
        return cuda_carried.tensors_of(weights)
    return weights.qweight, weights.qparams, weights.qparams


def _cut_of(spec: MatrixSpec, tiles: Tiles, config: Matmul) -> dict[str, Any]:
    """What both products are told alike. Small tiles take four warps, as in cuda.many."""
    own = cuda_carried.format_of(spec) if spec.format in CARRIED else {
        "GROUP": spec.group_size, "BITS": spec.code_bits, "E2M1": spec.format == "mxfp4"}
    return {"E2M1": False, **own, "BLOCK": spec.block, "BIASED": spec.bias, "TILE": tiles.size,
            "CHUNK": min(spec.group_size, 64), "RAGGED": spec.cols < spec.padded_cols, "num_stages": config.stages,
            "num_warps": config.warps if tiles.size == config.tokens else 4, "enable_fp_fusion": True,
            "maxnreg": REGISTERS if tiles.size == SIZES[0] else None}


def _dot(x: Tensor) -> Any:
    return cuda.dot_of(device_code("cuda_jit"), x)


def _code() -> ModuleType:
    return device_code("cuda_grouped_jit")
