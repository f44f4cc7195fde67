"""How fast and in how much memory does `qmix quantize` go through a checkpoint?

    python benchmarks/synthetic_checkpoint.py wide --gib 5
    python benchmarks/quantize.py wide wide-store

For each --config one fresh process; a table with decimal MB/s of source weights from start to renamed store
(reading, writing and syncing included), the peak resident size of the process (VmHWM), its processor seconds (user
and system; less than threads x seconds where others had the cores), and beside them what memory and disk of
this machine gave in the same minute, since on a shared machine both move. The store at OUT is deleted
after each run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from qmix.hardware import physical_cores
from qmix.render import table

RUN = """
import json, os, sys, time
from pathlib import Path
from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.quantize import quantize_checkpoint
source, out, quant, threads = json.loads(sys.argv[1])
start = time.perf_counter()
with Checkpoint.open(source) as checkpoint:
    report = quantize_checkpoint(checkpoint, out, QuantConfig(**quant), threads=threads)
seconds = time.perf_counter() - start
peak = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "source": report.source_bytes, "store": report.nbytes,
                  "bits": report.classes[0].bits_per_weight, "error": report.classes[0].error_mean,
                  "peak": int(peak.split()[1]) * 1024, "cpu": sum(os.times()[:2])}))
"""
PLAIN = {"method": "", "group_size": 0, "block": 0}
CONFIGS = {
    "rtn": {"method": "rtn"}, "hqq": {"method": "hqq"}, "hqq-g32": {"method": "hqq", "group_size": 32},
    "nf4": {"experts": "nf4", **PLAIN}, "nf4-double": {"experts": "nf4", "double_quant": True, **PLAIN},
    "keep": {"experts": "keep", "dense": "keep", **PLAIN},
}


def read_memory(threads: int) -> float:
    """Decimal GB/s of summing 1 GiB, best of three."""
    torch.set_num_threads(threads)
    data = torch.ones(2**28)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / 1e9 / (time.perf_counter() - start))
    return best


def read_disk(source: Path, nbytes: int = 2**30) -> float:
    """Decimal GB/s of a buffered read of weights that are not in the page cache."""
    path = max(source.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    buffer, done = bytearray(2**23), 0
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while done < nbytes and (got := file.readinto(buffer)):
            done += got
        seconds = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return done / 1e9 / seconds


def measure(source: Path, out: Path, name: str, threads: int) -> dict[str, object]:
    job = json.dumps([str(source), str(out), CONFIGS[name], threads])
    disk, memory = read_disk(source), read_memory(threads)
    try:
        done = subprocess.run([sys.executable, "-c", RUN, job], capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{name}: {error.stderr}")
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(f"{out}.partial", ignore_errors=True)
    result = json.loads(done.stdout)
    return {"config": name, "source GB": round(result["source"] / 1e9, 2),
            "seconds": round(result["seconds"], 1), "CPU s": round(result["cpu"], 1),
            "MB/s": round(result["source"] / 1e6 / result["seconds"]), "peak MiB": result["peak"] // 2**20,
            "bits/weight": round(result["bits"], 3), "error": result["error"],
            "memory GB/s": round(memory, 1), "disk GB/s": round(disk, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, help="written and deleted again; must not exist")
    parser.add_argument("--config", action="append", choices=CONFIGS, help="default: rtn and hqq")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--output", choices=["table", "md", "json", "csv"], default="md")
    args = parser.parse_args()
    if args.out.exists() or Path(f"{args.out}.partial").exists():
        sys.exit(f"{args.out} or {args.out}.partial exists: it would be deleted; choose another OUT")
    print(f"{args.threads} threads, torch {torch.__version__}", file=sys.stderr)
    print(table([measure(args.source, args.out, name, args.threads) for name in args.config or ["rtn", "hqq"]],
                args.output))


if __name__ == "__main__":
    main()
