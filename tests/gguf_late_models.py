"""Qwen3-Next, Qwen3.5 and Gemma 4 as GGUF files: what llama.cpp's converter does to their tensors, a second time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import torch
from torch import Tensor


def reversible(model: Any) -> Any:
    """The model with norms to which 1 can be added, and an A_log, as published in bfloat16, whose exponential is its
    own: fp32 loses bits of others."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.copy_((tensor * 256).round() / 256 + 0.0)  # no -0
            elif name.endswith("A_log"):
                tensor.copy_(tensor.bfloat16())
    return model


def tensors(model: Any, architecture: Any, experts: str) -> dict[str, Tensor]:
    """As gguf_models.tensors."""
    config = SimpleNamespace(**model.config.get_text_config().to_dict())
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    change = _gemma if architecture == gguf.MODEL_ARCH.GEMMA4 else _delta
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("language_model.", "")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for own, part in change(config, name, tensor.float(), architecture, experts):
            stem, dot, suffix = own.rpartition(".")
            if suffix not in ("weight", "bias", "scale"):
                stem, dot, suffix = own, ".", "weight"
            mapped = names.get_name(stem)
            assert mapped is not None, name
            found[mapped if stem.endswith("A_log") else mapped + dot + suffix] = part.squeeze() if part.numel() > 1 \
                else part.reshape(1)
    if architecture == gguf.MODEL_ARCH.GEMMA4:
        half = wide(config)["head_dim"] // 2
        turning = int(half * config.rope_parameters["full_attention"]["partial_rotary_factor"])
        found["rope_freqs.weight"] = torch.tensor([1.0] * turning + [1e30] * (half - turning))
    return found


def wide(config: Any) -> dict[str, int]:
    """Of Gemma 4's layers without a window: head_dim, num_key_value_heads."""
    return {"num_key_value_heads": config.num_key_value_heads,
            **config.per_layer_config[str(config.num_hidden_layers - 1)]}


def _gemma(config: Any, name: str, tensor: Tensor, architecture: Any, experts: str) -> list[tuple[str, Tensor]]:
    layer = ".".join(name.split(".")[:3])
    if name.endswith("router.scale"):
        return [(f"{layer}.router.proj.scale", tensor)]
    if name.endswith("per_expert_scale"):
        return [(f"{layer}.experts.down_proj.scale", tensor)]
    return [(name, tensor)]


def tiled(tensor: Tensor, config: Any, head: int, dim: int = 0) -> Tensor:
    """Heads of values, of `head` rows each, those of a key head side by side -> head j of all key heads together."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    order = torch.arange(values * head).view(keys, values // keys, head).transpose(0, 1).flatten()
    return tensor.index_select(dim, order)


def _delta(config: Any, name: str, tensor: Tensor, architecture: Any, experts: str) -> list[tuple[str, Tensor]]:
    start = name.rpartition(".linear_attn.")[0]
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    if "linear_attn" in name and architecture == gguf.MODEL_ARCH.QWEN35MOE:
        if "in_proj_qkv" in name or "conv1d" in name:
            tensor = torch.cat((tensor[:2 * keys], tiled(tensor[2 * keys:], config, config.linear_value_head_dim)))
        elif "in_proj_z" in name:
            tensor = tiled(tensor, config, config.linear_value_head_dim)
        elif "out_proj" in name:
            tensor = tiled(tensor, config, config.linear_value_head_dim, dim=1)
        elif not name.endswith("norm.weight"):
            tensor = tiled(tensor, config, 1)
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        tensor = tensor + 1
    elif name.endswith("A_log"):
        tensor = -torch.exp(tensor)
    elif name.endswith("dt_bias"):
        name = f"{start}.linear_attn.dt_proj.bias"
    elif "in_proj_qkvz" in name and experts != "legacy":
        of = config.linear_num_value_heads // config.linear_num_key_heads * config.linear_value_head_dim
        heads = tensor.unflatten(0, (config.linear_num_key_heads, -1))
        q, k, v, z = (part.flatten(0, 1) for part in heads.split(
            (config.linear_key_head_dim, config.linear_key_head_dim, of, of), 1))
        return [(f"{start}.linear_attn.in_proj_qkv.weight", torch.cat((q, k, v))),
                (f"{start}.linear_attn.in_proj_z.weight", z)]
    elif name.endswith("gate_up_proj") and experts != "joined":
        gate, up = tensor.chunk(2, 1)
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
    return [(name, tensor)]


def add_sizes(writer: Any, config: Any, kind: str) -> None:
    config = SimpleNamespace(**config.get_text_config().to_dict())
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name in ("bos", "eos"):
        value = getattr(config, f"{name}_token_id", None)
        if isinstance(value, int):
            getattr(writer, f"add_{name}_token_id")(value)
    (_add_gemma if kind == "gemma4" else _add_delta)(writer, config, kind)


def _add_delta(writer: Any, config: Any, kind: str) -> None:
    rope = config.rope_parameters
    if kind == "qwen3_next":
        writer.add_feed_forward_length(config.intermediate_size)
    else:
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config.head_dim * rope.get("partial_rotary_factor", 0.25)))
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(4)


def _add_gemma(writer: Any, config: Any, kind: str) -> None:
    windows = [layer == "sliding_attention" for layer in config.layer_types]
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_sliding_window_pattern(windows)
    writer.add_sliding_window(config.sliding_window)
    writer.add_key_length(wide(config)["head_dim"])
    writer.add_value_length(wide(config)["head_dim"])
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count(wide(config)["head_dim"])
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    few = wide(config)["num_key_value_heads"]
    writer.add_head_count_kv([config.num_key_value_heads if window else few for window in windows])
    if config.use_double_wide_mlp:
        own = config.num_hidden_layers - config.num_kv_shared_layers
        writer.add_feed_forward_length([config.intermediate_size * (1 if i < own else 2) for i in range(len(windows))])
    else:
        writer.add_feed_forward_length(config.intermediate_size)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
