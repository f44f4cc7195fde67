"""Qwen3.5 and 3.6 with experts (Qwen Team 2026): 35B-A3B, 122B-A10B, 397B-A17B, their language model.

Three of four layers are gated delta nets, the fourth attention whose output is gated. Norms weigh by 1 + w, but not the
one within the delta net. A quarter of each head is rotated. Every token meets a shared MLP beside its experts.
"""

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
from qmix.models.parts import dense_layout, expert_layout, fused_layout, read_dtype, read_silu, read_text, read_tied
from qmix.models.rope import read_rotary_dim, read_scaling
from qmix.models.source import Layout, Rows, Source, Squeeze
from qmix.spec import DeltaNet, Layer, Mixer, Model, Norm, Norms, Rope

MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
GGUF = "qwen35moe"
SKIPPED = re.compile(r"(model\.visual|mtp)\..+")  # mtp: a head that qmix has no description of


def read(keys: Keys) -> Model:
    text = read_text(keys, "vision_start_token_id", "vision_end_token_id")
    read_silu(text)
    text.fixed("attn_output_gate", True)
    text.fixed("mamba_ssm_dtype", "float32")
    text.fixed("mlp_only_layers", [])
    text.harmless("mtp_use_dedicated_embeddings")
    eps = text.number("rms_norm_eps", 1e-6, above=0)
    norm = Norm(eps, "one_plus")
    positions = text.count("max_position_embeddings", 32768)
    kinds = read_kinds(text, text.count("num_hidden_layers", 40, most=MOST_LAYERS))
    mixers: dict[str, Mixer] = {LINEAR: read_delta(text, eps),
                                FULL: read_gated_attention(text, norm, _rope(text, positions))}
    moe = read_moe(text, 256, 8)
    layers = tuple(Layer(mixers[kind], moe, Norms(norm, norm)) for kind in kinds)
    return Model("qwen3_5_moe", text.count("hidden_size", 2048), text.count("vocab_size", 248320), positions, layers,
                 norm, read_dtype(keys, text), read_tied(keys, text, False), text.integer("bos_token_id", None),
                 text.token_ids("eos_token_id"), mtp=text.count("mtp_num_hidden_layers", 0, most=64, least=0))


def _rope(text: Keys, positions: int) -> Rope:
    inner = text.object("rope_parameters")
    inner.harmless("mrope_section", "mrope_interleaved")  # of pictures: all sections of a text token are its position
    dim = read_rotary_dim(inner, text, text.count("head_dim", 256), 0.25)
    theta = inner.number("rope_theta", text.number("rope_theta", 1e4, above=0), above=0)
    return Rope(theta, dim, read_scaling(inner, dim, positions))


OWN = {**NAMES, **{f"delta.{part}": f"linear_attn.in_proj_{part}.weight" for part in "zba"}}


def layouts(model: Model) -> tuple[Layout, ...]:
    """As Qwen published it, experts fused, within a model that also sees; with experts one by one, and alone; the last
    one as transformers 5 holds it in memory."""
    within, alone = "model.language_model.", "model."
    return tuple({**_dense(model, prefix), **experts(model, layers=f"{prefix}layers.")} for experts, prefix in (
        (fused_layout, within), (expert_layout, within), (expert_layout, alone), (fused_layout, alone)))


def _dense(model: Model, prefix: str) -> Layout:
    top = {"embedding": f"{prefix}embed_tokens.weight", "final_norm": f"{prefix}norm.weight", "head": "lm_head.weight"}
    found = dense_layout(model, OWN, top, f"{prefix}layers.")
    for i, layer in enumerate(model.layers):
        mixer, name = layer.mixer, f"{prefix}layers.{i}."
        sources = _delta_sources(mixer, name) if isinstance(mixer, DeltaNet) else \
            gated_attention_sources(mixer, f"{name}self_attn.q_proj")
        found |= {f"layers.{i}.{part}": source for part, source in sources.items()}
    return found


def _delta_sources(mixer: DeltaNet, name: str) -> dict[str, Source]:
    """q, k and v lie one below the other; the convolution is one of torch's, with a channel dimension of 1."""
    keys, values = mixer.key_heads * mixer.key_dim, mixer.value_heads * mixer.value_dim
    rows, of = {"q": (0, keys), "k": (keys, 2 * keys), "v": (2 * keys, 2 * keys + values)}, 2 * keys + values
    found = {f"delta.{part}": Source(f"{name}linear_attn.in_proj_qkv.weight", (Rows(begin, end, of),))
             for part, (begin, end) in rows.items()}
    return {**found, "delta.conv": Source(f"{name}linear_attn.conv1d.weight", (Squeeze(1),))}


def gguf_config(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    keys.harmless("rope.dimension_sections")  # of pictures
    return {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"],
            **delta_config(keys, shapes, "mtp_num_hidden_layers")}


def gguf_layouts(model: Model) -> tuple[Layout, ...]:
    return delta_layouts(model, tiled=True)


TEXT: Mapping[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 512, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 4,
}
TINY = MappingProxyType[str, Any]({"model_type": "qwen3_5_moe", "text_config": TEXT, "tie_word_embeddings": False})
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"layer_types": [FULL, LINEAR, LINEAR, FULL], "attention_bias": True}, {"full_attention_interval": 2},
    {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3,
     "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
                         "mrope_section": [4, 2, 2], "mrope_interleaved": True}},
)
