"""qmix on a machine with one NVIDIA GPU, in one call of at most ten minutes: Mixtral 8x7B at full size, 4-bit experts,
VRAM capped as on a smaller card. first_contact.sh runs it last, behind what is cheaper.

    python setup.py build_ext --inplace                            # the CPU's kernels; without a compiler torch's serve
    PYTHONPATH=. python benchmarks/gpu.py --out benchmarks/results
    PYTHONPATH=. python benchmarks/gpu.py --stand-in --out DIR     # anywhere: the CPU as device, a small model; figures
                                                                   # mean nothing, but every part of qmix has run

Needs no network and no model: weights are random bytes in Mixtral's shapes (synthetic.py: 26 GB, in shared memory where
that has room), which route as a trained model does. `local` tokens repeat experts about as often as text does in
Mixtral, `uniform` ones never on purpose. Writes DATE-gpu-CARD.json and .md into --out, anew after every result.

Sections, in order; each has a share of --seconds, and one that fails, is late or cannot run here is recorded with the
reason, its traceback and the end of its stderr while the rest goes on. One process serves them one after another
(gpu_worker.py):

    check       the demo's model on the device against the CPU, a prompt of 520 tokens and 40 more. Wrong results:
                nothing else is timed but the kernels, which are compared with the reference one by one; exit code 1
    kernels     every operation of decoding against the memory's bandwidth; formats: cuda_kernels.py for the others
    store, bandwidth    the weights; VRAM, PCIe up and down, RAM, and the CPU computing experts
    24 GB       decoding at 128 and 4096 tokens of context, prompts of 512 and 2048; then with all experts in VRAM; a
                mixed store of 22 GiB that fits whole; without prefetch; with everything computed by the GPU ("split
                off"); with 8, 12 and 16 GB
    peer        transformers + accelerate with CPU offload; bitsandbytes; llama.cpp (--peer-python: an interpreter with
                llama-cpp-python, built with CUDA, and gguf)

Exit code 0 whatever failed or was skipped, 1 for wrong results, 2 without a card. Ended by SIGTERM or Ctrl-C it kills
what runs, writes what it has and exits with 143 or 130.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import gpu_report
from gpu_sections import Found, Section, allot
from gpu_worker import Workers
from sides import say

SIDE = Path(__file__).with_name("gpu_side.py")
SHARED = Path("/dev/shm")
FIRST = "machine"  # where there is no card nothing else is tried
CLOSING = 3.0  # seconds kept for the last report
GPU = {"contexts": [128, 4096], "prompts": [512, 2048], "warm": 48, "timed": 96, "peer_layers": 4, "peer_timed": 8}
SHAPES = {"mixtral": {"layers": 32, "hidden": 4096, "inner": 14336},
          "qwen3": {"layers": 48, "hidden": 2048, "inner": 768}}
NAMES = {"mixtral": "Mixtral 8x7B", "qwen3": "Qwen3-30B-A3B"}
FIT = 0.863  # bytes of the mixed experts, of those of int4: with 32 layers, a store of 22 GiB
STAND_IN = {"layers": 3, "hidden": 512, "inner": 256, "contexts": [16, 64], "prompts": [32, 64], "warm": 4, "timed": 6,
            "peer_layers": 2, "peer_timed": 2}


class Terminated(BaseException):
    """SIGTERM."""


def sections(args: argparse.Namespace, size: dict[str, Any], folders: Sequence[Path]) -> list[Section]:
    """All of them, in order: what tells most for its time comes first. Seconds are for a card; the stand-in needs
    less. folders: for the stores, the first where it is best."""
    small = args.stand_in
    base = {"stand_in": small, "model": args.model, "work": str(folders[-1]), "folders": list(map(str, folders)),
            "threads": args.threads, "seed": args.seed, "commit": args.commit, **size,
            "workers": 1 if small else os.cpu_count() or 1}
    peer = {**base, "vram": 24, "timed": size["peer_timed"], "peer_python": args.peer_python}

    def part(name: str, do: str, least: float, most: float, task: dict[str, Any] = base,
             needs: tuple[str, ...] = (FIRST,), unless: str | None = None) -> Section:
        return Section(name, do, min(least, 8.0) if small else least, most, task, needs, unless, do == "peer")

    def written(name: str, least: float, most: float, fit: float) -> Section:
        return part(name, "store", least, most, {**base, "name": name.replace(" ", "-"), "fit": fit})

    def placed(name: str, vram: int | None, least: float = 20.0, most: float = 45.0, prefetch: bool = True,
               split: bool = True, kinds: Sequence[str] = ("local",), prompts: Sequence[int] = (),
               store: str = "store", whole: bool = False) -> Section:
        # The stand-in's records are so small that `auto` would not look ahead.
        mode = ("ahead" if small else "auto") if prefetch else "off"
        return part(name, "run", least, most, {
            **base, "vram": vram, "exact": not split, "prefetch": mode, "kinds": list(kinds), "prompts": list(prompts),
            "store_of": store, "whole": whole}, needs=(FIRST, store))

    no_peer = None if args.peer_python else "no --peer-python was given"
    other = None if args.model == "mixtral" else "has Mixtral's shapes only"
    return [
        part(FIRST, "machine", 15, 150, needs=()),  # a first import of torch may take a minute and more
        part("check", "check", 30, 90),
        part("kernels", "kernels", 30, 75, unless=other),
        part("formats", "formats", 15, 60, unless=other),
        part("store", "store", 1, 10, {**base, "given": str(args.store)}) if args.store else
        written("store", 40, 200, 0.0),
        part("bandwidth", "bandwidth", 15, 45, {**base, "store_of": "store"}, needs=(FIRST, "store")),
        placed("24 GB", 24, 60.0, 120.0, prompts=size["prompts"]),
        placed("all in VRAM", None, 30.0, 70.0, prompts=size["prompts"]),
        written("mixed store", 30, 150, FIT),
        placed("mixed, whole in 24 GB", 24, 30.0, 60.0, prompts=size["prompts"], store="mixed store", whole=True),
        placed("24 GB, prefetch off", 24, prefetch=False),
        placed("24 GB, split off", 24, split=False),
        placed("12 GB", 12, prompts=size["prompts"]),
        placed("16 GB", 16),
        placed("8 GB", 8),
        placed("24 GB, uniform", 24, kinds=("uniform",)),
        placed("24 GB, prefetch and split off", 24, prefetch=False, split=False),
        placed("12 GB, split off", 12, split=False),
        placed("12 GB, prefetch off", 12, prefetch=False),
        placed("12 GB, prefetch and split off", 12, prefetch=False, split=False),
        part("peer: transformers + accelerate", "peer", 45, 90, {**peer, "peer": "transformers"}, unless=other),
        part("peer: llama.cpp", "peer", 45, 120, {**peer, "peer": "llama"}, unless=other or no_peer),
        part("peer: bitsandbytes", "peer", 40, 60, {**peer, "peer": "bitsandbytes"}, unless=other),
    ]


def refused(section: Section, done: dict[str, Any]) -> str | None:
    """Why a section is not to be run, given the results so far."""
    for name in section.needs:
        if done.get(name, {}).get("state") != "done":
            return f"needs {name}, which failed" if name in done else f"needs {name}"
    if section.do in ("run", "peer") and done.get("check", {}).get("state") == "wrong":
        return "the check found wrong results: nothing is timed"
    return None


def perform(todo: Sequence[Section], archive: dict[str, Any], ends: float, keep: Callable[[], None],
            workers: Workers) -> None:
    """Run the sections in order within the time; results into archive["sections"]."""
    results = archive["sections"]
    waiting = list(todo)
    while waiting:
        section = waiting[0]
        seconds, dropped = allot([other for other in waiting if not other.unless], ends - time.monotonic())
        if section.unless:
            results[section.name] = {"state": "unavailable", "reason": section.unless}
        elif reason := refused(section, results):
            results[section.name] = {"state": "skipped", "reason": reason}
        elif section in dropped:
            results[section.name] = {"state": "skipped", "reason": "no time was left"}
        else:
            say(f"{section.name}: up to {seconds:.0f} s")
            results[section.name] = {"state": "running"}

            def kept(result: Found, name: str = section.name) -> None:
                results[name] = result
                keep()

            found = results[section.name] = workers.run(with_store(section, results), seconds, kept)
            say(f"{section.name}: {found['state']}, {found['seconds']} s {found.get('reason', found.get('left', ''))}")
        waiting.pop(0)
        drop_store(section, waiting, results)
        keep()
    archive["processes"] = workers.started


def with_store(section: Section, results: dict[str, Any]) -> Section:
    """The section, told where the store lies that it needs."""
    name = section.task.get("store_of")
    return replace(section, task={**section.task, "store": results[name]["found"]["path"]}) if name else section


def drop_store(section: Section, waiting: Sequence[Section], results: dict[str, Any]) -> None:
    """Its store goes once nobody waits for it: two in shared memory leave little for what is loaded."""
    name = section.task.get("store_of")
    if results.get(name or "", {}).get("found", {}).get("given"):
        return
    if name and name in results and all(other.task.get("store_of") != name for other in waiting):
        shutil.rmtree(results[name].get("found", {}).get("path", ""), ignore_errors=True)


def work_folders(asked: Path | None, opened: ExitStack) -> list[Path]:
    """Where stores may go, emptied at the end: shared memory, then a temporary folder; or in the one that is asked."""
    parents = [asked] if asked else [*([SHARED] if SHARED.is_dir() and os.access(SHARED, os.W_OK) else []), None]
    return [Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="qmix-gpu-", dir=parent,
                                                                  ignore_cleanup_errors=True))) for parent in parents]


class Files:
    """The archive on the disk: the JSON and the report, whole at any time."""

    def __init__(self, archive: dict[str, Any], out: Path | None, name: str | None):
        self._archive, self._out, self._name = archive, out, name
        self.stem = ""

    def write(self) -> None:
        if self._out is None:
            return
        found = gpu_report.found_of(self._archive, "machine")
        card = "stand-in" if self._archive["stand_in"] else found.get("card", "")
        stem = f"{self._archive['started'][:10]}-gpu-{self._name or slug(card) or 'unknown'}"
        if self.stem and stem != self.stem:  # the card's name is known now
            for kind in ("json", "md"):
                (self._out / f"{self.stem}.{kind}").unlink(missing_ok=True)
        self.stem = stem
        _replace(self._out / f"{stem}.json", json.dumps(self._archive, indent=1) + "\n")
        _replace(self._out / f"{stem}.md", self.report())

    def report(self) -> str:
        try:
            self._archive["verdicts"] = gpu_report.verdicts(self._archive)
            return gpu_report.markdown(self._archive)
        except Exception as e:  # the figures must not be lost to a mistake in a table
            return f"The report could not be made of the JSON beside it: {type(e).__name__}: {e}\n"


def slug(text: str) -> str:
    """"NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-").removeprefix("nvidia-")


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stand-in", action="store_true", help="the CPU as device, a small model")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--name", help="in the files' names, instead of the card's")
    parser.add_argument("--only", metavar="NAMES", help="of sections, by semicolon: these alone, and those they need")
    parser.add_argument("--peer-python", help="interpreter with llama-cpp-python, built with CUDA, and gguf")
    parser.add_argument("--store", type=Path, metavar="DIR", help="of synthetic.py, in place of one that is made here")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the store is made, for the time of the run")
    parser.add_argument("-t", "--threads", type=int, help="of the CPU (all physical cores)")
    parser.add_argument("--model", choices=SHAPES, default="mixtral", help="whose shapes (mixtral)")
    parser.add_argument("--layers", type=int, help="fewer than the model has, to try things out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="to be recorded, where the code is a copy that git does not know")
    return parser.parse_args()


def chosen(todo: list[Section], only: str | None) -> list[Section]:
    """Those that --only names, and what they need. SystemExit for a name that there is not."""
    if only is None:
        return todo
    names = {name.strip() for name in only.split(";")}
    if unknown := names - {section.name for section in todo}:
        raise SystemExit(f"--only: there is no {sorted(unknown)[0]!r}; there are " +
                         "; ".join(section.name for section in todo))
    names |= {FIRST} | {need for section in todo if section.name in names for need in section.needs}
    return [section for section in todo if section.name in names]


def main() -> None:
    start, args = time.monotonic(), arguments()
    size = dict(STAND_IN if args.stand_in else GPU | SHAPES[args.model])
    size["layers"] = args.layers or size["layers"]
    archive: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "stand_in": args.stand_in,
        "command": shlex.join(["python", *sys.argv]), "settings": {**size, "seconds": args.seconds, "seed": args.seed},
        "shape": f"Random weights of {NAMES[args.model]}'s shapes, {size['layers']} layers, hidden {size['hidden']}, "
                 f"inner {size['inner']}, int4 g64 experts, int8 dense.", "sections": {}}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    files = Files(archive, args.out, args.name)

    def terminated(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows cleans up
        raise Terminated

    signal.signal(signal.SIGTERM, terminated)
    code = 0
    try:
        with ExitStack() as opened:
            folders = work_folders(args.work, opened)
            # The stand-in's Triton kernels are run by Triton's interpreter.
            workers = Workers([sys.executable, str(SIDE)],
                              {**os.environ, "TRITON_INTERPRET": "1"} if args.stand_in else None)
            opened.callback(workers.close)
            perform(chosen(sections(args, size, folders), args.only), archive, start + args.seconds - CLOSING,
                    files.write, workers)
    except Terminated:
        archive["ended"], code = "by SIGTERM", 143
    except KeyboardInterrupt:
        archive["ended"], code = "by Ctrl-C", 130
    for result in archive["sections"].values():
        if result["state"] == "running":
            result |= {"state": "ended", "reason": archive.get("ended", "")}
    archive["seconds"] = round(time.monotonic() - start, 1)
    files.write()
    print(files.report())
    states = {name: result["state"] for name, result in archive["sections"].items()}
    if not code and states.get(FIRST) != "done":
        code = 2
    if not code and "wrong" in states.values():
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
