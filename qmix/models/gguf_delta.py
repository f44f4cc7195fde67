"""Qwen3-Next, Qwen3.5 and 3.6 in GGUF files, and what the converter did to their tensors: norms hold 1 + w, but not
that within a delta net; ssm_a is -exp(A_log); dimensions of 1 are dropped. Files of qwen35moe have the heads of values
tiled, head j of every key head before head j + 1 of any, where checkpoints have those of a key head side by side.

H hidden. A value head belongs to a key head; `of` belong to each.
"""

from __future__ import annotations

from typing import Any

from qmix.models.gated_delta import FULL, LINEAR, gated_attention_sources
from qmix.models.gguf import LATE_NORM, Shapes, base_config, block_layouts, expert_counts, rope_config
from qmix.models.keys import Keys
from qmix.models.source import (
    ColumnsPerHead,
    Layout,
    LogOfNegative,
    OneRow,
    PerHead,
    Plus,
    Rows,
    Source,
    Step,
    per_head,
)
from qmix.spec import DeltaNet, Model

SOFTMAX = 1  # GGUF's number of it
NAMES = {**LATE_NORM, "delta.norm": "ssm_norm.weight", "delta.dt_bias": "ssm_dt.bias", "delta.o": "ssm_out.weight",
         "delta.conv": "ssm_conv1d.weight", "shared.switch": "ffn_gate_inp_shexp.weight"}
MINUS_ONE = Plus(-1.0)


def delta_config(keys: Keys, shapes: Shapes, mtp: str) -> dict[str, Any]:
    """What the config.json of both says. mtp: config.json's name of the layers of a multi-token-prediction head, which
    block_count includes."""
    found = base_config(keys, shapes)
    layers = found["num_hidden_layers"]
    behind = keys.count("nextn_predict_layers", 0, most=64, least=0)
    keys.want(behind < layers, "nextn_predict_layers", behind, "fewer than block_count")
    values, inner = keys.count("ssm.time_step_rank"), keys.count("ssm.inner_size")
    keys.want(inner % values == 0, "ssm.inner_size", inner, f"a multiple of ssm.time_step_rank = {values}")
    keys.fixed("expert_weights_norm", True)
    keys.fixed("expert_gating_func", SOFTMAX)
    keys.harmless("feed_forward_length", "expert_shared_count")  # of layers without experts, and the tensors'
    rotated = keys.count("rope.dimension_count", found["head_dim"] // 4)
    rope = rope_config(keys, rotated)["rope_parameters"]
    expert = keys.count("expert_feed_forward_length")
    return {**found, "num_hidden_layers": layers - behind, mtp: behind,
            "layer_types": _kinds(keys, layers)[:layers - behind],
            "linear_num_key_heads": keys.count("ssm.group_count"), "linear_num_value_heads": values,
            "linear_key_head_dim": keys.count("ssm.state_size"), "linear_value_head_dim": inner // values,
            "linear_conv_kernel_dim": keys.count("ssm.conv_kernel"), **expert_counts(keys, "num_experts", shapes),
            "moe_intermediate_size": expert,
            "shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length", expert),
            "rope_parameters": {**rope, "partial_rotary_factor": rotated / found["head_dim"]}}


def _kinds(keys: Keys, layers: int) -> list[str]:
    """Of each layer, also of the head's."""
    every, name = keys.count("full_attention_interval", 4), "attention.recurrent_layers"
    if name not in keys:
        return [LINEAR if (i + 1) % every else FULL for i in range(layers)]
    found = keys.get(name)
    keys.want(isinstance(found, tuple) and len(found) == layers and all(type(v) is bool for v in found), name, found,
              f"block_count = {layers} truth values")
    return [LINEAR if recurrent else FULL for recurrent in found]


def delta_layouts(model: Model, tiled: bool) -> tuple[dict[str, Source], ...]:
    """tiled: whether the heads of values are, as in files of qwen35moe; else q, k, v and z of Qwen3-Next may also lie
    in one tensor, key head by key head, as in the first files of it."""
    return tuple({**layout, **_changed(model, layout), **_mixers(model, tiled, joined)}
                 for layout in block_layouts(model, NAMES) for joined in ((False,) if tiled else (False, True)))


def _changed(model: Model, layout: Layout) -> dict[str, Source]:
    """Norms that weigh by 1 + w, which are all of the role: those within delta nets have another. And what is a row."""
    steps: dict[str, tuple[Step, ...]] = {"norm": (Plus(-1.0),), "router": (OneRow(),)}
    return {tensor.name: Source(layout[tensor.name].name, steps[tensor.role]) for tensor in model.tensors()
            if tensor.role == "norm" or tensor.name.endswith("shared.switch")}


def _mixers(model: Model, tiled: bool, joined: bool) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for i, layer in enumerate(model.layers):
        mixer, block = layer.mixer, f"blk.{i}."
        sources = _delta(mixer, block, tiled, joined) if isinstance(mixer, DeltaNet) else \
            gated_attention_sources(mixer, f"{block}attn_q")
        found |= {f"layers.{i}.{part}": source for part, source in sources.items()}
    return found


def _delta(mixer: DeltaNet, block: str, tiled: bool, joined: bool) -> dict[str, Source]:
    keys, values = mixer.key_heads * mixer.key_dim, mixer.value_heads * mixer.value_dim
    of, all_rows = mixer.value_heads // mixer.key_heads, 2 * keys + values
    wide, one = (mixer.value_dim,) * mixer.key_heads, (1,) * mixer.key_heads

    def heads_of(sizes: tuple[int, ...], before: int = 0) -> tuple[Step, ...]:
        """Puts heads of values side by side that belong to one key head."""
        return (PerHead(of, sizes, before),) if tiled else ()

    found = {"delta.a_log": Source(f"{block}ssm_a", (*heads_of(one), LogOfNegative()))}
    if tiled:
        found |= {"delta.dt_bias": Source(f"{block}ssm_dt.bias", heads_of(one)),
                  "delta.conv": Source(f"{block}ssm_conv1d.weight", heads_of(wide, before=2 * keys)),
                  "delta.o": Source(f"{block}ssm_out.weight", (ColumnsPerHead(of, wide),)),
                  "delta.b": Source(f"{block}ssm_beta.weight", heads_of(one)),
                  "delta.a": Source(f"{block}ssm_alpha.weight", heads_of(one))}
    else:
        found |= per_head("delta.", f"{block}ssm_ba.weight", mixer.key_heads, {"b": of, "a": of})
    if joined:
        per_value = of * mixer.value_dim
        parts = {"q": mixer.key_dim, "k": mixer.key_dim, "v": per_value, "z": per_value}
        return {**found, **per_head("delta.", f"{block}ssm_in.weight", mixer.key_heads, parts)}
    for part, begin, end in (("q", 0, keys), ("k", keys, 2 * keys), ("v", 2 * keys, all_rows)):
        steps = heads_of(wide) if part == "v" else ()
        found[f"delta.{part}"] = Source(f"{block}attn_qkv.weight", (Rows(begin, end, all_rows), *steps))
    return {**found, "delta.z": Source(f"{block}attn_gate.weight", heads_of(wide))}
