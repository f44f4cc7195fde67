"""The operations that a forward pass is made of, each once: a record whose docstring is its definition.

An Op reads and writes buffers by name. A buffer has a row for each of T tokens; its dtype is fp32, int64 for ids, or
"compute", the dtype that the model computes in (bf16, or fp32 for fp32 stores). `torch_ops.py` is the reference
implementation; any other computes the same up to the order of sums. No torch here: a plan sums over Ops (op.py).
"""

from qmix.kernels.ops.mixers import CHUNK, Attend, Conv, Delta, Rope
from qmix.kernels.ops.mlps import Combine, Experts, Guess, Mlp, Route
from qmix.kernels.ops.rows import Add, Embed, Gate, Head, HeadNorm, Join, Linear, Norm, Scale, Take

__all__ = [
    "CHUNK", "Add", "Attend", "Combine", "Conv", "Delta", "Embed", "Experts", "Gate", "Guess", "Head", "HeadNorm",
    "Join", "Linear", "Mlp", "Norm", "Rope", "Route", "Scale", "Take",
]
