"""Gemma 4 in GGUF files. The metadata has the sizes of layers without a window, and those with one apart; which layers
have a window, and how many heads of keys, may be lists. Which frequencies of a layer without a window turn stands in a
tensor: those that do not are divided by 1e30."""

from __future__ import annotations

from typing import Any

from qmix.models.gguf import (
    NAMES,
    ROPE_FREQS,
    Shapes,
    base_config,
    block_layouts,
    expert_counts,
    rope_factors,
)
from qmix.models.keys import Keys
from qmix.models.rope import NORMAL
from qmix.models.source import Layout
from qmix.spec import Model

GGUF = "gemma4"
SLIDING, FULL = "sliding_attention", "full_attention"
STILL = 1e29  # a frequency divided by as much or more does not turn
OWN = {**NAMES, "after_mixer": "post_attention_norm.weight", "after_mlp": "post_ffw_norm.weight",
       "output_scale": "layer_output_scale.weight", "router.input_scale": "ffn_gate_inp.scale",
       "router.expert_scale": "ffn_down_exps.scale",
       "routed.norm_in": "pre_ffw_norm_2.weight", "routed.norm_out": "post_ffw_norm_2.weight",
       "beside.norm_in": "ffn_norm.weight", "beside.norm_out": "post_ffw_norm_1.weight",
       **{f"beside.{part}": f"ffn_{part}.weight" for part in ("gate", "up", "down")}}


def gguf_config(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    kinds = _kinds(keys)
    usual, few = _kv_heads(keys, kinds)
    found = base_config(keys, shapes, usual)
    del found["hidden_act"]
    same = any(kind == FULL and f"blk.{i}.attn_v.weight" not in shapes for i, kind in enumerate(kinds))
    keys.want(same or few == usual, "attention.head_count_kv", few, f"{usual} in all layers, which have values")
    small = _head_dim_swa(keys, found["head_dim"])
    shared = keys.count("attention.shared_kv_layers", 0, least=0)
    return {**found, "model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"],
            "hidden_activation": "gelu_pytorch_tanh", "head_dim": small, "global_head_dim": found["head_dim"],
            "num_global_key_value_heads": few, "attention_k_eq_v": same, "layer_types": kinds,
            "sliding_window": keys.count("attention.sliding_window"), "num_kv_shared_layers": shared,
            "hidden_size_per_layer_input": keys.count("embedding_length_per_layer_input", 0, least=0),
            "final_logit_softcapping": keys.number("final_logit_softcapping", None, above=0),
            **_mlps(keys, len(kinds) - shared), **_experts(keys, shapes),
            "rope_parameters": _ropes(keys, found["head_dim"], small)}


def gguf_layouts(model: Model) -> tuple[Layout, ...]:
    return block_layouts(model, OWN)


def _kinds(keys: Keys) -> list[str]:
    name, count = "attention.sliding_window_pattern", keys.count("block_count", most=4096)
    pattern = keys.get(name)
    good = isinstance(pattern, tuple) and len(pattern) == count and all(type(v) is bool for v in pattern)
    keys.want(good and not pattern[-1], name, pattern, f"block_count = {count} truth values, the last of them false")
    return [SLIDING if window else FULL for window in pattern]


def _kv_heads(keys: Keys, kinds: list[str]) -> tuple[int, int]:
    """Of layers with a window and of those without."""
    name = "attention.head_count_kv"
    if not isinstance(keys.get(name), tuple):
        count = keys.count(name)
        return count, count
    counts = keys.integers(name)
    keys.want(len(counts) == len(kinds), name, len(counts), f"block_count = {len(kinds)} numbers")
    found = {kind: sorted({n for n, other in zip(counts, kinds, strict=True) if other == kind}) for kind in set(kinds)}
    keys.want(all(len(several) == 1 for several in found.values()), name, counts, "one number for each kind of layer")
    few = found[FULL][0]
    return keys.in_range(name, found.get(SLIDING, [few])[0]), keys.in_range(name, few)


def _head_dim_swa(keys: Keys, head_dim: int) -> int:
    """Of layers with a window, all of whose dimensions are rotated."""
    small = keys.count("attention.key_length_swa", head_dim)
    for name in ("attention.value_length_swa", "rope.dimension_count_swa"):
        got = keys.count(name, small)
        keys.want(got == small, name, got, f"attention.key_length_swa = {small}")
    return small


def _mlps(keys: Keys, own: int) -> dict[str, Any]:
    """own: the layers with keys of their own; the MLPs of the others may be twice as wide."""
    name = "feed_forward_length"
    if not isinstance(keys.get(name), tuple):
        return {"intermediate_size": keys.count(name)}
    sizes = keys.integers(name)
    wanted = [sizes[0] if i < own else 2 * sizes[0] for i in range(len(sizes))]
    keys.want([*sizes] == wanted, name, sizes, f"one size, and twice that behind layer {own}")
    return {"intermediate_size": keys.in_range(name, sizes[0]), "use_double_wide_mlp": True}


def _experts(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    if not keys.integer("expert_count", 0):
        keys.fixed("expert_used_count", 0)
        keys.harmless("expert_feed_forward_length")
        return {"enable_moe_block": False}
    found = expert_counts(keys, "num_experts", shapes)
    return {"enable_moe_block": True, "num_experts": found["num_experts"],
            "top_k_experts": found["num_experts_per_tok"],
            "moe_intermediate_size": keys.count("expert_feed_forward_length")}


def _ropes(keys: Keys, wide: int, small: int) -> dict[str, Any]:
    """wide, small: the dimensions of a head in layers without and with a window."""
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0, above=0)}
    count = keys.count("rope.dimension_count", wide)
    keys.want(count == wide, "rope.dimension_count", count, f"attention.key_length = {wide}")
    factors = rope_factors(keys, wide, most=NORMAL)
    turning = sum(factor < STILL for factor in factors)
    keys.want(turning > 0 and factors[:turning] == (1.0,) * turning, ROPE_FREQS, factors, "1 for the first, and 1e30")
    shares = 2 * turning / wide, (2 * turning + 0.5) / wide  # the first one unless it is rounded down
    share = shares[int(shares[0] * wide // 2) != turning]
    whole = {"rope_type": "proportional", "partial_rotary_factor": share,
             "rope_theta": keys.number("rope.freq_base", 1e6, above=0)}
    keys.fixed("rope.scaling.type", "none")
    return {SLIDING: local, FULL: whole}
