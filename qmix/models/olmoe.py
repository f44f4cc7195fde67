"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): a norm of the whole projection of q and k, which may be clipped
after it; routing weights are those of the softmax over all experts, mostly not normalized."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qmix.models.gguf import Shapes, base_config, block_layouts, expert_counts, rope_config
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
)
from qmix.models.rope import read_rope
from qmix.models.source import Layout
from qmix.spec import Attention, Expert, Layer, Model, Moe, Norm, Norms, Router

MODEL_TYPES = ("olmoe",)
SKIPPED = ROTARY_BUFFERS
GGUF = "olmoe"


def read(keys: Keys) -> Model:
    read_silu(keys)
    s = read_sizes(keys, kv_heads=None, max_positions=4096, eps=1e-5)
    keys.want(s.head_dim * s.heads == s.hidden, "head_dim", s.head_dim,
              f"hidden_size / num_attention_heads = {s.hidden / s.heads:g}, the size that q_norm has")
    norm = Norm(s.eps)
    attention = Attention(s.heads, s.kv_heads, s.head_dim, read_rope(keys, s.head_dim, s.max_positions, theta=1e4),
                          q_norm=norm, k_norm=norm, norm_over="whole",
                          bias="qkvo" if keys.boolean("attention_bias", False) else "none",
                          clip_qkv=keys.number("clip_qkv", None, above=0))
    experts, top_k = read_experts(keys, "num_experts")
    router = Router(experts, top_k, over="all", normalize=keys.boolean("norm_topk_prob", False))
    layer = Layer(attention, Moe(router, Expert(keys.count("intermediate_size"))), Norms(norm, norm))
    return Model("olmoe", s.hidden, s.vocab, s.max_positions, (layer,) * s.layers, norm, read_dtype(keys),
                 keys.boolean("tie_word_embeddings", False), keys.integer("bos_token_id", None),
                 keys.token_ids("eos_token_id", (50279,)))


def layouts(model: Model) -> tuple[Layout, ...]:
    """As AI2 published it, and as transformers 5 holds it in memory."""
    dense = dense_layout(model, LLAMA)
    return {**dense, **expert_layout(model)}, {**dense, **fused_layout(model)}


def gguf_config(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    found = base_config(keys, shapes)
    return {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], **found,
            "intermediate_size": keys.count("feed_forward_length"), **expert_counts(keys, "num_experts", shapes),
            **rope_config(keys, found["head_dim"]), "norm_topk_prob": False,
            "clip_qkv": keys.number("attention.clamp_kqv", None, above=0)}


def gguf_layouts(model: Model) -> tuple[Layout, ...]:
    return block_layouts(model)


TINY = MappingProxyType[str, Any]({
    "model_type": "olmoe", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 4, "clip_qkv": 0.5,
    "max_position_embeddings": 512, "eos_token_id": 2,
})
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"tie_word_embeddings": True, "clip_qkv": None}, {"attention_bias": True, "num_key_value_heads": 4},
    {"norm_topk_prob": True, "num_experts": 5, "num_hidden_layers": 3, "rope_parameters": TINY_YARN},
)
