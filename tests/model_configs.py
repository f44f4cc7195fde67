"""Tiny configurations of every architecture: its own TINY, and variants that reach its branches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmix.models import ARCHITECTURES

YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 128}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mixtral": [{"tie_word_embeddings": True, "sliding_window": 16}, {"head_dim": 32, "num_key_value_heads": 4},
                # transformers 5.23 cannot make YaRN of a null head_dim
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
}
CASES: list[Mapping[str, Any]] = [
    {**architecture.TINY, **variant} for kind, architecture in ARCHITECTURES.items()
    for variant in ({}, *VARIANTS[kind])]


def ids(raw: Mapping[str, Any]) -> str:
    changed = [k for k, v in raw.items() if ARCHITECTURES[raw["model_type"]].TINY.get(k, ...) != v]
    return "-".join([raw["model_type"], *changed])
