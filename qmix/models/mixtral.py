"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): 8x7B, 8x22B. The softmax of the router is over the chosen experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qmix.models.gguf import WITH_EXPERTS, Shapes, base_config, block_layouts, expert_counts, rope_config
from qmix.models.keys import Keys
from qmix.models.parts import (
    LLAMA,
    ROTARY_BUFFERS,
    TINY_YARN,
    dense_layout,
    expert_layout,
    fused_layout,
    read_dtype,
    read_experts,
    read_silu,
    read_sizes,
    read_window,
)
from qmix.models.rope import read_rope
from qmix.models.source import Layout
from qmix.spec import Attention, Expert, Layer, Model, Moe, Norm, Norms, Router

MODEL_TYPES = ("mixtral",)
SKIPPED = ROTARY_BUFFERS
GGUF = "llama" + WITH_EXPERTS
NAMES = {**LLAMA, "router.weight": "block_sparse_moe.gate.weight"}
EXPERTS = tuple(f"block_sparse_moe.experts.{{}}.{part}.weight" for part in ("w1", "w3", "w2"))  # gate, up, down


def read(keys: Keys) -> Model:
    read_silu(keys)
    s = read_sizes(keys, kv_heads=8, max_positions=131072, eps=1e-5)
    experts, top_k = read_experts(keys, "num_local_experts")
    norm = Norm(s.eps)
    attention = Attention(s.heads, s.kv_heads, s.head_dim, read_rope(keys, s.head_dim, s.max_positions, theta=1e6),
                          window=read_window(keys, None))
    # Softmax over the chosen logits alone is softmax over all, divided by the sum of the chosen.
    moe = Moe(Router(experts, top_k, over="chosen"), Expert(keys.count("intermediate_size")))
    layer = Layer(attention, moe, Norms(norm, norm))
    return Model("mixtral", s.hidden, s.vocab, s.max_positions, (layer,) * s.layers, norm, read_dtype(keys),
                 keys.boolean("tie_word_embeddings", False), keys.integer("bos_token_id", 1, null=True),
                 keys.token_ids("eos_token_id", (2,)))


def layouts(model: Model) -> tuple[Layout, ...]:
    """As Mistral published it, and as transformers 5 holds it in memory."""
    return ({**dense_layout(model, NAMES), **expert_layout(model, EXPERTS)},
            {**dense_layout(model, LLAMA), **fused_layout(model)})


def gguf_config(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    found = base_config(keys, shapes)
    return {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **found,
            "intermediate_size": keys.count("feed_forward_length"), **expert_counts(keys, "num_local_experts", shapes),
            **rope_config(keys, found["head_dim"]), "sliding_window": keys.integer("attention.sliding_window", None)}


def gguf_layouts(model: Model) -> tuple[Layout, ...]:
    return block_layouts(model, permuted=True)


TINY = MappingProxyType[str, Any]({
    "model_type": "mixtral", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 512, "rope_theta": 10000.0,
})
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"tie_word_embeddings": True, "sliding_window": 16}, {"head_dim": 32, "num_key_value_heads": 4},
    {"num_local_experts": 3, "num_hidden_layers": 2, "hidden_size": 48, "head_dim": 12,  # transformers 5.23 cannot make
     "rope_parameters": TINY_YARN},  # YaRN of a null head_dim
)
