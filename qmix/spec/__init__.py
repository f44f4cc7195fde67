"""What a model is, as frozen records that check themselves: an architecture reads a config into these (qmix/models),
and everything else works from them alone. No torch."""

from qmix.spec.layers import (
    Activation,
    Attention,
    Branch,
    DeltaNet,
    Expert,
    Layer,
    Mixer,
    Mlp,
    Moe,
    MtpHead,
    Norms,
    Router,
)
from qmix.spec.model import Model
from qmix.spec.rope import Linear, Llama3, LongRope, Proportional, Rope, Yarn
from qmix.spec.tensors import DTYPES, WIDE, WIDENED, ExpertKey, Norm, Role, Tensor

__all__ = ["DTYPES", "WIDE", "WIDENED", "Activation", "Attention", "Branch", "DeltaNet", "Expert", "ExpertKey", "Layer",
           "Linear", "Llama3", "LongRope", "Mixer", "Mlp", "Model", "Moe", "MtpHead", "Norm", "Norms", "Proportional",
           "Role", "Rope", "Router", "Tensor", "Yarn"]
