"""What decoding does on a GPU, in Triton: DeviceOps (device_ops.py has the meaning of each), tested under Triton's
interpreter and compiled for cards from sm_75 up.

Everything is computed in fp32, router logits and the rotary cosines in fp64. A token's bits do not depend on the others
of its call: no sum's order depends on how many there are.

What passes from one launch to the next lies in buffers, one for each use, made at the first call as FEW tokens need it
and kept, so that a call in a CUDA graph allocates nothing after one outside of it with the same matrices and cache.
Where the largest need of a model is known (device_scratch.Scratch), a buffer is made as large as that at once. They are
shared: calls of one TritonOps must follow each other in one stream, or in graphs that do. nf4 and fp4, which
bitsandbytes decodes, do allocate.

T tokens, H hidden, E experts, K chosen per token, Q query heads, KV key-value heads, D head size, S positions of a
cache.
"""

from __future__ import annotations

from functools import partial
from math import e, log2, prod
from types import ModuleType

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.formats import nf4
from qmix.formats.packed import Packed
from qmix.kernels import cuda, cuda_carried, cuda_delta
from qmix.kernels.attend import PLAIN, Softmax
from qmix.kernels.configs import Configs, built_in, capability
from qmix.kernels.cuda import Jobs, Matrices, device_code
from qmix.kernels.cuda_router import Routers, warps_of
from qmix.kernels.device_ops import FEW, ExpertSlots, Later, Scales
from qmix.kernels.device_scratch import Scratch, power_of_two, split_of
from qmix.kernels.router import RouterTensors
from qmix.kernels.torch_ops import activate
from qmix.spec import Activation, DeltaNet

PIECE = 1024  # numbers of a row that a program has, where each is computed by itself
SMALL = 4096  # rows; a matrix with fewer is cut finer, so that there are enough programs
TILE = 2048  # keys, times their size, that a program of attention has in hand
HEADS = 8  # query heads of a program of attention, at most: of 12 sm_86 spills registers
EVERYTHING = 2**30  # a window that no context fills
LOG2_E = log2(e)


class TritonOps:
    """See DeviceOps. configs: how kernels are cut, None for what is built in for the card of each call; scratch: what
    the buffers have at least."""

    name = "Triton"

    def __init__(self, configs: Configs | None = None, scratch: Scratch | None = None) -> None:
        self._configs = configs
        self._scratch = scratch or Scratch()
        self._rooms: dict[tuple[str, torch.device, torch.dtype], list[Tensor]] = {}
        self._single: dict[tuple[int, torch.device], Jobs] = {}
        self._routers = Routers(partial(self._room, "logits"))

    def embed(self, tokens: Tensor, embedding: Tensor | Packed, residual: Tensor, scale: float = 1.0) -> None:
        if isinstance(embedding, Packed):
            cuda_carried.rows(device_code("cuda_carried_rows_jit"), tokens, embedding, residual, scale)
            return
        hidden = embedding.shape[1]
        _layer().embed[len(tokens), -(-hidden // PIECE)](
            tokens, embedding, residual, float(scale), hidden, embedding.stride(0), residual.stride(0), SIZE=PIECE,
            num_warps=4)

    def norm(self, residual: Tensor, weight: Tensor | None, eps: float, out: Tensor,
             rows: Tensor | None = None, weights: Tensor | None = None) -> None:
        count, hidden = residual.shape
        strides, k = (0, 0, 0), 0
        if rows is not None:
            assert weights is not None and rows.stride(2) == 1 and weights.stride(1) == 1
            strides, k = (rows.stride(0), rows.stride(1), weights.stride(0)), rows.shape[1]
        width = power_of_two(hidden)
        _layer().norm[count,](residual, out if weight is None else weight, out, out if rows is None else rows,
                              out if weights is None else weights, eps, hidden, residual.stride(0), out.stride(0),
                              *strides, K=k, WEIGHT=weight is not None, WIDTH=width, num_warps=warps_of(width),
                              enable_fp_fusion=True)

    def head_norm(self, x: Tensor, size: int, weight: Tensor | None, eps: float | None,
                  clip: float | None = None) -> None:
        assert x.dtype == torch.float32 and x.stride(1) == 1 and x.shape[1] % size == 0
        width = power_of_two(size)
        _layer().head_norm[len(x), x.shape[1] // size](
            x, x if weight is None else weight, 0.0 if eps is None else eps, 0.0 if clip is None else float(clip),
            x.stride(0), size, NORM=eps is not None, WEIGHT=weight is not None, CLIP=clip is not None, WIDTH=width,
            num_warps=warps_of(width), enable_fp_fusion=True)

    def linear(self, x: Tensor, m: Packed, y: Tensor, add: bool = False) -> None:
        self._product(x, m, y, add)
        if m.spec.bias and not m.spec.in_blocks:
            y.add_(m["bias"])

    def _product(self, x: Tensor, m: Packed, y: Tensor, add: bool) -> None:
        """With the bias in a format in blocks of rows, in which it is added to the sums."""
        spec, tokens = m.spec, len(x)
        if not 1 <= tokens <= FEW or x.dtype != torch.float32 or x.shape[1] != spec.cols or x.stride(1) != 1:
            raise UsageError(f"x: got {x.dtype} {list(x.shape)}, want fp32 [1 to {FEW}, {spec.cols}], rows contiguous")
        if y.dtype != torch.float32 or y.shape != (tokens, spec.rows) or y.stride(1) != 1:
            raise UsageError(f"y: got {y.dtype} {list(y.shape)}, want fp32 [{tokens}, {spec.rows}], rows contiguous")
        if spec.in_blocks:
            if spec.parts != 1:
                raise UsageError("linear: the matrix is in parts", "use experts")
            cuda.few(x, Matrices.of(m), self._all(tokens, x.device), y, add=add,
                     room=self._partial(1), config=self._cut(x).gemv)
        elif spec.format in ("nf4", "fp4"):
            _decoded(x, m, y, add)
        else:
            scaled = spec.format == "int8"
            weight = m["qweight" if scaled else "weight"]
            config = self._cut(x).dense
            rows = config.rows if spec.rows >= SMALL else config.rows // 2
            device_code("cuda_dense_jit").gemv[-(-spec.rows // rows),](
                x, weight, m["scale"] if scaled else weight, y, x.stride(0), y.stride(0), tokens, spec.cols,
                spec.padded_cols, spec.rows, M=power_of_two(tokens), ROWS=rows, COLS=config.cols, UNROLL=config.unroll,
                SCALED=scaled, ADD=add, num_warps=4, enable_fp_fusion=True)

    def exact(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """By the kernel of a router's logits."""
        (rows, hidden), width = weight.shape, power_of_two(weight.shape[1])
        assert x.stride(1) == 1 and out.shape == (len(x), rows) and weight.is_contiguous() and out.is_contiguous()
        device_code("cuda_router_jit").logits[len(x), rows](
            x, x, weight, x, weight, x, out, 0.0, hidden, rows, x.stride(0), 0, 0, 0, OWN=True, NORM=False,
            WEIGHT=False, KEEP=False, WIDTH=width, num_warps=warps_of(width), enable_fp_fusion=True)

    def activate(self, activation: Activation, gate: Tensor, up: Tensor, out: Tensor) -> None:
        assert gate.shape == up.shape == out.shape
        _combine(activation.kind, gate, up, out, activation.alpha or 1.0, activation.limit)

    def combine(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        (tokens, k, hidden), width = rows.shape, min(PIECE, power_of_two(rows.shape[2]))
        assert rows.stride(2) == weights.stride(1) == out.stride(1) == 1 and out.shape == (tokens, hidden)
        _layer().combine[tokens, -(-hidden // width)](
            rows, weights, out, hidden, rows.stride(0), rows.stride(1), weights.stride(0), out.stride(0), K=k,
            SIZE=width, num_warps=4, enable_fp_fusion=True)

    def gate(self, x: Tensor, by: Tensor, kind: str = "sigmoid") -> None:
        assert kind in ("sigmoid", "silu") and by.shape[1] in (1, x.shape[1])
        _combine(kind, x, by, x)

    def add(self, target: Tensor, x: Tensor) -> None:
        assert target.shape == x.shape
        _combine("add", target, x, target)

    def scale(self, x: Tensor, weight: Tensor | None = None, factor: float = 1.0) -> None:
        if weight is None:
            _combine("factor", x, x, x, factor)
        else:
            assert len(weight) in (1, x.shape[1])
            _combine("scale", x, weight.expand(len(x), -1), x, factor)

    def softcap(self, x: Tensor, cap: float) -> None:
        _combine("softcap", x, x, x, cap)

    def rope_cos_sin(self, positions: Tensor, inv_freq: Tensor, out: Tensor, factor: float = 1.0) -> None:
        half = len(inv_freq)
        assert out.shape == (len(positions), 2 * half) and out.stride(1) == 1
        _layer().rope_cos_sin[len(positions),](positions, inv_freq, out, float(factor), out.stride(0), half,
                                               WIDTH=power_of_two(half), num_warps=1 if half <= 32 else 2)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None,
               out: Tensor, scales: Scales | None = None, softmax: Softmax = PLAIN) -> None:
        assert query.stride(1) == query.shape[2]
        self._attend(query, None, keys, values, positions, window, out, scales, softmax, False)

    def rope_attend(self, qkv: Tensor, cos_sin: Tensor | None, keys: Tensor, values: Tensor, positions: Tensor,
                    window: int | None, out: Tensor, scales: Scales | None = None, softmax: Softmax = PLAIN) -> None:
        size = keys.shape[2]
        assert qkv.stride(1) == 1 and qkv.shape[1] == out.shape[1] + 2 * len(keys) * size
        assert cos_sin is None or (cos_sin.stride(1) == 1 and len(cos_sin) == len(qkv) and cos_sin.shape[1] % 2 == 0
                                   and cos_sin.shape[1] <= size)
        self._attend(qkv.unflatten(1, (-1, size)), cos_sin, keys, values, positions, window, out, scales, softmax,
                     True)

    def _attend(self, query: Tensor, cos_sin: Tensor | None, keys: Tensor, values: Tensor, positions: Tensor,
                window: int | None, out: Tensor, scales: Scales | None, softmax: Softmax, new: bool) -> None:
        """Two launches. query [T, Q, D], or, where new, [T, Q + 2 KV, D], with keys and values that are not yet in the
        cache."""
        (kv, capacity, size), tokens = keys.shape, len(query)
        heads = out.shape[1] // size
        assert keys.stride(2) == values.stride(2) == out.stride(1) == 1 and (keys.dtype == torch.int8) == bool(scales)
        of_keys, of_values = scales or (keys, values)
        assert not scales or of_keys.stride(1) == of_values.stride(1) == 1
        (split, splits), (scale, softcap) = split_of(capacity), exponents(softmax, size)
        assert softmax.sinks is None or (softmax.sinks.dtype == torch.float32 and softmax.sinks.shape == (heads,)
                                         and softmax.sinks.is_contiguous())
        width, reach, group = power_of_two(size), window or EVERYTHING, heads_of_program(heads // kv)
        shape = heads, splits, size
        partial = self._room("attended", (tokens, *shape), (FEW, *shape), query.device)
        tops, totals = self._room("softmax", (2, tokens, *shape[:2]), (2, FEW, *shape[:2]), query.device).unbind()
        jit = device_code("cuda_attend_jit")
        jit.attend[heads // group, splits, tokens](
            query, query if cos_sin is None else cos_sin, keys, values, of_keys, of_values, positions, partial, tops,
            totals, reach, query.stride(0), 0 if cos_sin is None else cos_sin.stride(0), keys.stride(0), keys.stride(1),
            values.stride(0), values.stride(1), of_keys.stride(0), of_values.stride(0), splits, size,
            0 if cos_sin is None else cos_sin.shape[1], scale, softcap, GROUP=group,
            PARTS=heads // kv // group, SPLIT=split, STEP=min(TILE // width, split), WIDTH=width, NEW=new,
            ROPE=cos_sin is not None, INT8=scales is not None, num_warps=4 if group <= 4 else 8, enable_fp_fusion=True)
        jit.merge[tokens, heads](partial, tops, totals, softmax.sinks, positions, out, reach, out.stride(0), splits,
                                 size, SPLIT=split, SPLITS=power_of_two(splits), STEP=16, WIDTH=width, num_warps=4,
                                 enable_fp_fusion=True)

    def route(self, residual: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None,
              normed: Tensor | None, ids: Tensor, weights: Tensor, later: Later | None = None,
              more: tuple[Tensor, Tensor] | None = None) -> None:
        self._routers.route(residual, weight, router, eps, normed, ids, weights, later, more)

    def conv(self, x: Tensor, taps: Tensor, pasts: Tensor, side: Tensor, out: Tensor) -> None:
        cuda_delta.conv(x, taps, pasts, side, out)

    def delta(self, spec: DeltaNet, x: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, states: Tensor,
              side: Tensor, out: Tensor) -> None:
        cuda_delta.delta(spec, x, a, b, a_log, dt_bias, states, side, out)

    def expert(self, x: Tensor, w13: Packed, w2: Packed) -> Tensor:
        y = x.new_empty(len(x), w2.spec.rows)
        if w13.spec.in_blocks:  # beside records that are not
            inner = x.new_empty(len(x), w13.spec.rows // 2)
            cuda.few(x, Matrices.of(w13), self._all(len(x), x.device), inner, gated=True, room=self._partial(1),
                     config=self._cut(x).gemv)
            self.linear(inner, w2, y)
            return y
        both = x.new_empty(len(x), w13.spec.rows)
        gate, up = both.chunk(2, 1)
        if halves := w13.halves:
            for half, out in zip(halves, (gate, up), strict=True):
                self.linear(x, half, out)
        else:
            self.linear(x, w13, both)
        self.linear(activate(w13.spec.activation, gate, up), w2, y)
        return y

    def handles(self, slots: ExpertSlots) -> bool:
        return slots.record.w13.in_blocks and slots.record.w2.in_blocks

    def experts(self, x: Tensor, slots: ExpertSlots, ids: Tensor, table: Tensor, rows: Tensor) -> None:
        w13, w2 = matrices_of(slots)
        tokens, k = ids.shape
        width, count = power_of_two(tokens), min(tokens * k, len(table))
        most = min(FEW * k, len(table))
        room = self._room("jobs", (count * (1 + 2 * width),), (most * (1 + 2 * FEW),), x.device, torch.int32)
        first, (wanted, places) = room[:count], room[count:].view(2, count, width)
        assert ids.stride(1) == 1
        _layer().jobs[count,](ids, table, first, wanted, places, slots.first, w13.slots, tokens, k, ids.stride(0),
                              M=width, PAIRS=tokens * k <= len(table), num_warps=1)
        half = w13.spec.rows // 2
        inner = self._room("inner", (tokens * k, half), (FEW * k, half), x.device)
        gemv, partial = self._cut(x).gemv, self._partial(most)
        cuda.few(x, w13, Jobs(first, wanted, places), inner, gated=True, room=partial, config=gemv)
        cuda.few(inner, w2, Jobs(first, places, places), rows.view(tokens * k, -1), room=partial, config=gemv)

    def _cut(self, x: Tensor) -> Configs:
        return self._configs or built_in(capability(x.device))

    def _all(self, tokens: int, device: torch.device) -> Jobs:
        if (tokens, device) not in self._single:
            self._single[tokens, device] = Jobs.single(tokens, device)
        return self._single[tokens, device]

    def _partial(self, experts: int) -> cuda.Room:
        """Where the pieces of products lie: one buffer for all matrices, of which `experts` at most are of a call."""
        return lambda shape, device: self._room("partial", shape, (experts, FEW, *shape[2:]), device)

    def _room(self, use: str, shape: tuple[int, ...], most: tuple[int, ...], device: torch.device,
              dtype: torch.dtype = torch.float32) -> Tensor:
        """A part of the buffer of this use, a field of Scratch, which has `most` or more. Where that is more than it
        has, a larger one takes its place and the smaller one is kept too, since graphs may hold its address."""
        assert prod(shape) <= prod(most)
        made = self._rooms.setdefault((use, device, dtype), [])
        if not made or made[-1].numel() < prod(most):
            made.append(torch.empty(max(prod(most), getattr(self._scratch, use)), dtype=dtype, device=device))
        return made[-1][:prod(shape)].view(shape)


def matrices_of(slots: ExpertSlots) -> tuple[Matrices, Matrices]:
    """w13 and w2 of the records in a slab."""
    if "matrices" not in slots.made:
        slots.made["matrices"] = tuple(Matrices.in_slots(slots.slab, slots.record, name) for name in ("w13", "w2"))
    w13, w2 = slots.made["matrices"]
    return w13, w2


def heads_of_program(group: int) -> int:
    """Query heads that a program of attention has of the `group` that share keys: the most that divide them and for
    which there are registers."""
    return max(count for count in range(1, HEADS + 1) if group % count == 0)


def exponents(softmax: Softmax, size: int) -> tuple[float, float | None]:
    """(scale, softcap) as the kernels of attention take them: of powers of two; with a cap, as cuda_attend_jit.capped
    has it."""
    scale = LOG2_E / size**0.5 if softmax.scale is None else LOG2_E * softmax.scale
    return (scale, None) if softmax.softcap is None else (2 * scale / softmax.softcap, LOG2_E * softmax.softcap)


def _decoded(x: Tensor, m: Packed, y: Tensor, add: bool) -> None:
    """By tiles, which bitsandbytes decodes; each token alone, from memory of its own, has the bits that it always has.
    """
    rows = [row.clone() for row in x]
    for start, tile in nf4.tiles(m):
        for row, out in zip(rows, y, strict=True):
            product = tile @ row
            out[start:start + len(tile)] = out[start:start + len(tile)] + product if add else product


def _layer() -> ModuleType:
    return device_code("cuda_layer_jit")


def _combine(kind: str, x: Tensor, y: Tensor, out: Tensor, factor: float = 1.0, limit: float | None = None) -> None:
    """cuda_layer_jit.combined: x and out [T, N], y that or [T, 1]."""
    assert all(t.dtype == torch.float32 for t in (x, y, out)) and x.stride(1) == out.stride(1) == 1
    tokens, size = x.shape
    assert y.shape[1] == 1 or y.stride(1) == 1
    _layer().combined[tokens, -(-size // PIECE)](
        x, y, out, x.stride(0), y.stride(0), 1 if y.shape[1] == size else 0, out.stride(0), size, float(factor),
        limit, KIND=kind, SIZE=PIECE, num_warps=4, enable_fp_fusion=True)
