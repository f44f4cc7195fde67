"""How fast checkpoints become models, beside llama-quantize: GB of source a second, in turns, with equal threads.

    python benchmarks/synthetic_checkpoint.py wide --layers 1
    python benchmarks/conversion.py wide --peer-python PEER/bin/python            # has llama-cpp-python
    python benchmarks/conversion.py CHECKPOINT --gguf CHECKPOINT-BF16.gguf --peer-python PEER/bin/python

Of a checkpoint that synthetic_checkpoint.py wrote, a BF16 GGUF file is made once (needs gguf); of another one it is
given. Of that llama.cpp makes a Q4_K_M file. Then in each turn, each way once:

    qmix hqq, rtn          the safetensors to a store of int4 experts, dense int8
    qmix hqq, GGUF         the BF16 file to the same
    qmix auto              the Q4_K_M file to a store that carries it bit for bit
    llama.cpp Q4_0 ...     the BF16 file by llama_model_quantize

The page cache is emptied of the source before each, and each ends on the disk (fsync). Medians, smallest and largest.
Where other programs have the processors too, the GB of source a second of CPU say more than those a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import synthetic_gguf
from peers_report import table
from synthetic_recipe import Recipe

from qmix.hardware import physical_cores

HERE = Path(__file__).parent
CARRY = """
import json, os, sys, time
from pathlib import Path
from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.quantize import quantize_checkpoint
from qmix.quantize.carried import carry_all
source, out, way, threads = json.loads(sys.argv[1])
start, before = time.perf_counter(), sum(os.times()[:2])
with Checkpoint.open(source) as checkpoint:
    quant = carry_all(checkpoint, QuantConfig(), None) if way == "auto" else QuantConfig(method=way)
    quantize_checkpoint(checkpoint, out, quant, threads=threads)
print(json.dumps({"seconds": time.perf_counter() - start, "cpu": sum(os.times()[:2]) - before}))
"""
LLAMA = """
import json, os, sys, time
import llama_cpp as ll
source, out, way, threads = json.loads(sys.argv[1])
quiet = ll.llama_log_callback(lambda level, text, data: None)
ll.llama_log_set(quiet, None)
params = ll.llama_model_quantize_default_params()
params.nthread, params.ftype = threads, getattr(ll, "LLAMA_FTYPE_MOSTLY_" + way)
start, before = time.perf_counter(), sum(os.times()[:2])
if code := ll.llama_model_quantize(source.encode(), out.encode(), params):
    sys.exit(f"llama_model_quantize: {code}")
fd = os.open(out, os.O_RDWR)
os.fsync(fd)
print(json.dumps({"seconds": time.perf_counter() - start, "cpu": sum(os.times()[:2]) - before}))
"""
WAYS = (("qmix hqq", "source"), ("qmix rtn", "source"), ("qmix hqq, GGUF", "bf16"), ("qmix auto", "Q4_K_M"),
        ("llama.cpp Q4_0", "bf16"), ("llama.cpp Q4_K_M", "bf16"), ("llama.cpp Q8_0", "bf16"))


def bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])
               if file.suffix in (".safetensors", ".gguf"))


def forget(path: Path) -> None:
    """The page cache has nothing of a file or folder any more."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(name: str, source: Path, out: Path, python: str, threads: int) -> dict[str, Any]:
    """{"seconds", "cpu"} of one way; OUT is deleted."""
    program, way = name.split()[0], name.split()[1].rstrip(",")
    forget(source)
    job = json.dumps([str(source), str(out), way, threads])
    try:
        done = subprocess.run([sys.executable if program == "qmix" else python, "-c",
                               CARRY if program == "qmix" else LLAMA, job], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(out, ignore_errors=True)
        if out.is_file():
            out.unlink()


def recipe_of(checkpoint: Path) -> Recipe:
    raw = json.loads((checkpoint / "config.json").read_text())
    return Recipe(raw["num_hidden_layers"], hidden=raw["hidden_size"], inner=raw["intermediate_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peer-python", required=True, help="interpreter with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the checkpoint as a BF16 or F16 GGUF file")
    parser.add_argument("--work", type=Path, default=Path("conversion"), help="for files that are made (kept) and OUT")
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path, help="also write every run")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    gguf = args.gguf or args.work / f"{args.checkpoint.name}-bf16.gguf"
    if not gguf.exists():
        synthetic_gguf.write_gguf(recipe_of(args.checkpoint), gguf, checkpoint=args.checkpoint)
    carried = args.work / f"{args.checkpoint.name}-q4_k_m.gguf"
    if not carried.exists():
        job = json.dumps([str(gguf), str(carried), "Q4_K_M", args.threads])
        subprocess.run([args.peer_python, "-c", LLAMA, job], check=True, stdout=subprocess.DEVNULL)
    sources = {"source": args.checkpoint, "bf16": gguf, "Q4_K_M": carried}
    runs: list[dict[str, Any]] = []
    for turn in range(args.rounds):
        for name, kind in WAYS:
            done = convert(name, sources[kind], args.work / "out", args.peer_python, args.threads)
            gb = bytes_of(sources[kind]) / 1e9
            runs.append({"way": name, "turn": turn, "GB": gb, "GB/s": gb / done["seconds"],
                         "GB/CPU s": gb / done["cpu"], **done,
                         "at": time.strftime("%H:%M:%S")})
            print(f"{runs[-1]['at']} {name}: {done['seconds']:.2f} s, {runs[-1]['GB/s']:.3f} GB/s, "
                  f"CPU {done['cpu']:.1f} s", file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(runs, indent=1))
    print(f"{args.threads} threads, {args.rounds} turns\n\n{report(runs)}")


def report(runs: list[dict[str, Any]]) -> str:
    """A row a way; ratios to llama.cpp's Q4_K_M are of the same turn."""
    def spread(numbers: list[float], digits: int) -> str:
        middle, least, most = (f"{x:.{digits}f}" for x in (statistics.median(numbers), min(numbers), max(numbers)))
        return f"{middle} ({least} to {most})"

    peer = {run["turn"]: run for run in runs if run["way"] == "llama.cpp Q4_K_M"}
    rows = []
    for name, _ in WAYS:
        mine = [run for run in runs if run["way"] == name]
        rows.append([name, f"{mine[0]['GB']:.2f}", f"{statistics.median(run['seconds'] for run in mine):.1f}",
                     f"{statistics.median(run['cpu'] for run in mine):.1f}"])
        for key in ("GB/s", "GB/CPU s"):
            rows[-1].append(spread([run[key] for run in mine], 3))
            rows[-1].append(spread([run[key] / peer[run["turn"]][key] for run in mine], 2))
    return table(["way", "source GB", "s", "CPU s", "GB/s of source", "beside Q4_K_M", "GB a second of CPU",
                  "beside Q4_K_M"], rows)


if __name__ == "__main__":
    main()
