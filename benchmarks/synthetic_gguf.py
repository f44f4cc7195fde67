"""The synthetic model as a GGUF file for llama.cpp: Q4_0 experts, Q8_0 attention and head, F16 embedding, F32
router and norms, the vocabulary included.

Embedding, routers and norms are those of the store; experts and attention are other random weights of the
same deviations, so the routing has the same statistics. Q4_0 takes 4.5 bits a weight, as int4 g64 does.

Layouts (ggml-common.h), blocks of 32 weights along the input: Q4_0 fp16 d and 16 bytes, w = (q - 8) * d; Q8_0
fp16 d and 32 int8, w = q * d. Streamed: at most one tensor of a layer's experts in memory (264 MB).

E experts, N rows out, K columns in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from synthetic_recipe import CLUSTER, CLUSTERS, VOCAB, Recipe, tokenizer_file

Bytes = NDArray[np.uint8]
Draft = tuple[str, str, tuple[int, ...], Callable[[], NDArray]]  # name, type, logical shape, values

Q4_SPREAD = (2 * 140 / 16) ** 0.5  # deviation of q - 8, uniform in -7..7 with 0 twice
Q8_SPREAD = (127 * 128 / 3) ** 0.5  # of q, uniform in -127..127
# Any byte -> a byte whose nibbles are 1..15, mean 8: nibble 0 becomes 8.
CENTRED = np.array([(b & 15 or 8) | (b >> 4 or 8) << 4 for b in range(256)], np.uint8)


def _blocks(random: np.random.Generator, weights: int, payload: int, step: float) -> tuple[Bytes, Bytes]:
    """(blocks uint8 [weights / 32, 2 + payload] with d = step, their payload as a view), payload random."""
    blocks = np.empty((weights // 32, 2 + payload), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(step).tobytes(), np.uint8)
    for piece in np.array_split(blocks[:, 2:], max(1, blocks.nbytes >> 24)):
        piece[:] = random.integers(0, 2**64, piece.size // 8, dtype=np.uint64).view(np.uint8).reshape(piece.shape)
    return blocks, blocks[:, 2:]


def q4_experts(recipe: Recipe, matrix: str, layer: int, part: int, rows: int, cols: int) -> Bytes:
    """[E, N, bytes of a row]."""
    random, step = recipe.stream("gguf", layer, part), recipe.spread(matrix, layer) / Q4_SPREAD
    blocks, payload = _blocks(random, recipe.experts * rows * cols, 16, step)
    for piece in np.array_split(payload, max(1, payload.size >> 24)):
        piece[:] = CENTRED[piece]
    return blocks.reshape(recipe.experts, rows, -1)


def q8_matrix(recipe: Recipe, matrix: str, layer: int, rows: int, cols: int) -> Bytes:
    """[N, bytes of a row]."""
    blocks, payload = _blocks(recipe.stream("gguf " + matrix, layer), rows * cols, 32,
                              recipe.spread(matrix, layer) / Q8_SPREAD)
    payload[payload == 128] = 0  # -128
    return blocks.reshape(rows, -1)


def q_matrix(recipe: Recipe, layer: int) -> Bytes:
    """Each query head a copy of its key head."""
    keys = q8_matrix(recipe, "k", layer, recipe.kv_heads * 128, recipe.hidden).reshape(recipe.kv_heads, 128, -1)
    return keys.repeat(recipe.heads // recipe.kv_heads, axis=0).reshape(recipe.hidden, -1)


def embedding(recipe: Recipe) -> NDArray[np.float16]:
    """[V, H], the store's, through bf16 as there."""
    whole = np.empty((VOCAB, recipe.hidden), np.float16)
    for cluster in range(CLUSTERS):
        whole[cluster * CLUSTER:][:CLUSTER] = _bf16(recipe.embedding(cluster))
    return whole


def router(recipe: Recipe, layer: int) -> NDArray[np.float32]:
    """[E, H], the store's, through bf16 as there."""
    return _bf16(recipe.router(layer))


def _bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to bf16, half to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def drafts(recipe: Recipe) -> Iterator[Draft]:
    """Every tensor in the order of the file; values are drawn when it is their turn."""
    hidden, inner, keys = recipe.hidden, recipe.inner, recipe.kv_heads * 128
    ones, q8 = partial(np.ones, hidden, np.float32), partial(q8_matrix, recipe)
    yield "token_embd.weight", "F16", (VOCAB, hidden), partial(embedding, recipe)
    for i in range(recipe.layers):
        p = f"blk.{i}."
        yield p + "attn_norm.weight", "F32", (hidden,), ones
        yield p + "attn_q.weight", "Q8_0", (hidden, hidden), partial(q_matrix, recipe, i)
        yield p + "attn_k.weight", "Q8_0", (keys, hidden), partial(q8, "k", i, keys, hidden)
        yield p + "attn_v.weight", "Q8_0", (keys, hidden), partial(q8, "v", i, keys, hidden)
        yield p + "attn_output.weight", "Q8_0", (hidden, hidden), partial(q8, "o", i, hidden, hidden)
        yield p + "ffn_norm.weight", "F32", (hidden,), ones
        yield p + "ffn_gate_inp.weight", "F32", (recipe.experts, hidden), partial(router, recipe, i)
        for part, (name, matrix, rows, cols) in enumerate((("gate", "w13", inner, hidden), ("up", "w13", inner, hidden),
                                                           ("down", "w2", hidden, inner))):
            yield (p + f"ffn_{name}_exps.weight", "Q4_0", (recipe.experts, rows, cols),
                   partial(q4_experts, recipe, matrix, i, part, rows, cols))
    yield "output_norm.weight", "F32", (hidden,), ones
    yield "output.weight", "Q8_0", (VOCAB, hidden), partial(q8, "head", 0, VOCAB, hidden)


def write_gguf(recipe: Recipe, path: Path) -> int:
    """Write the file, through a temporary name; returns its bytes."""
    try:
        import gguf
    except ImportError:
        raise SystemExit("--gguf needs the package gguf: pip install gguf") from None
    draft = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(draft, "llama")
    writer.add_name(f"synthetic, {recipe.layers} layers")
    for add, value in ((writer.add_block_count, recipe.layers), (writer.add_context_length, 32768),
                       (writer.add_embedding_length, recipe.hidden), (writer.add_feed_forward_length, recipe.inner),
                       (writer.add_head_count, recipe.heads), (writer.add_head_count_kv, recipe.kv_heads),
                       (writer.add_rope_dimension_count, 128), (writer.add_rope_freq_base, 1e6),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_expert_count, recipe.experts),
                       (writer.add_expert_used_count, 2), (writer.add_vocab_size, VOCAB)):
        add(value)
    _add_vocabulary(writer)
    planned = list(drafts(recipe))
    for name, kind, shape, _ in planned:
        quantization = gguf.GGMLQuantizationType[kind]
        if kind.startswith("Q"):
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


def _add_vocabulary(writer: object) -> None:
    """Mixtral's sentencepiece vocabulary, token types as ggml counts them."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(tokenizer_file()))
    ids = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    writer.add_tokenizer_model("llama")  # type: ignore[attr-defined]
    writer.add_token_list([model.id_to_piece(i).encode() for i in ids])  # type: ignore[attr-defined]
    writer.add_token_scores([model.get_score(i) for i in ids])  # type: ignore[attr-defined]
    writer.add_token_types(kinds)  # type: ignore[attr-defined]
    writer.add_bos_token_id(model.bos_id())  # type: ignore[attr-defined]
    writer.add_eos_token_id(model.eos_id())  # type: ignore[attr-defined]
    writer.add_unk_token_id(model.unk_id())  # type: ignore[attr-defined]
