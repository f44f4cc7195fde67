"""Mixtrals for tests: a Model of given sizes, and the names that published checkpoints have for its tensors."""

from __future__ import annotations

from qmix.models import layouts, read_model
from qmix.spec import ExpertKey, Model, Tensor

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def mixtral(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, experts: int,
            top_k: int, theta: float = 1e4, eps: float = 1e-5, max_positions: int = 64) -> Model:
    return read_model({
        "model_type": "mixtral", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "num_local_experts": experts, "num_experts_per_tok": top_k, "rope_theta": theta,
        "rms_norm_eps": eps, "max_position_embeddings": max_positions})


MIXTRAL_8X7B = mixtral(32000, 4096, 14336, 32, 32, 8, 128, 8, 2, 1e6, 1e-5, 32768)


def published(model: Model) -> dict[str, str]:
    """{canonical name: that in checkpoints}, of the dense tensors."""
    table = layouts(model)[0]
    return {tensor.name: table[tensor.name].name for tensor in model.tensors()}


def canonical(model: Model) -> dict[str, str]:
    return {theirs: ours for ours, theirs in published(model).items()}


def dense_tensors(model: Model) -> tuple[Tensor, ...]:
    """By their names in checkpoints."""
    names = published(model)
    return tuple(Tensor(names[t.name], t.shape, t.role) for t in model.tensors())


def expert_tensors(model: Model, key: ExpertKey) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{"w1" | "w2" | "w3": (name in checkpoints, shape)}: gate, down and up."""
    table = layouts(model)[0]
    gate, up, down = ((table[t.name].name, t.shape) for t in model.expert_tensors(key))
    return {"w1": gate, "w2": down, "w3": up}
