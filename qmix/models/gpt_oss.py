"""gpt-oss (OpenAI 2025, arXiv 2508.10925): 20b, 120b. Biases throughout; every second layer sees a window; each head
has a learnt sink that takes part in the softmax; gate and up lie in turns, and are clamped before they are joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from qmix.models.gguf import LATE_NORM, Shapes, base_config, block_layouts, expert_counts, has_biases, rope_config
from qmix.models.keys import Keys
from qmix.models.parts import (
    LLAMA,
    ROTARY_BUFFERS,
    TINY_YARN,
    dense_layout,
    read_dtype,
    read_experts,
    read_silu,
    read_sizes,
    read_window,
)
from qmix.models.rope import read_rope
from qmix.models.source import Index, Layout, Mxfp4, Source, Step, Strided, Transpose
from qmix.spec import Activation, Attention, Expert, Layer, Model, Moe, Norm, Norms, Rope, Router, Yarn

MODEL_TYPES = ("gpt_oss",)
SKIPPED = ROTARY_BUFFERS
GGUF = "gpt-oss"
NAMES = {**LLAMA, "attention.sinks": "self_attn.sinks", "router.weight": "mlp.router.weight",
         "router.logit_bias": "mlp.router.bias"}
SLIDING, FULL = "sliding_attention", "full_attention"


def read(keys: Keys) -> Model:
    read_silu(keys)
    s = read_sizes(keys, kv_heads=8, max_positions=131072, eps=1e-5)
    norm, window = Norm(s.eps), read_window(keys, 128)
    attention = {kind: Attention(s.heads, s.kv_heads, s.head_dim, _rope(keys, s.head_dim, s.max_positions),
                                 window=window if kind == SLIDING else None, sinks=True,
                                 bias="qkvo" if keys.boolean("attention_bias", True) else "none")
                 for kind in (SLIDING, FULL)}
    kinds = keys.texts("layer_types", None) if "layer_types" in keys else tuple(
        (SLIDING, FULL)[i % 2] for i in range(s.layers))
    keys.harmless("layer_types", "swiglu_limit", "initial_context_length")  # the first and third: as rope has them
    keys.want(len(kinds) == s.layers and {*kinds} <= {SLIDING, FULL}, "layer_types", kinds,
              f"{s.layers} of {SLIDING!r} and {FULL!r}")
    experts, top_k = read_experts(keys, "num_local_experts", 128, 4)
    activation = Activation("swiglu_clamped", keys.number("swiglu_alpha", 1.702, above=0),
                            keys.number("swiglu_limit", 7.0, above=0))
    moe = Moe(Router(experts, top_k, logit_bias=True), Expert(keys.count("intermediate_size"), activation, bias=True))
    keys.harmless("experts_per_token")  # num_experts_per_tok, once more
    layers = tuple(Layer(attention[kind], moe, Norms(norm, norm)) for kind in kinds)
    return Model("gpt_oss", s.hidden, s.vocab, s.max_positions, layers, norm, read_dtype(keys),
                 keys.boolean("tie_word_embeddings", False), keys.integer("bos_token_id", None),
                 keys.token_ids("eos_token_id"))


def _rope(keys: Keys, head_dim: int, max_positions: int) -> Rope:
    if "rope_scaling" in keys or "rope_parameters" in keys:
        return read_rope(keys, head_dim, max_positions, theta=150000.0)
    return Rope(keys.number("rope_theta", 150000.0, above=0), head_dim, Yarn(4096, 32.0, truncate=False))


def layouts(model: Model) -> tuple[Layout, ...]:
    """As transformers holds it in memory, and writes it where it is not in MXFP4."""
    return (_layout(model, lambda name, this, *rows: Source(name, (this, Transpose(), *rows))),)


def mxfp4_layout(model: Model) -> Layout:
    """As published: blocks and scales of the experts' weights lie row by row, not transposed."""
    return _layout(model, lambda name, *rows: Source(f"{name}_blocks", (*rows, Mxfp4()), f"{name}_scales"))


def _layout(model: Model, weights: Callable[..., Source]) -> Layout:
    """weights(name, index of the expert, *which rows): where an expert's matrix lies."""
    found: dict[str, Source] = dense_layout(model, NAMES)
    for key in model.expert_keys:
        router = model.layers[key.layer].mlp.router  # type: ignore[union-attr]
        prefix, source = f"layers.{key.layer}.experts.{key.expert}.", f"model.layers.{key.layer}.mlp.experts."
        this = Index(key.expert, router.experts)
        for at, part in enumerate(("gate", "up")):
            turns: Step = Strided(at, 2)
            found[f"{prefix}{part}"] = weights(f"{source}gate_up_proj", this, turns)
            found[f"{prefix}{part}_bias"] = Source(f"{source}gate_up_proj_bias", (this, turns))
        found[f"{prefix}down"] = weights(f"{source}down_proj", this)
        found[f"{prefix}down_bias"] = Source(f"{source}down_proj_bias", (this,))
    return found


def gguf_config(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    """What files do not say is as in both published models: which layers have the window, the activation, and a YaRN
    that is not truncated."""
    found = base_config(keys, shapes)
    keys.harmless("feed_forward_length")
    return {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], **found,
            "intermediate_size": keys.count("expert_feed_forward_length"),
            **expert_counts(keys, "num_local_experts", shapes),
            "sliding_window": keys.count("attention.sliding_window"), "attention_bias": has_biases(shapes),
            "layer_types": [(SLIDING, FULL)[i % 2] for i in range(found["num_hidden_layers"])],
            "swiglu_limit": 7.0, **rope_config(keys, found["head_dim"], truncate=False)}


def gguf_layouts(model: Model) -> tuple[Layout, ...]:
    return block_layouts(model, LATE_NORM)


TINY = MappingProxyType[str, Any]({
    "model_type": "gpt_oss", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8,
    "num_experts_per_tok": 4, "sliding_window": 8, "max_position_embeddings": 512, "swiglu_limit": 1.5,
})
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"tie_word_embeddings": True, "layer_types": [FULL, FULL, SLIDING, FULL]},
    {"attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "swiglu_alpha": 1.1},
    {"num_local_experts": 5, "num_key_value_heads": 4, "num_hidden_layers": 2, "sliding_window": 5,
     "rope_parameters": TINY_YARN},
)
