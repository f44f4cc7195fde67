"""Triton kernels for int4, int3, int2, mxfp4 and ggml's formats, on the bytes that a store has; nothing is repacked.

Tested under Triton's interpreter and compiled for cards from sm_75 up; they have not run on one. How they are cut is an
argument everywhere (configs.py), None for what is built in for the card.

    linear, gated            x and one matrix: up to FEW tokens by `gemv`, which reads each weight once for all of
                             them; more by `matmul`, which decodes each piece of weights once for up to 128
    chosen_experts           what the experts in some slots of a slab give for up to FEW tokens: four launches
    many                     many tokens and the matrix in one slot

What is promised: gemv computes in fp32, whatever the dtype of x, and a token's bits do not depend on the others of its
call, nor on which slot an expert is in. matmul multiplies in `dot` (codes are exact in all of them; x is rounded to it)
and sums in fp32; a row's bits may depend on how many rows there are.
A launch handles one format: of a mixed store the caller groups experts by kind.

T tokens, K chosen experts per token, E experts of a call, M tokens of its busiest expert, H hidden, F expert inner,
N padded rows, B rows per block, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.formats.packed import Packed
from qmix.kernels import cuda_carried
from qmix.kernels.configs import Configs, Gemv, Matmul, built_in, capability
from qmix.kernels.device_scratch import lanes_of, power_of_two, splits_of, words_of
from qmix.kernels.op import FEW as FEW
from qmix.sizes import CARRIED, MatrixSpec, RecordLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DOTS = ("bf16", "fp16", "fp32")
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
FINISH = 1024  # results that a program of `finish` makes
INDEX = torch.int32
REGISTERS = 168  # of a thread of gemv, int4, FEW tokens: it needs no more, and three programs of four warps run at once
Room = Callable[[tuple[int, ...], torch.device], Tensor]  # where results of a launch lie for the next one


@dataclass(frozen=True, slots=True)
class Matrices:
    """Matrices of one spec that lie `slot_bytes` apart: those of the records in a slab, or a single one.

    qweight uint8, qparams int32 (a pair a word) or, of mxfp4 and ggml's formats, their scales uint8, bias fp32 (None
    where the spec has none): one-dimensional views that begin with those of slot 0. slots: how many there are. Made
    through `of` or `in_slots`, which check.
    """

    spec: MatrixSpec
    qweight: Tensor
    qparams: Tensor
    bias: Tensor | None
    slot_bytes: int
    slots: int

    @classmethod
    def of(cls, m: Packed) -> Matrices:
        """A single matrix. UsageError where it is in no grouped format, or not where the kernels run."""
        _check_weights(m["qweight"], m.spec)
        name, dtype = _params(m.spec)
        bias = m["bias"] if m.spec.bias else None
        return cls(m.spec, m["qweight"].view(-1), m[name].view(-1).view(dtype), bias, 0, 1)

    @classmethod
    def in_slots(cls, slab: Tensor, record: RecordLayout, matrix: str) -> Matrices:
        """The `matrix` ("w13" | "w2") of the records in slab, uint8 [S, bytes], each as `record` lays it out."""
        spec = {"w13": record.w13, "w2": record.w2}[matrix]
        _check_weights(slab, spec)
        if slab.dtype != torch.uint8 or slab.dim() != 2 or not slab.is_contiguous() or slab.shape[1] < record.payload \
                or slab.shape[1] % 64 or slab.data_ptr() % 64:
            raise UsageError(f"slab: got {slab.dtype} {list(slab.shape)}, want contiguous uint8 [slots, bytes], at "
                             f"least {record.payload} bytes each, slots on 64-byte boundaries")
        offsets = {p.tensor.name: p.offset for p in record.placed if p.matrix == matrix}
        flat, (name, dtype) = slab.view(-1), _params(spec)
        return cls(spec, flat[offsets["qweight"]:], flat[offsets[name]:].view(dtype),
                   flat[offsets["bias"]:].view(torch.float32) if spec.bias else None, slab.shape[1], len(slab))


@dataclass(frozen=True, slots=True)
class Jobs:
    """What a gemv call computes, on the device of the weights: of expert e, in slot slots[e], the product with each
    row rows[e, m] of x into row out_rows[e, m] of y; -1 in both for none, and in slots[e] where all are none. slots
    [E], rows and out_rows [E, M], M a power of two up to FEW, int32. Their numbers are not checked: that would take a
    look at the device."""

    slots: Tensor
    rows: Tensor
    out_rows: Tensor

    @classmethod
    def of(cls, chosen: Sequence[Sequence[int]], slots: int, device: torch.device) -> tuple[Jobs, Jobs]:
        """chosen: for each of up to FEW tokens the slots of its experts, each expert once; of `slots` that there are.
        -> the jobs of w13, x [T, H] to y [T * K, F], and those of w2, x and y [T * K, .].

        [[5, 2], [2, 9]] -> slots [5, 2, 9], rows [[0, -1], [0, 1], [1, -1]], out_rows [[0, -1], [1, 2], [3, -1]].
        """
        of_slot: dict[int, list[tuple[int, int]]] = {}
        for token, own in enumerate(chosen):
            if len(own) != len(chosen[0]) or len(set(own)) != len(own) or not all(0 <= s < slots for s in own):
                raise UsageError(f"slots of token {token}: got {list(own)}, want {len(chosen[0])} different ones of "
                                 f"0 to {slots - 1}")
            for rank, slot in enumerate(own):
                of_slot.setdefault(slot, []).append((token, token * len(own) + rank))
        if not of_slot or len(chosen) > FEW:
            raise UsageError(f"got {len(chosen)} tokens, want 1 to {FEW} with an expert or more each")
        width = power_of_two(max(map(len, of_slot.values())))
        filled = [pairs + [(-1, -1)] * (width - len(pairs)) for pairs in of_slot.values()]
        both = torch.tensor(filled, dtype=INDEX)
        flat = torch.cat((torch.tensor(list(of_slot), dtype=INDEX), both[..., 0].reshape(-1),
                          both[..., 1].reshape(-1))).to(device)  # one copy
        count = len(of_slot)
        rows, out_rows = flat[count:].view(2, count, width)
        return cls(flat[:count], rows, out_rows), cls(flat[:count], out_rows, out_rows)

    @classmethod
    def single(cls, tokens: int, device: torch.device) -> Jobs:
        """All of up to FEW tokens and slot 0."""
        at = torch.arange(power_of_two(tokens), device=device, dtype=INDEX)
        rows = torch.where(at < tokens, at, -1)[None]
        return cls(torch.zeros(1, device=device, dtype=INDEX), rows, rows)


def linear(x: Tensor, m: Packed, out_dtype: torch.dtype | None = None, dot: str | None = None,
           configs: Configs | None = None) -> Tensor:
    """x [T, cols] fp32, bf16 or fp16 -> [T, padded_rows] in `out_dtype` (x's), gaps of the padding zero where x is
    finite; without the bias. dot: see `many`; it matters for more than FEW tokens. UsageError for what the kernels
    lack."""
    weights, configs = replace(Matrices.of(m), bias=None), configs or _configs(x.device)
    _check_x(x, weights)
    y = x.new_empty(len(x), m.spec.padded_rows, dtype=out_dtype or x.dtype)
    if not len(x):
        return y
    if len(x) <= FEW:
        few(x, weights, Jobs.single(len(x), x.device), y, config=configs.gemv)
    else:
        many(x, weights, 0, y, dot, configs.matmul)
    return y


def gated(x: Tensor, m: Packed, out_dtype: torch.dtype | None = None, dot: str | None = None,
          configs: Configs | None = None) -> Tensor:
    """The first half of an expert, activation(gate(x), up(x)): x [T, H] -> [T, F]; m is gate over up, [2F, H]."""
    weights, configs = Matrices.of(m), configs or _configs(x.device)
    _check_x(x, weights)
    y = x.new_empty(len(x), m.spec.rows // 2, dtype=out_dtype or x.dtype)
    if not len(x):
        return y
    if len(x) <= FEW:
        few(x, weights, Jobs.single(len(x), x.device), y, gated=True, config=configs.gemv)
    else:
        both = x.new_empty(len(x), m.spec.padded_rows, dtype=torch.float32)
        many(x, weights, 0, both, dot, configs.matmul)
        join(both, weights, y)
    return y


def chosen_experts(x: Tensor, w13: Matrices, w2: Matrices, chosen: Sequence[Sequence[int]]) -> Tensor:
    """The experts in slots chosen[t] of each token: x [T, H], T <= FEW -> fp32 [T, K, rows of w2], in the order of
    `chosen`, to be weighted and summed in rank order. Four launches; between the halves fp32 [T * K, F]."""
    first, second = Jobs.of(chosen, min(w13.slots, w2.slots), x.device)
    if len(chosen) != len(x):
        raise UsageError(f"chosen: got {len(chosen)} tokens, x has {len(x)}")
    pairs = len(x) * len(chosen[0])
    inner = x.new_empty(pairs, w13.spec.rows // 2, dtype=torch.float32)
    few(x, w13, first, inner, gated=True)
    y = x.new_empty(pairs, w2.spec.padded_rows, dtype=torch.float32)
    few(inner, w2, second, y)
    return y.view(len(x), -1, w2.spec.padded_rows)[..., :w2.spec.rows]


def fresh(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """New memory, fp32 of that shape, undefined."""
    return torch.empty(shape, dtype=torch.float32, device=device)


def few(x: Tensor, weights: Matrices, jobs: Jobs, y: Tensor, gated: bool = False, add: bool = False,
        room: Room = fresh, config: Gemv | None = None) -> None:
    """What `jobs` say, into y [., padded_rows] or its first columns, or [., F] where gated; or, where `add`, added to
    what is there. Two launches: the products of pieces of the columns, into `room`, then their sums, biases and what
    joins gate and up."""
    _check_x(x, weights)
    jit, spec = device_code("cuda_jit"), weights.spec
    config = config or _configs(x.device).gemv
    assert weights.bias is None or gated or spec.parts == 1, "the bias of parts side by side"
    (count, width), splits = jobs.rows.shape, splits_of(spec, config)
    partial = room((count, width, splits, spec.padded_rows), x.device)
    if spec.format in CARRIED:
        cuda_carried.gemv(device_code("cuda_carried_jit"), x, weights, jobs, partial, config)
    else:
        _gemv(jit, x, weights, jobs, partial, config)
    _finish(jit, partial.view(-1, splits, spec.padded_rows), jobs, weights, y, gated, add)


def _gemv(jit: ModuleType, x: Tensor, weights: Matrices, jobs: Jobs, partial: Tensor, config: Gemv) -> None:
    spec, (count, width, splits, _) = weights.spec, partial.shape
    groups, words = spec.padded_cols // spec.group_size, words_of(spec)
    lanes = lanes_of(spec, config)
    warps = max(1, lanes * words // 32)
    jit.gemv[spec.padded_rows // spec.block, splits, count](
        x, weights.qweight.view(torch.int32), weights.qparams, jobs.slots, jobs.rows, partial, weights.slot_bytes // 4,
        x.stride(0), spec.cols, groups, spec.padded_rows, M=width, GROUP=spec.group_size, BLOCK=spec.block,
        BITS=spec.code_bits, LANES=lanes, UNROLL=config.unroll, RAGGED=spec.cols < spec.padded_cols,
        E2M1=spec.format == "mxfp4", num_warps=warps, enable_fp_fusion=True,
        maxnreg=REGISTERS if width == FEW and spec.bits == 4 and warps <= 8 else None)


def many(x: Tensor, weights: Matrices, slot: int, y: Tensor, dot: str | None = None,
         config: Matmul | None = None) -> None:
    """x [T, cols] times the matrix in `slot`, into y [T, padded_rows]. The CPU waits for nothing.

    dot: "bf16" | "fp16" | "fp32", what x is rounded to: bf16 for bf16 where the card has it, fp16 for fp16, else
    fp32, which is exact and slow. x beyond 65504 is infinite in fp16. x that has to be rounded is rounded before the
    launch: a product of 16-bit numbers must read x as it lies in memory, since operands that are made in registers are
    not safe on Hopper (cuda_prompt.attend_many says why).
    """
    _check_x(x, weights)
    if not 0 <= slot < weights.slots:
        raise UsageError(f"slot {slot}: want 0 to {weights.slots - 1}")
    jit, spec = device_code("cuda_jit"), weights.spec
    config, operands = config or _configs(x.device).matmul, dot_of(jit, x, dot)
    x = x.to(NARROW.get(operands.name, x.dtype))
    block_m = min(config.tokens, 128 if len(x) > 64 else 64 if len(x) > 16 else 16)
    if spec.format in CARRIED:
        cuda_carried.matmul(device_code("cuda_carried_jit"), x, weights, slot, y, operands, block_m, config)
        return
    blocks, per_tile = spec.padded_rows // spec.block, config.rows // spec.block
    jit.matmul[-(-len(x) // block_m), -(-blocks // per_tile)](
        x, weights.qweight, weights.qparams, y, slot, len(x), weights.slot_bytes, x.stride(0), y.stride(0),
        spec.cols, spec.padded_cols // spec.group_size, spec.padded_rows, blocks,
        GROUP=spec.group_size, BLOCK=spec.block, BITS=spec.code_bits, BLOCK_M=block_m, BLOCKS=per_tile,
        CHUNK=min(spec.group_size, 64), DOT=operands, E2M1=spec.format == "mxfp4", num_stages=config.stages,
        enable_fp_fusion=True, num_warps=config.warps if block_m == config.tokens else 4)


def decoded(weights: Matrices, first: int, blocks: int, dtype: torch.dtype) -> Tensor:
    """Rows of slot 0 as numbers, those of `blocks` blocks from number `first` on, rounded to dtype, [rows,
    padded_cols]: a view whose columns are contiguous."""
    spec = weights.spec
    chunk = min(spec.group_size, 2048 // spec.block)  # columns of a program, which has 2048 numbers in hand
    out = weights.qweight.new_empty(spec.padded_cols, blocks * spec.block, dtype=dtype)
    if spec.format in CARRIED:
        cuda_carried.decode(device_code("cuda_carried_jit"), weights, first, blocks, out)
        return out.T
    device_code("cuda_jit").decode[blocks, spec.padded_cols // chunk](
        weights.qweight, weights.qparams, out, first, spec.padded_cols // spec.group_size, spec.padded_rows,
        out.stride(0), GROUP=spec.group_size, BLOCK=spec.block, BITS=spec.code_bits, CHUNK=chunk,
        E2M1=spec.format == "mxfp4", num_warps=4, enable_fp_fusion=True)
    return out.T


def join(both: Tensor, weights: Matrices, y: Tensor) -> None:
    """activation(gate, up) of what `many` gives of slot 0: both fp32 [T, N] contiguous, gate and up each the first F of
    a half, without their biases, into y [T, F]."""
    rows = torch.arange(len(both), device=both.device, dtype=INDEX)[:, None]
    jobs = Jobs(torch.zeros(len(both), device=both.device, dtype=INDEX), rows, rows)
    _finish(device_code("cuda_jit"), both[:, None], jobs, weights, y, True, False)


def _finish(jit: ModuleType, partial: Tensor, jobs: Jobs, weights: Matrices, y: Tensor, gated: bool,
            add: bool) -> None:
    (pairs, splits, n), out, bias = partial.shape, y.shape[1], weights.bias
    how = weights.spec.activation
    jit.finish[pairs, -(-out // FINISH)](
        partial, jobs.out_rows, y, y.stride(0), n, out, splits, partial if bias is None else bias, jobs.slots,
        weights.slot_bytes // 4, weights.spec.rows, GATED=gated, ADD=add, SIZE=FINISH, BIASED=bias is not None,
        WIDTH=1 if bias is None else jobs.rows.shape[1], KIND=how.kind, ALPHA=how.alpha or 0.0,
        LIMIT=how.limit or 0.0, num_warps=4, enable_fp_fusion=True)


def device_code(name: str) -> ModuleType:
    """A module of device code. UsageError where Triton is missing; it is imported here, at the first call."""
    try:
        return import_module(f"qmix.kernels.{name}")
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] != "triton":
            raise
        raise UsageError("the GPU kernels need Triton, which is not installed",
                         "pip install triton (a CUDA build of torch for Linux brings it)") from None


def interpreted(jit: ModuleType) -> bool:
    """Whether Triton's interpreter runs the kernels, as TRITON_INTERPRET=1 has it."""
    return not isinstance(jit.gemv, jit.triton.JITFunction)


def _configs(device: torch.device) -> Configs:
    return built_in(capability(device))


def dot_of(jit: ModuleType, x: Tensor, dot: str | None = None) -> Any:
    """Triton's dtype of a product's operands; see `many`."""
    if dot not in (None, *DOTS):
        raise UsageError(f"dot: got {dot!r}, want " + ", ".join(DOTS))
    lacking = (capability(x.device) or (0, 0)) < (8, 0)
    if dot == "bf16" and lacking:
        raise UsageError(f"dot: {x.device} has no bf16 products", "use fp16 or fp32")
    narrow = "fp16" if x.dtype == torch.float16 else "bf16" if x.dtype == torch.bfloat16 and not lacking else "fp32"
    return {"bf16": jit.tl.bfloat16, "fp16": jit.tl.float16, "fp32": jit.tl.float32}[dot or narrow]


def _check_weights(tensor: Tensor, spec: MatrixSpec) -> None:
    if not spec.in_blocks:
        raise UsageError(f"{spec.format}: these GPU kernels support int4, int3, int2, mxfp4 and ggml's formats")
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreted(device_code("cuda_jit"))):
        raise UsageError(f"weights on {tensor.device}: Triton's kernels need them on a CUDA device",
                         "for tests without one, set TRITON_INTERPRET=1 before Python starts")


def _check_x(x: Tensor, weights: Matrices) -> None:
    if x.dim() != 2 or x.shape[1] != weights.spec.cols or x.dtype not in DTYPES or x.stride(1) != 1:
        raise UsageError(f"x: got {x.dtype} {list(x.shape)}, strides {x.stride()}, want fp32, bf16 or fp16 "
                         f"[T, {weights.spec.cols}], rows contiguous")
    if x.device != weights.qweight.device:
        raise UsageError(f"x is on {x.device}, the weights are on {weights.qweight.device}")


def _params(spec: MatrixSpec) -> tuple[str, torch.dtype]:
    """The tensor that has a matrix's parameters, and as what the kernels read it."""
    if spec.format in CARRIED:
        return "scales", torch.uint8
    return ("scale", torch.uint8) if spec.format == "mxfp4" else ("qparams", torch.int32)
