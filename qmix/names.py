"""The tensor names of a Hugging Face Mixtral checkpoint, as data.

The checkpoint reader, the quantizer and the model's loader walk these same lists, so a tensor that
one of them forgets is an error in the others. H hidden, F expert inner, V vocabulary, E experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qmix.config import ExpertKey, ModelConfig

Role = Literal["embedding", "linear", "head", "router", "norm"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"

# Buffers that old exports carry and that are computed from the config instead.
SKIPPED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """One tensor that is not part of an expert. `linear` and `head` may be quantized; the
    embedding, the routers and the norms never are."""

    name: str
    shape: tuple[int, ...]
    role: Role


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def layer_of(name: str) -> int | None:
    """The layer of a dense tensor's name, None outside the layers."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def dense_tensors(config: ModelConfig) -> tuple[DenseTensor, ...]:
    """Every dense tensor, in the order of use. Without tied embeddings the head comes last."""
    hidden = config.hidden_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found = [DenseTensor(EMBEDDING, (config.vocab_size, hidden), "embedding")]
    for layer in range(config.num_layers):
        p = layer_prefix(layer)
        found += [
            DenseTensor(p + "input_layernorm.weight", (hidden,), "norm"),
            DenseTensor(p + "self_attn.q_proj.weight", (q_rows, hidden), "linear"),
            DenseTensor(p + "self_attn.k_proj.weight", (kv_rows, hidden), "linear"),
            DenseTensor(p + "self_attn.v_proj.weight", (kv_rows, hidden), "linear"),
            DenseTensor(p + "self_attn.o_proj.weight", (hidden, q_rows), "linear"),
            DenseTensor(p + "post_attention_layernorm.weight", (hidden,), "norm"),
            DenseTensor(p + "block_sparse_moe.gate.weight", (config.num_experts, hidden), "router"),
        ]
    found.append(DenseTensor(FINAL_NORM, (hidden,), "norm"))
    if not config.tie_embeddings:
        found.append(DenseTensor(HEAD, (config.vocab_size, hidden), "head"))
    return tuple(found)


def expert_tensors(config: ModelConfig, key: ExpertKey) -> dict[str, tuple[str, tuple[int, int]]]:
    """{"w1" | "w2" | "w3": (checkpoint name, shape)}; w1 is the gate [F, H], w3 up [F, H], w2 down [H, F]."""
    prefix = f"{layer_prefix(key.layer)}block_sparse_moe.experts.{key.expert}."
    tall, wide = (config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)
    return {"w1": (prefix + "w1.weight", tall), "w2": (prefix + "w2.weight", wide), "w3": (prefix + "w3.weight", tall)}
