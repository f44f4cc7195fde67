"""What a layer does to a few tokens beside products and attention, through the library: norm, router, rotary embedding,
the weighted sum of expert outputs, and what joins gate and up. torch takes some 25 operations for it, which cost more
to start than to compute.

T tokens, H hidden, E experts, K chosen of them, F inner size, A guessed, Q query heads, KV key-value heads, D head
size, R rotary dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qmix.kernels.native import jobs
from qmix.kernels.native.loader import levels, library
from qmix.kernels.router import RouterTensors
from qmix.spec import Activation, DeltaNet


class NativeLayerOps:
    """The library at one level (see levels()); the same methods as kernels.layer.TorchLayerOps. By the calling thread,
    but for the logits of many experts, which `threads` threads share; the bits of a token depend neither on the others
    nor on the threads."""

    def __init__(self, level: str):
        opened = library()
        assert opened is not None, "no library"
        self._library = opened
        self._number = levels()[level]
        self.level = level
        self.threads = torch.get_num_threads()
        self.name = f"native {level}"

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight: x [T, H] fp32 or bf16, weight [H] fp32, None for 1 -> [T, H] of `dtype`,
        fp32 or bf16. RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), of any number of tokens."""
        x, weight = _readable(x), _optional(weight)
        out = torch.empty(x.shape, dtype=dtype)
        _check(self._library.qmix_norms(self._number, jobs.norm(x, weight, eps, out), x.shape[0]))
        return out

    def head_norm(self, x: Tensor, size: int, weight: Tensor | None, eps: float | None,
                  clip: float | None = None) -> Tensor:
        """Each `size` neighbours of x [T, N] fp32 or bf16 normed by themselves, weight [size] fp32 or None for 1, then
        clamped to [-clip, clip]; eps None: only clamped -> [T, N] fp32. q and k norms (Henry et al. 2020,
        arXiv 2010.04245): size is the head's, or N for one norm of a whole projection."""
        x, weight = _readable(x), _optional(weight)
        out = torch.empty(x.shape)
        job = jobs.norm(x, weight, eps, out, clip=clip, rows=x.shape[1] // size)
        _check(self._library.qmix_norms(self._number, job, x.shape[0]))
        return out

    def route(self, x: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None, normed: Tensor | None,
              ids: Tensor, topk_weights: Tensor) -> None:
        """norm(x) into normed [T, H], fp32 or bf16; the K experts that `router` chooses by logits of norm(x), which are
        summed in fp64 and rounded to fp32, into ids [T, K] int64, the best first; their weights, in fp32, into
        topk_weights [T, K]. x [T, H], weight [H] fp32. eps None: x is normed already, and weight and normed are None.
        spec.Router has the formulas."""
        x, weight = _plain(x), _optional(weight)
        assert (normed is None or normed.is_contiguous()) and topk_weights.is_contiguous(), "rows with gaps"
        self._route(x, jobs.route(x, weight, router, eps, normed, _ids(ids), topk_weights))

    def guess(self, x: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None, ids: Tensor) -> None:
        """What `route` would put into ids, [T, A] of any strides between tokens."""
        x, weight = _plain(x), _optional(weight)
        self._route(x, jobs.route(x, weight, router, eps, None, _ids(ids), None))

    def _route(self, x: Tensor, job: bytes) -> None:
        _check(self._library.qmix_routes(self._number, job, x.shape[0], self.threads))

    def rope_cos_sin(self, positions: Tensor, inv_freq: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine, fp32 [T, 1, R], of position * inv_freq [R / 2], for positions [T] int64, times the
        attention factor (YaRN, arXiv 2309.00071, section 3.4)."""
        cos, sin = torch.empty(2, len(positions), 1, 2 * len(inv_freq))
        positions = positions.contiguous()
        job = jobs.rope_cos_sin(positions, inv_freq, cos, sin, factor)
        _check(self._library.qmix_angles_of(self._number, job, len(positions)))
        return cos, sin

    def rotate(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor,
               head_dim: int | None = None) -> tuple[Tensor, Tensor]:
        """Rotary embedding (Su et al. 2021, arXiv 2104.09864) of the first R dimensions of each head, the others are
        copied: queries [T, Q * D] and keys [T, KV * D], each fp32 or bf16; cos, signed sin [T, 1, R] fp32; head_dim: D,
        None for R -> [T, Q, D] and [T, KV, D], fp32."""
        count, _, rotary = cos.shape
        size = head_dim or rotary
        queries, keys, cos, sin = (x if x.is_contiguous() else x.contiguous() for x in (queries, keys, cos, sin))
        heads, kv_heads = queries.shape[1] // size, keys.shape[1] // size
        out = torch.empty(count, heads + kv_heads, size)
        _check(self._library.qmix_rotations(self._number, jobs.rotate(queries, keys, cos, sin, out), count))
        return out[:, :heads], out[:, heads:]

    def combine(self, rows: Tensor, topk_weights: Tensor) -> Tensor:
        """sum_k topk_weights[:, k] * rows[:, k], strictly in order: rows [T, K, H], topk_weights [T, K] -> [T, H], all
        fp32."""
        rows, topk_weights = _plain(rows), _plain(topk_weights)
        out = torch.empty(rows.shape[0], rows.shape[2])
        _check(self._library.qmix_combines(self._number, jobs.combine(rows, topk_weights, out), rows.shape[0]))
        return out

    def activate(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        """What joins gate and up [T, F], both fp32 or both bf16, by spec.Activation -> [T, F] fp32."""
        gate, up = _readable(gate), _readable(up)
        assert gate.dtype == up.dtype and gate.shape == up.shape, (gate.dtype, up.dtype)
        out = torch.empty(gate.shape)
        _check(self._library.qmix_joins(self._number, jobs.join(activation, gate, up, out), len(gate)))
        return out


    def exact(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, H] fp32 or bf16 times the transpose of weight [N, H] as a router's, summed in fp64: [T, N] fp32."""
        x = _readable(x)
        out = torch.empty(len(x), len(weight))
        _check(self._library.qmix_exacts(self._number, jobs.exact(x, weight, out), len(x), self.threads))
        return out

    def gate(self, x: Tensor, by: Tensor, kind: str) -> Tensor:
        """x [T, N] times kind(by), by [T, N] or [T, 1]; each fp32 or bf16 -> [T, N] of x's dtype."""
        x, by = _readable(x).clone(), _readable(by)
        _check(self._library.qmix_gates(self._number, jobs.gate(x, by, kind), len(x)))
        return x

    def conv(self, taps: Tensor, past: Tensor, *sources: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of one token: taps [J, C], past [J - 1, C] fp32, three sources [1, n], fp32 or bf16 -> (what Conv writes,
        the rows that stay)."""
        sources = tuple(map(_readable, sources))
        after, out = torch.empty_like(past), tuple(torch.empty(x.shape) for x in sources)
        _check(self._library.qmix_convolution(self._number, jobs.conv(taps, past, after, sources, out)))
        return out, after

    def delta(self, spec: DeltaNet, a_log: Tensor, dt_bias: Tensor, state: Tensor, *rows: Tensor,
              ) -> tuple[Tensor, Tensor]:
        """Of one token: q, k, v, a, b [1, n] fp32 -> (what Delta writes, the state after it). `threads` threads share
        the value heads. Each state is read from memory once and written once."""
        rows = tuple(map(_plain, (*rows, a_log, dt_bias)))
        after, out = torch.empty_like(state), torch.empty(1, spec.value_heads * spec.value_dim)
        job = jobs.delta(spec, state, after, rows, out)
        _check(self._library.qmix_delta_rule(self._number, job, self.threads))
        return out, after


def _plain(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32, x.dtype
    return x if x.is_contiguous() else x.contiguous()


def _readable(x: Tensor) -> Tensor:
    assert x.dtype in jobs.TYPES, x.dtype
    return x if x.is_contiguous() else x.contiguous()


def _optional(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else _plain(weight)


def _ids(ids: Tensor) -> Tensor:
    assert ids.dtype == torch.int64 and ids.stride(1) == 1, "rows with gaps"
    return ids


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for a row of hidden states")
