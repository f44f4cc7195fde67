"""The synthetic model as a GGUF file for llama.cpp, the vocabulary included. Types of its matrices:

    mixed    Q4_0 experts, Q8_0 attention and head: the store with int8 dense
    q4_0     Q4_0 throughout: the store with int4 dense
    q4_k_m   as llama-quantize chooses for Q4_K_M with eight experts (llama-quant.cpp)

and always F16 embedding, F32 router and norms. Embedding, routers and norms are those of the store; experts and
attention are other random weights of the same deviations, so the routing has the same statistics. Q4_0 takes 4.5 bits
a weight, as int4 g64 does.

Layouts (ggml-common.h), blocks of 32 or, with K in the name, 256 weights along the input:
  Q4_0  fp16 d, 16 bytes: w = (q - 8) d
  Q8_0  fp16 d, 32 int8: w = q d
  Q4_K  fp16 d and m, 12 bytes of 6-bit scales s and minima t, 128 bytes: w = q s d - t m; here all s = t = 32
  Q5_K  the same with 32 bytes of fifth bits before the 128
  Q6_K  192 bytes, 16 int8 scales s, fp16 d: w = (q - 32) s d; here s is 8 or -8 at random, which makes the mean 0

Streamed: at most one tensor of a layer's experts in memory (264 MB; 940 MB of a bf16 checkpoint).

E experts, N rows out, K columns in, l a layer, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from synthetic_recipe import CLUSTER, HEAD, Qwen3Recipe, Recipe, tokenizer_file

Bytes = NDArray[np.uint8]
Draft = tuple[str, str, tuple[int, ...], Callable[[], NDArray]]  # name, type, logical shape, values

# Type -> weights and bytes of a block, where its random bytes are, deviation of a weight over d.
BLOCKS = {"Q4_0": (32, 18, slice(2, 18), (2 * 140 / 16) ** 0.5),  # q - 8 uniform in -7..7 with 0 twice
          "Q8_0": (32, 34, slice(2, 34), (127 * 128 / 3) ** 0.5),  # q uniform in -127..127
          "Q4_K": (256, 144, slice(16, 144), 32 * (255 / 12) ** 0.5),
          "Q5_K": (256, 176, slice(16, 176), 32 * (1023 / 12) ** 0.5),
          "Q6_K": (256, 210, slice(0, 192), 8 * (4095 / 12) ** 0.5)}
ITEMS = {"F32": 4, "F16": 2, "BF16": 2}
MEAN = {"Q4_K": 7.5, "Q5_K": 15.5}
# Any byte -> a byte whose nibbles are 1..15, mean 8: nibble 0 becomes 8.
CENTRED = np.array([(b & 15 or 8) | (b >> 4 or 8) << 4 for b in range(256)], np.uint8)
THIRTY_TWOS = np.array([0xA0] * 8 + [0] * 4, np.uint8)  # eight scales and eight minima of 32, as Q4_K packs them
TYPES = ("mixed", "q4_0", "q4_k_m")


def type_of(types: str, matrix: str, layer: int, layers: int) -> str:
    """The type of a matrix: "q" | "k" | "v" | "o" | "gate" | "up" | "down" | "head"."""
    if types == "mixed":
        return "Q4_0" if matrix in ("gate", "up", "down") else "Q8_0"
    if types == "q4_0":
        return "Q4_0"
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return {"k": "Q8_0", "v": "Q8_0", "o": "Q5_K", "head": "Q6_K", "down": "Q6_K" if more else "Q4_K"}.get(
        matrix, "Q4_K")


def matrix(random: np.random.Generator, kind: str, shape: Sequence[int], spread: float) -> Bytes:
    """[..., N, bytes of a row] of random blocks whose weights have mean 0 and deviation `spread`."""
    weights, nbytes, where, deviation = BLOCKS[kind]
    blocks = np.empty((prod(shape) // weights, nbytes), np.uint8)
    payload = blocks[:, where]
    for piece in np.array_split(payload, max(1, blocks.nbytes >> 24)):
        piece[:] = random.integers(0, 2**64, piece.size // 8, dtype=np.uint64).view(np.uint8).reshape(piece.shape)
    step = spread / deviation
    if kind == "Q6_K":
        blocks[:, 192:208] = random.choice(np.array([8, 248], np.uint8), (len(blocks), 16))
        blocks[:, 208:] = _fp16(step)
        return blocks.reshape(*shape[:-1], -1)
    blocks[:, :2] = _fp16(step)
    if kind == "Q4_0":
        for piece in np.array_split(payload, max(1, payload.size >> 24)):
            piece[:] = CENTRED[piece]
    elif kind == "Q8_0":
        payload[payload == 128] = 0  # -128
    else:
        blocks[:, 2:4], blocks[:, 4:16] = _fp16(step * MEAN[kind]), THIRTY_TWOS
    return blocks.reshape(*shape[:-1], -1)


def _fp16(x: float) -> Bytes:
    return np.frombuffer(np.float16(x).tobytes(), np.uint8)


def experts(recipe: Recipe, kind: str, layer: int, part: int, shape: tuple[int, ...]) -> Bytes:
    """[E, N, bytes of a row]; part 0 gate, 1 up, 2 down."""
    return matrix(recipe.stream("gguf", layer, part), kind, shape,
                  recipe.spread("w2" if part == 2 else "w13", layer))


def linear(recipe: Recipe, kind: str, name: str, layer: int, shape: tuple[int, int]) -> Bytes:
    """[N, bytes of a row]."""
    return matrix(recipe.stream("gguf " + name, layer), kind, shape, recipe.spread(name, layer))


def q_matrix(recipe: Recipe, kind: str, layer: int) -> Bytes:
    """Each query head a copy of its key head."""
    keys = linear(recipe, kind, "k", layer, (recipe.kv_heads * HEAD, recipe.hidden))
    repeated = keys.reshape(recipe.kv_heads, HEAD, -1).repeat(recipe.heads // recipe.kv_heads, axis=0)
    return repeated.reshape(recipe.heads * HEAD, -1)


def embedding(recipe: Recipe) -> NDArray[np.float16]:
    """[V, H], the store's, through bf16 as there."""
    whole = np.empty((recipe.vocab, recipe.hidden), np.float16)
    for start in range(0, recipe.vocab, CLUSTER):
        rows = whole[start:start + CLUSTER]
        rows[:] = _bf16(recipe.embedding(start // CLUSTER)[:len(rows)])
    return whole


def router(recipe: Recipe, layer: int) -> NDArray[np.float32]:
    """[E, H], the store's, through bf16 as there."""
    return _bf16(recipe.router(layer))


def _bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to bf16, half to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def drafts(recipe: Recipe, types: str = "mixed") -> Iterator[Draft]:
    """Every tensor in the order of the file; values are drawn when it is their turn."""
    hidden, inner, vocab = recipe.hidden, recipe.inner, recipe.vocab
    queries, keys = recipe.heads * HEAD, recipe.kv_heads * HEAD
    ones = partial(np.ones, hidden, np.float32)
    yield "token_embd.weight", "F16", (vocab, hidden), partial(embedding, recipe)
    for i in range(recipe.layers):
        p = f"blk.{i}."
        kinds = {name: type_of(types, name, i, recipe.layers) for name in ("q", "k", "v", "o", "gate", "up", "down")}
        yield p + "attn_norm.weight", "F32", (hidden,), ones
        yield p + "attn_q.weight", kinds["q"], (queries, hidden), partial(q_matrix, recipe, kinds["q"], i)
        for name, long, shape in (("k", "k", (keys, hidden)), ("v", "v", (keys, hidden)),
                                  ("o", "output", (hidden, queries))):
            yield p + f"attn_{long}.weight", kinds[name], shape, partial(linear, recipe, kinds[name], name, i, shape)
        for name in ("q", "k") if recipe.head_norms else ():
            yield p + f"attn_{name}_norm.weight", "F32", (HEAD,), partial(np.ones, HEAD, np.float32)
        yield p + "ffn_norm.weight", "F32", (hidden,), ones
        yield p + "ffn_gate_inp.weight", "F32", (recipe.experts, hidden), partial(router, recipe, i)
        for part, (name, rows, cols) in enumerate((("gate", inner, hidden), ("up", inner, hidden),
                                                   ("down", hidden, inner))):
            each = (recipe.experts, rows, cols)
            yield p + f"ffn_{name}_exps.weight", kinds[name], each, partial(
                experts, recipe, kinds[name], i, part, each)
    head = type_of(types, "head", 0, recipe.layers)
    yield "output_norm.weight", "F32", (hidden,), ones
    yield "output.weight", head, (vocab, hidden), partial(linear, recipe, head, "head", 0, (vocab, hidden))


def tensor_bytes(kind: str, shape: Sequence[int]) -> int:
    if kind in ITEMS:
        return prod(shape) * ITEMS[kind]
    weights, nbytes, *_ = BLOCKS[kind]
    return prod(shape) // weights * nbytes


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
    draft = path.with_name(path.name + ".partial")
    qwen3 = isinstance(recipe, Qwen3Recipe)
    writer = gguf.GGUFWriter(draft, "qwen3moe" if qwen3 else "llama")
    writer.add_name(f"synthetic, {recipe.layers} layers")
    for add, value in ((writer.add_block_count, recipe.layers), (writer.add_context_length, 32768),
                       (writer.add_embedding_length, recipe.hidden), (writer.add_feed_forward_length, recipe.inner),
                       (writer.add_head_count, recipe.heads), (writer.add_head_count_kv, recipe.kv_heads),
                       (writer.add_rope_dimension_count, HEAD), (writer.add_rope_freq_base, 1e6),
                       (writer.add_layer_norm_rms_eps, recipe.eps), (writer.add_expert_count, recipe.experts),
                       (writer.add_expert_used_count, recipe.chosen), (writer.add_vocab_size, recipe.vocab)):
        add(value)
    if qwen3:
        for add, value in ((writer.add_expert_feed_forward_length, recipe.inner), (writer.add_key_length, HEAD),
                           (writer.add_value_length, HEAD)):
            add(value)
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
