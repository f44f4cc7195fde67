"""Ops that look at other tokens of a session, by a cache: attention with its rotary embedding, and the gated delta net.

T tokens, Q query heads, KV key-value heads, D head size, C channels, J taps of a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmix.kernels.op import FEW, WIDE, BytesOf, Op
from qmix.spec import Attention, DeltaNet, Tensor
from qmix.spec import Rope as RopeSpec

CHUNK = 64  # tokens of a prompt that the delta rule takes at once


@dataclass(frozen=True, slots=True)
class Rope(Op):
    """Each buffer [T, n * head_dim] becomes [T, n, head_dim] fp32, its heads rotated by their token's position p:
    dimension i of the first rope.dim turns with i + rope.dim / 2 by the angle p * inv_freq[i]; cos and sin are
    multiplied by the scaling's attention factor (kernels/rope.py)."""

    READS = ("buffers",)
    WRITES = ("buffers",)

    buffers: tuple[str, ...]
    rope: RopeSpec
    head_dim: int


@dataclass(frozen=True, slots=True)
class Attend(Op):
    """Causal attention of T tokens of one session over all of its positions, or over each one's last `window`: keys k
    and values v [T, KV * D] are appended to the cache of `layer`; then for each query head h of q [T, Q * D]

        out[t, h] = sum_s p[s] value[s, h // (Q / KV)],  p = softmax over s of score(scale * q . key[s])

    score: identity, or softcap * tanh(. / softcap). With sinks [Q], p is softmax over the scores and sinks[h], which
    itself has no value. Keys and values are kept, and q is rounded, to the cache's dtype; so is out [T, Q * D].
    kv_source: nothing is appended, and the keys and values are those of that layer; k and v are None.
    """

    READS = ("q", "k", "v")
    WRITES = ("out",)
    WEIGHTS = ("sinks",)

    q: str
    k: str | None
    v: str | None
    out: str
    layer: int
    attention: Attention
    sinks: Tensor | None = None

    def _seen(self, context: int) -> int:
        return context if self.attention.window is None else min(context, self.attention.window)

    def scratch(self, tokens: int) -> int:
        return tokens * self.attention.heads * self.attention.head_dim * WIDE

    def bytes_read(self, tokens: int, bytes_of: BytesOf, context: int = 0, kv_bytes: int = 2) -> int:
        a = self.attention
        return sum(map(bytes_of, self.weights)) + 2 * self._seen(context) * a.kv_heads * a.head_dim * kv_bytes

    def flops(self, tokens: int, context: int = 0) -> int:
        return 4 * tokens * self._seen(context) * self.attention.heads * self.attention.head_dim


@dataclass(frozen=True, slots=True)
class Conv(Op):
    """Causal convolution of each channel with its own taps, over the tokens of one session, then silu: of the sources
    side by side, x [T, C] fp32, y[t] = silu(sum_j weight[:, j] * x[t - J + 1 + j]); weight [C, J]. The last J - 1 rows
    of x stay in the cache of `layer`; before the first token they are 0. Each source is overwritten."""

    READS = ("sources",)
    WRITES = ("sources",)
    WEIGHTS = ("weight",)

    sources: tuple[str, ...]
    weight: Tensor
    layer: int


@dataclass(frozen=True, slots=True)
class Delta(Op):
    """The gated delta rule (Yang et al. 2024, arXiv 2412.06464), fp32, over the tokens of one session in order. Of a
    value head, with the key and query of its key head brought to length 1 (x / sqrt(sum(x^2) + 1e-6)) and the query
    divided by sqrt(key_dim), state S [key_dim, value_dim] in the cache of `layer`, 0 before the first token:

        S *= exp(-exp(a_log) * softplus(a + dt_bias));  S += k (sigmoid(b) * (v - S^T k))^T;  out = S^T q

    Of more than FEW tokens CHUNK at a time, counted from the first, by products of matrices (kernels/delta_rule.py).
    q, k [T, key_heads * key_dim], v [T, value_heads * value_dim], a, b [T, value_heads]; out as v, fp32.
    """

    READS = ("q", "k", "v", "a", "b")
    WRITES = ("out",)
    WEIGHTS = ("a_log", "dt_bias")

    q: str
    k: str
    v: str
    a: str
    b: str
    out: str
    layer: int
    delta: DeltaNet
    a_log: Tensor
    dt_bias: Tensor

    @property
    def _state(self) -> int:
        return self.delta.value_heads * self.delta.key_dim * self.delta.value_dim

    def scratch(self, tokens: int) -> int:
        """Its output, and what a chunk of a prompt takes meanwhile (delta_rule.py)."""
        d, count = self.delta, min(tokens, CHUNK)
        if tokens <= FEW:
            return tokens * d.value_heads * d.value_dim * WIDE
        squares = 5 * d.value_heads * count * count
        rows = 5 * count * (d.value_heads * d.value_dim + d.key_heads * d.key_dim)
        return (tokens * d.value_heads * d.value_dim + squares + rows + 2 * self._state) * WIDE

    def bytes_read(self, tokens: int, bytes_of: BytesOf, context: int = 0, kv_bytes: int = 2) -> int:
        return sum(map(bytes_of, self.weights)) + self._state * WIDE

    def flops(self, tokens: int, context: int = 0) -> int:
        return 7 * tokens * self._state
