"""The weights of transformers' own model, by its names and in its layout, read from a checkpoint as they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from qmix.checkpoint import HEAD, Checkpoint
from qmix.models import Source, layouts
from qmix.models.source import Index, PerHead, Rows, Squeeze, Strided, Transpose
from qmix.sources import apply


class Weights(Mapping[str, Tensor]):
    """The tensors of transformers' own model by its names, each read from the checkpoint whenever it is asked for,
    unless RAM holds it. It has a layer's experts in one tensor each for gate and up, and for down."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._held: dict[str, Tensor] = {}
        model = checkpoint.model
        self._parts: dict[str, list[tuple[str, Source]]] = {}  # of each tensor, what of the model lies where in it
        self.shapes: dict[str, tuple[int, ...]] = {}
        table = layouts(model)[-1]  # as transformers 5 holds it
        for tensor in chain(model.tensors(), (t for key in model.expert_keys for t in model.expert_tensors(key))):
            source = table[tensor.name]
            self._parts.setdefault(source.name, []).append((tensor.name, source))
            self.shapes[source.name] = _whole(tensor.shape, source)
        if model.tied:
            self._parts[HEAD] = self._parts[table["embedding"].name]
            self.shapes[HEAD] = self.shapes[table["embedding"].name]

    def __getitem__(self, name: str) -> Tensor:
        name = self._parts[name][0][1].name  # a tied head is the embedding
        if name in self._held:
            return self._held[name]
        parts = self._parts[name]
        if len(parts) == 1:
            return self._checkpoint.dense(parts[0][0]).view(self.shapes[name])
        out = torch.empty(self.shapes[name], dtype=getattr(torch, self._checkpoint.model.dtype))
        for ours, source in parts:
            if any(isinstance(step, PerHead) for step in source.steps):  # of whose rows there is no view
                out[apply(torch.arange(len(out)), source.steps)] = self._checkpoint.dense(ours)
            else:
                self._checkpoint.read_into(ours, apply(out, source.steps))
        return out

    def hold(self, name: str) -> None:
        """Keep a tensor in RAM from now on."""
        self._held[self._parts[name][0][1].name] = self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _whole(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    """Of the tensor of which `source` cuts a piece of `shape`."""
    for step in reversed(source.steps):
        if isinstance(step, Index):
            shape = (step.of, *shape)
        elif isinstance(step, Transpose):
            shape = shape[::-1]
        elif isinstance(step, Squeeze):
            shape = (*shape[:step.dim], 1, *shape[step.dim:])
        elif not isinstance(step, PerHead):
            assert isinstance(step, Rows | Strided), step
            shape = (step.of if isinstance(step, Rows) else step.step * shape[0], *shape[1:])
    return shape
