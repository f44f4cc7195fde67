"""Tiny gpt-oss checkpoints as they are published: experts in MXFP4, row by row, gate and up in turns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from architectures import FIRST, random_model, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
EXPERTS = ("gate_up_proj", "down_proj")


def random_blocks(weight: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random codes and scales for a tensor [E, K, N] as transformers holds it, of about its size: uint8
    [E, N, K/32, 16] and [E, N, K/32]."""
    experts, k, n = weight.shape
    codes = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8, generator=random)
    exponent = int(weight.std().log2().floor())  # random codes are 2.6 in the mean square
    return codes, torch.randint(125 + exponent, 128 + exponent, (experts, n, k // 32), dtype=torch.uint8,
                                generator=random)


def write_published(path: Path, raw: Mapping[str, Any] = FIRST["gpt_oss"], dtype: torch.dtype = torch.bfloat16,
                    seed: int = 0) -> tuple[Path, Any]:
    """The checkpoint, and transformers' model with the same weights, its experts decoded by transformers."""
    model = random_model(raw, dtype, seed)
    write(model, raw, path)
    random = torch.Generator().manual_seed(seed)
    tensors, decoded = load_file(path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        codes, scales = random_blocks(tensors.pop(name).float(), random)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = codes, scales
        decoded[name] = convert_moe_packed_tensors(codes, scales, dtype=torch.float32).to(dtype)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    model.load_state_dict(decoded, strict=False)
    config = json.loads((path / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}
    (path / "config.json").write_text(json.dumps(config))
    return path, model
