"""The native attention of one token: GB/s of keys and values beside the rate at which memory can be read.

    python benchmarks/cpu_attention.py                                # this processor's best level, bf16 and int8
    python benchmarks/cpu_attention.py --positions 512,8192 -t 1,2    # Mixtral's heads, one and two threads
    python benchmarks/cpu_attention.py --against OLD.so               # beside the library of another build

The caches of several layers are larger together than the last cache, so each call finds its keys and values in memory.
In each turn every library attends once in each layer, and a bare read of as many bytes follows; ratios are taken within
a turn, then their median. OLD.so is _native*.so of another commit with the same ABI.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cpu_kernels import seconds
from peers import numbers
from peers_report import cell, table
from torch import Tensor

from qmix import settings
from qmix.hardware.cores import cpu_model, last_level_cache
from qmix.kernels import native
from qmix.kernels.native import Attention, Kept


def at_library(level: str, threads: int, path: Path | None = None) -> Attention:
    """Attention at one level, of this build or of the library at `path`."""
    found = Attention(level)
    found.threads = threads
    if path is not None:
        found._attend = ctypes.CDLL(str(path.resolve())).qmix_attend
    return found


def random_layers(kv: str, kv_heads: int, head_dim: int, positions: int, nbytes: int) -> list[Kept]:
    """Caches of random numbers, at least two, together of `nbytes` or more."""
    random, found = torch.Generator().manual_seed(0), []
    shape = (2, kv_heads, positions, head_dim)
    while len(found) < 2 or sum(cache_bytes(one) for one in found) < nbytes:
        if kv == "int8":
            keys, values = torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)
            scales = torch.rand(2, kv_heads, positions, generator=random) / 64
            found.append(Kept(keys, values, *scales))
        else:
            found.append(Kept(*torch.randn(shape, generator=random).bfloat16()))
    return found


def cache_bytes(kept: Kept) -> int:
    return sum(t.nbytes for t in (kept.keys, kept.values, kept.key_scales, kept.value_scales) if t is not None)


def measure(kernels: dict[str, Attention], layers: Sequence[Kept], query_heads: int, turns: int,
            clock: Callable[[], float]) -> dict[str, Any]:
    """{"nbytes", "seconds": {library: of each turn}, "read": of each turn}, after one turn that does not count."""
    kv_heads, positions, size = layers[0].keys.shape
    random = torch.Generator().manual_seed(1)
    q = torch.randn(1, query_heads, size, generator=random).bfloat16()
    keys, values = torch.randn(2, 1, kv_heads, size, generator=random)
    halves: list[Tensor] = [t.view(-1).view(torch.float64) for one in layers for t in (one.keys, one.values)]
    threads, before = next(iter(kernels.values())).threads, torch.get_num_threads()
    took: dict[str, list[float]] = {name: [] for name in kernels}
    read: list[float] = []
    torch.set_num_threads(threads)
    try:
        for _ in range(turns + 1):
            for name, own in kernels.items():
                took[name].append(seconds(
                    lambda own=own: [own.append(one, q, keys, values, 0, positions)  # type: ignore[misc]
                                     for one in layers], clock))
            read.append(seconds(lambda: [half.sum() for half in halves], clock))
    finally:
        torch.set_num_threads(before)
    return {"nbytes": sum(map(cache_bytes, layers)), "read_bytes": sum(half.nbytes for half in halves),
            "calls": len(layers), "seconds": {k: v[1:] for k, v in took.items()}, "read": read[1:]}


def row(label: Sequence[str], name: str, found: dict[str, Any], first: str) -> list[str]:
    own = found["seconds"][name]
    rates = [found["nbytes"] / s / 1e9 for s in own]
    read = [found["read_bytes"] / s / 1e9 for s in found["read"]]
    return [*label, name, f"{1e6 * statistics.median(own) / found['calls']:.0f}", f"{statistics.median(rates):.1f}",
            f"{max(rates):.1f}", f"{statistics.median(read):.1f}",
            cell([100 * a / b for a, b in zip(rates, read, strict=True)]),
            cell([a / b for a, b in zip(found["seconds"][first], own, strict=True)])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default="", help="of the native kernels (default: the best here)")
    parser.add_argument("--kv", default="bf16,int8", help="how keys and values are kept")
    parser.add_argument("--positions", type=numbers, default=[8192])
    parser.add_argument("--heads", default="32,8,128", metavar="Q,KV,D", help="query heads, key-value heads, head size")
    parser.add_argument("-t", "--threads", type=numbers, default=[torch.get_num_threads()])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--mib", type=int, help="of caches (default: four times the last cache, at least 160)")
    parser.add_argument("--against", type=Path, metavar="OLD.so")
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's seconds of one thread, where "
                        "other programs run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every turn")
    args = parser.parse_args()
    if not native.levels():
        parser.error(f"there are no native kernels here: {native.trouble()}")
    level = args.level or settings.native_level() or next(iter(native.levels()))
    if level not in native.levels():
        parser.error(f"--level {level}: this processor has " + ", ".join(native.levels()))
    if unknown := [name for name in args.kv.split(",") if name not in ("bf16", "int8")]:
        parser.error(f"--kv: got {unknown[0]!r}, want bf16, int8")
    heads = [int(word) if word.isdigit() and int(word) else 0 for word in args.heads.split(",")]
    if len(heads) != 3 or 0 in heads or heads[0] % heads[1] or heads[2] % native.HEAD_UNIT:
        parser.error(f"--heads: got {args.heads}, want Q,KV,D: Q a multiple of KV, D of {native.HEAD_UNIT}")
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time: wants -t 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    nbytes = 2**20 * args.mib if args.mib else max(160 * 2**20, 4 * last_level_cache())
    rows, archive = [], []
    for kv in args.kv.split(","):
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
