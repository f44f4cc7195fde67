"""Qwen3-MoE (Qwen Team 2025, arXiv 2505.09388): 30B-A3B, Coder, 235B. A norm of each head of q and k; the router's
softmax is over all experts; some layers may have a dense MLP in place of experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qmix.models.gguf import Shapes, base_config, block_layouts, expert_counts, has_biases, rope_config
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
    read_sparse_layers,
    read_window,
)
from qmix.models.rope import read_rope
from qmix.models.source import Layout
from qmix.spec import Attention, Expert, Layer, Mlp, Model, Moe, Norm, Norms, Router

MODEL_TYPES = ("qwen3_moe",)
SKIPPED = ROTARY_BUFFERS
GGUF = "qwen3moe"


def read(keys: Keys) -> Model:
    read_silu(keys)
    s = read_sizes(keys, kv_heads=4, max_positions=32768, eps=1e-6)
    keys.fixed("use_qk_norm", True)  # Qwen3-Coder names what every model of this architecture has or lacks
    keys.fixed("shared_expert_intermediate_size", 0)
    keys.harmless("max_window_layers")  # of Qwen2; here a window is that of every layer
    norm = Norm(s.eps)
    window = read_window(keys, 4096)
    attention = Attention(s.heads, s.kv_heads, s.head_dim, read_rope(keys, s.head_dim, s.max_positions, theta=1e4),
                          window=window if keys.boolean("use_sliding_window", False) else None,
                          q_norm=norm, k_norm=norm, bias="qkvo" if keys.boolean("attention_bias", False) else "none")
    sparse = read_sparse_layers(keys, s.layers)
    moe, mlp = _moe(keys), Mlp(keys.count("intermediate_size"))
    layers = tuple(Layer(attention, moe if i in sparse else mlp, Norms(norm, norm)) for i in range(s.layers))
    return Model("qwen3_moe", s.hidden, s.vocab, s.max_positions, layers, norm, read_dtype(keys),
                 keys.boolean("tie_word_embeddings", False), keys.integer("bos_token_id", None),
                 keys.token_ids("eos_token_id"))


def _moe(keys: Keys) -> Moe:
    experts, top_k = read_experts(keys, "num_experts")
    router = Router(experts, top_k, over="all", normalize=keys.boolean("norm_topk_prob", False))
    return Moe(router, Expert(keys.count("moe_intermediate_size")))


def layouts(model: Model) -> tuple[Layout, ...]:
    """As Qwen published it, and as transformers 5 holds it in memory."""
    dense = dense_layout(model, LLAMA)
    return {**dense, **expert_layout(model)}, {**dense, **fused_layout(model)}


def gguf_config(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    found = base_config(keys, shapes)
    inner = keys.count("expert_feed_forward_length")
    keys.fixed("expert_weights_norm", True)  # what llama.cpp computes; no published model has it otherwise
    return {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **found,
            "intermediate_size": keys.count("feed_forward_length", inner), "moe_intermediate_size": inner,
            **expert_counts(keys, "num_experts", shapes), **rope_config(keys, found["head_dim"]),
            "norm_topk_prob": True, "attention_bias": has_biases(shapes)}


def gguf_layouts(model: Model) -> tuple[Layout, ...]:
    return block_layouts(model)


TINY = MappingProxyType[str, Any]({
    "model_type": "qwen3_moe", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 4,
    "moe_intermediate_size": 32, "norm_topk_prob": True, "max_position_embeddings": 512, "mlp_only_layers": [1],
})
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"mlp_only_layers": [0, 2], "attention_bias": True}, {"decoder_sparse_step": 2, "mlp_only_layers": []},
    {"tie_word_embeddings": True, "norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 16,
     "num_key_value_heads": 4},
    {"rope_parameters": TINY_YARN, "head_dim": 16},
)
