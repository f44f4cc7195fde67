"""Tensors and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from qmix.spec.checks import numbers, one_of, want

# What a dense tensor is, and so what may be done to it: "linear" and "head" may be quantized, all others never are.
# "mlp" is a linear of a dense or shared MLP. The roles of WIDE are fp32 in a store whatever the dtype of the model, as
# in published checkpoints: "choice_bias", which tells experts apart whose scores bf16 would call equal; "recurrent",
# what a delta net's state forgets by and what its output is normed with (Qwen3.5; Qwen3.6 has them in bf16).
Role = Literal["embedding", "linear", "mlp", "head", "router", "choice_bias", "recurrent", "norm", "bias", "other"]
WIDE: frozenset[Role] = frozenset(("choice_bias", "recurrent"))
# Those that stay fp32 where the checkpoint has numbers that the model's dtype does not have (Model.wide).
WIDENED: frozenset[Role] = frozenset(("router", "norm", "bias", "other"))

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # of weights, and their short names


class ExpertKey(NamedTuple):
    """One expert of one layer; sorts in the order of the store."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.expert}"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the model by its canonical name, "layers.3.attention.q"; shape as the model uses it, rows first."""

    name: str
    shape: tuple[int, ...]
    role: Role


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: x / sqrt(mean(x^2) + eps), times its weight. weight: "plain", w; "one_plus", 1 + w (Qwen3.5); "none",
    there is none. factor: of the weight, where there is one."""

    eps: float
    weight: str = "plain"
    factor: float = 1.0

    def __post_init__(self) -> None:
        numbers(self, "eps", "factor")
        one_of(self, "weight", "plain", "one_plus", "none")
        want(self.weight != "none" or self.factor == 1, self, "factor", self.factor, "1 without a weight")

    def multiplier(self, weight: Any) -> Any:
        """What the norm multiplies by, of its weight as a checkpoint has it: a tensor in fp32."""
        found = 1 + weight if self.weight == "one_plus" else weight
        return found if self.factor == 1 else found * self.factor
