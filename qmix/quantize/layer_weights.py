"""The dense weights of a run of Ops, straight from a checkpoint, as torch_ops.Weights has it.

Only what these Ops use is read; every tensor is checked to be finite, since the text would carry an inf or NaN into all
that follows. Matrices are widened to fp32 once. A product's bits depend on its shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.config import ExpertKey
from qmix.errors import CheckpointError
from qmix.kernels.op import Op
from qmix.kernels.torch_ops import PlainWeights
from qmix.spec import Model, Norm
from qmix.spec import Tensor as Named

MATRICES = ("linear", "mlp")  # roles of what is multiplied in fp32
Seen = Callable[[tuple[str, ...], Tensor, list[Tensor]], None]  # (names, x [n, K], what each gave for it [n, N])


class Source(Protocol):
    """What is read of a checkpoint; Checkpoint has the meaning of each."""

    @property
    def path(self) -> object: ...

    @property
    def model(self) -> Model: ...

    def dense(self, name: str) -> Tensor: ...

    def published(self, name: str) -> str: ...

    def stacked_expert(self, key: ExpertKey, buffer: Tensor) -> tuple[Tensor, Tensor]: ...

    def expert_biases(self, key: ExpertKey) -> tuple[Tensor, Tensor] | None: ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """tensors: by canonical name. seen: hears of every product, before anybody changes its result."""

    plain: PlainWeights
    seen: Seen | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def read(cls, source: Source, program: Iterable[Op]) -> LayerWeights:
        """What `program` uses; CheckpointError names a tensor with an inf or NaN as the checkpoint calls it."""
        wanted = {tensor.name: tensor for op in program for tensor in op.weights}
        return cls(PlainWeights({name: _read(source, tensor) for name, tensor in wanted.items()}))

    def watched(self, seen: Seen) -> LayerWeights:
        return replace(self, seen=seen)

    def __getitem__(self, name: str) -> Tensor:
        return self.plain[name]

    def rows(self, name: str, tokens: Tensor) -> Tensor:
        return self.plain.rows(name, tokens)

    def linears(self, x: Tensor, *names: str) -> list[Tensor]:
        """Not PlainWeights', by which a few rows are multiplied one by one."""
        x = x.float()
        found = [F.linear(x, self.plain[name]) for name in names]
        if self.seen is not None:
            self.seen(names, x, found)
        return found

    def exact(self, x: Tensor, name: str) -> Tensor:
        return self.plain.exact(x, name)

    def norm(self, weight: Named | None, spec: Norm) -> Tensor | None:
        return self.plain.norm(weight, spec)

    def vector(self, weight: Named | None) -> Tensor | None:
        return self.plain.vector(weight)

    def taps(self, weight: Named) -> Tensor:
        return self.plain.taps(weight)


def _read(source: Source, wanted: Named) -> Tensor:
    tensor = source.dense(wanted.name)
    if not math.isfinite(tensor.sum(dtype=torch.float32).item()):
        raise CheckpointError(f"{source.path}: {source.published(wanted.name)} holds an inf or NaN",
                              "no working model has such a weight: fetch the checkpoint again")
    return tensor.float() if wanted.role in MATRICES else tensor


def dense_bytes(program: Iterable[Op], item: int) -> int:
    """Of `LayerWeights.read`; item: bytes of a number in the checkpoint."""
    wanted: Mapping[str, Named] = {tensor.name: tensor for op in program for tensor in op.weights}
    return sum(math.prod(t.shape) * (torch.float32.itemsize if t.role in MATRICES else item) for t in wanted.values())
