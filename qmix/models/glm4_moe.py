"""GLM-4.5 and 4.6 (Zhipu AI 2025, arXiv 2508.06471): GLM-4.5, GLM-4.5-Air.

The router scores by a sigmoid; a bias of each expert takes part in the choice but not in the weight. Every token meets
a shared MLP beside its experts, and the first layers have a dense MLP instead. Half of each head is rotated. Published
checkpoints carry a multi-token-prediction head as one more layer behind the last, which is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qmix.models.gguf import LATE_NORM, Shapes, base_config, block_layouts, expert_counts, has_biases, rope_config
from qmix.models.keys import MOST_EXPERTS, MOST_LAYERS, Keys
from qmix.models.parts import (
    LLAMA,
    ROTARY_BUFFERS,
    TINY_YARN,
    dense_layout,
    expert_layout,
    fused_layout,
    read_dtype,
    read_head_dim,
    read_silu,
)
from qmix.models.rope import read_rope
from qmix.models.source import Layout
from qmix.spec import Attention, Expert, Layer, Mlp, Model, Moe, Norm, Norms, Router

MODEL_TYPES = ("glm4_moe",)
SKIPPED = ROTARY_BUFFERS  # and the multi-token-prediction head, by Model.mtp
GGUF = "glm4moe"
SIGMOID = 2  # GGUF's number of it
EPS = 1e-20  # is added to the sum that routing weights are divided by
MOST_SHARED = 64
NAMES = {**LLAMA, "router.choice_bias": "mlp.gate.e_score_correction_bias",
         **{f"shared.{p}": f"mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")}}


def read(keys: Keys) -> Model:
    """Sizes have defaults too: transformers leaves out of config.json what is as its class has it, GLM-4.5-Air's."""
    read_silu(keys)
    hidden, heads = keys.count("hidden_size", 4096), keys.count("num_attention_heads", 96)
    positions = keys.count("max_position_embeddings", 131072)
    norm = Norm(keys.number("rms_norm_eps", 1e-5, above=0))
    attention = _attention(keys, hidden, heads, positions, norm)
    count = keys.count("num_hidden_layers", 46, most=MOST_LAYERS)
    dense = keys.count("first_k_dense_replace", 1, least=0)
    moe, mlp = _moe(keys), Mlp(keys.count("intermediate_size", 10944))
    layers = tuple(Layer(attention, mlp if i < dense else moe, Norms(norm, norm)) for i in range(count))
    mtp = keys.one_name("num_nextn_predict_layers", "num_mtp_layers")
    return Model("glm4_moe", hidden, keys.count("vocab_size", 151552), positions, layers, norm, read_dtype(keys),
                 keys.boolean("tie_word_embeddings", False), keys.integer("bos_token_id", None),
                 keys.token_ids("eos_token_id"), mtp=keys.count(mtp, 1, most=64, least=0))


def _attention(keys: Keys, hidden: int, heads: int, positions: int, norm: Norm) -> Attention:
    kv_heads, head_dim = keys.count("num_key_value_heads", 8), read_head_dim(keys, hidden, heads)
    keys.want(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
    qk_norm = norm if keys.boolean("use_qk_norm", False) else None
    return Attention(heads, kv_heads, head_dim, read_rope(keys, head_dim, positions, theta=1e4, partial=0.5),
                     q_norm=qk_norm, k_norm=qk_norm, bias="qkv" if keys.boolean("attention_bias", False) else "none")


def _moe(keys: Keys) -> Moe:
    name = keys.one_name("n_routed_experts", "num_local_experts")
    experts, top_k = keys.count(name, 128, most=MOST_EXPERTS), keys.count("num_experts_per_tok", 8)
    groups, top_groups = keys.count("n_group", 1), keys.count("topk_group", 1)
    keys.want(experts % groups == 0 and experts >= 2 * groups, "n_group", groups,
              f"a divisor of {name} = {experts} that leaves two experts or more to a group")
    keys.want(top_groups <= groups, "topk_group", top_groups, f"<= n_group = {groups}")
    allowed = experts // groups * top_groups
    keys.want(top_k <= allowed, "num_experts_per_tok", top_k, f"<= {allowed}, the experts of topk_group groups")
    router = Router(experts, top_k, score="sigmoid", normalize=keys.boolean("norm_topk_prob", True), eps=EPS,
                    choice_bias=True, groups=groups, top_groups=top_groups, group_score="top2",
                    scale=keys.number("routed_scaling_factor", 1.0, above=0))
    inner, shared = keys.count("moe_intermediate_size", 1408), keys.count("n_shared_experts", 1, most=MOST_SHARED)
    return Moe(router, Expert(inner), shared=Mlp(inner * shared))


def layouts(model: Model) -> tuple[Layout, ...]:
    """As Zhipu published it, and as transformers 5 holds it in memory."""
    dense = dense_layout(model, NAMES)
    return {**dense, **expert_layout(model)}, {**dense, **fused_layout(model)}


def gguf_config(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    """The layers that a file counts include those of the multi-token-prediction head."""
    found = base_config(keys, shapes)
    mtp = keys.count("nextn_predict_layers", 0, most=64, least=0)
    keys.want(mtp < found["num_hidden_layers"], "nextn_predict_layers", mtp, "fewer than block_count")
    rotated = keys.count("rope.dimension_count", found["head_dim"] // 2)
    keys.fixed("expert_gating_func", SIGMOID)
    return {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], **found,
            "num_hidden_layers": found["num_hidden_layers"] - mtp, "num_nextn_predict_layers": mtp,
            "intermediate_size": keys.count("feed_forward_length"),
            "moe_intermediate_size": keys.count("expert_feed_forward_length"),
            **expert_counts(keys, "n_routed_experts", shapes), "n_shared_experts": keys.count("expert_shared_count", 1),
            "first_k_dense_replace": keys.count("leading_dense_block_count", 1, least=0),
            "n_group": keys.count("expert_group_count", 1), "topk_group": keys.count("expert_group_used_count", 1),
            "norm_topk_prob": keys.boolean("expert_weights_norm", True),
            "routed_scaling_factor": keys.number("expert_weights_scale", 1.0, above=0),
            "use_qk_norm": "blk.0.attn_q_norm.weight" in shapes, "attention_bias": has_biases(shapes),
            **rope_config(keys, rotated), "partial_rotary_factor": rotated / found["head_dim"]}


def gguf_layouts(model: Model) -> tuple[Layout, ...]:
    return block_layouts(model, LATE_NORM)


TINY = MappingProxyType[str, Any]({
    "model_type": "glm4_moe", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "n_routed_experts": 8,
    "num_experts_per_tok": 4, "moe_intermediate_size": 32, "max_position_embeddings": 512, "attention_bias": True,
})
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"use_qk_norm": True, "attention_bias": False, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
     "num_key_value_heads": 4},
    {"first_k_dense_replace": 3, "n_shared_experts": 2, "norm_topk_prob": False, "partial_rotary_factor": 0.25,
     "num_hidden_layers": 5},
    {"first_k_dense_replace": 0, "tie_word_embeddings": True, "n_group": 2, "num_experts_per_tok": 3,
     "rope_parameters": {**TINY_YARN, "partial_rotary_factor": 1.0}},
)
