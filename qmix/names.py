"""The tensor names of a Hugging Face Mixtral checkpoint: a view of qmix/models/mixtral.py by ModelConfig.

Stores name their tensors so too. The quantizer and the model's loader walk these same lists, so a tensor that one of
them forgets is an error in the others. H hidden, F expert inner.
"""

from __future__ import annotations

import re
from functools import lru_cache

from qmix.config import ExpertKey, ModelConfig
from qmix.models import Layout, layouts, mixtral, read_model
from qmix.models.parts import TOP
from qmix.spec import Model, Tensor

DenseTensor = Tensor  # one that is not part of an expert, here by its name in the checkpoint
EMBEDDING, HEAD, FINAL_NORM = TOP["embedding"], TOP["head"], TOP["final_norm"]
SKIPPED = mixtral.SKIPPED


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def layer_of(name: str) -> int | None:
    """The layer of a dense tensor's name, None outside the layers."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


@lru_cache(maxsize=8)  # of a frozen record: walks ask for one expert after the other
def _table(config: ModelConfig) -> tuple[Model, Layout]:
    model = read_model(config.to_hf())
    return model, layouts(model)[0]


def dense_tensors(config: ModelConfig) -> tuple[DenseTensor, ...]:
    """Every dense tensor, in the order of use. Without tied embeddings the head comes last."""
    model, table = _table(config)
    return tuple(DenseTensor(table[t.name].name, t.shape, t.role) for t in model.tensors())


def expert_tensors(config: ModelConfig, key: ExpertKey) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{"w1" | "w2" | "w3": (checkpoint name, shape)}; w1 is the gate [F, H], w3 up [F, H], w2 down [H, F]."""
    model, table = _table(config)
    gate, up, down = ((table[t.name].name, t.shape) for t in model.expert_tensors(key))
    return {"w1": gate, "w2": down, "w3": up}
