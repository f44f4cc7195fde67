"""Tiny random models of transformers as GGUF files, written with the package gguf and its table of names: what
llama.cpp's converter does, a second time."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_late_models
import k_blocks
import numpy as np
import torch
from architectures import FIRST
from model_configs import with_keys
from torch import Tensor

ARCHITECTURES = {"mixtral": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA,
                 "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE, "olmoe": gguf.MODEL_ARCH.OLMOE,
                 "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE, "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
                 "qwen3_next": gguf.MODEL_ARCH.QWEN3NEXT, "qwen3_5_moe": gguf.MODEL_ARCH.QWEN35MOE,
                 "gemma4": gguf.MODEL_ARCH.GEMMA4}
DELTA = ("qwen3_next", "qwen3_5_moe")
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
# What GGUF files cannot say, as published models have it.
CONFIGS: dict[str, dict[str, Any]] = {
    kind: dict(with_keys(FIRST[kind], changed)) for kind, changed in {
        "mixtral": {"rms_norm_eps": 1e-6}, "mistral": {}, "qwen3_moe": {"mlp_only_layers": []},
        "olmoe": {"eos_token_id": 2}, "glm4_moe": {"use_qk_norm": True, "routed_scaling_factor": 2.5,
                                                 "num_nextn_predict_layers": 0},
        "gpt_oss": {"swiglu_limit": 7.0, "rope_parameters": YARN, "num_hidden_layers": 2},
        "qwen3_next": {"linear_value_head_dim": 32, "shared_expert_intermediate_size": 64}, "gemma4": {},
        "qwen3_5_moe": {"linear_key_head_dim": 16, "linear_value_head_dim": 32,
                        "shared_expert_intermediate_size": 64}}.items()}
NO_MATRICES = ("mlp.gate.weight", "router.weight", "router.proj.weight", "shared_expert_gate.weight", "conv1d.weight",
               "_bias")


def permuted(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k as llama.cpp's rotary embedding of Llama has them: of each head, the halves in turns."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def tensors(model: Any, kind: str, experts: str = "fused") -> dict[str, Tensor]:
    """{GGUF's name: tensor} of transformers' model. experts: "fused", gate and up each in one tensor a layer; "joined",
    both in one; "single", as Mixtral's files had them at first; "legacy", q, k, v and z of Qwen3-Next in one."""
    if kind in DELTA or kind == "gemma4":
        return gguf_late_models.tensors(model, ARCHITECTURES[kind], experts)
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in name:
            found |= _experts(name, tensor, kind, experts)
            continue
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        name += ".weight" if name.endswith("sinks") else ""
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        if kind in ("mixtral", "mistral") and (part := re.search(r"\.([qk])_proj\.weight", name)):
            heads = config.num_attention_heads if part[1] == "q" else config.num_key_value_heads
            tensor = permuted(tensor, heads)
        found[mapped] = tensor
    return found


def _experts(name: str, tensor: Tensor, kind: str, experts: str) -> dict[str, Tensor]:
    """Gate above up [E, 2F, H]; of gpt-oss [E, H, 2F], in turns."""
    prefix = f"blk.{name.partition('layers.')[2].split('.')[0]}.ffn_"
    own = name.rpartition(".")[2].removesuffix("_bias")
    what = "bias" if name.endswith("_bias") else "weight"
    if kind == "gpt_oss" and what == "weight":
        tensor = tensor.transpose(1, 2)
    parts = {"down": tensor}
    if own == "gate_up_proj":
        gate, up = (tensor[:, 0::2], tensor[:, 1::2]) if kind == "gpt_oss" else tensor.chunk(2, 1)
        parts = {"gate_up": torch.cat((gate, up), 1)} if experts == "joined" else {"gate": gate, "up": up}
    if experts == "single":
        return {f"{prefix}{part}.{i}.{what}": row for part, whole in parts.items() for i, row in enumerate(whole)}
    return {f"{prefix}{part}_exps.{what}": whole.contiguous() for part, whole in parts.items()}


def is_matrix(name: str, tensor: Tensor) -> bool:
    """What a converter quantizes: all matrices but routers."""
    return tensor.dim() > 1 and "ffn_gate_inp" not in name and "ssm_conv1d" not in name and not name.endswith(".bias")


def encoded(name: str, tensor: Tensor, type_of: Callable[[str], str]) -> tuple[np.ndarray, Any]:
    """The bytes of a tensor, and their type; zeros of NVFP4."""
    kind = gguf.GGMLQuantizationType[type_of(name) if is_matrix(name, tensor) else "F32"]
    if kind == gguf.GGMLQuantizationType.NVFP4:
        return np.zeros(gguf.quant_shape_to_byte_shape(tensor.shape, kind), np.uint8), kind
    return k_blocks.quantize(tensor.detach().float().contiguous().numpy(), kind.name), kind


def write(path: Path, model: Any, kind: str, type_of: Callable[[str], str] = lambda name: "F32", experts: str = "fused",
          keys: Callable[[Any], None] = lambda writer: None, left_out: tuple[str, ...] = (), **further: Tensor) -> Path:
    """A GGUF file of the model. type_of: of a matrix; keys(writer): adds keys; left_out: tensors; further: other ones
    beside the model's, "__" for a dot."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]])
    _add_sizes(writer, model.config, kind)
    keys(writer)
    more = {name.replace("__", "."): tensor for name, tensor in further.items()}
    for name, tensor in {**tensors(model, kind, experts), **more}.items():
        if name not in left_out:
            data, number = encoded(name, tensor, type_of)
            writer.add_tensor(name, data, raw_dtype=number)
    finish(writer)
    return path


def write_split(path: Path, model: Any, kind: str, most: int) -> Path:
    """The first of several files of F32 with at most so many tensors each."""
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]], split_max_tensors=most)
    _add_sizes(writer, model.config, kind)
    for name, tensor in tensors(model, kind).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    finish(writer)
    return sorted(path.parent.glob("*.gguf"))[0]


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: Any, kind: str) -> None:
    if kind in DELTA or kind == "gemma4":
        gguf_late_models.add_sizes(writer, config, kind)
        return
    heads, rope = config.num_attention_heads, config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_vocab_size(config.vocab_size)
    for name in ("bos", "eos"):
        value = getattr(config, f"{name}_token_id", None)
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    if kind != "mistral":
        named = {"glm4_moe": "n_routed_experts", "qwen3_moe": "num_experts", "olmoe": "num_experts"}
        writer.add_expert_count(getattr(config, named.get(kind, "num_local_experts")))
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind in ("mistral", "gpt_oss"):
        writer.add_sliding_window(config.sliding_window)
    if kind == "olmoe":
        writer.add_clamp_kqv(config.clip_qkv)
    if kind in ("qwen3_moe", "glm4_moe", "gpt_oss"):
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if kind == "glm4_moe":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
    if kind == "gpt_oss":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def reread(model: Any, kind: str, type_name: str, dtype: torch.dtype) -> Any:
    """Give the model the weights that a file of it has, rounded to `dtype`: rows are quantized each by itself, so how
    they are arranged does not matter."""
    number = gguf.GGMLQuantizationType[type_name]
    for name, tensor in model.state_dict().items():
        turned = kind == "gpt_oss" and name.endswith("_proj") and ".experts." in name
        if tensor.dim() > 1 and not name.endswith(NO_MATRICES):
            rows = (tensor.transpose(1, 2) if turned else tensor).float().contiguous()
            exact = torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(rows.numpy(), number), number)))
            exact = exact.view(rows.shape)
            tensor.copy_((exact.transpose(1, 2) if turned else exact).to(dtype))
    return model
