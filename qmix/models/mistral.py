"""Mistral 7B (Jiang et al. 2023, arXiv 2310.06825): dense. The MLP of each layer is a record, paged like an expert."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qmix.models.gguf import Shapes, base_config, block_layouts, rope_config
from qmix.models.keys import Keys
from qmix.models.parts import (
    LLAMA,
    ROTARY_BUFFERS,
    TINY_YARN,
    dense_layout,
    expert_layout,
    read_dtype,
    read_silu,
    read_sizes,
    read_window,
)
from qmix.models.rope import read_rope
from qmix.models.source import Layout
from qmix.spec import Attention, Layer, Mlp, Model, Norm, Norms

MODEL_TYPES = ("mistral",)
SKIPPED = ROTARY_BUFFERS
GGUF = "llama"


def read(keys: Keys) -> Model:
    read_silu(keys)
    s = read_sizes(keys, kv_heads=8, max_positions=131072, eps=1e-6)
    norm = Norm(s.eps)
    attention = Attention(s.heads, s.kv_heads, s.head_dim, read_rope(keys, s.head_dim, s.max_positions, theta=1e4),
                          window=read_window(keys, 4096))
    layer = Layer(attention, Mlp(keys.count("intermediate_size")), Norms(norm, norm))
    return Model("mistral", s.hidden, s.vocab, s.max_positions, (layer,) * s.layers, norm, read_dtype(keys),
                 keys.boolean("tie_word_embeddings", False), keys.integer("bos_token_id", 1, null=True),
                 keys.token_ids("eos_token_id", (2,)))


def layouts(model: Model) -> tuple[Layout, ...]:
    return ({**dense_layout(model, LLAMA), **expert_layout(model)},)


def gguf_config(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    """Of any dense model of the Llama family: without a window these are the same."""
    found = base_config(keys, shapes)
    keys.fixed("expert_count", 0)
    keys.fixed("expert_used_count", 0)
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **found,
            "intermediate_size": keys.count("feed_forward_length"), **rope_config(keys, found["head_dim"]),
            "sliding_window": keys.integer("attention.sliding_window", None)}


def gguf_layouts(model: Model) -> tuple[Layout, ...]:
    return block_layouts(model, permuted=True)


TINY = MappingProxyType[str, Any]({
    "model_type": "mistral", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 8,
})
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"tie_word_embeddings": True}, {"head_dim": 32, "sliding_window": None},
    {"hidden_size": 48, "num_key_value_heads": 1, "rope_parameters": TINY_YARN},
)
