"""Decoding of qmix and llama.cpp in short turns, both models in memory at once: a machine's drift meets all alike.

    python benchmarks/decode_turns.py --peer-python PEER/bin/python --work DIR   # models as peers.py keeps them in DIR
    python benchmarks/decode_turns.py --peer-python AVX2PEER/bin/python --work DIR --level avx2 --depth 0,512
    python benchmarks/decode_turns.py --peer-python AVX2PEER/bin/python --work DIR --level avx2 --depth 8192 --kv int8
    python benchmarks/decode_turns.py --peer-python AVX2PEER/bin/python --work DIR --model qwen3 --layers 24 \
        --dense int8 --gguf mixed --native-only --depth 0,512 --prefill 512
    python benchmarks/decode_turns.py --peer-python AVX2PEER/bin/python --work DIR --level avx2 --model gpt-oss \
        --layers 12 --dense int8 --gguf mixed --native-only --depth 0,512 --prefill 512

peers.py runs one program after the other, minutes apart, in which a shared machine's memory may give half of what it
gave before. Here each side decodes some tokens (about a second), then the next one does, then the memory's read
bandwidth is measured; and again. Ratios are taken within a turn, then their median. Who begins changes from turn to
turn. Both sides idle while another works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import instruction_levels
from machines import find_peer, machine
from peers import SIDE, Side, numbers_from_0
from peers_report import GB, cell, table
from synthetic_models import RECIPES
from synthetic_recipe import Recipe, tokenizer_file, uniform_tokens

from qmix.hardware import physical_cores
from qmix.hardware.bandwidth import measure_ram

PEER_KV = {"bf16": "f16", "int8": "q8_0"}  # {qmix's --kv-cache: what llama.cpp has of as many bits}


class Turns:
    """A side that waits for its turn."""

    def __init__(self, side: Side, python: str, task: dict[str, Any], opened: ExitStack):
        self.side = side
        file = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="qmix-turns-"))) / "task.json"
        file.write_text(json.dumps({**task, "do": "turns", "model": str(side.model), "started": time.time()}))
        self._process = opened.enter_context(subprocess.Popen(
            [python, str(SIDE), side.kind, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **side.env}))
        opened.callback(self._process.kill)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"{self.side.name}: ended early")

    def rate(self, count: int) -> float:
        """Tokens a second over `count` steps."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its end is noticed below
            self._process.stdin.write(f"{count}\n")
            self._process.stdin.flush()
        answer = self._answer()
        return float(answer["tokens"] / answer["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the models are or will be")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores())
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("-n", "--tokens", type=int, default=24, help="decoded in each turn")
    parser.add_argument("--depth", type=numbers_from_0, default=[0], help="decode behind prompts of so many tokens")
    parser.add_argument("--prefill", type=numbers_from_0, default=[], help="then prompts of so many tokens, one a turn")
    parser.add_argument("--model", choices=tuple(RECIPES), default="mixtral")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--gguf", default="q4_0", help="mixed, q4_0, q4_k_m; see synthetic_gguf.py")
    parser.add_argument("--dense", default="int4", choices=("int4", "int8"))
    parser.add_argument("--block", type=int, default=0, choices=(32, 64), help="of qmix's int4 (default: as `qmix "
                        "quantize` chooses it on this machine)")
    parser.add_argument("--level", choices=tuple(instruction_levels.LEVELS), help="the instruction set of both sides")
    parser.add_argument("--native-only", action="store_true", help="without the side that computes through torch")
    parser.add_argument("--kv", choices=tuple(PEER_KV), default="bf16", help="how both sides keep keys and values: "
                        "llama.cpp as f16 or q8_0")
    parser.add_argument("--activations", choices=("bf16", "int8", "auto"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="every turn")
    args = parser.parse_args()
    instruction_levels.start_at(args.level)
    version = find_peer(parser, args.peer_python, args.level)
    tokenizer_file()
    recipe = RECIPES[args.model](args.layers, block=args.block)
    size = f"{args.layers}x{recipe.hidden}x{recipe.inner}-0"  # peers.py's, whose models these are
    suffix = (f"-{args.level}" if args.level else "") + (f"-b{args.block}" if args.block else "")
    store = args.work.resolve() / f"qmix-{args.dense}-{size}{suffix}"
    sides = [Side(f"qmix {args.dense}", "qmix", args.dense, store)]
    if not args.native_only:
        sides.append(Side("qmix without native kernels", "qmix", args.dense, store, {"QMIX_NATIVE": "off"}))
    sides.append(Side(f"llama.cpp {args.gguf.upper()}", "llama", args.gguf,
                      args.work.resolve() / f"{args.gguf}-{size}.gguf"))
    args.work.mkdir(parents=True, exist_ok=True)
    for side in sides:
        side.make(recipe)
    where, found = machine(version), []
    for depth, prompt in [*((depth, 0) for depth in args.depth), *((0, prompt) for prompt in args.prefill)]:
        rates, memory = take_turns(sides, args, depth, prompt)
        found.append({"depth": depth, "prompt": prompt, "rates": rates, "memory": memory})
        what = f"prompts of {prompt} tokens" if prompt else f"depth {depth}"
        print(f"{where['date']}, {where['processor']}, {where['cores']} cores; commit {where['commit']}, qmix: "
              f"{where['instructions']}; {version}; {args.threads} threads, {args.model}, {args.layers} layers, "
              f"{what}, {args.kv} keys and values (llama.cpp: {PEER_KV[args.kv]}), {args.turns} turns of "
              f"{prompt or args.tokens} tokens; RAM read {cell(memory)} GB/s.\n")
        print(report(sides, None if prompt else recipe, rates, memory) + "\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": where, "depths": found}, indent=1) + "\n")


def take_turns(sides: Sequence[Side], args: argparse.Namespace, depth: int,
               prompt: int) -> tuple[dict[str, list[float]], list[float]]:
    """({side: tok/s of each turn}, GB/s that the memory gave in each). prompt: tokens of a prompt, which is a turn; 0
    to decode."""
    context = -(-max(depth + args.turns * args.tokens + 16, prompt) // 256) * 256
    task = {"tokens": uniform_tokens(context, 0), "depth": depth, "prompt": prompt, "threads": args.threads,
            "context": context, "ubatch": [512], "load_mode": "auto", "activations": args.activations, "kv": args.kv,
            "peer_kv": PEER_KV[args.kv]}
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    memory: list[float] = []
    with ExitStack() as opened:
        waiting = [Turns(side, args.peer_python if side.kind == "llama" else sys.executable, task, opened)
                   for side in sides]
        for turn in range(args.turns):
            first = turn % len(waiting)
            for one in waiting[first:] + waiting[:first]:
                rates[one.side.name].append(one.rate(prompt or args.tokens))
            memory.append(measure_ram(args.threads, seconds=0.4, say=lambda line: None))
    return rates, memory


def report(sides: Sequence[Side], recipe: Recipe | None, rates: dict[str, list[float]],
           memory: Sequence[float]) -> str:
    """A row for each side: tok/s, with a recipe weights read and their share of what the memory gave in that turn,
    times the last."""
    peer, rows = rates[sides[-1].name], []
    for side in sides:
        own = rates[side.name]
        row = [side.name, cell(own)]
        if recipe is not None:
            read = [rate * side.token_bytes(recipe) / GB for rate in own]
            share = [100 * a / b for a, b in zip(read, memory, strict=True)]
            row += [f"{statistics.median(read):.1f}", cell(share)]
        rows.append([*row, cell([a / b for a, b in zip(own, peer, strict=True)])])
    weights = ["GB/s of weights", "% of RAM read"] if recipe is not None else []
    return table(["side", "tok/s", *weights, f"times {sides[-1].name}"], rows)


if __name__ == "__main__":
    main()
