"""qmix beside llama.cpp, everything resident, in turns: load, first token, prefill, decode, quantizing.

    python benchmarks/peers.py --peer-python PEER/bin/python --json peers.json            # 25 GB of disk, for a while
    python benchmarks/peers.py --peer-python PEER/bin/python --quick                      # within five minutes
    python benchmarks/peers.py --peer-python PEER/bin/python --work DIR --skip quantize   # keeps the models in DIR
    python benchmarks/peers.py --peer-python AVX2PEER/bin/python --level avx2              # both sides without AVX-512

PEER is a virtual environment with llama-cpp-python (its native build) and gguf. The models are random, of Mixtral
8x7B's shapes with 4 layers (synthetic.py), at equal bits: int4 g64 throughout beside Q4_0 throughout, 4.5 bits a
weight; Q4_K_M has more. Both sides get the same tokens, given one by one when decoding, and the same threads.
llama.cpp at its best: weights repacked, flash attention as it chooses, for each prefill the fastest n_ubatch of
several. Each run is a process of its own. Before it the page cache is emptied, so that loading reads the disk, whose
bandwidth is measured before and after; the RAM's read bandwidth is measured right before and after each stretch of
decoding, while the side waits. Ratios are taken within a round, then their median. Work that fails is shown, and the
rest goes on.

With few layers prefill is kinder to llama.cpp: it computes the last layer's experts for the last token alone, a
quarter of the work of 4 layers and a thirtieth of that of 32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf_blocks
import instruction_levels
import quantize
import synthetic
import synthetic_gguf
from machines import find_peer, machine, now
from offload_peers import disk_bandwidth, drop_page_cache, files_of
from peers_report import GB, GIB, Run, cell, figures_table, ratio_table, table
from sides import say
from synthetic_recipe import Recipe, tokenizer_file, uniform_tokens

from qmix.hardware import memory, physical_cores
from qmix.hardware.bandwidth import measure_ram

SIDE = Path(__file__).with_name("peers_side.py")
CHECKPOINT = Path(__file__).with_name("synthetic_checkpoint.py")
ROUTED = 192  # tokens whose routing is looked at
SHORT = 16  # tokens of the prompt whose first answer is waited for
CROWDED = 0.2  # a share of 0.125 is uniform: above this the routing, and so the run, is not what it should be
QUICK = {"rounds": 1, "prefill": "512", "tokens": 32, "ubatch": "512", "gguf": "q4_0", "quantize": "rtn,hqq,Q4_0"}
FULL = {"rounds": 3, "prefill": "512,2048", "tokens": 96, "ubatch": "512,2048", "gguf": "q4_0,q4_k_m",
        "quantize": "rtn,hqq,Q4_0,Q4_K_M"}


@dataclass(frozen=True, slots=True)
class Side:
    """kind: "qmix" | "llama"; types: of the dense part, or of the GGUF; env: set for the process."""

    name: str
    kind: str
    types: str
    model: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in files_of(self.model))

    def token_bytes(self, recipe: Recipe) -> int:
        return (synthetic if self.kind == "qmix" else synthetic_gguf).bytes_per_token(recipe, self.types)

    def make(self, recipe: Recipe) -> None:
        if self.model.exists():
            return
        say(f"writing {self.model}")
        if self.kind == "qmix":
            synthetic.write_store(recipe, self.model, self.types)
        else:
            synthetic_gguf.write_gguf(recipe, self.model, self.types)

    def planned_bytes(self, recipe: Recipe) -> int:
        if self.kind == "qmix":
            return synthetic.layout_of(recipe, self.types)[2].nbytes
        return sum(gguf_blocks.tensor_bytes(kind, shape) for _, kind, shape, _ in
                   synthetic_gguf.drafts(recipe, self.types))


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs sides as processes and answers their probes."""

    peer: str
    threads: int
    timeout: float

    def run(self, side: str, task: dict[str, Any],
            env: dict[str, str]) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """(what the side printed last, {probe: GB/s of the RAM}); {"error": ...} where it failed."""
        probes: dict[str, list[float]] = {}
        found: dict[str, Any] = {}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file, tempfile.TemporaryFile("w+") as errors:
            file.write(json.dumps({**task, "threads": self.threads, "started": time.time()}))
            file.flush()
            command = [sys.executable if side == "qmix" else self.peer, str(SIDE), side, file.name]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                  env={**os.environ, **env}) as process:
                timer = threading.Timer(self.timeout, process.kill)
                timer.start()
                try:
                    for line in process.stdout or ():
                        message = json.loads(line) if line.startswith("{") else {}
                        if "probe" in message:
                            probes.setdefault(message["probe"], []).append(self.ram())
                            process.stdin.write("\n")  # type: ignore[union-attr]
                            process.stdin.flush()  # type: ignore[union-attr]
                        elif message:
                            found = message
                except (OSError, ValueError) as e:
                    process.kill()
                    found = {"error": str(e)}
                finally:
                    late = not timer.is_alive()
                    timer.cancel()
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1]
        if process.returncode or not found:
            why = f"killed after {self.timeout:.0f} s" if late else f"exit {process.returncode}"
            return {"error": f"{why}: {last}" if last else why}, probes
        return found, probes

    def ram(self) -> float:
        return measure_ram(self.threads, seconds=0.6, say=lambda line: None)

    def speed(self, side: Side, task: dict[str, Any], recipe: Recipe) -> Run:
        files = files_of(side.model)
        drop_page_cache(files)
        before = disk_bandwidth(files, 1.0)
        drop_page_cache(files)
        found, probes = self.run(side.kind, {**task, "do": "speed", "model": str(side.model)}, side.env)
        return {"side": side.name, "started": now(), "nbytes": side.nbytes, "token_bytes": side.token_bytes(recipe),
                "disk_bandwidth": (before + disk_bandwidth(files, 1.0)) / 2, "probes": probes,
                "bandwidth": {name: sum(values) / len(values) for name, values in probes.items()}, **found}


def quantizing(runner: Runner, names: Sequence[str], work: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """A bf16 checkpoint of one layer by each way, "rtn" and "hqq" of qmix or a type of llama.cpp; {"name", "seconds",
    "source_gb"} or {"name", "error"}. The page cache is emptied before each, and each ends on the disk."""
    source, gguf, out = work / "source", work / "source.gguf", work / "quantized"
    if not source.exists():
        say(f"writing {source}")
        shutil.rmtree(draft := work / "source.partial", ignore_errors=True)
        subprocess.run([sys.executable, str(CHECKPOINT), str(draft), "--layers", "1", "--hidden", str(recipe.hidden),
                        "--inner", str(recipe.inner)], check=True, stdout=sys.stderr)
        draft.rename(source)
    if not gguf.exists() and any(name.startswith("Q") for name in names):
        synthetic_gguf.write_gguf(Recipe(1, hidden=recipe.hidden, inner=recipe.inner), gguf, checkpoint=source)
    found = []
    for name in names:
        say(f"quantizing: {name}")
        mine = not name.startswith("Q")
        files = files_of(source if mine else gguf)
        drop_page_cache(files)
        size = sum(path.stat().st_size for path in files) / GB
        row: dict[str, Any] = {"name": name, "source_gb": size, "started": now()}
        if mine:
            try:
                done = quantize.measure(source, out, name, runner.threads)
                found.append({**row, "seconds": done["seconds"], "details": done})
            except SystemExit as e:
                found.append({**row, "error": str(e).strip().splitlines()[-1]})
        else:
            disk, ram = disk_bandwidth(files, 1.0), runner.ram()
            drop_page_cache(files)
            done, _ = runner.run("llama", {"do": "quantize", "model": str(gguf), "out": str(out), "type": name}, {})
            out.unlink(missing_ok=True)
            found.append({**row, **done, "details": {"memory GB/s": round(ram, 1), "disk GB/s": round(disk / GB, 2)}})
    return found


def quantize_table(found: Sequence[dict[str, Any]]) -> str:
    """Seconds for a GB of source, and how many times faster than each of llama.cpp's."""
    speeds = {row["name"]: row["seconds"] / row["source_gb"] for row in found if "seconds" in row}
    peers = [name for name in speeds if name.startswith("Q")]
    rows = []
    for row in found:
        name, side = row["name"], "llama.cpp" if row["name"].startswith("Q") else "qmix"
        each = speeds.get(name)
        rows.append([f"{side} {name}", row.get("error") or f"{row['seconds']:.1f}", f"{row['source_gb']:.2f}",
                     cell([each] if each else []), *(cell([speeds[p] / each] if each else []) for p in peers),
                     *(str(row.get("details", {}).get(key, "–")) for key in ("memory GB/s", "disk GB/s"))])
    return table(["quantizing", "s", "source GB", "s per GB", *(f"times as fast as {p}" for p in peers),
                  "RAM read GB/s", "disk GB/s"], rows)


def numbers(text: str) -> list[int]:
    """"512,2048" -> [512, 2048]"""
    found = [int(word) if word.strip().isdigit() else 0 for word in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want numbers such as 512,2048")
    return sorted(set(found))


def numbers_from_0(text: str) -> list[int]:
    """"0,512" -> [0, 512]"""
    return [0] * (text.split(",")[0] == "0") + (numbers(text.removeprefix("0,")) if text != "0" else [])


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {QUICK}")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the models there (else: a temporary folder)")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores())
    parser.add_argument("-r", "--rounds", type=int)
    parser.add_argument("-n", "--tokens", type=int, help="decoded in each stretch")
    parser.add_argument("--prefill", help="lengths; decoding is also measured behind the first")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096, help="smaller only to try things out")
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", help="files of llama.cpp: mixed, q4_0, q4_k_m")
    parser.add_argument("--dense", default="int4", help="of qmix's stores: int4 is equal bits; int8 is its default")
    parser.add_argument("--level", choices=tuple(instruction_levels.LEVELS), help="the instruction set of both sides")
    parser.add_argument("--qmix-native", default="default,off", metavar="VALUES",
                        help="values of QMIX_NATIVE, a row each; default: as the environment has it (default,off)")
    parser.add_argument("--activations", choices=("bf16", "int8", "auto"), help="passed to qmix where it has it")
    parser.add_argument("--ubatch", help="llama.cpp's n_ubatch: the fastest of these for each prefill")
    parser.add_argument("--load-mode", choices=("auto", "none", "mmap", "direct_io"), default="auto",
                        help="how llama.cpp loads")
    parser.add_argument("--quantize", metavar="WAYS", help="rtn, hqq, and types of llama.cpp")
    parser.add_argument("--skip", default="", help="of speed, routing, quantize")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds, of one run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single run, the machine and the settings")
    args = parser.parse_args()
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        args.prefill, args.ubatch = numbers(args.prefill), numbers(args.ubatch)
    except argparse.ArgumentTypeError as e:
        parser.error(str(e))
    for name, known in (("gguf", synthetic_gguf.TYPES), ("dense", ("int4", "int8")),
                        ("quantize", ("rtn", "hqq", "Q4_0", "Q4_K_M")), ("skip", ("speed", "routing", "quantize", ""))):
        words = getattr(args, name).split(",")
        if unknown := [word for word in words if word not in known]:
            parser.error(f"--{name}: got {unknown[0]!r}, want {', '.join(filter(None, known))}")
        setattr(args, name, words)
    if min(args.rounds, args.tokens, args.threads) < 1:
        parser.error("--rounds, --tokens and --threads: want at least 1")
    return parser, args


def sides_of(args: argparse.Namespace, work: Path) -> list[Side]:
    size = f"{args.layers}x{args.hidden}x{args.inner}-{args.seed}"
    store = size + (f"-{args.level}" if args.level else "")  # torch's level decides the block of the store
    found = []
    for dense in args.dense:
        for level in args.qmix_native.split(","):
            extra = {"default": "", "off": " without native kernel"}.get(level, f" native {level}")
            found.append(Side(f"qmix {dense}{extra}", "qmix", dense, work / f"qmix-{dense}-{store}",
                              {} if level == "default" else {"QMIX_NATIVE": level}))
    return found + [Side(f"llama.cpp {types.upper()}", "llama", types, work / f"{types}-{size}.gguf")
                    for types in args.gguf]


def check_room(parser: argparse.ArgumentParser, args: argparse.Namespace, sides: Sequence[Side], recipe: Recipe,
               work: Path) -> None:
    """argparse's error where disk or memory are too small."""
    models = {side.model: side.planned_bytes(recipe) for side in sides}
    need = sum(nbytes for model, nbytes in models.items() if not model.exists()) + GIB
    if "quantize" not in args.skip:
        layer = 2 * (3 * recipe.experts * recipe.hidden * recipe.inner + 2 * 32000 * recipe.hidden
                     + 4 * recipe.hidden**2)
        need += sum(layer for name in ("source", "source.gguf") if not (work / name).exists()) + layer // 2
    free = shutil.disk_usage(work).free
    if need > free:
        parser.error(f"{work}: {need / GIB:.1f} GiB wanted, {free / GIB:.1f} GiB free: name another with --work")
    room = memory().available
    wanted = int(2.2 * max(models.values())) + 2 * GIB  # llama.cpp maps the file and repacks a copy
    if "speed" not in args.skip and wanted > room:
        parser.error(f"{wanted / GIB:.1f} GiB of memory wanted, {room / GIB:.1f} GiB available: fewer --layers")


def main() -> None:
    parser, args = arguments()
    instruction_levels.start_at(args.level)
    version = find_peer(parser, args.peer_python, args.level)
    try:
        recipe = Recipe(args.layers, hidden=args.hidden, inner=args.inner, seed=args.seed)
    except ValueError as e:
        parser.error(str(e))
    tokenizer_file()
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        run(parser, args, recipe, args.work.resolve(), version)
    else:
        with tempfile.TemporaryDirectory(prefix="qmix-peers-") as folder:
            run(parser, args, recipe, Path(folder), version)


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, recipe: Recipe, work: Path, version: str) -> None:
    start = time.perf_counter()
    sides = sides_of(args, work)
    check_room(parser, args, sides, recipe, work)
    runner = Runner(args.peer_python, args.threads, args.timeout)
    archive: dict[str, Any] = {"machine": machine(version), "settings": {k: str(v) if isinstance(v, Path) else v
                                                                         for k, v in vars(args).items()}}

    def keep(**values: Any) -> None:
        archive.update(values, seconds=time.perf_counter() - start)
        if args.json:
            args.json.write_text(json.dumps(archive, indent=1) + "\n")

    where = archive["machine"]
    print(f"{where['date']}, {where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB; commit "
          f"{where['commit']}, torch {where['torch']}, qmix: {where['instructions']}; {version}. {args.threads} "
          f"threads on both sides, {args.layers} "
          f"layers, {args.rounds} rounds; llama.cpp: repacked, load mode {args.load_mode}, n_ubatch the best of "
          f"{args.ubatch}, flash attention auto. Models and sources cold (page cache dropped).", flush=True)
    if not {"speed", "routing"} <= set(args.skip):
        for side in sides:
            side.make(recipe)
    depth = args.prefill[0]
    more = args.tokens + 16
    context = -(-max(args.prefill[-1], depth + more, more) // 256) * 256
    task = {"tokens": uniform_tokens(context, args.seed), "short": SHORT, "decode": args.tokens, "depths": [depth],
            "prefill": args.prefill, "context": context, "ubatch": args.ubatch, "load_mode": args.load_mode,
            "activations": args.activations}
    if "routing" not in args.skip:
        question = {**task, "do": "routing", "tokens": task["tokens"][:ROUTED]}
        models = {side.model: side for side in reversed(sides)}  # of sides that share a model the first
        found = {model: (side, runner.run(side.kind, {**question, "model": str(model)}, side.env)[0])
                 for model, side in reversed(models.items())}
        keep(routing={side.name: result for side, result in found.values()})
        rows = [[side.name, result.get("error") or crowded(result["largest"]), str(ROUTED)]
                for side, result in found.values()]
        print("\n" + table(["routing", "largest share of an expert, % (uniform: 12.5)", "tokens"], rows), flush=True)
    if "speed" not in args.skip:
        runs: dict[str, list[Run]] = {side.name: [] for side in sides}
        for turn in range(args.rounds):
            for side in sides:
                say(f"round {turn + 1} of {args.rounds}: {side.name}, {time.perf_counter() - start:.0f} s")
                runs[side.name].append({"round": turn, **runner.speed(side, task, recipe)})
                keep(runs=runs)
        mine, others = ([side.name for side in sides if side.kind == kind] for kind in ("qmix", "llama"))
        print("\n" + figures_table(runs) + "\n\nMore than 1: qmix is better.\n\n" + ratio_table(runs, mine, others),
              flush=True)
    if "quantize" not in args.skip:
        rows = quantizing(runner, args.quantize, work, recipe)
        keep(quantizing=rows)
        print("\n" + quantize_table(rows), flush=True)
    keep()
    say(f"done in {time.perf_counter() - start:.0f} s")


def crowded(largest: Sequence[float]) -> str:
    text = f"{100 * max(largest):.1f}"
    return text if max(largest) <= CROWDED else f"{text}: NOT UNIFORM, the speeds below mean little"


if __name__ == "__main__":
    main()
