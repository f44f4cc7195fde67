"""Qwen3-Next (Qwen Team 2025): 80B-A3B. Three of four layers are gated delta nets, the fourth attention whose output is
gated; every token meets a shared MLP beside its 10 of 512 experts. The projections of a delta net are grouped by key
head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qmix.models.gated_delta import (
    FULL,
    LINEAR,
    NAMES,
    gated_attention_sources,
    read_delta,
    read_gated_attention,
    read_kinds,
    read_moe,
)
from qmix.models.gguf import Shapes
from qmix.models.gguf_delta import delta_config, delta_layouts
from qmix.models.keys import MOST_LAYERS, Keys
from qmix.models.mtp import mtp_head as mtp_head
from qmix.models.mtp import mtp_layouts as mtp_layouts
from qmix.models.parts import dense_layout, expert_layout, fused_layout, read_dtype, read_silu, read_sparse_layers
from qmix.models.rope import read_rope
from qmix.models.source import Layout, Source, Squeeze, per_head
from qmix.spec import DeltaNet, Layer, Mixer, Mlp, Model, Norm, Norms

MODEL_TYPES = ("qwen3_next",)
GGUF = "qwen3next"
SKIPPED = re.compile(r"mtp\..+")  # a head that qmix has no description of


def read(keys: Keys) -> Model:
    read_silu(keys)
    keys.fixed("use_sliding_window", False)
    eps, positions = keys.number("rms_norm_eps", 1e-6, above=0), keys.count("max_position_embeddings", 32768)
    norm, count = Norm(eps, "one_plus"), keys.count("num_hidden_layers", 48, most=MOST_LAYERS)
    rope = read_rope(keys, keys.count("head_dim", 256), positions, theta=1e4, partial=0.25)
    mixers: dict[str, Mixer] = {LINEAR: read_delta(keys, eps), FULL: read_gated_attention(keys, norm, rope)}
    moe, mlp = read_moe(keys, 512, 10, keys.boolean("norm_topk_prob", True)), Mlp(keys.count("intermediate_size", 5632))
    sparse = read_sparse_layers(keys, count)
    layers = tuple(Layer(mixers[kind], moe if i in sparse else mlp, Norms(norm, norm))
                   for i, kind in enumerate(read_kinds(keys, count)))
    return Model("qwen3_next", keys.count("hidden_size", 2048), keys.count("vocab_size", 151936), positions, layers,
                 norm, read_dtype(keys), keys.boolean("tie_word_embeddings", False),
                 keys.integer("bos_token_id", None), keys.token_ids("eos_token_id"),
                 mtp=keys.count("num_nextn_predict_layers", 0, most=64, least=0))  # published files do not say


def layouts(model: Model) -> tuple[Layout, ...]:
    """As Qwen published it, and as transformers 5 holds it in memory."""
    dense = _dense(model)
    return {**dense, **expert_layout(model)}, {**dense, **fused_layout(model)}


def _dense(model: Model) -> Layout:
    found = dense_layout(model, NAMES)
    for i, layer in enumerate(model.layers):
        mixer, name = layer.mixer, f"model.layers.{i}."
        sources = _delta_sources(mixer, name) if isinstance(mixer, DeltaNet) else \
            gated_attention_sources(mixer, f"{name}self_attn.q_proj")
        found |= {f"layers.{i}.{part}": source for part, source in sources.items()}
    return found


def _delta_sources(mixer: DeltaNet, name: str) -> dict[str, Source]:
    """Of each key head its rows of q, k, v and z, in another tensor those of b and a: (v0 v1 belong to key head 0)
    [q0 k0 v0 v1 z0 z1 q1 k1 v2 v3 z2 z3]."""
    of, heads, name = mixer.value_heads // mixer.key_heads, mixer.key_heads, f"{name}linear_attn."
    wide = of * mixer.value_dim
    qkvz = {"q": mixer.key_dim, "k": mixer.key_dim, "v": wide, "z": wide}
    return {**per_head("delta.", f"{name}in_proj_qkvz.weight", heads, qkvz),
            **per_head("delta.", f"{name}in_proj_ba.weight", heads, {"b": of, "a": of}),
            "delta.conv": Source(f"{name}conv1d.weight", (Squeeze(1),))}


def gguf_config(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    return {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"],
            **delta_config(keys, shapes, "num_nextn_predict_layers"), "norm_topk_prob": True}


def gguf_layouts(model: Model) -> tuple[Layout, ...]:
    return delta_layouts(model, tiled=False)


TINY = MappingProxyType[str, Any]({
    "model_type": "qwen3_next", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "linear_key_head_dim": 8, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 4,
})
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"layer_types": [FULL, LINEAR, LINEAR, FULL], "attention_bias": True, "mlp_only_layers": [1]},
    {"full_attention_interval": 2, "norm_topk_prob": False, "partial_rotary_factor": 0.5},
    {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3, "decoder_sparse_step": 2, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 128,
        "partial_rotary_factor": 0.25}},
)
