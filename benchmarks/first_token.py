"""How long a user waits: `qmix --help`, the first token, and tokens per second of one store.

    python benchmarks/first_token.py STORE [-p PROMPT] [-n 128] [-r 5] [-t THREADS]

Each figure is the median of -r runs, each a process of its own, with the spread behind it. "command to
first token" is the whole process: interpreter, imports, loading, prefill. Greedy, so that every run
does the same work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

QMIX = [sys.executable, "-m", "qmix"]


def seconds(command: list[str]) -> tuple[float, str]:
    """(wall time of a command that must succeed, its stdout)."""
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def row(name: str, values: list[float], unit: str, digits: int = 2) -> str:
    spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
    return f"| {name} | {statistics.median(values):.{digits}f} {unit} | {spread} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("-p", "--prompt", default="Tell me a story about a fox and a lantern.")
    parser.add_argument("-n", "--tokens", type=int, default=128)
    parser.add_argument("-r", "--runs", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int)
    args = parser.parse_args()
    flags = ["-p", args.prompt, "-n", str(args.tokens), "--temp", "0", "--json"]
    flags += ["-t", str(args.threads)] if args.threads else []
    helps = [seconds([*QMIX, "--help"])[0] for _ in range(args.runs)]
    walls, timings = [], []
    for _ in range(args.runs):
        wall, text = seconds([*QMIX, "generate", args.store, *flags])
        walls.append(wall)
        timings.append(json.loads(text)["timings"])
    before = [w - t["prefill_seconds"] - t["decode_seconds"] for w, t in zip(walls, timings, strict=True)]
    print("| figure | median | spread |\n|---|---|---|")
    print(row("qmix --help", helps, "s"))
    waits = [b + t["first_token_seconds"] for b, t in zip(before, timings, strict=True)]
    print(row("command to first token", waits, "s"))
    print(row("prompt to first token", [1000 * t["first_token_seconds"] for t in timings], "ms", 1))
    print(row(f"prefill, {timings[0]['prompt_tokens']} tokens", [t["prefill_rate"] for t in timings], "tok/s", 0))
    print(row(f"decode, {timings[0]['generated_tokens']} tokens", [t["decode_rate"] for t in timings], "tok/s", 0))


if __name__ == "__main__":
    main()
