"""The native kernels of the CPU, one format at a time: GB/s of weights beside the rate at which memory can be read.

    python benchmarks/cpu_kernels.py                                     # this processor's best level, one token
    python benchmarks/cpu_kernels.py --level avx2 --tokens 1,2,4,8 -t 1  # on one thread
    python benchmarks/cpu_kernels.py --against OLD.so                    # beside the library of another build

The matrices of a format are larger together than the last cache, so each call finds its weights in memory. In each
turn every library computes all matrices once, and a bare read of as many bytes follows; ratios are taken within a turn,
then their median. GOP/s count a product and a sum as two operations; they are compared with the bare dot products of
the same number of threads (NativeProducts.peak). OLD.so is _native*.so of another commit with the same ABI.
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

from qmix.formats.packed import TORCH_DTYPES, Packed
from qmix.hardware.cores import cpu_model
from qmix.kernels.native import NativeProducts, Product
from qmix.sizes import CARRIED, MX_GROUP, MatrixSpec, with_layout

FORMATS = ("int4/64", "int4/32", "mxfp4/64", "int3/64", "int3/32", "int2/64", "int2/32", "int8",
           *(f"{name}/64" for name in CARRIED))


def random_matrices(name: str, rows: int, cols: int, nbytes: int) -> list[Packed]:
    """Matrices of random codes, at least two, together of `nbytes` or more."""
    kind, _, block = name.partition("/")
    group = MX_GROUP if kind == "mxfp4" else 64 if block else 0
    spec = MatrixSpec(rows=rows, cols=cols, **with_layout(kind)) if kind in CARRIED else \
        MatrixSpec(kind, rows, cols, group_size=group, block=int(block or 0))
    random, found = torch.Generator().manual_seed(0), []
    while len(found) < 2 or sum(m.spec.nbytes for m in found) < nbytes:
        tensors = {}
        for part in spec.tensors:
            if part.dtype == "BF16":
                tensors[part.name] = torch.randn(part.shape, generator=random).bfloat16()
            elif part.name == "scales":  # of ggml's formats: all numbers finite and small
                tensors[part.name] = torch.randint(20, 40, part.shape, dtype=torch.uint8, generator=random)
            elif kind == "mxfp4" and part.name == "scale":
                tensors[part.name] = torch.randint(120, 128, part.shape, dtype=torch.uint8, generator=random)
            else:
                whole = torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype])
                whole.view(-1).view(torch.int64).random_(generator=random)
                tensors[part.name] = whole
        found.append(Packed.of(spec, tensors))
    return found


def at_library(level: str, activations: str, threads: int, path: Path | None = None) -> NativeProducts:
    """The kernels of one level, of this build or of the library at `path`."""
    found = NativeProducts(level, activations)
    found.threads = threads
    if path is not None:
        found._library = ctypes.CDLL(str(path.resolve()))
        found._library.qmix_peak.restype = ctypes.c_int64
        found._products = found._library.qmix_products
    return found


def measure(kernels: dict[str, NativeProducts], matrices: Sequence[Packed], tokens: int, turns: int,
            clock: Clock) -> dict[str, Any]:
    """{"nbytes", "operations", "seconds": {library: of each turn}, "read": of each turn}, after one turn that does not
    count."""
    spec = matrices[0].spec
    x = torch.randn(tokens, spec.cols, generator=torch.Generator().manual_seed(1))
    outputs = [torch.empty(tokens, spec.rows) for _ in matrices]
    numbers_of = [m["qweight"].view(-1).view(torch.float64) for m in matrices]
    works = {name: lambda own=own: [own.run([Product(x, m, y)])  # type: ignore[misc]
                                    for m, y in zip(matrices, outputs, strict=True)] for name, own in kernels.items()}
    threads = next(iter(kernels.values())).threads
    took, read = take_turns(works, bare_read(numbers_of, threads), turns, clock)
    weights = sum(m.spec.padded_rows * m.spec.padded_cols for m in matrices)
    return {"nbytes": sum(m.spec.nbytes for m in matrices), "read_bytes": sum(m["qweight"].numel() for m in matrices),
            "operations": 2 * tokens * weights, "weights": weights, "seconds": took, "read": read}


def row(label: Sequence[str], name: str, found: dict[str, Any], peak: float, first: str) -> list[str]:
    own = found["seconds"][name]
    rates = [found["nbytes"] / s / 1e9 for s in own]
    read = [found["read_bytes"] / s / 1e9 for s in found["read"]]
    return [*label, name, f"{statistics.median(rates):.1f}", f"{max(rates):.1f}", f"{statistics.median(read):.1f}",
            ratios([100 * rate for rate in rates], read),
            f"{found['weights'] / statistics.median(own) / 1e9:.1f}",
            f"{100 * found['operations'] / statistics.median(own) / peak:.0f}",
            ratios(found["seconds"][first], own)]


def main() -> None:
    parser = make_parser(__doc__, "matrices")
    parser.add_argument("--activations", choices=("int8", "bf16"), default="int8")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", type=numbers, default=[1])
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--cols", type=int, default=4096)
    args = parser.parse_args()
    level, clock, nbytes = level_of(parser, args), clock_of(parser, args), bytes_of(args)
    formats = check_names(parser, "--formats", args.formats, FORMATS)
    rows, archive = [], []
    for name in formats:
        matrices = random_matrices(name, args.rows, args.cols, nbytes)
        for threads in args.threads:
            kernels = {"this": at_library(level, args.activations, threads)}
            if args.against:
                kernels = {"other": at_library(level, args.activations, threads, args.against), **kernels}
            peak = kernels["this"].peak(threads)
            for tokens in args.tokens:
                found = measure(kernels, matrices, tokens, args.turns, clock)
                archive.append({"format": name, "threads": threads, "tokens": tokens, "peak": peak, **found})
                rows += [row([name, str(threads), str(tokens)], library, found, peak, next(iter(kernels)))
                         for library in kernels]
    print(f"{cpu_model(Path('/'))}; level {level}, {args.activations} activations, {args.rows} x {args.cols}, "
          "group 64 (mxfp4 and ggml's: their own)\n")
    print(table(["format", "threads", "tokens", "library", "GB/s", "best", "read GB/s", "% of the read rate",
                 "G weights/s", "% of bare dots", "times the first"], rows))
    if args.json:
        args.json.write_text(json.dumps(archive, indent=1) + "\n")


if __name__ == "__main__":
    main()
