"""native.h's structures, packed from tensors. A job holds addresses: who keeps one keeps its tensors.

T tokens, H hidden, E experts, K chosen, Q query heads, KV key-value heads, D head size, R rotary dimension.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from qmix.kernels.router import RouterTensors
from qmix.spec import Activation, DeltaNet

PRODUCT = struct.Struct("@7P7q9i2f4x2Pq2i")  # qmix_job: pointers, sizes, layout, what it does, activation, another up
ATTENTION = struct.Struct("@8P6q4iP2f")       # qmix_attention
NORM = struct.Struct("@4P2q2f3i4x")           # qmix_norm
ROUTE_REST = struct.Struct("@6P5q2f4i")       # qmix_route behind the qmix_norm that it begins with
ROTATE = struct.Struct("@5P4q2i")             # qmix_rotate
ROPE_COS_SIN = struct.Struct("@4Pqf4x")       # qmix_angles
COMBINE = struct.Struct("@3P2q")      # qmix_combine
JOIN = struct.Struct("@3Pqi2fi")       # qmix_join
BIAS = struct.Struct("@2Pqi4x")               # qmix_bias
EXACT = struct.Struct("@3P2q2i")               # qmix_exact
GATE = struct.Struct("@2Pq4i")                # qmix_gate
CONV = struct.Struct("@9P5q3i4x")             # qmix_conv
DELTA = struct.Struct("@10P4q")               # qmix_delta
ADDITION = struct.Struct("@2Pq")      # qmix_addition
SCALING = struct.Struct("@2Pqfi")     # qmix_scaling
MATRIX = struct.Struct("@7q5i2f4x3q2i")   # qmix_matrix, two of which are a qmix_record
EXPERTS = struct.Struct("@9P3qi4x")   # qmix_experts
CALL = struct.Struct("@P2i")          # qmix_call
ACTIVATIONS = {"swiglu": 0, "geglu": 1, "swiglu_clamped": 2}  # native.h's QMIX_SWIGLU and so on
TYPES = {torch.float32: 0, torch.bfloat16: 1}
ROUTER_TYPES = {**TYPES, torch.float16: 2}
SOFTMAX_CHOSEN, SOFTMAX_ALL, SIGMOID = range(3)  # qmix_route.score
KV_TYPES = {torch.int8: 0, torch.bfloat16: 1}


def norm(x: Tensor, weight: Tensor | None, eps: float | None, out: Tensor | None, wide: Tensor | None = None,
         clip: float | None = None, rows: int = 1) -> bytes:
    """clamp(x / sqrt(mean(x^2) + eps) * weight, -clip, clip), where a token has `rows` neighbouring rows, each normed
    by itself: the heads of a projection. eps None: x is not normed, only clamped; weight None: 1.

    x [T, rows * H] fp32 or bf16; weight [H] fp32; out [T, rows * H] fp32 or bf16; wide, the same before it is rounded,
    fp32. out may be x where both are fp32. All contiguous."""
    kind, size = 0 if out is None else TYPES[out.dtype], x.shape[1] // rows
    return NORM.pack(x.data_ptr(), _address(weight), _address(out), _address(wide), rows, size, eps or 0.0,
                     math.inf if clip is None else clip, TYPES[x.dtype], kind, eps is None)


def route(x: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None, normed: Tensor | None,
          ids: Tensor, topk_weights: Tensor | None) -> bytes:
    """x [T, H] fp32, normed first as by `norm`, or as it is where eps is None; normed [T, H], what the norm gives, fp32
    or bf16; ids [T, K] int64; topk_weights [T, K] fp32, None where only ids are asked for. All contiguous but for the
    rows of ids."""
    spec, matrix = router.spec, router.weight
    score = SIGMOID if spec.score == "sigmoid" else SOFTMAX_CHOSEN if spec.over == "chosen" else SOFTMAX_ALL
    return norm(x, weight, eps, normed) + ROUTE_REST.pack(
        matrix.data_ptr(), _address(router.logit_bias), _address(router.choice_bias), _address(router.expert_scale),
        ids.data_ptr(), _address(topk_weights), ids.stride(0), spec.experts, ids.shape[1], spec.groups, spec.top_groups,
        spec.eps, spec.scale, ROUTER_TYPES[matrix.dtype], score, spec.normalize, spec.group_score == "top2")


def rotate(queries: Tensor, keys: Tensor | None, cos: Tensor, sin: Tensor, out: Tensor) -> bytes:
    """queries [T, Q * D] and keys [T, KV * D], each fp32 or bf16; cos, sin [T, 1, R] fp32; out [T, Q + KV, D] fp32, the
    dimensions from R on copied. keys None: KV = 0. All contiguous."""
    size = out.shape[2]
    kv_heads, key_type = (0, 0) if keys is None else (keys.shape[1] // size, TYPES[keys.dtype])
    return ROTATE.pack(queries.data_ptr(), _address(keys), cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
                       queries.shape[1] // size, kv_heads, size, cos.shape[2], TYPES[queries.dtype], key_type)


def rope_cos_sin(positions: Tensor, inv_freq: Tensor, cos: Tensor, sin: Tensor, factor: float = 1.0) -> bytes:
    """positions [T] int64, inv_freq [R / 2], cos, sin [T, 1, R] fp32, multiplied by `factor`; all contiguous."""
    return ROPE_COS_SIN.pack(positions.data_ptr(), inv_freq.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[2],
                             factor)


def combine(rows: Tensor, topk_weights: Tensor, out: Tensor) -> bytes:
    """rows [T, K, H], weights [T, K], out [T, H]; all fp32, contiguous."""
    return COMBINE.pack(rows.data_ptr(), topk_weights.data_ptr(), out.data_ptr(), rows.shape[1], rows.shape[2])


def join(activation: Activation, gate: Tensor, up: Tensor, out: Tensor) -> bytes:
    """gate, up [T, F], both fp32 or both bf16, out [T, F] fp32; all contiguous."""
    return JOIN.pack(gate.data_ptr(), up.data_ptr(), out.data_ptr(), out.shape[1], ACTIVATIONS[activation.kind],
                     activation.alpha or 0.0, activation.limit or 0.0, TYPES[gate.dtype])


def bias(y: Tensor, by: Tensor) -> bytes:
    """y [T, N], fp32 or bf16, plus bias [N] fp32, rounded once; both contiguous."""
    return BIAS.pack(y.data_ptr(), by.data_ptr(), y.shape[1], TYPES[y.dtype])


def exact(x: Tensor, weight: Tensor, out: Tensor) -> bytes:
    """x [T, H] fp32 or bf16 times the transpose of weight [N, H] as a router's: out [T, N] fp32; all contiguous."""
    return EXACT.pack(x.data_ptr(), weight.data_ptr(), out.data_ptr(), weight.shape[1], weight.shape[0],
                      TYPES[x.dtype], ROUTER_TYPES[weight.dtype])


def gate(y: Tensor, by: Tensor, kind: str) -> bytes:
    """y [T, N] *= kind(by), by [T, N] or [T, 1]; each fp32 or bf16, contiguous."""
    return GATE.pack(y.data_ptr(), by.data_ptr(), y.shape[1], TYPES[y.dtype], TYPES[by.dtype], kind == "silu",
                     by.shape[1] == 1)


def conv(taps: Tensor, past: Tensor, after: Tensor, sources: Sequence[Tensor], out: Sequence[Tensor]) -> bytes:
    """One token. taps [J, C]; past, after [J - 1, C], two tensors; three sources [1, n], fp32 or bf16, and what becomes
    of them, fp32; all contiguous."""
    return CONV.pack(*(x.data_ptr() for x in (past, after, taps, *sources, *out)), *(x.shape[1] for x in sources),
                     taps.shape[1], taps.shape[0], *(TYPES[x.dtype] for x in sources))


def delta(spec: DeltaNet, state: Tensor, after: Tensor, rows: Sequence[Tensor], out: Tensor) -> bytes:
    """One token. state, after [value_heads, key_dim, value_dim], two tensors; rows: q, k, v, a, b, a_log, dt_bias; all
    fp32, contiguous."""
    return DELTA.pack(*(x.data_ptr() for x in (state, after, *rows, out)), spec.key_heads, spec.value_heads,
                      spec.key_dim, spec.value_dim)


def scale(y: Tensor, weight: Tensor | None, factor: float) -> bytes:
    """y [T, H] *= weight, [H] or [1] or None for 1, then *= factor; all fp32, contiguous."""
    one = weight is not None and len(weight) == 1
    return SCALING.pack(y.data_ptr(), _address(weight), y.shape[1], factor, one)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
