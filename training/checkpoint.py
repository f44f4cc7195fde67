"""Writes the trained model as a plain Hugging Face Mixtral checkpoint in bf16.

`transformers` keeps the experts of a layer in one 3-D tensor. The published Mixtral checkpoints
hold one 2-D tensor per expert matrix (w1 gate, w3 up, w2 down), and so do we.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizer import write_tokenizer_config
from transformers import MixtralForCausalLM

CONFIG_KEYS = (
    "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "num_local_experts",
    "rms_norm_eps", "router_aux_loss_coef", "sliding_window", "tie_word_embeddings", "vocab_size",
)


def published_tensors(model: MixtralForCausalLM) -> dict[str, torch.Tensor]:
    """The weights in bf16 under the names of the published Mixtral checkpoints."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # the embedding itself
        value = value.detach().to(torch.bfloat16)
        head, _, leaf = name.rpartition(".mlp.")
        if not head:
            tensors[name] = value.contiguous()
            continue
        block = f"{head}.block_sparse_moe"
        if leaf == "gate.weight":
            tensors[f"{block}.gate.weight"] = value.contiguous()
        elif leaf == "experts.gate_up_proj":  # (experts, 2 * intermediate, hidden)
            for number, both in enumerate(value):
                gate, up = both.chunk(2, dim=0)
                tensors[f"{block}.experts.{number}.w1.weight"] = gate.contiguous()
                tensors[f"{block}.experts.{number}.w3.weight"] = up.contiguous()
        elif leaf == "experts.down_proj":  # (experts, hidden, intermediate)
            for number, down in enumerate(value):
                tensors[f"{block}.experts.{number}.w2.weight"] = down.contiguous()
        else:
            raise ValueError(f"no published name for {name}")
    return tensors


def published_config(model: MixtralForCausalLM) -> dict:
    """The entries of config.json that describe a Mixtral model, as the published ones have them."""
    config = {key: getattr(model.config, key) for key in CONFIG_KEYS}
    config |= {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "torch_dtype": "bfloat16",
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "output_router_logits": False, "use_cache": True,
    }
    return config


def write_checkpoint(model: MixtralForCausalLM, folder: Path, temperature: float) -> None:
    """Write model.safetensors (atomically) and the JSON files next to tokenizer.model."""
    half_done = folder / "model.safetensors.part"
    save_file(published_tensors(model), half_done, metadata={"format": "pt"})
    half_done.replace(folder / "model.safetensors")
    config = published_config(model)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {
        "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"],
        "do_sample": True, "temperature": temperature,
    })
    write_tokenizer_config(folder)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
