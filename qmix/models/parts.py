"""What most decoders share: their sizes in config.json, and the tensor names of the Llama family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qmix.models.keys import MOST_EXPERTS, MOST_LAYERS, REQUIRED, Keys
from qmix.models.source import Index, Layout, Source, halves
from qmix.spec import Model

# Buffers that old exports carry and that are computed from the config instead.
ROTARY_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

TOP = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
LLAMA = {  # behind "model.layers.N."
    "before_mixer": "input_layernorm.weight", "before_mlp": "post_attention_layernorm.weight",
    **{f"attention.{p}": f"self_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"attention.{p}_bias": f"self_attn.{p}_proj.bias" for p in "qkvo"},
    **{f"attention.{p}_norm": f"self_attn.{p}_norm.weight" for p in "qk"},
    **{f"mlp.{p}": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
    "router.weight": "mlp.gate.weight",
}
MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
EXPERTS = tuple(f"mlp.experts.{{}}.{p}_proj.weight" for p in ("gate", "up", "down"))
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
TINY_YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 128}  # VARIANTS


@dataclass(frozen=True, slots=True)
class Sizes:
    hidden: int
    vocab: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    eps: float


def read_sizes(keys: Keys, kv_heads: int | None, max_positions: int, eps: float) -> Sizes:
    """The sizes that every decoder has. Arguments: transformers' defaults; kv_heads None = as many as heads. The sizes
    without a default are required: every exporter writes them, so a file without one is damaged."""
    hidden = keys.count("hidden_size")
    heads = keys.count("num_attention_heads")
    kv = keys.integer("num_key_value_heads", kv_heads, null=True)
    kv = heads if kv is None else keys.in_range("num_key_value_heads", kv)
    keys.want(heads % kv == 0, "num_key_value_heads", kv, f"a divisor of num_attention_heads = {heads}")
    return Sizes(hidden, keys.count("vocab_size"), keys.count("num_hidden_layers", most=MOST_LAYERS), heads, kv,
                 read_head_dim(keys, hidden, heads), keys.count("max_position_embeddings", max_positions),
                 keys.number("rms_norm_eps", eps, above=0))


def read_text(keys: Keys, *harmless: str) -> Keys:
    """The keys of the language model: those of `text_config`, or all of them in the config of a model that is nothing
    else. harmless: further keys beside text_config; those of the towers for pictures and sound are."""
    if "text_config" not in keys:
        return keys
    keys.harmless("vision_config", "audio_config", "image_token_id", "video_token_id", "audio_token_id", *harmless)
    return keys.object("text_config")


def read_tied(keys: Keys, text: Keys, default: bool) -> bool:
    """tie_word_embeddings, which stands beside text_config; where it stands inside too, both must say the same."""
    tied = keys.boolean("tie_word_embeddings", default)
    if "tie_word_embeddings" in text:
        text.want(text.boolean("tie_word_embeddings") == tied, "tie_word_embeddings", not tied,
                  "the same as beside text_config")
    return tied


def read_head_dim(keys: Keys, hidden: int, heads: int) -> int:
    head_dim = keys.integer("head_dim", None) or None  # 0, as null, is hidden_size / heads (transformers)
    if head_dim is None:
        keys.want(hidden % heads == 0, "num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
        head_dim = hidden // heads
    keys.in_range("head_dim", head_dim)
    keys.want(head_dim % 2 == 0, "head_dim", head_dim, "an even number (rotary pairs)")
    return head_dim


def read_experts(keys: Keys, name: str, experts: int = REQUIRED, top_k: int = REQUIRED) -> tuple[int, int]:
    """(experts, chosen per token). name: of the count in published files; transformers knows it by both names."""
    name = keys.one_name(name, *{"num_local_experts", "num_experts"} - {name})
    experts = keys.count(name, experts, most=MOST_EXPERTS)
    top_k = keys.count("num_experts_per_tok", top_k)
    keys.want(top_k <= experts, "num_experts_per_tok", top_k, f"<= {name} = {experts}")
    return experts, top_k


def read_sparse_layers(keys: Keys, layers: int) -> set[int]:
    """Those with experts: every decoder_sparse_step-th, counted from 1, but not those of mlp_only_layers."""
    step, dense = keys.count("decoder_sparse_step", 1), keys.integers("mlp_only_layers", ())
    return {i for i in range(layers) if (i + 1) % step == 0} - set(dense)


def read_silu(keys: Keys) -> None:
    keys.text("hidden_act", "silu", "swish", default="silu")  # two names of one function


def read_window(keys: Keys, default: int | None) -> int | None:
    window = keys.integer("sliding_window", default, null=True)
    if window is None or window <= 0:  # exporters write 0 or -1 for none
        return None
    return keys.in_range("sliding_window", window)


def read_dtype(*sections: Keys) -> str:
    """Of the weights, as the first of `sections` has it that says something; bfloat16 where none does. The dtype of the
    files decides where there are any."""
    found = [(keys, name) for keys in sections for name in ("dtype", "torch_dtype") if name in keys]
    for keys in sections:
        keys.harmless("dtype", "torch_dtype")
    return found[0][0].text(found[0][1], "bfloat16", "float16", "float32") if found else "bfloat16"


def dense_layout(model: Model, names: Mapping[str, str], top: Mapping[str, str] = TOP,
                 layers: str = "model.layers.") -> dict[str, Source]:
    """Sources of `model.tensors()`. names: by canonical name, behind "layers.N." on both sides; tensors that are not
    there are left out, for those that are made in steps."""
    found = {}
    for tensor in model.tensors():
        within = re.fullmatch(r"layers\.(\d+)\.(.+)", tensor.name)
        if not within:
            found[tensor.name] = Source(top[tensor.name])
        elif within[2] in names:
            found[tensor.name] = Source(f"{layers}{within[1]}.{names[within[2]]}")
    return found


def expert_layout(model: Model, names: tuple[str, ...] | None = None, layers: str = "model.layers.") -> Layout:
    """Sources of experts that are tensors of their own. names: of gate, up and down, "{}" for the expert; by default
    those of the Llama family, in a model without experts of the MLPs."""
    names = names or (EXPERTS if model.moe_layers else MLP)
    return {f"layers.{layer}.experts.{expert}.{part}": Source(f"{layers}{layer}.{name.format(expert)}")
            for layer, expert in model.expert_keys
            for part, name in zip(("gate", "up", "down"), names, strict=True)}


def fused_layout(model: Model, names: tuple[str, str] = FUSED, layers: str = "model.layers.") -> Layout:
    """Sources of experts in one tensor a layer: gate above up [E, 2F, H], and down [E, H, F]. The MLPs of a model
    without experts are as expert_layout has them."""
    if not model.moe_layers:
        return expert_layout(model, layers=layers)
    found = {}
    for key in model.expert_keys:
        gate, _, _ = model.expert_tensors(key)
        index = Index(key.expert, model.layers[key.layer].mlp.router.experts)  # type: ignore[union-attr]
        gate_up, down = (f"{layers}{key.layer}.{name}" for name in names)
        prefix = f"layers.{key.layer}.experts.{key.expert}."
        found[prefix + "gate"], found[prefix + "up"] = halves(gate_up, gate.shape[0], index)
        found[prefix + "down"] = Source(down, (index,))
    return found
