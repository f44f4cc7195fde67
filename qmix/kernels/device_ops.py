"""What decoding does on a device, operation by operation, for up to FEW tokens: into buffers that are there already.

Every operation reads and writes only what it is given, allocates nothing that outlives it, asks the host nothing and
tells it nothing: a row of them can be a CUDA graph. Activations are fp32 throughout. A token gets the same bits
whatever the others of its call are, and an expert whatever slot it is in.

`TorchDeviceOps` says what each does, through the CPU's kernels; on a GPU it is cuda_ops.TritonOps.

A router's weight stays in the checkpoint's dtype and is widened where it is multiplied. Routers rank experts as
choose_experts (router.py) does; NaN counts as the largest, and of equals the lower number comes first.

T tokens, H hidden, F inner size of an MLP, E experts, K chosen per token, Q query heads, KV key-value heads, D head
size, R of its dimensions that rotate, S positions of a cache, N slots, L layers asked, A experts guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.formats import carried
from qmix.formats.packed import Packed
from qmix.kernels.attend import PLAIN, Softmax, softmax_attention
from qmix.kernels.kv_codes import decoded, quantize
from qmix.kernels.layer import capped, steady
from qmix.kernels.op import FEW as FEW
from qmix.kernels.router import RouterTensors, choose_experts, router_logits, stable_best
from qmix.kernels.table import KernelTable
from qmix.sizes import RecordLayout
from qmix.spec import Activation, DeltaNet

Scales = tuple[Tensor, Tensor]  # of the keys and the values of an int8 cache, fp32 [KV, S] each, positions adjacent


@dataclass(frozen=True, slots=True)
class ExpertSlots:
    """Records of one layout in the slots of a slab: uint8 [N, bytes]; views: (w13, w2) of each slot. first: the number
    of its first slot in its tier, which may have several slabs. made: what an implementation derives of them, once."""

    slab: Tensor
    record: RecordLayout
    views: Sequence[tuple[Packed, Packed]]
    first: int = 0
    made: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Later:
    """Routers of L later layers that are asked beside a layer's own, each by its own rule: what the norm before it
    multiplies by, [H] fp32 or None for 1, with the same eps as the layer's own; ids int32 [T, L, A]: where the A
    experts go that each would choose."""

    norms: Sequence[Tensor | None]
    routers: Sequence[RouterTensors]
    ids: Tensor


class DeviceOps(Protocol):
    """TorchDeviceOps has the meaning of each."""

    name: str

    def embed(self, tokens: Tensor, embedding: Tensor | Packed, residual: Tensor, scale: float = 1.0) -> None: ...

    def norm(self, residual: Tensor, weight: Tensor | None, eps: float, out: Tensor,
             rows: Tensor | None = None, weights: Tensor | None = None) -> None: ...

    def head_norm(self, x: Tensor, size: int, weight: Tensor | None, eps: float | None,
                  clip: float | None = None) -> None: ...

    def linear(self, x: Tensor, m: Packed, y: Tensor, add: bool = False) -> None: ...

    def exact(self, x: Tensor, weight: Tensor, out: Tensor) -> None: ...

    def activate(self, activation: Activation, gate: Tensor, up: Tensor, out: Tensor) -> None: ...

    def combine(self, rows: Tensor, weights: Tensor, out: Tensor) -> None: ...

    def gate(self, x: Tensor, by: Tensor, kind: str = "sigmoid") -> None: ...

    def add(self, target: Tensor, x: Tensor) -> None: ...

    def scale(self, x: Tensor, weight: Tensor | None = None, factor: float = 1.0) -> None: ...

    def softcap(self, x: Tensor, cap: float) -> None: ...

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None,
               out: Tensor, scales: Scales | None = None, softmax: Softmax = PLAIN) -> None: ...

    def rope_cos_sin(self, positions: Tensor, inv_freq: Tensor, out: Tensor, factor: float = 1.0) -> None: ...

    def rope_attend(self, qkv: Tensor, cos_sin: Tensor | None, keys: Tensor, values: Tensor, positions: Tensor,
                    window: int | None, out: Tensor, scales: Scales | None = None,
                    softmax: Softmax = PLAIN) -> None: ...

    def route(self, residual: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None,
              normed: Tensor | None, ids: Tensor, weights: Tensor, later: Later | None = None,
              more: tuple[Tensor, Tensor] | None = None) -> None: ...

    def conv(self, x: Tensor, taps: Tensor, pasts: Tensor, side: Tensor, out: Tensor) -> None: ...

    def delta(self, spec: DeltaNet, x: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, states: Tensor,
              side: Tensor, out: Tensor) -> None: ...

    def handles(self, slots: ExpertSlots) -> bool: ...

    def expert(self, x: Tensor, w13: Packed, w2: Packed) -> Tensor: ...

    def experts(self, x: Tensor, slots: ExpertSlots, ids: Tensor, table: Tensor, rows: Tensor) -> None: ...


class TorchDeviceOps:
    """Through `kernels`, the CPU's, which must compute rows independently. For the CPU in a device's place."""

    def __init__(self, kernels: KernelTable):
        self.name = "the CPU's kernels"
        self._kernels = kernels

    def embed(self, tokens: Tensor, embedding: Tensor | Packed, residual: Tensor, scale: float = 1.0) -> None:
        """The rows of embedding [V, H], plain or in a format of ggml's, of tokens [T] int64, widened, times scale, into
        residual [T, H]."""
        residual.copy_(carried.rows(embedding, tokens) if isinstance(embedding, Packed) else embedding[tokens])
        if scale != 1:
            residual.mul_(scale)

    def norm(self, residual: Tensor, weight: Tensor | None, eps: float, out: Tensor,
             rows: Tensor | None = None, weights: Tensor | None = None) -> None:
        """residual / sqrt(mean(residual^2) + eps) * weight into out, all fp32: residual and out [T, H], which may be
        the same; weight [H], None for 1. Where rows [T, K, H] and weights [T, K] are given, sum_k weights[:, k] *
        rows[:, k], in that order, is first added to the residual, in place."""
        if rows is not None:
            assert weights is not None
            residual.add_(self._kernels.layer.combine(rows, weights))
        out.copy_(self._kernels.layer.norm(residual, weight, eps, torch.float32))

    def head_norm(self, x: Tensor, size: int, weight: Tensor | None, eps: float | None,
                  clip: float | None = None) -> None:
        """Each `size` neighbours of x [T, N] fp32 normed by themselves, weight [size] fp32 or None for 1, then clamped
        to [-clip, clip], in place; eps None: only clamped. x may be columns of something wider, as q is of q, k and v.
        NaN stays."""
        x.copy_(self._kernels.layer.head_norm(x, size, weight, eps, clip))

    def linear(self, x: Tensor, m: Packed, y: Tensor, add: bool = False) -> None:
        """x [T, cols] times the matrix into y [T, rows], or added to what is there. Both fp32, rows contiguous."""
        product = self._kernels.linear(x, m)
        y.add_(product) if add else y.copy_(product)

    def exact(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """x [T, H] fp32 times the few rows of weight [N, H], of any float dtype, summed in fp64, into out [T, N] fp32,
        contiguous."""
        out.copy_(torch.cat([router_logits(row, weight) for row in x.split(1)]))

    def activate(self, activation: Activation, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """What joins gate and up, by spec.Activation, into out, fp32 [T, F] each; out may be gate or up."""
        out.copy_(self._kernels.layer.activate(activation, gate, up))

    def combine(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """sum_k weights[:, k] * rows[:, k], in that order: rows [T, K, H], weights [T, K], into out [T, H], all fp32.
        """
        out.copy_(self._kernels.layer.combine(rows, weights))

    def gate(self, x: Tensor, by: Tensor, kind: str = "sigmoid") -> None:
        """x [T, N] *= f(by), fp32, in device; by [T, N], or [T, 1] for one number a token; kind, f: "sigmoid", "silu".
        """
        x.mul_(steady(torch.sigmoid if kind == "sigmoid" else F.silu, by))

    def add(self, target: Tensor, x: Tensor) -> None:
        """target [T, H] += x, fp32."""
        target.add_(x)

    def scale(self, x: Tensor, weight: Tensor | None = None, factor: float = 1.0) -> None:
        """x [T, N] *= weight, then *= factor, fp32, in device; weight [N], [1] for one number, None for 1."""
        if weight is not None:
            x.mul_(weight)
        if factor != 1:
            x.mul_(factor)

    def softcap(self, x: Tensor, cap: float) -> None:
        """x [T, V] = cap * tanh(x / cap), fp32, in place."""
        capped(x, cap)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None,
               out: Tensor, scales: Scales | None = None, softmax: Softmax = PLAIN) -> None:
        """Each token's queries [T, Q, D] over the keys and values [KV, S, D] up to its own of positions [T], or over
        the last `window` of them, into out [T, Q * D] fp32. Query head h reads key-value head h // (Q / KV). scales:
        where keys and values are int8 codes, of which they are made in fp32. softmax: sinks, scale and cap."""
        for token, position in enumerate(positions.tolist()):
            seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
            here, there = keys[:, seen], values[:, seen]
            if scales is not None:
                here, there = (decoded(codes, scale[:, seen], torch.float32) for codes, scale in zip(
                    (here, there), scales, strict=True))
            out[token] = softmax_attention(query[token:token + 1].to(here.dtype), here, there, None, softmax)[0]

    def rope_cos_sin(self, positions: Tensor, inv_freq: Tensor, out: Tensor, factor: float = 1.0) -> None:
        """What rotates heads at positions [T] int64, inv_freq [R / 2] radians a position: the R / 2 cosines, then the
        sines, times the attention factor (kernels/rope.py), into out fp32 [T, R]. The same for every layer with this
        rope."""
        half = len(inv_freq)
        cos, signed = self._kernels.layer.rope_cos_sin(positions, inv_freq, factor)
        out[:, :half], out[:, half:] = cos[:, 0, :half], signed[:, 0, half:]

    def rope_attend(self, qkv: Tensor, cos_sin: Tensor | None, keys: Tensor, values: Tensor, positions: Tensor,
                    window: int | None, out: Tensor, scales: Scales | None = None, softmax: Softmax = PLAIN) -> None:
        """qkv [T, (Q + 2 KV) * D] fp32, queries before keys before values: the first R <= D dimensions of each query
        and key head turn by cos_sin [T, R] of `rope_cos_sin`, dimension i with i + R / 2; None: none turn. Keys and
        values go to their positions in the cache's keys and values [KV, S, D]; then `attend`. Positions [T] follow each
        other, as a session's new tokens have them: each is one more than the last. scales: of a cache of int8 codes, to
        which the new keys and values are rounded first (kv_codes.py)."""
        (kv, _, size), heads = keys.shape, out.shape[1]
        q, k, v = (part.unflatten(1, (-1, size)) for part in qkv.split((heads, kv * size, kv * size), 1))
        if cos_sin is not None:
            cos, sin = cos_sin[:, None].chunk(2, -1)
            q, k = self._kernels.layer.rotate(q.flatten(1), k.flatten(1), torch.cat((cos, cos), -1),
                                              torch.cat((-sin, sin), -1), size)
        for there, x, scale in zip((keys, values), (k, v), scales or (None, None), strict=True):
            if scale is None:
                there[:, positions] = x.transpose(0, 1).to(there.dtype)
            else:
                codes, own = there.new_empty(kv, len(x), size), scale.new_empty(kv, len(x))
                quantize(x, codes, own)
                there[:, positions], scale[:, positions] = codes, own
        self.attend(q, keys, values, positions, window, out, scales, softmax)

    def route(self, residual: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None,
              normed: Tensor | None, ids: Tensor, weights: Tensor, later: Later | None = None,
              more: tuple[Tensor, Tensor] | None = None) -> None:
        """norm(residual) into normed [T, H] fp32, if given; the K experts that the router chooses of that into ids
        [T, K] int32, the best first, and their weights, in fp32, into weights [T, K]. Logits are summed in fp64 and
        rounded to fp32. weight [H] fp32, None for 1. eps None: the residual is normed already; weight, normed and later
        are None.

        later: what these routers would choose, asked now. more: ids and weights are written a second time, into these.
        """
        assert eps is not None or (weight is None and normed is None and later is None)
        wide = residual if eps is None else self._kernels.layer.norm(residual, weight, eps, torch.float32)
        chosen, found = _chosen(wide, router, ids.shape[1])
        ids.copy_(chosen)
        weights.copy_(found)
        if normed is not None:
            normed.copy_(wide)
        if more is not None:
            more[0].copy_(ids)
            more[1].copy_(weights)
        if later is not None:
            assert eps is not None
            for distance, (norm, asked) in enumerate(zip(later.norms, later.routers, strict=True)):
                there = self._kernels.layer.norm(residual, norm, eps, torch.float32)
                later.ids[:, distance] = _chosen(there, asked, later.ids.shape[2])[0]

    def conv(self, x: Tensor, taps: Tensor, pasts: Tensor, side: Tensor, out: Tensor) -> None:
        """ops.Conv of a session's tokens x [T, C] by taps [C, J] into out [T, C], all fp32. pasts [2, J - 1, C]: what
        stayed is on the side that side [1] int32 names; what stays now goes to the other."""
        now = int(side)
        past, by = pasts[now], taps.T.contiguous()
        for row, to in zip(x.split(1), out, strict=True):
            found, past = self._kernels.layer.conv(by, past, *row.tensor_split(3, 1))
            to.copy_(torch.cat(found, 1)[0])
        pasts[1 - now] = past

    def delta(self, spec: DeltaNet, x: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, states: Tensor,
              side: Tensor, out: Tensor) -> None:
        """ops.Delta of a session's tokens: x [T, C], q, k and v side by side, as `conv` gives them; a, b [T, B]; a_log,
        dt_bias [B]; out [T, B * V]; all fp32. states [2, B, K, V], B value heads, and side: as of `conv`."""
        now, keys = int(side), spec.key_heads * spec.key_dim
        state = states[now]
        for at, row in enumerate(x.split(1)):
            rows = (*row.split((keys, keys, x.shape[1] - 2 * keys), 1), a[at:at + 1], b[at:at + 1])
            found, state = self._kernels.layer.delta(spec, a_log, dt_bias, state, *rows)
            out[at] = found[0]
        states[1 - now] = state

    def handles(self, slots: ExpertSlots) -> bool:
        """Whether `experts` has the format of these records."""
        return True

    def expert(self, x: Tensor, w13: Packed, w2: Packed) -> Tensor:
        """One expert, in any format, for x [T, H] fp32 -> [T, H] fp32. Not for captured work: it may allocate."""
        return torch.cat([self._kernels.expert(row, w13, w2) for row in x.split(1)])

    def experts(self, x: Tensor, slots: ExpertSlots, ids: Tensor, table: Tensor, rows: Tensor) -> None:
        """w2(silu(gate(x)) * up(x)) of the experts ids [T, K] int32 of x [T, H] fp32, into rows [T, K, H] fp32. table
        [E] int32: the slot of each expert in its tier, -1 where it is in none. Rows of experts that are in no slot of
        this slab stay."""
        where = [slot - slots.first for slot in table.tolist()]
        for token, chosen in enumerate(ids.tolist()):
            for rank, expert in enumerate(chosen):
                if 0 <= where[expert] < len(slots.views):
                    rows[token, rank] = self._kernels.expert(x[token:token + 1], *slots.views[where[expert]])[0]


def _chosen(normed: Tensor, router: RouterTensors, count: int) -> tuple[Tensor, Tensor]:
    logits = torch.cat([router_logits(row, router.weight) for row in normed.split(1)])
    return choose_experts(logits, router, count, stable_best)
