"""Tiny configurations of every architecture: its own TINY, and variants that reach its branches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmix.models import ARCHITECTURES

YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 128}
S, F, L = "sliding_attention", "full_attention", "linear_attention"
VARIANTS: dict[str, list[dict[str, Any]]] = {  # of text_config where there is one
    # transformers 5.23 cannot make YaRN of a null head_dim
    "mixtral": [{"tie_word_embeddings": True, "sliding_window": 16}, {"head_dim": 32, "num_key_value_heads": 4},
                {"num_local_experts": 3, "num_hidden_layers": 2, "hidden_size": 48, "head_dim": 12,
                 "rope_parameters": YARN}],
    "mistral": [{"tie_word_embeddings": True}, {"head_dim": 32, "sliding_window": None},
                {"hidden_size": 48, "num_key_value_heads": 1, "rope_parameters": YARN}],
    "qwen3_moe": [{"mlp_only_layers": [0, 2], "attention_bias": True},
                  {"decoder_sparse_step": 2, "mlp_only_layers": []},
                  {"tie_word_embeddings": True, "norm_topk_prob": False, "use_sliding_window": True,
                   "sliding_window": 16, "num_key_value_heads": 4},
                  {"rope_parameters": YARN, "head_dim": 16}],
    "olmoe": [{"tie_word_embeddings": True, "clip_qkv": None}, {"attention_bias": True, "num_key_value_heads": 4},
              {"norm_topk_prob": True, "num_experts": 5, "num_hidden_layers": 3, "rope_parameters": YARN}],
    "gemma4": [{"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "layer_types": [S, F, S, F, S, F]},
               {"enable_moe_block": False, "attention_k_eq_v": False, "final_logit_softcapping": None},
               {"global_head_dim": 48, "attention_bias": True, "use_bidirectional_attention": "vision",
                "rope_parameters": {S: {"rope_type": "default", "rope_theta": 5e3},
                                    F: {"rope_type": "proportional", "rope_theta": 5e5, "factor": 2.0,
                                        "partial_rotary_factor": 0.5}}}],
    "qwen3_5_moe": [{"layer_types": [F, L, L, F], "attention_bias": True}, {"full_attention_interval": 2},
                    {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
                                         "mrope_section": [4, 2, 2], "mrope_interleaved": True}}],
}


def with_keys(raw: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """That config.json with other values, in text_config where it has one."""
    if "text_config" not in raw:
        return {**raw, **changed}
    return {**raw, "text_config": {**raw["text_config"], **changed}}


TINY = {architecture.TINY["model_type"]: architecture.TINY for architecture in ARCHITECTURES.values()}
ALONE = [{**tiny["text_config"], "model_type": f"{kind}_text"} for kind, tiny in TINY.items() if "text_config" in tiny]
CASES: list[Mapping[str, Any]] = [
    *(with_keys(tiny, variant) for kind, tiny in TINY.items() for variant in ({}, *VARIANTS[kind])), *ALONE]


def ids(raw: Mapping[str, Any]) -> str:
    tiny = TINY[raw["model_type"].removesuffix("_text")]
    own, tiny = (raw.get("text_config", raw), tiny.get("text_config", tiny))
    return "-".join([raw["model_type"], *(k for k, v in own.items() if k != "model_type" and tiny.get(k, ...) != v)])
