"""Gemma 4 with experts (Google 2026): 26B-A4B, its language model.

Five layers with a window and small heads, then one without a window, with large heads, fewer of them for keys, and
values made of the key projection. A layer has an MLP and experts beside each other: both read the residual, each
through its own norm, and so does the router. Last layers may read the keys and values of an earlier layer of their
kind. Per-layer embeddings, which the small models of the family have, are refused by their key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qmix.models.gguf_gemma4 import GGUF as GGUF
from qmix.models.gguf_gemma4 import gguf_config as gguf_config
from qmix.models.gguf_gemma4 import gguf_layouts as gguf_layouts
from qmix.models.keys import MOST_EXPERTS, MOST_LAYERS, Keys
from qmix.models.parts import LLAMA, dense_layout, expert_layout, fused_layout, read_dtype, read_text, read_tied
from qmix.models.source import Layout
from qmix.spec import (
    Activation,
    Attention,
    Branch,
    Expert,
    Layer,
    Mlp,
    Model,
    Moe,
    Norm,
    Norms,
    Proportional,
    Rope,
    Router,
)

MODEL_TYPES = ("gemma4", "gemma4_text")
SKIPPED = re.compile(r"model\.(vision_tower|audio_tower|embed_vision|embed_audio)\..+")
SLIDING, FULL = "sliding_attention", "full_attention"
ROPES = {SLIDING: {"rope_type": "default", "rope_theta": 1e4},
         FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}}


def read(keys: Keys) -> Model:
    text = read_text(keys, "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_index", "eoa_token_id",
                     "vision_soft_tokens_per_image")
    text.text("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    text.fixed("use_bidirectional_attention", "vision")  # of pictures; text stays causal
    text.harmless("vocab_size_per_layer_input")
    embeddings = text.count("hidden_size_per_layer_input", 256, least=0)
    text.want(embeddings == 0, "hidden_size_per_layer_input", embeddings, "0: qmix reads no per-layer embeddings yet")
    hidden, norm = text.count("hidden_size", 2304), Norm(text.number("rms_norm_eps", 1e-6, above=0))
    count = text.count("num_hidden_layers", 30, most=MOST_LAYERS)
    kinds = _kinds(text, count)
    mixers = _mixers(text, kinds, norm)
    own = [mixer.kv_source is None for mixer in mixers]
    wide, inner = text.boolean("use_double_wide_mlp", False), text.count("intermediate_size", 9216)
    moe = _moe(text, hidden, norm)
    ends = (keys if "eos_token_id" in keys else text).token_ids("eos_token_id", (1,))
    text.harmless("eos_token_id")  # where the whole model's stands, which are more
    layers = tuple(_layer(mixer, Mlp(inner * (1 if has or not wide else 2), GEGLU), moe, norm)
                   for mixer, has in zip(mixers, own, strict=True))
    return Model("gemma4", hidden, text.count("vocab_size", 262144), text.count("max_position_embeddings", 131072),
                 layers, norm, read_dtype(keys, text), read_tied(keys, text, True),
                 text.integer("bos_token_id", 2, null=True), ends,
                 embed_scale=hidden**0.5, logit_softcap=text.number("final_logit_softcapping", None, above=0))


GEGLU = Activation("geglu")


def _kinds(text: Keys, count: int) -> tuple[str, ...]:
    """The kind of each layer; the last is without a window whatever the file says, as in transformers."""
    usual = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    kinds = text.texts("layer_types", usual)
    text.want(len(kinds) == count, "layer_types", len(kinds), f"num_hidden_layers = {count} of them")
    text.want(set(kinds) <= {SLIDING, FULL}, "layer_types", kinds, f"{SLIDING} or {FULL}")
    return (*kinds[:-1], FULL)


def _mixers(text: Keys, kinds: tuple[str, ...], norm: Norm) -> list[Attention]:
    heads, window = text.count("num_attention_heads", 8), text.count("sliding_window", 512)
    ropes = text.object("rope_parameters") if "rope_parameters" in text else Keys(ROPES)
    ropes.harmless(SLIDING, FULL)  # a kind that no layer is of
    bias = "qkvo" if text.boolean("attention_bias", False) else "none"
    shared = text.count("num_kv_shared_layers", 0, most=len(kinds) - 1, least=0)
    first, same = len(kinds) - shared, text.boolean("attention_k_eq_v", False)
    text.want(set(kinds[first:]) <= set(kinds[:first]), "num_kv_shared_layers", shared,
              "a layer of each kind before the shared ones")
    last = {kind: max(i for i in range(first) if kinds[i] == kind) for kind in set(kinds[:first])}
    found = []
    for i, (kind, (head_dim, kv_heads)) in enumerate(zip(kinds, _heads(text, kinds, same), strict=True)):
        text.want(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
        reads = i >= first
        found.append(Attention(
            heads, kv_heads, head_dim, _rope(ropes, kind, head_dim), scale=1.0,
            window=window if kind == SLIDING else None, q_norm=norm, k_norm=None if reads else norm,
            v_norm=None if reads else Norm(norm.eps, "none"), bias=bias, v_from_k=same and kind == FULL and not reads,
            kv_source=last[kind] if reads else None))
    return found


def _heads(text: Keys, kinds: tuple[str, ...], same: bool) -> list[tuple[int, int]]:
    """(head_dim, kv heads) of each layer: transformers 5 writes a `per_layer_config` of those that differ, published
    files have names for the layers without a window."""
    usual = text.count("head_dim", 256), text.count("num_key_value_heads", 4)
    wide = text.integer("global_head_dim", 512)
    few = text.integer("num_global_key_value_heads", None)
    few = text.in_range("num_global_key_value_heads", few) if same and few is not None else usual[1]
    if "per_layer_config" not in text:
        return [(text.in_range("global_head_dim", wide), few) if kind == FULL else usual for kind in kinds]
    found = [usual] * len(kinds)
    layers = text.object("per_layer_config")
    for name in layers.names():
        layers.want(name.isdecimal() and int(name) < len(kinds), name, name, f"a layer, 0 to {len(kinds) - 1}")
        one = layers.object(name)
        found[int(name)] = one.count("head_dim", usual[0]), one.count("num_key_value_heads", usual[1])
    return found


def _rope(ropes: Keys, kind: str, head_dim: int) -> Rope:
    """Proportional: the first partial_rotary_factor of all pairs of the head turn. Each kind of layer has its own."""
    inner = ropes.object(kind)
    theta = inner.number("rope_theta", above=0)
    if inner.text("rope_type", "default", "proportional", default="default") == "default":
        return Rope(theta, head_dim)
    part = inner.number("partial_rotary_factor", 1.0, above=0)
    rotated = 2 * int(part * head_dim // 2)
    inner.want(2 <= rotated <= head_dim, "partial_rotary_factor", part, f"0 to 1, and a pair of head_dim = {head_dim}")
    return Rope(theta, head_dim, Proportional(rotated, inner.number("factor", 1.0, above=0)))


def _moe(text: Keys, hidden: int, norm: Norm) -> tuple[Router, Expert] | None:
    """Router and experts of every layer, None in the dense models of the family."""
    if not text.boolean("enable_moe_block", False):
        text.harmless("num_experts", "top_k_experts", "moe_intermediate_size")
        return None
    experts, top_k = text.count("num_experts", most=MOST_EXPERTS), text.count("top_k_experts")
    text.want(top_k <= experts, "top_k_experts", top_k, f"<= num_experts = {experts}")
    router = Router(experts, top_k, over="all", normalize=True, expert_scale=True, input="residual",
                    input_norm=Norm(norm.eps, "none"), input_scale=True, input_factor=hidden**-0.5)
    return router, Expert(text.count("moe_intermediate_size"), GEGLU)


def _layer(mixer: Attention, mlp: Mlp, moe: tuple[Router, Expert] | None, norm: Norm) -> Layer:
    both = Branch(norm, norm)
    second = mlp if moe is None else Moe(*moe, routed=both, beside=(mlp, both))
    return Layer(mixer, second, Norms(norm, norm if moe is None else None, norm, norm), output_scale=True)


NAMES = {
    **LLAMA, "after_mixer": "post_attention_layernorm.weight", "before_mlp": "pre_feedforward_layernorm.weight",
    "after_mlp": "post_feedforward_layernorm.weight", "output_scale": "layer_scalar",
    "router.weight": "router.proj.weight", "router.input_scale": "router.scale",
    "router.expert_scale": "router.per_expert_scale",
    "routed.norm_in": "pre_feedforward_layernorm_2.weight", "routed.norm_out": "post_feedforward_layernorm_2.weight",
    "beside.norm_in": "pre_feedforward_layernorm.weight", "beside.norm_out": "post_feedforward_layernorm_1.weight",
    **{f"beside.{p}": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
}


def layouts(model: Model) -> tuple[Layout, ...]:
    """As Google published it, within a model that also sees, and the language model alone; experts as tensors of their
    own in between."""
    whole, alone = "model.language_model.", "model."
    if not model.moe_layers:
        return _layout(model, whole), _layout(model, alone)
    return _layout(model, whole), _layout(model, whole, True), _layout(model, alone, True), _layout(model, alone)


def _layout(model: Model, prefix: str, apart: bool = False) -> Layout:
    """apart: an expert's matrices are tensors of their own."""
    top = {"embedding": f"{prefix}embed_tokens.weight", "final_norm": f"{prefix}norm.weight", "head": "lm_head.weight"}
    layers = f"{prefix}layers."
    if model.moe_layers and not apart:
        experts = fused_layout(model, ("experts.gate_up_proj", "experts.down_proj"), layers)
    else:
        of = "experts.{}" if apart else "mlp"
        experts = expert_layout(model, tuple(f"{of}.{p}_proj.weight" for p in ("gate", "up", "down")), layers)
    return {**dense_layout(model, NAMES, top, layers), **experts}


TEXT: Mapping[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1,
    "attention_k_eq_v": True, "sliding_window": 8, "max_position_embeddings": 512, "hidden_size_per_layer_input": 0,
    "enable_moe_block": True, "num_experts": 8, "top_k_experts": 4, "moe_intermediate_size": 32,
    "final_logit_softcapping": 30.0,
}
TINY = MappingProxyType[str, Any]({"model_type": "gemma4", "text_config": TEXT, "tie_word_embeddings": True})
S, F = "sliding_attention", "full_attention"
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "layer_types": [S, F, S, F, S, F]},
    {"enable_moe_block": False, "attention_k_eq_v": False, "final_logit_softcapping": None},
    {"global_head_dim": 48, "attention_bias": True, "use_bidirectional_attention": "vision",
     "rope_parameters": {S: {"rope_type": "default", "rope_theta": 5e3},
                         F: {"rope_type": "proportional", "rope_theta": 5e5, "factor": 2.0,
                             "partial_rotary_factor": 0.5}}},
)
