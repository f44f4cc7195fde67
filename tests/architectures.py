"""Tiny random checkpoints of every architecture that runs, as transformers writes them or holds them in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from forward_models import reference
from model_configs import CASES, RUN, TINY, with_keys
from safetensors.torch import save_file
from tokenizer_files import DEMO_TEMPLATE, spm_model
from transformers import AutoConfig, AutoModelForCausalLM

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.quantize import quantize_checkpoint

WIDE = {"glm4_moe": ("e_score_correction_bias",), "qwen3_5_moe": ("linear_attn.A_log", "linear_attn.norm.weight")}
VOCAB = 512  # at least as many as the tokenizer has
RUNNING: list[Mapping[str, Any]] = [with_keys(raw, {"vocab_size": VOCAB}) for raw in CASES
                                    if raw["model_type"].removesuffix("_text") in RUN]
FIRST = {kind: with_keys(TINY[kind], {"vocab_size": VOCAB}) for kind in RUN}


def random_model(raw: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """transformers' model of that config.json, every parameter and buffer of it random, none of them 0 or 1."""
    model = reference(AutoModelForCausalLM.from_config, AutoConfig.for_model(**raw), seed)
    for name, tensor in model.state_dict().items():
        apart = tensor.std() if tensor.numel() > 1 else min(abs(tensor), abs(tensor - 1))
        assert apart > 0.01, f"{name}: a constant would hide what is missing"
    wide = {name: tensor for name, tensor in (*model.named_buffers(), *model.named_parameters())
            if name.endswith(WIDE.get(raw["model_type"], ()))}
    numbers = {name: tensor.detach().clone() for name, tensor in wide.items()}
    model.to(dtype)
    for name, tensor in numbers.items():  # fp32 beside other weights in bf16, as published
        module, _, own = name.rpartition(".")
        parameter = isinstance(wide[name], torch.nn.Parameter)
        setattr(model.get_submodule(module), own, torch.nn.Parameter(tensor, False) if parameter else tensor)
    return model


def write(model: Any, raw: Mapping[str, Any], path: Path, published: bool = True) -> Path:
    """A checkpoint of the model, with a tokenizer. published: as transformers writes it, config.json too; else as it
    holds it in memory, with `raw` for config.json."""
    if published:
        model.save_pretrained(path)
    else:
        path.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(dict(raw)))
    (path / "tokenizer.model").write_bytes(spm_model())
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>",
                                                            "chat_template": DEMO_TEMPLATE}))
    return path


def quantized(source: Path, out: Path, quant: QuantConfig) -> Path:
    with Checkpoint.open(source) as checkpoint:
        quantize_checkpoint(checkpoint, out, quant, threads=1)
    return out
