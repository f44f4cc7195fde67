"""What architectures have in common in GGUF files (qmix/gguf/model.py): their sizes in the metadata, and the names of
their tensors.

E experts, F expert inner, H hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from qmix.models.keys import MOST_EXPERTS, MOST_LAYERS, REQUIRED, Keys
from qmix.models.parts import dense_layout
from qmix.models.rope import MOST_FACTOR, want_factors
from qmix.models.source import Index, Layout, Pairs, Source, Step, halves
from qmix.spec import Attention, ExpertKey, Model, Moe

Shapes = Mapping[str, tuple[int, ...]]  # of the file's tensors, rows first

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROPE_FREQS = "rope_freqs.weight"  # what each frequency is divided by; its numbers are among the metadata's keys
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # as published
SAME = 1e-5  # as a part of a factor: computed in fp32
TOP = {"embedding": EMBEDDING, "final_norm": "output_norm.weight", "head": HEAD}
NAMES = {  # behind "blk.N."
    "before_mixer": "attn_norm.weight", "before_mlp": "ffn_norm.weight",
    **{f"attention.{p}": f"attn_{name}.weight" for p, name in zip("qkvo", ("q", "k", "v", "output"), strict=True)},
    **{f"attention.{p}_bias": f"attn_{name}.bias" for p, name in zip("qkvo", ("q", "k", "v", "output"), strict=True)},
    **{f"attention.{p}_norm": f"attn_{p}_norm.weight" for p in "qk"},
    "attention.sinks": "attn_sinks.weight",
    **{f"mlp.{p}": f"ffn_{p}.weight" for p in ("gate", "up", "down")},
    **{f"shared.{p}": f"ffn_{p}_shexp.weight" for p in ("gate", "up", "down")},
    "router.weight": "ffn_gate_inp.weight", "router.logit_bias": "ffn_gate_inp.bias",
    "router.choice_bias": "exp_probs_b.bias"}
LATE_NORM = {**NAMES, "before_mlp": "post_attention_norm.weight"}  # what GLM and gpt-oss call the same norm
FUSED = re.compile(r"blk\.\d+\.ffn_\w+_exps\.weight")  # all experts of a layer in one tensor
SINGLE = re.compile(r"blk\.\d+\.ffn_\w+\.(\d+)\.weight")
WITH_EXPERTS = " with experts"  # llama.cpp calls Mixtral llama


def base_config(keys: Keys, shapes: Shapes, kv_heads: int | None = None) -> dict[str, Any]:
    """The sizes that every decoder has, in config.json's words. kv_heads: where it is not one number."""
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // heads if hidden % heads == 0 else REQUIRED)
    value = keys.count("attention.value_length", head_dim)
    keys.want(value == head_dim, "attention.value_length", value, f"attention.key_length = {head_dim}")
    layers = keys.count("block_count", most=MOST_LAYERS)
    keys.want(layers <= len(shapes), "block_count", layers, f"at most {len(shapes)}, the tensors of the file")
    return {"vocab_size": shapes[EMBEDDING][0], "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads or keys.count("attention.head_count_kv", heads),
            "head_dim": head_dim, "max_position_embeddings": keys.count("context_length"),
            "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", above=0), "hidden_act": "silu",
            "tie_word_embeddings": HEAD not in shapes}


def expert_counts(keys: Keys, experts: str, shapes: Shapes) -> dict[str, int]:
    """experts: config.json's name of their number. It must be that of the tensors: a layout has entries for each."""
    count = keys.count("expert_count", most=MOST_EXPERTS)
    fused = next((name for name in shapes if FUSED.fullmatch(name)), None)
    there = shapes[fused][0] if fused else len({found[1] for name in shapes if (found := SINGLE.fullmatch(name))})
    keys.want(count == there, "expert_count", count, f"{there}, the experts of {fused or 'blk.N.ffn_up.N.weight'}")
    return {experts: count,
            "num_experts_per_tok": keys.count("expert_used_count", most=MOST_EXPERTS)}


def rope_config(keys: Keys, rotated: int, **further: Any) -> dict[str, Any]:
    """`rope_parameters` where `rotated` dimensions of each head are rotated. further: keys of YaRN that files lack."""
    dim = keys.count("rope.dimension_count", rotated)
    keys.want(dim == rotated, "rope.dimension_count", dim, f"{rotated}")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0, above=0)}
    old = keys.number("rope.scale_linear", None, above=0)
    kind = keys.text("rope.scaling.type", "none", "linear", "yarn",
                     default="linear" if old or "rope.scaling.factor" in keys else "none")  # as llama.cpp has it
    for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        keys.fixed(f"rope.scaling.{name}", 1, *((-1,) if name == "yarn_ext_factor" else ()))
    if kind == "none":
        keys.harmless("rope.scaling.factor", "rope.scaling.original_context_length")
        if ROPE_FREQS in keys:
            found |= _divided(keys, rotated, found["rope_theta"])
        return {"rope_parameters": found}
    found |= {"rope_type": kind, "factor": keys.number("rope.scaling.factor", old or REQUIRED, above=0)}
    if kind == "yarn":
        found |= {"original_max_position_embeddings": keys.count("rope.scaling.original_context_length"),
                  "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0, above=0),
                  "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0, above=0), **further}
    else:
        keys.harmless("rope.scaling.original_context_length")
    return {"rope_parameters": found}


def rope_factors(keys: Keys, rotated: int, most: float = MOST_FACTOR) -> tuple[float, ...]:
    """What each frequency of a head with `rotated` dimensions is divided by, as a tensor of the file has it; `most` at
    most."""
    factors = keys.numbers(ROPE_FREQS)
    want_factors(keys, ROPE_FREQS, factors, rotated // 2, most)
    return factors


def _divided(keys: Keys, rotated: int, theta: float) -> dict[str, Any]:
    """Llama 3's scaling where the factors are those of it, as published, else the factors themselves, for all contexts
    alike, as LongRoPE has them."""
    factors = rope_factors(keys, rotated)
    if {*factors} == {1.0}:
        return {}
    frequencies = [max(theta, 1.0) ** (-2 * i / rotated) for i in range(rotated // 2)]
    if theta >= 1 and all(abs(found / want - 1) < SAME
           for found, want in zip(factors, _llama3(frequencies, max(factors)), strict=True)):
        return {"rope_type": "llama3", "factor": round(max(factors), 6), **LLAMA3}
    return {"rope_type": "longrope", "short_factor": list(factors), "long_factor": list(factors),
            "attention_factor": 1.0, "original_max_position_embeddings": keys.count("context_length")}


def _llama3(frequencies: list[float], factor: float) -> list[float]:
    low, high, original = LLAMA3.values()
    found = []
    for frequency in frequencies:
        turns = original * frequency / (2 * math.pi)  # over the positions that the model was trained with first
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def has_biases(shapes: Shapes) -> bool:
    return "blk.0.attn_q.bias" in shapes


def block_layouts(model: Model, names: Mapping[str, str] = NAMES, permuted: bool = False) -> tuple[Layout, ...]:
    """permuted: rows of q and k lie as llama.cpp's rotary embedding of Llama wants them, in pairs."""
    dense = dense_layout(model, names, TOP, "blk.")
    for i, layer in enumerate(model.layers if permuted else ()):
        assert isinstance(layer.mixer, Attention)
        for part, heads in (("q", layer.mixer.heads), ("k", layer.mixer.kv_heads)):
            name = f"layers.{i}.attention.{part}"
            dense[name] = Source(dense[name].name, (Pairs(heads),))
    if not model.moe_layers:
        return ({**dense, **_experts(model, "ffn_{part}.{kind}")},)
    return tuple({**dense, **experts} for experts in (
        _experts(model, "ffn_{part}_exps.{kind}"), _fused(model), _experts(model, "ffn_{part}.{expert}.{kind}")))


def _experts(model: Model, form: str) -> Layout:
    """Gate, up and down in tensors of their own, of all experts of a layer or of one. form: of their names."""
    found = {}
    for key in model.expert_keys:
        for tensor in model.expert_tensors(key):
            part, _, bias = tensor.name.rpartition(".")[2].partition("_")
            name = form.format(part=part, expert=key.expert, kind=bias or "weight")
            found[tensor.name] = Source(f"blk.{key.layer}.{name}", _index(model, key) if "_exps" in form else ())
    return found


def _fused(model: Model) -> Layout:
    """Gate above up in one tensor [E, 2F, H]; the rest as `_experts` has it."""
    found = dict(_experts(model, "ffn_{part}_exps.{kind}"))
    for key in model.expert_keys:
        tensors = model.expert_tensors(key)
        for gate, up in (tensors[:2], tensors[3:5]):
            name = found[gate.name].name.replace("ffn_gate_exps", "ffn_gate_up_exps")
            found[gate.name], found[up.name] = halves(name, gate.shape[0], *_index(model, key))
            if not tensors[3:]:
                break
    return found


def _index(model: Model, key: ExpertKey) -> tuple[Step, ...]:
    mlp = model.layers[key.layer].mlp
    return (Index(key.expert, mlp.router.experts),) if isinstance(mlp, Moe) else ()
