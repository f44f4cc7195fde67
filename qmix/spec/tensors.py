"""Tensors and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qmix.spec.checks import numbers, one_of

# What a dense tensor is, and so what may be done to it: "linear" and "head" may be quantized, all others never are.
# "mlp" is a linear of a dense or shared MLP.
Role = Literal["embedding", "linear", "mlp", "head", "router", "norm", "bias", "other"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the model by its canonical name, "layers.3.attention.q"; shape as the model uses it, rows first."""

    name: str
    shape: tuple[int, ...]
    role: Role


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: x / sqrt(mean(x^2) + eps), times its weight. weight: "plain", w; "one_plus", 1 + w (Gemma, Qwen3.5);
    "none", there is none."""

    eps: float
    weight: str = "plain"

    def __post_init__(self) -> None:
        numbers(self, "eps")
        one_of(self, "weight", "plain", "one_plus", "none")
