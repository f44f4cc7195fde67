"""Tiny random checkpoints of every architecture that runs, and what their matrices read: a plain pass in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from helpers import write_checkpoint
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey
from qmix.models import ARCHITECTURES, layouts, read_model
from qmix.spec import Attention, Model, Moe

# One that keeps two sequences apart, a dense layer in the middle, all of a norm; all numbers are random.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [1]}, "olmoe": {"clip_qkv": 1.5}, "mistral": {"sliding_window": 7},
    "mixtral": {"hidden_size": 64, "intermediate_size": 96},
}


def write(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Its TINY with random weights, norms included."""
    raw = {**ARCHITECTURES[architecture].TINY, **CONFIGS[architecture], **overrides,
           "torch_dtype": str(dtype).removeprefix("torch.")}
    model = read_model(raw)
    names, random = layouts(model)[0], torch.Generator().manual_seed(5)
    wanted = [*model.tensors(), *(t for key in model.expert_keys for t in model.expert_tensors(key))]
    tensors = {names[t.name].name: (torch.randn(t.shape, generator=random) * (
        1.0 if t.role == "embedding" else 1.7 * t.shape[-1] ** -0.5 if len(t.shape) > 1 else 0.2)
        + (t.role == "norm")).to(dtype) for t in wanted}
    return write_checkpoint(folder, raw, tensors)


class Float64:
    """The model on sequences ids [S, L], in float64 and by the formulas of its paper, one sequence after another.
    reads: {matrix: [what it read [n, K] of each sequence]}."""

    def __init__(self, source: Checkpoint, ids: Tensor):
        self.source, self.model = source, source.model
        self.reads: dict[str, list[Tensor]] = {}
        self.residual = torch.cat([self._sequence(row) for row in ids])

    def weight(self, name: str) -> Tensor:
        return self.source._tensor(name).double()  # experts as well

    def _sequence(self, ids: Tensor) -> Tensor:
        h = self.weight("embedding")[ids]
        for i in range(self.model.num_layers):
            h = h + self._attention(i, self._norm(h, f"layers.{i}.before_mixer"))
            h = h + self._mlp(i, self._norm(h, f"layers.{i}.before_mlp"))
        final = self._norm(h, "final_norm")
        if not self.model.tied:
            self.reads.setdefault("head", []).append(final)
        return h

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.model.final_norm.eps).sqrt() * self.weight(name)

    def _product(self, x: Tensor, name: str) -> Tensor:
        self.reads.setdefault(name, []).append(x)
        return x @ self.weight(name).T

    def _attention(self, i: int, x: Tensor) -> Tensor:
        a, prefix, count = self.model.layers[i].mixer, f"layers.{i}.attention.", len(x)
        assert isinstance(a, Attention) and a.rope is not None and a.rope.scaling is None
        q, k, v = (self._product(x, prefix + name) for name in "qkv")
        if a.q_norm is not None:
            size = a.head_dim if a.norm_over == "head" else None
            q, k = (self._norm(y.view(count, -1, size or y.shape[1]), f"{prefix}{name}_norm").view(y.shape)
                    for name, y in (("q", q), ("k", k)))
        if a.clip_qkv is not None:
            q, k, v = (y.clamp(-a.clip_qkv, a.clip_qkv) for y in (q, k, v))
        heads, half = a.head_dim, a.head_dim // 2
        angle = torch.arange(count)[:, None].double() * a.rope.theta ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]

        def rotated(y: Tensor) -> Tensor:
            y = y.view(count, -1, heads)
            pair = torch.complex(y[..., :half].contiguous(), y[..., half:].contiguous()) * turn
            return torch.cat((pair.real, pair.imag), -1)

        q, k, v = rotated(q), rotated(k), v.view(count, -1, heads)
        k, v = (y.repeat_interleave(a.heads // a.kv_heads, 1) for y in (k, v))
        scores = torch.einsum("tqd,sqd->qts", q, k) * heads ** -0.5
        far = torch.arange(count)[:, None] - torch.arange(count)
        hidden = (far < 0) if a.window is None else (far < 0) | (far >= a.window)
        out = torch.einsum("qts,sqd->tqd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        return self._product(out.reshape(count, -1), prefix + "o")

    def _mlp(self, i: int, x: Tensor) -> Tensor:
        mlp = self.model.layers[i].mlp
        if not isinstance(mlp, Moe):
            return self._gated(x, f"layers.{i}." + ("mlp." if self.model.moe_layers else "experts.0."))
        logits = x @ self.weight(f"layers.{i}.router.weight").T
        ids = logits.topk(mlp.router.top_k).indices
        chances = logits.softmax(-1).gather(1, ids)
        if mlp.router.over == "chosen" or mlp.router.normalize:
            chances = chances / chances.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            rows, rank = (ids == expert).nonzero(as_tuple=True)
            out[rows] += chances[rows, rank, None] * self._gated(x[rows], f"layers.{i}.experts.{expert}.")
        return out

    def _gated(self, x: Tensor, prefix: str) -> Tensor:
        middle = F.silu(self._product(x, prefix + "gate")) * self._product(x, prefix + "up")
        return self._product(middle, prefix + "down")


def expert_names(model: Model, key: ExpertKey) -> dict[str, tuple[str, ...]]:
    """{"w13": (gate, up), "w2": (down,)}"""
    gate, up, down = (t.name for t in model.expert_tensors(key)[:3])
    return {"w13": (gate, up), "w2": (down,)}
