"""Decoding a model that does not fit the RAM: qmix and llama.cpp in turns, each in a cgroup of the same size.

    python benchmarks/synthetic.py wide12 --layers 12 --gguf wide12.gguf
    python benchmarks/offload_peers.py wide12 wide12.gguf --peer-python PEER/bin/python [--caps 8G,6G,4G]
    python benchmarks/synthetic.py qwen48 --model qwen3 --layers 48 --gguf qwen48.gguf     # many small experts, 18 GB
    python benchmarks/offload_peers.py qwen48 qwen48.gguf --peer-python PEER/bin/python --caps 12G,8G
    python benchmarks/synthetic.py gptoss24 --model gpt-oss --layers 24 --gguf gptoss24.gguf   # MXFP4, 12.6 GB
    python benchmarks/offload_peers.py gptoss24 gptoss24.gguf --peer-python PEER/bin/python --caps 8G
    python benchmarks/offload_peers.py wide12 wide12.gguf --peer-python AVX2PEER/bin/python --level avx2
    python benchmarks/offload_peers.py --full wide32 --memory 16G         # qmix alone, with and without prefetch

Needs root (cgroups). PEER is a virtual environment with llama-cpp-python. Both sides get the same tokens, one a
step, behind a warm-up; before each run the page cache is emptied, and before and after it the disk is measured.
A run ends early when its time is up. Every figure is of one run, or with --rounds the median of several.

The disk bound is what this machine could do with these misses: 1 / max(bytes missed a token / disk bandwidth,
seconds of computing a token), both from qmix's own counters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import instruction_levels
import limits
from peers_machine import find_peer, machine
from synthetic_recipe import tokens_of

from qmix.hardware.disk import DiskEffort, measure_disk
from qmix.sizes import MIB

SIDE = Path(__file__).with_name("offload_side.py")
CONTEXT = 512
GIB, GB = 2**30, 1e9
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs share."""

    python: str  # with qmix
    peer: str | None  # with llama-cpp-python
    threads: int
    warm: int
    timed: int
    seconds: float
    seed: int
    margin: int | None
    policy: str

    def run(self, side: str, model: Path, memory: int, kind: str, prefetch: str = "auto") -> Result:
        """One side over one kind of sequence, in a cgroup of `memory` bytes; {"error": ...} where it failed."""
        task = {"model": str(model.resolve()), "tokens": tokens_of(kind, self.warm + self.timed, self.seed),
                "warm": self.warm, "seconds": self.seconds, "threads": self.threads, "context": CONTEXT,
                "ram": memory, "margin": self.margin, "prefetch": prefetch, "policy": self.policy}
        python = self.python if side == "qmix" else self.peer
        files = files_of(model)
        drop_page_cache(files)
        before = disk_bandwidth(files)
        drop_page_cache(files)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(json.dumps(task))
            file.flush()
            done = limits.run([str(python), str(SIDE), side, file.name], memory, timeout=4 * self.seconds + 120,
                              capture=True)
        after = disk_bandwidth(files)
        found: Result = {"side": side, "model": model.name, "memory": memory, "tokens_kind": kind, "prefetch": prefetch,
                         "disk_bandwidth": (before + after) / 2, "peak_bytes": done.peak_bytes,
                         "limit_hits": done.limit_hits}
        lines = (done.stdout or "").strip().splitlines()
        if done.returncode or not lines:
            why = "timed out" if done.timed_out else "killed for memory" if done.killed else f"exit {done.returncode}"
            return {**found, "error": why, "hwm_bytes": done.hwm_bytes}
        found |= json.loads(lines[-1])
        found["rate"] = found["tokens"] / found["seconds"]
        return found


def files_of(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors")) if model.is_dir() else [model]


def drop_page_cache(files: Sequence[Path]) -> None:
    """Forget what the system keeps of `files`, and where that is allowed of all others."""
    os.sync()
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def disk_bandwidth(files: Sequence[Path], seconds: float = 2.0) -> float:
    """Bytes per second that the disk gives now, as `qmix doctor` measures it: 4 threads, 4 MiB, O_DIRECT."""
    effort = DiskEffort(seconds=seconds / 2, rounds=2, depths=(4,), chunks=(4 * MIB,))
    return 1e9 * measure_disk(files, effort, say=lambda line: None).best.gbps


def decode_figures(result: Result) -> Result:
    """What qmix counted while decoding, per token where it says so; None where it counted nothing.

    missed: bytes that had to come from the disk: all that was read, less what prefetch wasted. read_rate: bytes
    read / seconds in which a read was under way. bound: see the top.
    """
    offload = (result.get("stats") or {}).get("offload") or {}
    decode, ahead = offload.get("decode") or {}, offload.get("prefetcher")
    ahead = ahead or {}
    tokens = decode.get("tokens") or result.get("tokens") or 0
    if not tokens or "bytes_read" not in decode:
        return {}
    read, stalled, reading = decode["bytes_read"], decode.get("stalled_seconds"), decode.get("read_seconds")
    missed = read - ahead.get("wasted_bytes", 0)
    compute = decode.get("compute_seconds") or result["seconds"] - (stalled or 0.0)
    bound = 1 / max(missed / tokens / result["disk_bandwidth"], compute / tokens)
    return {"slots": offload.get("slots"), "policy": offload.get("policy"),
            "hits": (decode["hits"] - decode["prefetched"]) / decode["chosen"] if decode.get("chosen") else None,
            "bytes_per_token": read / tokens, "stalled": stalled,
            "overlapped": None if stalled is None or reading is None else max(0.0, reading - stalled),
            "read_rate": read / reading if reading else None, "compute": compute / tokens, "bound": bound,
            "share": result["rate"] / bound, "recall": ahead.get("recall"), "wasted": ahead.get("wasted_bytes"),
            "used": ahead.get("used"), "late": ahead.get("late"), "issued": ahead.get("issued")}


def show(value: Any, digits: int = 2, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value / scale:.{digits}f}"


def percent(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


PEER_HEAD = ("tokens", "cap GiB", "qmix tok/s", "llama.cpp tok/s", "ratio", "qmix VmHWM GiB", "qmix cgroup peak GiB",
             "llama.cpp cgroup peak GiB", "hit rate", "qmix GB/token", "llama.cpp GB/token", "stalled s of all",
             "read GB/s", "disk GB/s", "bound tok/s", "share of bound")
FULL_HEAD = ("tokens", "prefetch", "tok/s", "VmHWM GiB", "cgroup peak GiB", "hit rate", "GB/token", "read GB/s",
             "disk GB/s", "read / disk", "stalled s of all", "overlapped s", "prefetch used / late / issued",
             "recall", "wasted GB", "bound tok/s", "share of bound")


def peer_row(mine: Result, other: Result) -> list[str]:
    found = decode_figures(mine)
    rates = mine.get("rate"), other.get("rate")
    return [mine["tokens_kind"], show(mine["memory"], 0, GIB), mine.get("error") or show(rates[0]),
            other.get("error") or show(rates[1]), show(rates[0] / rates[1], 1) if rates[0] and rates[1] else "–",
            show(mine["hwm_bytes"], 2, GIB), show(mine["peak_bytes"], 2, GIB), show(other["peak_bytes"], 2, GIB),
            percent(found.get("hits")), show(found.get("bytes_per_token"), 2, GB),
            show(other["disk_bytes"] / other["tokens"], 2, GB) if "rate" in other else "–",
            f"{show(found.get('stalled'), 1)} of {show(mine.get('seconds'), 1)}", show(found.get("read_rate"), 2, GB),
            show(mine["disk_bandwidth"], 2, GB), show(found.get("bound")), percent(found.get("share"))]


def full_row(run: Result) -> list[str]:
    found = decode_figures(run)
    rate = found.get("read_rate")
    counts = " / ".join(show(found.get(key), 0) for key in ("used", "late", "issued"))
    return [run["tokens_kind"], run["prefetch"], run.get("error") or show(run["rate"]), show(run["hwm_bytes"], 2, GIB),
            show(run["peak_bytes"], 2, GIB), percent(found.get("hits")), show(found.get("bytes_per_token"), 2, GB),
            show(rate, 2, GB), show(run["disk_bandwidth"], 2, GB),
            percent(rate / run["disk_bandwidth"] if rate else None),
            f"{show(found.get('stalled'), 1)} of {show(run.get('seconds'), 1)}", show(found.get("overlapped"), 1),
            counts, percent(found.get("recall")), show(found.get("wasted"), 2, GB), show(found.get("bound")),
            percent(found.get("share"))]


def median(runs: Sequence[Result]) -> Result:
    """The run in the middle, by speed; a failed one only where all failed."""
    good = sorted((run for run in runs if "rate" in run), key=lambda run: run["rate"])
    return good[(len(good) - 1) // 2] if good else runs[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("gguf", type=Path, nargs="?")
    parser.add_argument("--peer-python", help="interpreter that has llama-cpp-python; without it qmix runs alone")
    parser.add_argument("--caps", default="8G,6G,4G", help="memory limits, also given to qmix as --ram")
    parser.add_argument("--tokens", default="uniform,local", help="sequences: uniform, local, or text files")
    parser.add_argument("--full", type=Path, metavar="STORE", help="qmix alone on STORE, by prefetch setting")
    parser.add_argument("--memory", type=limits.parse_bytes, default=16 * GIB, help="limit of --full (16G)")
    parser.add_argument("--prefetch", default="off,auto", help="settings of --full")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--margin", type=limits.parse_bytes, help="passed to qmix")
    parser.add_argument("--level", choices=tuple(instruction_levels.LEVELS), help="the instruction set of both sides")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--warm", type=int, default=24, help="tokens before the clock starts")
    parser.add_argument("-n", "--timed", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, for the warm-up and for the timed tokens")
    parser.add_argument("-r", "--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append every run as a line")
    args = parser.parse_args()
    if not args.full and (args.store is None or (args.gguf is None and args.peer_python)):
        parser.error("want STORE GGUF --peer-python PYTHON, or STORE alone, or --full STORE")
    if args.warm + args.timed > CONTEXT or min(args.warm, args.timed, args.rounds) < 1:
        parser.error(f"want at least 1 token of each kind and at most {CONTEXT} together")
    for model in filter(None, (args.full, args.store, args.gguf)):
        if not model.exists():
            parser.error(f"{model}: no such model")
    instruction_levels.start_at(args.level)
    version = find_peer(parser, args.peer_python, args.level) if args.peer_python else "qmix alone"
    bench = Bench(sys.executable, args.peer_python, args.threads, args.warm, args.timed, args.seconds, args.seed,
                  args.margin, args.policy)

    def keep(result: Result) -> Result:
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        return result

    kinds = args.tokens.split(",")
    where = machine(version)
    print(f"{where['date']}, {where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB; commit "
          f"{where['commit']}, qmix: {where['instructions']}; {version}; {args.threads} threads, {args.warm} + "
          f"{args.timed} tokens, {args.rounds} round(s).\n", flush=True)
    if args.full:
        compare_prefetch(bench, args, kinds, keep)
    else:
        compare_peers(bench, args, kinds, keep)


def line(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def compare_peers(bench: Bench, args: argparse.Namespace, kinds: Sequence[str],
                  keep: Callable[[Result], Result]) -> None:
    line(PEER_HEAD)
    line(["---"] * len(PEER_HEAD))
    for kind in kinds:
        for cap in map(limits.parse_bytes, args.caps.split(",")):
            mine, others = [], []
            for _ in range(args.rounds):
                mine.append(keep(bench.run("qmix", args.store, cap, kind)))
                if bench.peer:
                    others.append(keep(bench.run("llama", args.gguf, cap, kind)))
            line(peer_row(median(mine), median(others) if others else {"error": "–", "peak_bytes": None}))


def compare_prefetch(bench: Bench, args: argparse.Namespace, kinds: Sequence[str],
                     keep: Callable[[Result], Result]) -> None:
    line(FULL_HEAD)
    line(["---"] * len(FULL_HEAD))
    for kind in kinds:
        runs: dict[str, list[Result]] = {setting: [] for setting in args.prefetch.split(",")}
        for _ in range(args.rounds):
            for setting, found in runs.items():
                found.append(keep(bench.run("qmix", args.full, args.memory, kind, setting)))
        for found in runs.values():
            line(full_row(median(found)))


if __name__ == "__main__":
    main()
