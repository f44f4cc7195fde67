"""The eager runner against transformers in fp32 on the models that stretch the spec: Gemma 4, Qwen3.5-MoE, gpt-oss and
GLM-4.5, with every weight random; a prompt longer than the window, then token by token over the cache."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from forward_models import BASE, GEMMA, NAMES, assert_parity, reference

from qmix.spec import (
    Activation,
    Attention,
    Branch,
    DeltaNet,
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
    Yarn,
)

MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA4: dict[str, dict[str, Any]] = {
    "keys are values": {"attention_k_eq_v": True, "num_global_key_value_heads": 1}, "own values": {},
    "capped logits": {"final_logit_softcapping": 4.0, "attention_k_eq_v": True, "tie_word_embeddings": True},
    "shared keys": {"num_kv_shared_layers": 2, "attention_bias": True},
    "dense": {"enable_moe_block": False, "attention_k_eq_v": True},
}


def gemma4_layer(c: Any, i: int, full_heads: int) -> Layer:
    norm, none, geglu = Norm(c.rms_norm_eps), Norm(c.rms_norm_eps, "none"), Activation("geglu")
    sliding = c.layer_types[i] == "sliding_attention"
    rope = Rope(10_000.0, 8) if sliding else Rope(1_000_000.0, 16, Proportional(4))
    shared = i >= 4 - c.num_kv_shared_layers
    mixer = Attention(4, 2 if sliding else full_heads, rope.dim, rope, 1.0, 6 if sliding else None, norm, norm, none,
                      bias="qkvo" if c.attention_bias else "none", v_from_k=c.attention_k_eq_v and not sliding,
                      kv_source=i - 2 if shared else None)
    dense = Mlp(40, geglu)
    if not c.enable_moe_block:
        return Layer(mixer, dense, Norms(norm, norm, norm, norm), True)
    router = Router(6, 2, over="all", normalize=True, expert_scale=True, input="residual", input_norm=none,
                    input_scale=True, input_factor=c.hidden_size**-0.5)
    moe = Moe(router, Expert(16, geglu), Branch(norm, norm), beside=(dense, Branch(norm, norm)))
    return Layer(mixer, moe, Norms(norm, None, norm, norm), True)


@pytest.mark.parametrize("name", GEMMA4)
def test_gemma4(name: str) -> None:
    config = transformers.Gemma4TextConfig(**{
        **BASE, "num_hidden_layers": 4, "intermediate_size": 40, "head_dim": 8, "global_head_dim": 16,
        "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 96, "sliding_window": 6,
        "layer_types": MIXED, "tie_word_embeddings": False, **GEMMA4[name]})
    layers = tuple(gemma4_layer(config, i, GEMMA4[name].get("num_global_key_value_heads", 2)) for i in range(4))
    spec = Model("gemma4", 32, 96, 256, layers, Norm(config.rms_norm_eps), "float32", config.tie_word_embeddings,
                 embed_scale=32**0.5, logit_softcap=config.final_logit_softcapping)
    names = {**NAMES, **GEMMA}
    if not config.enable_moe_block:
        names |= {r"mlp\.(gate|up|down)_proj\.weight": r"mlp.\1", r"pre_feedforward_layernorm\.weight": "before_mlp"}
    assert_parity(reference(transformers.Gemma4ForCausalLM, config), spec, names)


QWEN35: dict[str, dict[str, Any]] = {
    "plain": {}, "as many keys as values": {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 3},
    "whole heads rotate": {"partial_rotary_factor": 1.0, "attention_bias": True}, "wide values": {
        "linear_value_head_dim": 12, "linear_num_key_heads": 1, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("name", QWEN35)
def test_qwen35_moe(name: str) -> None:
    kinds = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    config = transformers.Qwen3_5MoeTextConfig(**{
        **BASE, "num_hidden_layers": 4, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 16, "num_experts": 8,
        "shared_expert_intermediate_size": 24, "num_experts_per_tok": 3, "layer_types": kinds, **QWEN35[name]})
    eps, share = config.rms_norm_eps, QWEN35[name].get("partial_rotary_factor", 0.25)
    norm = Norm(eps, "one_plus")
    attention = Attention(4, 2, 16, Rope(config.rope_parameters["rope_theta"], int(16 * share)), q_norm=norm,
                          k_norm=norm, output_gate=True, bias="qkvo" if config.attention_bias else "none")
    delta = DeltaNet(config.linear_num_key_heads, 4, 8, config.linear_value_head_dim, config.linear_conv_kernel_dim,
                     Norm(eps))
    moe = Moe(Router(8, config.num_experts_per_tok, over="all", normalize=True), Expert(16), shared=Mlp(24),
              shared_gate=True)
    layers = tuple(Layer(delta if kind == "linear_attention" else attention, moe, Norms(norm, norm)) for kind in kinds)
    spec = Model("qwen3_5_moe", 32, 96, 256, layers, norm, "float32")
    assert_parity(reference(transformers.Qwen3_5MoeForCausalLM, config), spec)


GPT_OSS: dict[str, dict[str, Any]] = {
    "plain rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}, "yarn": {},
    "clamped low": {"swiglu_limit": 0.5, "num_experts_per_tok": 1}, "all full": {"layer_types": ["full_attention"] * 3},
}


@pytest.mark.parametrize("name", GPT_OSS)
def test_gpt_oss(name: str) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 64}
    config = transformers.GptOssConfig(**{
        **BASE, "intermediate_size": 24, "head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 2,
        "sliding_window": 6, "rope_parameters": yarn, **GPT_OSS[name]})
    norm = Norm(config.rms_norm_eps)
    scaling = Yarn(64, 4.0, truncate=False) if config.rope_parameters["rope_type"] == "yarn" else None
    activation = Activation("swiglu_clamped", config.swiglu_alpha, config.swiglu_limit)
    moe = Moe(Router(5, config.num_experts_per_tok, logit_bias=True), Expert(24, activation, bias=True))
    layers = tuple(Layer(Attention(4, 2, 8, Rope(1000.0, 8, scaling), bias="qkvo", sinks=True,
                                   window=6 if kind == "sliding_attention" else None), moe, Norms(norm, norm))
                   for kind in config.layer_types)
    spec = Model("gpt_oss", 32, 96, 256, layers, norm, "float32")
    assert_parity(reference(transformers.GptOssForCausalLM, config), spec)


GLM: dict[str, dict[str, Any]] = {
    "groups": {"n_group": 4, "topk_group": 2}, "one group": {"use_qk_norm": True},
    "not normalized": {"norm_topk_prob": False, "attention_bias": True}, "two dense layers": {
        "first_k_dense_replace": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 2},
}


@pytest.mark.parametrize("name", GLM)
def test_glm4_moe(name: str) -> None:
    config = transformers.Glm4MoeConfig(**{
        **BASE, "intermediate_size": 40, "head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 16, "routed_scaling_factor": 1.7, **GLM[name]})
    norm = Norm(config.rms_norm_eps)
    router = Router(8, 3, "sigmoid", "all", config.norm_topk_prob, 1e-20, choice_bias=True, groups=config.n_group,
                    top_groups=config.topk_group, group_score="top2", scale=1.7)
    moe = Moe(router, Expert(16), shared=Mlp(16 * config.n_shared_experts))
    heads = norm if config.use_qk_norm else None
    attention = Attention(4, 2, 12, Rope(config.rope_parameters["rope_theta"], 6), q_norm=heads, k_norm=heads,
                          bias="qkv" if config.attention_bias else "none")
    layers = tuple(Layer(attention, moe if i >= config.first_k_dense_replace else Mlp(40), Norms(norm, norm))
                   for i in range(3))
    spec = Model("glm4_moe", 32, 96, 256, layers, norm, "float32")
    assert_parity(reference(transformers.Glm4MoeForCausalLM, config), spec)
