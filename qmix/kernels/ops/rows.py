"""Ops on each token's row by itself: embedding, norms, products, sums and the head.

T tokens, H hidden, M in and N out of a product, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmix.kernels.op import WIDE, BytesOf, Op
from qmix.spec import Norm as NormSpec
from qmix.spec import Tensor


@dataclass(frozen=True, slots=True)
class Embed(Op):
    """out [T, H] fp32 = weight[tokens] * scale; weight [V, H], widened first."""

    READS = ("tokens",)
    WRITES = ("out",)
    WEIGHTS = ("weight",)

    tokens: str
    out: str
    weight: Tensor
    scale: float = 1.0

    def scratch(self, tokens: int) -> int:
        return tokens * self.weight.shape[1] * WIDE

    def bytes_read(self, tokens: int, bytes_of: BytesOf, context: int = 0, kv_bytes: int = 2) -> int:
        return tokens * bytes_of(self.weight) // self.weight.shape[0]

    def flops(self, tokens: int, context: int = 0) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Norm(Op):
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467): out [T, H] = source / sqrt(mean(source^2) + eps) * w, in fp32;
    w = weight, 1 + weight, or 1 (spec.Norm). source fp32 or compute; out compute; wide: the same unrounded, fp32. One
    of them may be None."""

    READS = ("source",)
    WRITES = ("out", "wide")
    WEIGHTS = ("weight",)

    source: str
    out: str | None
    wide: str | None
    norm: NormSpec
    size: int
    weight: Tensor | None = None

    def scratch(self, tokens: int) -> int:
        return len(self.outputs) * tokens * self.size * WIDE


@dataclass(frozen=True, slots=True)
class Linear(Op):
    """out [T, N] = source weight^T + bias; weight [N, M], bias [N]. source compute or fp32: a product that takes fp32
    takes it as it is, any other rounds it to compute; out has the dtype that was taken. exact: sums in fp64, source and
    out fp32: for the few rows that decide something (a router, a gate)."""

    READS = ("source",)
    WRITES = ("out",)
    WEIGHTS = ("weight", "bias")

    source: str
    out: str
    weight: Tensor
    bias: Tensor | None = None
    exact: bool = False

    def scratch(self, tokens: int) -> int:
        return tokens * self.weight.shape[0] * WIDE


@dataclass(frozen=True, slots=True)
class Join(Op):
    """out [T, N] fp32 = [first; second] weight^T; first, second [T, M / 2], compute; weight [N, M]. The product is as
    of Linear."""

    READS = ("first", "second")
    WRITES = ("out",)
    WEIGHTS = ("weight",)

    first: str
    second: str
    out: str
    weight: Tensor

    def scratch(self, tokens: int) -> int:
        return tokens * sum(self.weight.shape) * WIDE


@dataclass(frozen=True, slots=True)
class HeadNorm(Op):
    """buffer [T, n * size] becomes fp32: each `size` neighbours normed as by Norm (one head, or all of them at once),
    then clamped to [-clip, clip]; norm None: only clamped."""

    READS = ("buffer",)
    WRITES = ("buffer",)
    WEIGHTS = ("weight",)

    buffer: str
    size: int
    norm: NormSpec | None
    weight: Tensor | None = None
    clip: float | None = None


@dataclass(frozen=True, slots=True)
class Gate(Op):
    """buffer [T, N] *= f(by) in fp32; by [T, N], or [T, 1] for one number a token; f: sigmoid, or silu."""

    READS = ("buffer", "by")
    WRITES = ("buffer",)

    buffer: str
    by: str
    kind: str = "sigmoid"


@dataclass(frozen=True, slots=True)
class Take(Op):
    """Of these buffers only the rows stay whose logits are wanted, and all others end: in the last layer nothing reads
    what the other tokens would give."""

    READS = ("buffers",)
    WRITES = ("buffers",)

    buffers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Add(Op):
    """buffer [T, H] fp32 += source."""

    READS = ("buffer", "source")
    WRITES = ("buffer",)

    buffer: str
    source: str


@dataclass(frozen=True, slots=True)
class Scale(Op):
    """buffer [T, N] fp32 *= weight * factor; weight [N], or [1] for one number, None for 1."""

    READS = ("buffer",)
    WRITES = ("buffer",)
    WEIGHTS = ("weight",)

    buffer: str
    weight: Tensor | None = None
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Head(Op):
    """out [T, V] fp32: logits = source weight^T, then softcap * tanh(logits / softcap) where there is one; source fp32,
    which the product rounds as Linear has it."""

    READS = ("source",)
    WRITES = ("out",)
    WEIGHTS = ("weight",)

    source: str
    out: str
    weight: Tensor
    softcap: float | None = None

    def scratch(self, tokens: int) -> int:
        return tokens * self.weight.shape[0] * WIDE
