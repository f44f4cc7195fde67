"""The synthetic model as a GGUF file for llama.cpp, the vocabulary included. Types of its matrices:

    mixed    Q4_0 experts, Q8_0 attention and head: the store with int8 dense
    q4_0     Q4_0 throughout: the store with int4 dense
    q4_k_m   as llama-quantize chooses for Q4_K_M with eight experts (llama-quant.cpp)

gpt-oss's experts are MXFP4 whatever the types. Embedding always F16, router, norms and other vectors F32: these are
those of the store; experts and other matrices are other random weights of the same deviations, so the routing has the
same statistics. Q4_0 takes 4.5 bits a weight, as int4 g64 does.

Streamed: at most one tensor of a layer's experts in memory (264 MB; 940 MB of a bf16 checkpoint).

E experts, N rows out, K columns in, l a layer, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from gguf_blocks import Bytes, matrix, tensor_bytes
from numpy.typing import NDArray
from synthetic_recipe import CLUSTER, Recipe, Values, kind_of, rounded, tokenizer_file

from qmix.models import read_model
from qmix.spec import Model, Moe, Tensor
from qmix.spec.model import layer_of

Draft = tuple[str, str, tuple[int, ...], Callable[[], NDArray]]  # name, type, logical shape, values

TYPES = ("mixed", "q4_0", "q4_k_m")


def type_of(recipe: Recipe, types: str, matrix: str, layer: int) -> str:
    """The type of a matrix: "gate_exps" | "up_exps" | "down_exps" of experts, else as kind_of has it."""
    expert = matrix.endswith("_exps")
    if expert and recipe.expert_format == "mxfp4":
        return "MXFP4"
    if types == "mixed":
        return "Q4_0" if expert else "Q8_0"
    if types == "q4_0":
        return "Q4_0"
    eighth, layers = recipe.layers // 8, recipe.layers
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return {"k": "Q8_0", "v": "Q8_0", "o": "Q5_K", "head": "Q6_K", "down_exps": "Q6_K" if more else "Q4_K"}.get(
        matrix, "Q4_K")


def experts(recipe: Recipe, kind: str, layer: int, part: int, shape: tuple[int, ...]) -> Bytes:
    """[E, N, bytes of a row]; part 0 gate, 1 up, 2 down."""
    return matrix(recipe.stream("gguf", layer, part), kind, shape,
                  recipe.spread("w2" if part == 2 else "w13", layer))


def expert_biases(recipe: Recipe, layer: int, part: int, rows: int) -> Values:
    """[E, N], the store's."""
    def one(expert: int) -> Values:
        if part == 2:
            return recipe.expert_bias(layer, expert, "w2", rows)
        return recipe.expert_bias(layer, expert, "w13", 2 * rows).reshape(2, rows)[part]

    return np.stack([one(expert) for expert in range(recipe.experts)])


def linear(recipe: Recipe, kind: str, tensor: Tensor) -> Bytes:
    """[N, bytes of a row]. Each query head is a copy of its key head."""
    part, layer, (rows, cols) = kind_of(tensor.name), layer_of(tensor.name) or 0, tensor.shape
    if not part.endswith("q"):
        return matrix(recipe.stream("gguf " + part, layer), kind, (rows, cols), recipe.spread(part, layer))
    (heads, copies), part = recipe.key_heads(tensor.name), part[:-1] + "k"
    keys = matrix(recipe.stream("gguf " + part, layer), kind, (rows // copies, cols), recipe.spread(part, layer))
    return keys.reshape(heads, rows // copies // heads, -1).repeat(copies, axis=0).reshape(rows, -1)


def joined(recipe: Recipe, kind: str, tensors: Sequence[Tensor]) -> Bytes:
    """Matrices that GGUF has as one: below each other, or, where queries come with their gate, head by head."""
    found = [linear(recipe, kind, tensor) for tensor in tensors]
    if kind_of(tensors[-1].name) != "gate":
        return np.concatenate(found)
    whole = np.stack([part.reshape(recipe.heads, recipe.head_dim, -1) for part in found], axis=1)
    return whole.reshape(-1, whole.shape[-1])


def embedding(recipe: Recipe) -> NDArray[np.float16]:
    """[V, H], the store's, through bf16 as there."""
    whole = np.empty((recipe.vocab, recipe.hidden), np.float16)
    for start in range(0, recipe.vocab, CLUSTER):
        rows = whole[start:start + CLUSTER]
        rows[:] = rounded(recipe.embedding(start // CLUSTER)[:len(rows)])
    return whole


NAMES = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight",
         "before_mixer": "attn_norm.weight", "before_mlp": "ffn_norm.weight",
         **{f"attention.{name}": f"attn_{name}.weight" for name in ("q", "k", "v", "q_norm", "k_norm", "sinks")},
         **{f"attention.{name}_bias": f"attn_{name}.bias" for name in ("q", "k", "v")},
         "attention.o": "attn_output.weight", "attention.o_bias": "attn_output.bias",
         "router.weight": "ffn_gate_inp.weight", "router.logit_bias": "ffn_gate_inp.bias"}


def name_of(recipe: Recipe, tensor: Tensor) -> str:
    """GGUF's name: "layers.3.attention.q" -> "blk.3.attn_q.weight"."""
    names, layer = {**NAMES, **recipe.gguf_names}, layer_of(tensor.name)
    return names[tensor.name] if layer is None else f"blk.{layer}.{names[tensor.name.split('.', 2)[2]]}"


def drafts(recipe: Recipe, types: str = "mixed") -> Iterator[Draft]:
    """Every tensor in the order of the file; values are drawn when it is their turn."""
    model = read_model(recipe.raw_config())
    for name, group in groupby(model.tensors(), partial(name_of, recipe)):
        tensors = list(group)
        first, layer = tensors[0], layer_of(tensors[0].name) or 0
        if first.role == "embedding":
            yield name, "F16", first.shape, partial(embedding, recipe)
        elif first.role in ("linear", "mlp", "head"):
            kind = type_of(recipe, types, kind_of(first.name), layer)
            yield name, kind, (sum(t.shape[0] for t in tensors), first.shape[1]), partial(
                joined, recipe, kind, tensors)
        else:  # GGUF has a matrix of one row as a vector
            shape = first.shape[1:] if first.shape[0] == 1 else first.shape
            yield name, "F32", shape, partial(recipe.gguf_plain, first.name, shape)
        if first.name.endswith("router.weight"):
            yield from expert_drafts(recipe, model, layer, types)


def expert_drafts(recipe: Recipe, model: Model, layer: int, types: str) -> Iterator[Draft]:
    """The experts of a layer, each matrix of all of them together."""
    mlp, hidden, inner = model.layers[layer].mlp, recipe.hidden, recipe.inner
    assert isinstance(mlp, Moe)
    for part, (name, rows, cols) in enumerate((("gate", inner, hidden), ("up", inner, hidden),
                                               ("down", hidden, inner))):
        kind, each = type_of(recipe, types, name + "_exps", layer), (recipe.experts, rows, cols)
        yield f"blk.{layer}.ffn_{name}_exps.weight", kind, each, partial(experts, recipe, kind, layer, part, each)
        if mlp.expert.bias:
            yield f"blk.{layer}.ffn_{name}_exps.bias", "F32", each[:2], partial(
                expert_biases, recipe, layer, part, rows)


def bytes_per_token(recipe: Recipe, types: str) -> int:
    """Bytes of weights that one token reads: all but the experts not chosen and the embeddings of other tokens."""
    total, routed, looked_up = 0, recipe.chosen / recipe.experts, 1 / recipe.vocab
    for name, kind, shape, _ in drafts(recipe, types):
        share = routed if "_exps" in name else looked_up if name.startswith("token_embd") else 1
        total += int(tensor_bytes(kind, shape) * share)
    return total


# GGUF's name of a tensor -> that of a Hugging Face checkpoint; i its layer, * each expert.
CHECKPOINT = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
              "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
              "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
              "ffn_up_exps": "block_sparse_moe.experts.*.w3", "ffn_down_exps": "block_sparse_moe.experts.*.w2",
              "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
              "attn_output": "self_attn.o_proj"}


def checkpoint_drafts(recipe: Recipe, folder: Path) -> Iterator[Draft]:
    """The tensors of a bf16 checkpoint of the recipe's shape, as they are: matrices BF16, router and norms F32. The
    rows of q and k keep Hugging Face's order, so the result is for quantizing, not for running."""
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, kind, shape, _ in drafts(recipe):
        parts = name.removesuffix(".weight").split(".")
        old = CHECKPOINT[parts[-1]] + ".weight"
        if parts[0] == "blk":
            old = f"model.layers.{parts[1]}.{old}"
        files = [(folder / where[n], n) for n in ([old.replace("*", str(e)) for e in range(recipe.experts)]
                                                  if "*" in old else [old])]
        plain = kind == "F32"
        yield name, kind if plain else "BF16", shape, partial(_read, files, plain)


def _read(files: Sequence[tuple[Path, str]], plain: bool) -> NDArray:
    """The tensors, one upon the other: fp32 where `plain`, else the bytes of bf16."""
    import torch
    from safetensors import safe_open

    found = []
    for path, name in files:
        with safe_open(path, "pt") as file:
            found.append(file.get_tensor(name))
    whole = torch.stack(found) if len(found) > 1 else found[0]
    return whole.float().numpy() if plain else whole.view(torch.uint8).numpy()  # type: ignore[no-any-return]


def write_gguf(recipe: Recipe, path: Path, types: str = "mixed", checkpoint: Path | None = None) -> int:
    """Write the file, through a temporary name; returns its bytes. checkpoint: whose weights to take."""
    try:
        import gguf
    except ImportError:
        raise SystemExit("--gguf needs the package gguf: pip install gguf") from None
    if types == "q4_k_m" and any(width % 256 for width in (recipe.hidden, recipe.inner)):
        raise SystemExit(f"q4_k_m: wants widths that are multiples of 256, got {recipe.hidden} and {recipe.inner}")
    draft = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(draft, recipe.gguf)
    writer.add_name(f"synthetic, {recipe.layers} layers")
    for key, value in {"block_count": recipe.layers, "context_length": 32768, "embedding_length": recipe.hidden,
                       "feed_forward_length": recipe.inner, "head_count": recipe.heads,
                       "head_count_kv": recipe.kv_heads, "rope_freq_base": recipe.theta,
                       "layer_norm_rms_eps": recipe.eps, "expert_count": recipe.experts,
                       "expert_used_count": recipe.chosen, "vocab_size": recipe.vocab, **recipe.gguf_keys()}.items():
        getattr(writer, f"add_{key}")(value)
    _add_vocabulary(writer, recipe.vocab)
    planned = list(drafts(recipe, types) if checkpoint is None else checkpoint_drafts(recipe, checkpoint))
    for name, kind, shape, _ in planned:
        quantization = gguf.GGMLQuantizationType[kind]
        if kind not in ("F16", "F32"):
            shape = gguf.quant_shape_to_byte_shape(shape, quantization)
        dtype = {"F16": np.float16, "F32": np.float32}.get(kind, np.uint8)
        writer.add_tensor_info(name, shape, np.dtype(dtype), int(np.prod(shape)) * np.dtype(dtype).itemsize,
                               raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, _, values in planned:
        writer.write_tensor_data(values())
    writer.close()
    draft.rename(path)
    return path.stat().st_size


def _add_vocabulary(writer: object, vocab: int) -> None:
    """Mixtral's sentencepiece vocabulary, token types as ggml counts them; unused tokens (5) up to `vocab`."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(tokenizer_file()))
    ids = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    writer.add_tokenizer_model("llama")  # type: ignore[attr-defined]
    unused = range(model.vocab_size(), vocab)
    pieces = [*(model.id_to_piece(i) for i in ids), *(f"<unused{i}>" for i in unused)]
    writer.add_token_list([piece.encode() for piece in pieces])  # type: ignore[attr-defined]
    writer.add_token_scores([*map(model.get_score, ids), *(0.0 for _ in unused)])  # type: ignore[attr-defined]
    writer.add_token_types(kinds + [5] * len(unused))  # type: ignore[attr-defined]
    writer.add_bos_token_id(model.bos_id())  # type: ignore[attr-defined]
    writer.add_eos_token_id(model.eos_id())  # type: ignore[attr-defined]
    writer.add_unk_token_id(model.unk_id())  # type: ignore[attr-defined]
