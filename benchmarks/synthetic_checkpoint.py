"""Write a random checkpoint as wide as Mixtral 8x7B, in Hugging Face layout, of a chosen size.

    python benchmarks/synthetic_checkpoint.py OUT --gib 5
    python benchmarks/synthetic_checkpoint.py OUT --layers 32          # all 93 GB of it

Normal weights of deviation 0.02, reproducible by --seed; sharded with an index; streamed in pieces of 16 MiB, so
that the size does not matter to the memory. Speed and memory of the quantizer can be measured on it,
quality cannot. There is no tokenizer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from qmix.models import layouts, read_model
from qmix.spec import Model
from qmix.spec.model import layer_of
from qmix.tensorfile import Entry, build_header, write_exact

PIECE = 2**23  # weights drawn at a time
KINDS = {"bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16), "float32": ("F32", torch.float32)}


def raw_config(args: argparse.Namespace) -> dict[str, object]:
    """config.json of Mixtral 8x7B v0.1 with other counts."""
    return {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "vocab_size": 32000,
        "hidden_size": args.hidden, "intermediate_size": args.inner, "num_hidden_layers": args.layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": args.experts,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
        "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": args.dtype,
    }


def tensors_of(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape), a layer's experts after its attention, as in the original."""
    experts: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    table = layouts(model)[0]
    for key in model.expert_keys:
        experts.setdefault(key.layer, []).extend((table[t.name].name, t.shape) for t in model.expert_tensors(key))
    for tensor in model.tensors():
        yield table[tensor.name].name, tensor.shape
        if tensor.role == "router":
            yield from experts[layer_of(tensor.name)]


def shards_of(model: Model, item: int, limit: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors, in order, in files of at most `limit` bytes."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensors_of(model):
        nbytes = prod(shape) * item
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    return shards


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], kind: str, dtype: torch.dtype,
                random: torch.Generator) -> None:
    header, entries = build_header([(name, kind, shape) for name, shape in tensors], 8)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_exact(fd, header, 0)
        for entry in entries:
            for offset, piece in draw(entry, dtype, random):
                memory = memoryview((ctypes.c_char * piece.nbytes).from_address(piece.data_ptr()))
                write_exact(fd, memory, offset)
                os.posix_fadvise(fd, offset, piece.nbytes, os.POSIX_FADV_DONTNEED)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def draw(entry: Entry, dtype: torch.dtype, random: torch.Generator) -> Iterator[tuple[int, torch.Tensor]]:
    """(offset in the file, values) of a tensor, piece by piece; norms are near 1."""
    mean = 1.0 if len(entry.shape) == 1 else 0.0
    count = prod(entry.shape)
    for start in range(0, count, PIECE):
        piece = torch.empty(min(PIECE, count - start)).normal_(mean, 0.02, generator=random).to(dtype)
        yield entry.offset + start * dtype.itemsize, piece


def layers_for(gib: float, model: Model, item: int) -> int:
    """Layers that make a checkpoint of at least so many GiB; `model` has one layer."""
    dense = sum(prod(t.shape) for t in model.tensors())
    outside = 2 * model.vocab * model.hidden + model.hidden
    layer = dense - outside + 3 * model.num_experts * model.hidden * model.expert_inner
    return max(1, -(-int(gib * 2**30 - outside * item) // (layer * item)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gib", type=float, default=5.0, help="at least this size (GiB), unless --layers is given")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--dtype", choices=KINDS, default="bfloat16")
    parser.add_argument("--shard-gib", type=float, default=4.6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kind, dtype = KINDS[args.dtype]
    if args.layers is None:
        args.layers = 1
        args.layers = layers_for(args.gib, read_model(raw_config(args)), dtype.itemsize)
    model = read_model(raw_config(args))
    args.out.mkdir(parents=True)
    shards = shards_of(model, dtype.itemsize, int(args.shard_gib * 2**30))
    random, weight_map = torch.Generator().manual_seed(args.seed), {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(args.out / name, tensors, kind, dtype, random)
        weight_map.update((tensor, name) for tensor, _ in tensors)
    total = sum(prod(shape) * dtype.itemsize for shard in shards for _, shape in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (args.out / "config.json").write_text(json.dumps(raw_config(args), indent=1))
    print(f"{args.out}: {args.layers} layers, {total / 2**30:.2f} GiB in {len(shards)} files")


if __name__ == "__main__":
    main()
