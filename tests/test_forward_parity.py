"""The eager runner against transformers in fp32: Mixtral, Mistral, Qwen3-MoE and OLMoE, with every weight random; a
prompt longer than the window, then token by token over the cache."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from forward_models import BASE, assert_parity, reference

from qmix.spec import Attention, Expert, Layer, Mlp, Model, Moe, Norm, Norms, Rope, Router, Yarn

ONLY_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 64}


def build(config: Any, architecture: str, attention: dict[str, Any], mlps: list[Moe | Mlp]) -> Model:
    """The spec that all four share: pre-norm attention and MLP."""
    norm = Norm(config.rms_norm_eps)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = config.rope_parameters
    scaling = None
    if parameters["rope_type"] == "yarn":
        scaling = Yarn(parameters["original_max_position_embeddings"], parameters["factor"])
    mixer = Attention(config.num_attention_heads, config.num_key_value_heads, size,
                      Rope(parameters["rope_theta"], size, scaling), **attention)
    return Model(architecture, config.hidden_size, config.vocab_size, config.max_position_embeddings,
                 tuple(Layer(mixer, mlp, Norms(norm, norm)) for mlp in mlps), norm, "float32",
                 config.tie_word_embeddings)


MIXTRAL: dict[str, dict[str, Any]] = {
    "plain": {}, "window": {"sliding_window": 7}, "tied, one key for all": {"num_key_value_heads": 1,
                                                                           "tie_word_embeddings": True},
    "head size, one of five": {"head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 1},
    "theta, all of three": {"num_local_experts": 3, "num_experts_per_tok": 3, "rope_parameters": ONLY_PLAIN_ROPE},
}


@pytest.mark.parametrize("name", MIXTRAL)
def test_mixtral(name: str) -> None:
    config = transformers.MixtralConfig(**{**BASE, "intermediate_size": 40, "num_local_experts": 4,
                                           "num_experts_per_tok": 2, "sliding_window": None, **MIXTRAL[name]})
    moe = Moe(Router(config.num_local_experts, config.num_experts_per_tok), Expert(config.intermediate_size))
    spec = build(config, "mixtral", {"window": config.sliding_window}, [moe] * 3)
    assert_parity(reference(transformers.MixtralForCausalLM, config), spec)


MISTRAL: dict[str, dict[str, Any]] = {
    "plain": {"sliding_window": None}, "window": {"sliding_window": 5}, "tied": {"tie_word_embeddings": True},
    "head size": {"head_dim": 12, "num_key_value_heads": 4, "rope_parameters": ONLY_PLAIN_ROPE},
}


@pytest.mark.parametrize("name", MISTRAL)
def test_mistral(name: str) -> None:
    config = transformers.MistralConfig(**{**BASE, "intermediate_size": 40, "sliding_window": 40, **MISTRAL[name]})
    spec = build(config, "mistral", {"window": config.sliding_window}, [Mlp(config.intermediate_size)] * 3)
    assert not spec.moe_layers
    assert len(spec.expert_keys) == 3
    assert_parity(reference(transformers.MistralForCausalLM, config), spec)


QWEN3: dict[str, dict[str, Any]] = {
    "plain": {"norm_topk_prob": True}, "not normalized": {}, "dense layer": {"mlp_only_layers": [1]},
    "every second, biases": {"decoder_sparse_step": 2, "attention_bias": True, "norm_topk_prob": True},
    "yarn": {"rope_parameters": YARN, "num_key_value_heads": 1}, "window": {"use_sliding_window": True,
                                                                           "sliding_window": 6},
}


@pytest.mark.parametrize("name", QWEN3)
def test_qwen3_moe(name: str) -> None:
    config = transformers.Qwen3MoeConfig(**{**BASE, "intermediate_size": 40, "head_dim": 12, "num_experts": 8,
                                            "num_experts_per_tok": 3, "moe_intermediate_size": 16, **QWEN3[name]})
    norm = Norm(config.rms_norm_eps)
    moe = Moe(Router(8, 3, over="all", normalize=config.norm_topk_prob), Expert(16))
    sparse = [i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0 for i in range(3)]
    spec = build(config, "qwen3_moe", {"q_norm": norm, "k_norm": norm, "window": config.sliding_window,
                                       "bias": "qkvo" if config.attention_bias else "none"},
                 [moe if routed else Mlp(40) for routed in sparse])
    assert_parity(reference(transformers.Qwen3MoeForCausalLM, config), spec)


OLMOE: dict[str, dict[str, Any]] = {
    "plain": {}, "clipped": {"clip_qkv": 0.7}, "normalized, biases": {"norm_topk_prob": True, "attention_bias": True},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4}, "yarn": {"rope_parameters": YARN},
}


@pytest.mark.parametrize("name", OLMOE)
def test_olmoe(name: str) -> None:
    config = transformers.OlmoeConfig(**{**BASE, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3,
                                         **OLMOE[name]})
    norm = Norm(config.rms_norm_eps)
    moe = Moe(Router(8, 3, over="all", normalize=config.norm_topk_prob), Expert(24))
    spec = build(config, "olmoe", {"q_norm": norm, "k_norm": norm, "norm_over": "whole", "clip_qkv": config.clip_qkv,
                                   "bias": "qkvo" if config.attention_bias else "none"}, [moe] * 3)
    assert_parity(reference(transformers.OlmoeForCausalLM, config), spec)
