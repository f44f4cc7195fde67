"""Tiny random checkpoints with a multi-token-prediction head, and what such a head computes, in plain torch.

transformers leaves these heads out. The reference is written from the published description: vLLM's qwen3_next_mtp.py
and qwen3_5_mtp.py have its order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from architectures import random_model, write
from model_configs import with_keys
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES = {"pre_fc_norm_embedding.weight": ("H",), "pre_fc_norm_hidden.weight": ("H",), "fc.weight": ("H", "2H"),
          "norm.weight": ("H",), "layers.0.input_layernorm.weight": ("H",),
          "layers.0.post_attention_layernorm.weight": ("H",), "layers.0.self_attn.q_proj.weight": ("2Q", "H"),
          "layers.0.self_attn.k_proj.weight": ("K", "H"), "layers.0.self_attn.v_proj.weight": ("K", "H"),
          "layers.0.self_attn.o_proj.weight": ("H", "Q"), "layers.0.self_attn.q_norm.weight": ("D",),
          "layers.0.self_attn.k_norm.weight": ("D",), "layers.0.mlp.gate.weight": ("E", "H"),
          "layers.0.mlp.shared_expert.gate_proj.weight": ("S", "H"),
          "layers.0.mlp.shared_expert.up_proj.weight": ("S", "H"),
          "layers.0.mlp.shared_expert.down_proj.weight": ("H", "S"),
          "layers.0.mlp.shared_expert_gate.weight": ("1", "H")}
BIASES = {f"layers.0.self_attn.{p}_proj.bias": size for p, size in (("q", "2Q"), ("k", "K"), ("v", "K"), ("o", "H"))}


def head_tensors(raw: Mapping[str, Any], fused: bool, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the head, by their names in a checkpoint, fp32, none of them 0 or 1."""
    c = raw.get("text_config", raw)
    q, f = c["num_attention_heads"] * c["head_dim"], c["moe_intermediate_size"]
    size = {"H": c["hidden_size"], "2H": 2 * c["hidden_size"], "Q": q, "2Q": 2 * q, "D": c["head_dim"], "1": 1,
            "K": c["num_key_value_heads"] * c["head_dim"], "E": c["num_experts"],
            "S": c["shared_expert_intermediate_size"]}
    random = torch.Generator().manual_seed(1000 + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)

    found = {f"mtp.{name}": draw(*(size[part] for part in shape)) for name, shape in SHAPES.items()}
    if c.get("attention_bias"):
        found |= {f"mtp.{name}": draw(size[part]) for name, part in BIASES.items()}
    found["mtp.layers.0.mlp.gate.weight"] *= 2
    gate_up, down = 1.5 * draw(size["E"], 2 * f, size["H"]), 1.5 * draw(size["E"], size["H"], f)
    if fused:
        return found | {"mtp.layers.0.mlp.experts.gate_up_proj": gate_up, "mtp.layers.0.mlp.experts.down_proj": down}
    for e, (both, last) in enumerate(zip(gate_up, down, strict=True)):
        parts = zip(("gate", "up", "down"), (*both.chunk(2), last), strict=True)
        found |= {f"mtp.layers.0.mlp.experts.{e}.{name}_proj.weight": part.contiguous() for name, part in parts}
    return found


def with_head(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model with a head: that of Qwen3-Next does not say."""
    return dict(raw) if raw["model_type"] == "qwen3_next" else with_keys(raw, {"mtp_num_hidden_layers": 1})


def add_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    file = path / "model.safetensors"
    there = load_file(file)
    dtype = there["lm_head.weight"].dtype if "lm_head.weight" in there else torch.float32
    save_file(there | {name: tensor.to(dtype) for name, tensor in tensors.items()}, file, {"format": "pt"})


def write_with_head(raw: Mapping[str, Any], path: Path, fused: bool = False, dtype: torch.dtype = torch.float32,
                    seed: int = 0) -> tuple[Any, Path]:
    """(transformers' model without the head, a checkpoint of both with a tokenizer)."""
    model = random_model(with_head(raw), dtype, seed)
    write(model, raw, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config))
    add_tensors(path, head_tensors(raw, fused, seed))
    return model, path


class Reference:
    """The head in float64; hidden: the model's, behind its final norm."""

    def __init__(self, model: Any, raw: Mapping[str, Any], fused: bool = False, seed: int = 0):
        self.w = {name.removeprefix("mtp."): t.double() for name, t in head_tensors(raw, fused, seed).items()}
        self.model, self.c = model, model.config.get_text_config()
        self.embedding = model.get_input_embeddings().weight.double()
        self.lm_head = model.get_output_embeddings().weight.double()

    def hidden(self, ids: list[int]) -> Tensor:
        with torch.no_grad():
            return self.model.model(torch.tensor([ids])).last_hidden_state[0].double()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps).sqrt() * (1 + self.w[f"{name}.weight"])

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def __call__(self, hidden: Tensor, following: list[int]) -> tuple[Tensor, Tensor]:
        """Of every position: the head's hidden state [T, H] and logits [T, V]."""
        joined = torch.cat((self.norm(self.embedding[following], "pre_fc_norm_embedding"),
                            self.norm(hidden, "pre_fc_norm_hidden")), -1)
        x = self.linear(joined, "fc")
        x = x + self.attention(self.norm(x, "layers.0.input_layernorm"))
        x = x + self.moe(self.norm(x, "layers.0.post_attention_layernorm"))
        x = self.norm(x, "norm")
        return x, F.linear(x, self.lm_head)

    def guess(self, ids: list[int], count: int) -> list[Tensor]:
        """Logits [V] of `count` guesses behind ids, each made of the likeliest id before it."""
        hidden, following, found = self.hidden(ids[:-1]), list(ids[1:]), []
        for _ in range(count):
            own, logits = self(hidden, following)
            found.append(logits[-1])
            hidden, following = torch.cat((hidden, own[-1:])), [*following, int(logits[-1].argmax())]
        return found

    def attention(self, x: Tensor) -> Tensor:
        c, (count, _), at = self.c, x.shape, "layers.0.self_attn."
        q, gate = self.linear(x, at + "q_proj").view(count, -1, 2, c.head_dim).unbind(2)
        k, v = (self.linear(x, f"{at}{p}_proj").view(count, -1, c.head_dim) for p in "kv")
        q, k = self.rotate(self.norm(q, at + "q_norm")), self.rotate(self.norm(k, at + "k_norm"))
        group = c.num_attention_heads // c.num_key_value_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("tqd,sqd->qts", q, k) * c.head_dim ** -0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
        out = torch.einsum("qts,sqd->tqd", scores.softmax(-1), v) * gate.sigmoid()
        return self.linear(out.reshape(count, -1), at + "o_proj")

    def rotate(self, x: Tensor) -> Tensor:
        """By the model's own cosines and sines, at positions 0, 1, ..."""
        cos, sin = self.model.model.rotary_emb(x.float(), torch.arange(len(x))[None])
        cos, sin = cos[0].double()[:, None], sin[0].double()[:, None]
        turned, rest = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
        first, second = turned.chunk(2, -1)
        return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, rest), -1)

    def moe(self, x: Tensor) -> Tensor:
        at = "layers.0.mlp."
        weights, chosen = self.linear(x, at + "gate").softmax(-1).topk(self.c.num_experts_per_tok)
        if getattr(self.c, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        rows = []
        for row, own, experts in zip(x, weights, chosen, strict=True):
            rows.append(sum(weight * self.expert(row, int(e)) for weight, e in zip(own, experts, strict=True)))
        shared = at + "shared_expert."
        inner = F.silu(self.linear(x, shared + "gate_proj")) * self.linear(x, shared + "up_proj")
        gate = self.linear(x, at + "shared_expert_gate").sigmoid()
        return torch.stack(rows) + gate * self.linear(inner, shared + "down_proj")

    def expert(self, x: Tensor, e: int) -> Tensor:
        at, w = "layers.0.mlp.experts.", self.w
        if at + "gate_up_proj" in w:
            gate, up, down = *w[at + "gate_up_proj"][e].chunk(2), w[at + "down_proj"][e]
        else:
            gate, up, down = (w[f"{at}{e}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        return down @ (F.silu(gate @ x) * (up @ x))
