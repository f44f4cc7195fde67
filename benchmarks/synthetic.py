"""Write a random Mixtral 8x7B, Qwen3-30B-A3B, Qwen3.6-35B-A3B or gpt-oss-20b of a chosen depth, without ever having had
the original: a qmix store, and the same model for llama.cpp.

    python benchmarks/synthetic.py OUT --layers 12                     # 9.9 GB; 32 layers: 26 GB
    python benchmarks/synthetic.py OUT --layers 12 --gguf OUT.gguf     # both; --only-gguf for the second alone
    python benchmarks/synthetic.py OUT --model qwen3 --layers 24       # 9.6 GB, many small experts; all 48: 18.2
    python benchmarks/synthetic.py OUT --model gpt-oss --layers 12     # 7.1 GB, MXFP4 experts; all 24: 12.6
    python benchmarks/synthetic.py OUT --model qwen35 --layers 20      # 11.3 GB, most layers delta nets; all 40: 21.1
    python benchmarks/synthetic.py OUT --model qwen35-mtp --layers 20  # the same, and its prediction head
    python benchmarks/synthetic.py OUT --fit 22G                       # int4, int3 and int2 mixed
    python benchmarks/synthetic.py OUT --check [-f TEXT]               # how an existing store routes

The shapes, formats and bytes are the model's (experts int4 g64 or a mix, gpt-oss's mxfp4; the rest int8 or --dense
int4), so speed and memory can be measured on it; what it says is noise. How it routes is chosen: see
synthetic_recipe.py. Expert bytes are random, distinct, and streamed; the same flags give the same store. Needs numpy
and mistral-common.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from synthetic_models import RECIPES
from synthetic_recipe import (
    CLUSTER,
    Recipe,
    kind_of,
    local_tokens,
    microscales,
    prose_tokens,
    tokenizer_file,
    tokens_of,
    uniform_tokens,
)
from torch import Tensor

from qmix.config import GROUPED_BITS, ExpertKey, QuantConfig, parse_kind
from qmix.errors import QmixError
from qmix.kernels.table import native_block
from qmix.models import read_model
from qmix.quantize.fit import Wanted, mixed
from qmix.quantize.mix import FORMATS
from qmix.quantize.sensitivity import Sensitivity
from qmix.sizes import MatrixSpec, format_bytes, parse_bytes
from qmix.spec import WIDE, Model
from qmix.spec import Tensor as Named
from qmix.spec.model import layer_of
from qmix.store import CONFIG, MANIFEST, DenseEntry, FileEntry, Manifest, RecordEntry, StoreLayout, StoreWriter
from qmix.store.raw import digest

__all__ = ["Recipe", "local_tokens", "prose_tokens", "tokens_of", "uniform_tokens", "write_store"]

INT8_SPREAD = (127 * 128 / 3) ** 0.5  # of q, uniform in -127..127
Entries = tuple[dict[str, DenseEntry], dict[ExpertKey, RecordEntry]]


def random_bytes(random: np.random.Generator, nbytes: int) -> Tensor:
    """uint8 [nbytes], eight at a time: 2 to 3 GB/s, faster than the disk takes them."""
    return torch.from_numpy(random.integers(0, 2**64, -(-nbytes // 8), dtype=np.uint64).view(np.uint8)[:nbytes])


def grouped_matrix(random: np.random.Generator, spec: MatrixSpec, spread: float) -> dict[str, Tensor]:
    """int4, int3 or int2: random codes q, uniform in 0..2^bits - 1, of deviation sqrt((4^bits - 1) / 12).
    q - 2^(bits - 1) has mean -1/2, so zero = scale / 2 makes the weights' mean 0."""
    qweight, qparams = spec.tensors
    scale = torch.tensor(spread / ((4**spec.bits - 1) / 12) ** 0.5).bfloat16()
    return {"qweight": random_bytes(random, qweight.nbytes).view(qweight.shape),
            "qparams": torch.stack((scale, scale / 2)).expand(qparams.shape).contiguous()}


def mxfp4_matrix(random: np.random.Generator, spec: MatrixSpec, spread: float) -> dict[str, Tensor]:
    """Random codes, as often above as below 0."""
    qweight, scale = spec.tensors[:2]
    return {"qweight": random_bytes(random, qweight.nbytes).view(qweight.shape),
            "scale": torch.from_numpy(microscales(random, scale.shape, spread))}


def int8_matrix(random: np.random.Generator, spec: MatrixSpec, spread: float) -> dict[str, Tensor]:
    qweight, scale = spec.tensors
    q = random_bytes(random, qweight.nbytes).view(torch.int8).view(qweight.shape)
    q[q == -128] = 0
    return {"qweight": q, "scale": torch.full(scale.shape, spread / INT8_SPREAD).bfloat16()}


def dense_matrix(random: np.random.Generator, spec: MatrixSpec, spread: float) -> dict[str, Tensor]:
    return (grouped_matrix if spec.format == "int4" else int8_matrix)(random, spec, spread)


def dense_tensor(recipe: Recipe, tensor: Named, spec: MatrixSpec | None) -> dict[str, Tensor]:
    """{tensor name: values} of one dense tensor of the model."""
    layer = layer_of(tensor.name) or 0
    if spec is None:
        if tensor.role == "embedding":
            whole = torch.empty(tensor.shape, dtype=torch.bfloat16)
            for cluster, rows in enumerate(whole.split(CLUSTER)):
                rows.copy_(torch.from_numpy(recipe.embedding(cluster)[:len(rows)]))
            return {"weight": whole}
        plain = torch.from_numpy(recipe.plain(tensor.name, tensor.shape)).bfloat16()
        return {"weight": plain.float() if tensor.role in WIDE else plain}
    kind = kind_of(tensor.name)
    if not kind.endswith("q"):
        return dense_matrix(recipe.stream(kind, layer), spec, recipe.spread(kind, layer))
    (heads, group), kind = recipe.key_heads(tensor.name), kind[:-1] + "k"
    keys = dense_matrix(recipe.stream(kind, layer), replace(spec, rows=spec.rows // group), recipe.spread(kind, layer))
    if spec.format == "int4":  # qparams are the same in every row
        return {"qweight": copied(keys["qweight"], heads, group),
                "qparams": keys["qparams"].repeat(1, group, 1)}
    return {name: copied(t, heads, group) for name, t in keys.items()}


def copied(keys: Tensor, heads: int, times: int) -> Tensor:
    """Each of `heads` equal pieces of the first dimension, `times` over."""
    return keys.unflatten(0, (heads, -1)).repeat_interleave(times, 0).flatten(0, 1)


def record(recipe: Recipe, key: ExpertKey, specs: Mapping[str, MatrixSpec]) -> dict[tuple[str, str], Tensor]:
    """{(matrix, tensor name): values} of one expert."""
    found = {}
    for matrix, spec in specs.items():
        draw = mxfp4_matrix if spec.format == "mxfp4" else grouped_matrix
        values = draw(recipe.stream(matrix, *key), spec, recipe.spread(matrix, key.layer))
        if spec.bias:
            values["bias"] = torch.from_numpy(recipe.expert_bias(key.layer, key.expert, matrix, spec.rows))
        found |= {(matrix, name): tensor for name, tensor in values.items()}
    return found


def layout_of(recipe: Recipe, dense: str = "int8", size: int = 0) -> tuple[Model, QuantConfig, StoreLayout]:
    """size: bytes of a mixed store, as `qmix quantize --fit` has it; 0 for the recipe's format throughout."""
    model = read_model(recipe.raw_config())
    if recipe.expert_format not in GROUPED_BITS and dense not in GROUPED_BITS:
        quant = QuantConfig(recipe.expert_format, dense, method="", group_size=0, block=0)
    else:
        quant = QuantConfig(recipe.expert_format, dense, method="rtn", block=recipe.block or native_block())
    if size:
        quant, _ = mixed(model, quant, random_sensitivity(recipe, model), Wanted(nbytes=size))
    return model, quant, StoreLayout.of(model, quant)


def random_sensitivity(recipe: Recipe, model: Model) -> Sensitivity:
    """There is nothing to measure: damages a quarter as large a bit, times a factor of each expert's own, so that the
    chooser mixes formats within every layer as it does for trained models."""
    factors = {key: float(np.exp(recipe.stream("damage", *key).standard_normal())) for key in model.expert_keys}

    def damage(name: str) -> float:
        kind, group = parse_kind(name)
        return float(4.0**-(GROUPED_BITS[kind] + 32 / group))

    rows = {name: damage(name) for name in FORMATS}
    damages = {key: {matrix: {name: factor * value for name, value in rows.items()} for matrix in ("w13", "w2")}
               for key, factor in factors.items()}
    return Sensitivity(damages, dict.fromkeys(factors, 0), [0.0] * model.num_layers)


def bytes_per_token(recipe: Recipe, dense: str = "int8") -> int:
    """Bytes of weights that one token reads: all but the experts not chosen and the embeddings of other tokens."""
    model, _, layout = layout_of(recipe, dense)
    embedding = layout.dense["embedding"].nbytes
    return (sum(region.nbytes for region in layout.dense.values()) - embedding + embedding // model.vocab
            + model.chosen * layout.record_bytes)


def write_store(recipe: Recipe, out: Path, dense_format: str = "int8", workers: int = 1,
                tokenizer: Path | None = None, size: int = 0) -> int:
    """Write the store, through a temporary name; returns its bytes. workers: processes that draw and write, which
    changes no byte; tokenizer: another tokenizer.model than Mixtral's; size: see layout_of."""
    model, quant, layout = layout_of(recipe, dense_format, size)
    folder = out.with_name(out.name + ".partial")
    folder.mkdir(parents=True)
    dense, records = {}, {}
    for some_dense, some_records in parts(recipe, folder, dense_format, workers, size):
        dense |= some_dense
        records |= some_records
    copies = {CONFIG: json.dumps(recipe.raw_config(), indent=1).encode(),
              "tokenizer.model": (tokenizer or tokenizer_file()).read_bytes()}
    for name, data in copies.items():
        (folder / name).write_bytes(data)
    name = f"synthetic-{recipe.layers}-layers"
    files = {name: FileEntry(name, len(data), digest(data)) for name, data in copies.items()}
    manifest = Manifest(name, None, digest(repr(recipe).encode()), model, quant,
                        {key: records[key] for key in layout.records},
                        {t.name: dense[t.name] for t in model.tensors()}, files)
    (folder / MANIFEST).write_bytes(manifest.to_json())
    os.sync()
    folder.rename(out)
    return layout.nbytes


def parts(recipe: Recipe, folder: Path, dense_format: str, workers: int, size: int = 0) -> Iterator[Entries]:
    """What each of `workers` has written. Processes and not threads: most of the time goes into fresh memory, which
    threads of one process wait for in turn."""
    if workers == 1:
        yield write_part(recipe, folder, dense_format, 0, 1, size)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for job in [pool.submit(write_part, recipe, folder, dense_format, part, workers, size)
                    for part in range(workers)]:
            yield job.result()


def write_part(recipe: Recipe, folder: Path, dense_format: str, part: int, of: int, size: int = 0) -> Entries:
    """Every `of`th dense tensor and record, from number `part` on; their entries in the manifest. Each part opens
    files of its own: they write different regions, and the same headers."""
    model, _, layout = layout_of(recipe, dense_format, size)
    none = {"w13": 0.0, "w2": 0.0, "all": 0.0}  # there was no original to differ from
    dense, records = {}, {}
    with StoreWriter(folder, layout) as writer:
        for tensor in islice(model.tensors(), part, None, of):
            region, spec = layout.dense[tensor.name], layout.specs[tensor.name]
            values = dense_tensor(recipe, tensor, spec)
            xxh3 = writer.write(region, {("", name): value for name, value in values.items()})
            dense[tensor.name] = DenseEntry(tensor.name, spec.format if spec else "plain", region.file,
                                            region.offset, region.nbytes, xxh3, 0.0 if spec else None)
        for key, region in islice(layout.records.items(), part, None, of):
            kind = layout.record(key)
            xxh3 = writer.write(region, record(recipe, key, {"w13": kind.w13, "w2": kind.w2}))
            records[key] = RecordEntry(key, region.file, region.offset, region.nbytes, xxh3, none)
        writer.sync()
    return dense, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the store's folder")
    parser.add_argument("--model", choices=tuple(RECIPES), default="mixtral")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recall", type=float, help="of the next router, asked one layer early (Mixtral 0.85)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw and write; the bytes are the same")
    parser.add_argument("--hidden", type=int, help="other than the model's only to try things out")
    parser.add_argument("--inner", type=int)
    parser.add_argument("--dense", choices=("int8", "int4"), default="int8", help="attention and head (int8)")
    parser.add_argument("--fit", metavar="SIZE", help="a mix of int4, int3 and int2 of this size, as 22G")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="also write the model for llama.cpp (needs gguf)")
    parser.add_argument("--gguf-type", choices=("mixed", "q4_0", "q4_k_m"), default="mixed",
                        help="mixed is Q4_0 experts and Q8_0 attention and head; see synthetic_gguf.py")
    parser.add_argument("--only-gguf", action="store_true", help="no store")
    parser.add_argument("--check", action="store_true", help="write nothing, measure how the store OUT routes")
    parser.add_argument("-n", "--tokens", type=int, default=512, help="of a sequence to check")
    parser.add_argument("-f", "--file", help="check with this text too")
    args = parser.parse_args()
    if args.check:
        from synthetic_check import report

        report(args.out, ["uniform", "local", *([args.file] if args.file else [])], args.tokens, args.seed)
        return
    if args.only_gguf and not args.gguf:
        parser.error("--only-gguf wants --gguf FILE")
    if args.model == "qwen35-mtp" and (args.gguf or args.fit):
        parser.error("--model qwen35-mtp: is for a store of one format")
    if args.fit and (kind := RECIPES[args.model].expert_format) != "int4":
        parser.error(f"--fit: {args.model}'s experts are {kind}, want a model whose experts are int4")
    try:
        given = {name: getattr(args, name) for name in ("recall", "hidden", "inner") if getattr(args, name) is not None}
        recipe = RECIPES[args.model](args.layers, seed=args.seed, **given)
    except ValueError as e:
        parser.error(str(e))
    tokenizer_file()  # a missing one is said before anything large is written
    taken = [path for path in (args.gguf, None if args.only_gguf else args.out) if path and path.exists()]
    if taken:
        parser.error(f"{taken[0]}: exists")
    start = time.perf_counter()
    if not args.only_gguf:
        try:
            nbytes = write_store(recipe, args.out, args.dense, max(1, args.workers),
                                 size=parse_bytes(args.fit) if args.fit else 0)
        except QmixError as e:
            parser.error(f"--fit {args.fit}: {e.message}")
        rate = nbytes / 1e9 / (time.perf_counter() - start)
        print(f"{args.out}: {args.layers} layers, {format_bytes(nbytes)}, {rate:.2f} GB/s")
    if args.gguf:
        from synthetic_gguf import write_gguf

        start = time.perf_counter()
        nbytes = write_gguf(recipe, args.gguf, args.gguf_type)
        rate = nbytes / 1e9 / (time.perf_counter() - start)
        print(f"{args.gguf}: {args.layers} layers, {format_bytes(nbytes)}, {rate:.2f} GB/s")


if __name__ == "__main__":
    main()
