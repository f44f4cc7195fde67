"""Mistral's own layout of Mixtral and Mistral 7B: params.json in the place of config.json, tensors as Mistral's program
names them.

The rows of q and k of each head lie in the pairs that rotate together; in Hugging Face's layout all first ones lie
before all second ones. Experts are tensors of their own, or in older files all in one tensor [E F, H] a layer, w2
transposed in it. Source: mistral-inference, and transformers' scripts that convert these files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmix.models.keys import Keys
from qmix.models.parts import dense_layout, expert_layout
from qmix.models.source import Layout, Pairs, Rows, Source, Step, Transpose
from qmix.spec import Attention, Model

PARAMS = "params.json"
WEIGHTS = "consolidated*.safetensors"
HUGGING_FACE = ("model.safetensors", "model.safetensors.index.json")
TOP = {"embedding": "tok_embeddings.weight", "final_norm": "norm.weight", "head": "output.weight"}
NAMES = {"before_mixer": "attention_norm.weight", "before_mlp": "ffn_norm.weight",
         **{f"attention.{p}": f"attention.w{p}.weight" for p in "qkvo"}}
ROUTERS = ("feed_forward.gate.weight", "block_sparse_moe.gate.weight")
MLP = tuple(f"feed_forward.{part}.weight" for part in ("w1", "w3", "w2"))  # gate, up, down
EXPERTS = tuple(f"feed_forward.experts.{{}}.{part}.weight" for part in ("w1", "w3", "w2"))
POSITIONS = 32768
OLD = tuple(f"block_sparse_moe.{part}" for part in ("w1", "w3", "w2"))


def is_consolidated(path: Path) -> bool:
    """Whether a folder has weights in this layout and none in Hugging Face's."""
    return (path / PARAMS).is_file() and not any((path / name).exists() for name in HUGGING_FACE) \
        and any(path.glob(WEIGHTS))


def consolidated_config(params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(config.json, what was taken where params.json says nothing); ConfigError for a key that is missing, wrong or not
    known."""
    keys, notes = Keys(params), list[str]()
    keys.text("model_type", "transformer", default="transformer")
    for name in ("use_biases", "use_biases_ffn", "vocab_parallel", "causal"):
        keys.fixed(name, name == "causal")
    keys.harmless("max_batch_size")
    window = keys.get("sliding_window", None)
    if isinstance(window, str) and window.isdecimal() and len(window) < 10:  # some files have it as a text
        window = int(window)
    theta = keys.number("rope_theta", None, above=0)
    if theta is None:
        theta = 1e6 if window is None else 1e4  # as mistral-inference has it
        notes.append(f"rope_theta: absent, taken as {theta:g}, as Mistral's own program does "
                     f"{'without' if window is None else 'with'} a window")
    heads = keys.count("n_heads")
    positions = keys.count("max_position_embeddings", keys.count("max_seq_len", POSITIONS))
    if not {"max_position_embeddings", "max_seq_len"} & {*params}:
        notes.append(f"max_position_embeddings, max_seq_len: absent, taken as {POSITIONS}, as in the config.json of "
                     "Mistral 7B and Mixtral 8x7B")
    found: dict[str, Any] = {
        "hidden_size": keys.count("dim"), "num_hidden_layers": keys.count("n_layers"), "num_attention_heads": heads,
        "head_dim": keys.count("head_dim", keys.count("dim") // heads or 1), "rope_theta": theta,
        "num_key_value_heads": keys.count("n_kv_heads", heads), "intermediate_size": keys.count("hidden_dim"),
        "rms_norm_eps": keys.number("norm_eps", above=0), "vocab_size": keys.count("vocab_size"),
        "sliding_window": window, "max_position_embeddings": positions, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": keys.boolean("tied_embeddings", False)}
    moe = keys.object("moe")
    dense = not moe.names()
    if not dense:
        found |= {"num_local_experts": moe.count("num_experts"),
                  "num_experts_per_tok": moe.count("num_experts_per_tok")}
    keys.finish()
    kind, name = ("mistral", "MistralForCausalLM") if dense else ("mixtral", "MixtralForCausalLM")
    return {"architectures": [name], "model_type": kind, **found}, notes


def consolidated_layouts(model: Model) -> tuple[Layout, ...]:
    """With experts of their own, and as older files have them."""
    if not model.moe_layers:
        return (_paired(model, {**_dense(model, ROUTERS[0]), **expert_layout(model, MLP, "layers.")}),)
    return (_paired(model, {**_dense(model, ROUTERS[0]), **expert_layout(model, EXPERTS, "layers.")}),
            _paired(model, {**_dense(model, ROUTERS[1]), **_old_experts(model)}))


def _dense(model: Model, router: str) -> dict[str, Source]:
    return dense_layout(model, {**NAMES, "router.weight": router}, TOP, "layers.")


def _paired(model: Model, layout: Mapping[str, Source]) -> Layout:
    """With the rows of q and k in their order."""
    found = dict(layout)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer.mixer, Attention)
        for name, heads in (("q", layer.mixer.heads), ("k", layer.mixer.kv_heads)):
            own = f"layers.{i}.attention.{name}"
            found[own] = Source(found[own].name, (Pairs(heads),))
    return found


def _old_experts(model: Model) -> Layout:
    found = {}
    inner, count = model.expert_inner, model.num_experts
    for layer, expert in model.expert_keys:
        rows = Rows(expert * inner, (expert + 1) * inner, count * inner)
        for part, name in zip(("gate", "up", "down"), OLD, strict=True):
            steps: tuple[Step, ...] = (rows, Transpose()) if part == "down" else (rows,)
            found[f"layers.{layer}.experts.{expert}.{part}"] = Source(f"layers.{layer}.{name}", steps)
    return found
