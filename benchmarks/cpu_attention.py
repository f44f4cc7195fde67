"""The native attention of one token: GB/s of keys and values beside the rate at which memory can be read.

    python benchmarks/cpu_attention.py                                # this processor's best level, bf16 and int8
    python benchmarks/cpu_attention.py --positions 512,8192 -t 1,2    # Mixtral's heads, one and two threads
    python benchmarks/cpu_attention.py --against OLD.so               # beside the library of another build

The caches of several layers are larger together than the last cache, so each call finds its keys and values in memory.
In each turn every library attends once in each layer, and a bare read of as many bytes follows; ratios are taken within
a turn, then their median. OLD.so is _native*.so of another commit with the same ABI.
"""

from __future__ import annotations

import ctypes
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cpu_turns import Clock, bare_read, bytes_of, check_names, clock_of, level_of, make_parser, ratios, take_turns
from peers import numbers
from peers_report import table
from torch import Tensor

from qmix.hardware.cores import cpu_model
from qmix.kernels import native
from qmix.kernels.native import Attention, KVLayer


def at_library(level: str, threads: int, path: Path | None = None) -> Attention:
    """Attention at one level, of this build or of the library at `path`."""
    found = Attention(level)
    found.threads = threads
    if path is not None:
        found._attend = ctypes.CDLL(str(path.resolve())).qmix_attend
    return found


def random_layers(kv: str, kv_heads: int, head_dim: int, positions: int, nbytes: int) -> list[KVLayer]:
    """Caches of random numbers, at least two, together of `nbytes` or more."""
    random, found = torch.Generator().manual_seed(0), []
    shape = (2, kv_heads, positions, head_dim)
    while len(found) < 2 or sum(cache_bytes(one) for one in found) < nbytes:
        if kv == "int8":
            keys, values = torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)
            scales = torch.rand(2, kv_heads, positions, generator=random) / 64
            found.append(KVLayer(keys, values, *scales))
        else:
            found.append(KVLayer(*torch.randn(shape, generator=random).bfloat16()))
    return found


def cache_bytes(layer: KVLayer) -> int:
    return sum(t.nbytes for t in (layer.keys, layer.values, layer.key_scales, layer.value_scales) if t is not None)


def measure(kernels: dict[str, Attention], layers: Sequence[KVLayer], query_heads: int, turns: int,
            clock: Clock) -> dict[str, Any]:
    """{"nbytes", "seconds": {library: of each turn}, "read": of each turn}, after one turn that does not count."""
    kv_heads, positions, size = layers[0].keys.shape
    random = torch.Generator().manual_seed(1)
    q = torch.randn(1, query_heads, size, generator=random).bfloat16()
    keys, values = torch.randn(2, 1, kv_heads, size, generator=random)
    halves: list[Tensor] = [t.view(-1).view(torch.float64) for one in layers for t in (one.keys, one.values)]
    works = {name: lambda own=own: [own.append(one, q, keys, values, 0, positions)  # type: ignore[misc]
                                    for one in layers] for name, own in kernels.items()}
    threads = next(iter(kernels.values())).threads
    took, read = take_turns(works, bare_read(halves, threads), turns, clock)
    return {"nbytes": sum(map(cache_bytes, layers)), "read_bytes": sum(half.nbytes for half in halves),
            "calls": len(layers), "seconds": took, "read": read}


def row(label: Sequence[str], name: str, found: dict[str, Any], first: str) -> list[str]:
    own = found["seconds"][name]
    rates = [found["nbytes"] / s / 1e9 for s in own]
    read = [found["read_bytes"] / s / 1e9 for s in found["read"]]
    return [*label, name, f"{1e6 * statistics.median(own) / found['calls']:.0f}", f"{statistics.median(rates):.1f}",
            f"{max(rates):.1f}", f"{statistics.median(read):.1f}",
            ratios([100 * rate for rate in rates], read), ratios(found["seconds"][first], own)]


def main() -> None:
    parser = make_parser(__doc__, "caches")
    parser.add_argument("--kv", default="bf16,int8", help="how keys and values are kept")
    parser.add_argument("--positions", type=numbers, default=[8192])
    parser.add_argument("--heads", default="32,8,128", metavar="Q,KV,D", help="query heads, key-value heads, head size")
    args = parser.parse_args()
    level, clock, nbytes = level_of(parser, args), clock_of(parser, args), bytes_of(args)
    kinds = check_names(parser, "--kv", args.kv, ("bf16", "int8"))
    heads = [int(word) if word.isdigit() and int(word) else 0 for word in args.heads.split(",")]
    if len(heads) != 3 or 0 in heads or heads[0] % heads[1] or heads[2] % native.HEAD_UNIT:
        parser.error(f"--heads: got {args.heads}, want Q,KV,D: Q a multiple of KV, D of {native.HEAD_UNIT}")
    rows, archive = [], []
    for kv in kinds:
        for positions in args.positions:
            layers = random_layers(kv, heads[1], heads[2], positions, nbytes)
            for threads in args.threads:
                kernels = {"this": at_library(level, threads)}
                if args.against:
                    kernels = {"other": at_library(level, threads, args.against), **kernels}
                found = measure(kernels, layers, heads[0], args.turns, clock)
                archive.append({"kv": kv, "positions": positions, "threads": threads, **found})
                rows += [row([kv, str(positions), str(threads)], library, found, next(iter(kernels)))
                         for library in kernels]
    print(f"{cpu_model(Path('/'))}; level {level}, {heads[0]} query heads, {heads[1]} key-value heads of {heads[2]}\n")
    print(table(["KV", "positions", "threads", "library", "us a call", "GB/s", "best", "read GB/s",
                 "% of the read rate", "times the first"], rows))
    if args.json:
        args.json.write_text(json.dumps(archive, indent=1) + "\n")


if __name__ == "__main__":
    main()
