"""qmix on a machine with one NVIDIA GPU, in one call of at most ten minutes: Mixtral 8x7B at full size, 4-bit experts,
VRAM capped as on a smaller card.

    python setup.py build_ext --inplace                            # the CPU's kernels; without a compiler torch's serve
    PYTHONPATH=. python benchmarks/gpu.py --out benchmarks/results
    PYTHONPATH=. python benchmarks/gpu.py --stand-in --out DIR     # anywhere: the CPU as device, a small model; figures
                                                                   # mean nothing, but every part of qmix has run

Needs no network and no model: weights are random bytes in Mixtral's shapes (synthetic.py: 26 GB, in shared memory where
that has room), which route as a trained model does. `local` tokens repeat experts about as often as text does in
Mixtral, `uniform` ones never on purpose. Writes DATE-gpu-CARD.json and .md into --out, anew after every result.

Sections, by importance; each is a process of its own with a share of --seconds, and one that fails, is late or cannot
run here is recorded with the reason while the rest goes on:

    check       the demo's model on the device against the CPU. Wrong results: nothing else is timed but the kernels,
                which are compared with the reference one by one, and the exit code is 1
    store, bandwidth    the weights; VRAM, PCIe up and down, RAM, and the CPU computing experts
    24 GB       decoding at 128 and 4096 tokens of context, prompts of 512 and 2048; then with all experts in VRAM, with
                8, 12 and 16 GB, without prefetch, with everything computed by the GPU ("split off"), and neither
    kernels     every operation of decoding against the memory's bandwidth; cuda_kernels.py for the other formats
    peer        transformers + accelerate with CPU offload; bitsandbytes; llama.cpp (--peer-python: an interpreter with
                llama-cpp-python, built with CUDA, and gguf)

Exit code 0 whatever failed or was skipped, 1 for wrong results, 2 without a card. Ended by SIGTERM or Ctrl-C it kills
what runs, writes what it has and exits with 143 or 130. Run to its end on the stand-in only: no GPU was at hand.
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
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import gpu_report
from gpu_sections import Section, allot, run
from sides import number, say

SIDE = Path(__file__).with_name("gpu_side.py")
SHARED = Path("/dev/shm")
LAYER_GB, REST_GB = 0.84, 0.5  # of the store
SPARE = 16e9  # bytes of RAM beside the store and a second copy of it, for the store to lie in shared memory
FIRST = "machine"  # where there is no card nothing else is tried
CLOSING = 3.0  # seconds kept for the last report
GPU = {"layers": 32, "hidden": 4096, "inner": 14336, "contexts": [128, 4096], "prompts": [512, 2048], "warm": 48,
       "timed": 96, "peer_layers": 4, "peer_timed": 8}
STAND_IN = {"layers": 3, "hidden": 512, "inner": 256, "contexts": [16, 64], "prompts": [32, 64], "warm": 4, "timed": 6,
            "peer_layers": 2, "peer_timed": 2}


class Terminated(BaseException):
    """SIGTERM."""


def sections(args: argparse.Namespace, size: dict[str, Any], work: Path) -> list[Section]:
    """All of them, the most important first. Seconds are for a card; the stand-in needs less."""
    small = args.stand_in
    base = {"stand_in": small, "work": str(work), "store": str(work / "store"), "threads": args.threads,
            "seed": args.seed, "commit": args.commit, **size, "workers": 1 if small else os.cpu_count() or 1}
    peer = {**base, "vram": 24, "timed": size["peer_timed"], "peer_python": args.peer_python}

    def part(name: str, do: str, least: float, most: float, task: dict[str, Any] = base,
             needs: tuple[str, ...] = (FIRST,), unless: str | None = None) -> Section:
        return Section(name, do, min(least, 8.0) if small else least, most, task, needs, unless)

    def placed(name: str, vram: int | None, least: float = 25.0, most: float = 45.0, prefetch: bool = True,
               split: bool = True, kinds: Sequence[str] = ("local",), prompts: Sequence[int] = ()) -> Section:
        # The stand-in's records are so small that `auto` would not look ahead.
        mode = ("ahead" if small else "auto") if prefetch else "off"
        return part(name, "run", least, most, {**base, "vram": vram, "exact": not split, "prefetch": mode,
                                               "kinds": list(kinds), "prompts": list(prompts)}, needs=(FIRST, "store"))

    no_peer = None if args.peer_python else "no --peer-python was given"
    return [
        part(FIRST, "machine", 15, 60, needs=()),
        part("check", "check", 45, 90),
        part("store", "store", 75, 200),
        part("bandwidth", "bandwidth", 20, 45, needs=(FIRST, "store")),
        placed("24 GB", 24, 80.0, 120.0, prompts=size["prompts"]),
        part("kernels", "kernels", 40, 75),
        part("peer: transformers + accelerate", "peer", 50, 90, {**peer, "peer": "transformers"}),
        placed("all in VRAM", None, 40.0, 70.0, prompts=size["prompts"]),
        placed("24 GB, split off", 24, split=False),
        placed("24 GB, prefetch off", 24, prefetch=False),
        placed("12 GB", 12, prompts=size["prompts"]),
        placed("16 GB", 16),
        placed("8 GB", 8),
        placed("24 GB, uniform", 24, kinds=("uniform",)),
        placed("24 GB, prefetch and split off", 24, prefetch=False, split=False),
        placed("12 GB, split off", 12, split=False),
        placed("12 GB, prefetch off", 12, prefetch=False),
        part("formats", "formats", 25, 60, {**base, "options": [
            "--interpret", "--format", "int4"] if small else ["--repeat", "20"]}),
        part("peer: llama.cpp", "peer", 45, 120, {**peer, "peer": "llama"}, unless=no_peer),
        part("peer: bitsandbytes", "peer", 40, 60, {**peer, "peer": "bitsandbytes"}),
        placed("12 GB, prefetch and split off", 12, prefetch=False, split=False),
    ]


def refused(section: Section, done: dict[str, Any]) -> str | None:
    """Why a section is not to be run, given the results so far."""
    for name in section.needs:
        if done.get(name, {}).get("state") != "done":
            return f"needs {name}, which failed" if name in done else f"needs {name}"
    if section.do in ("run", "peer") and done.get("check", {}).get("state") == "wrong":
        return "the check found wrong results: nothing is timed"
    return None


def perform(todo: Sequence[Section], archive: dict[str, Any], ends: float, keep: Any) -> None:
    """Run the sections in order within the time; results into archive["sections"]."""
    results = archive["sections"]
    results |= {section.name: {"state": "unavailable", "reason": section.unless} for section in todo if section.unless}
    waiting = [section for section in todo if not section.unless]
    while waiting:
        section = waiting[0]
        seconds, dropped = allot(waiting, ends - time.monotonic())
        if reason := refused(section, results):
            results[section.name] = {"state": "skipped", "reason": reason}
        elif section in dropped:
            results[section.name] = {"state": "skipped", "reason": "no time was left"}
        else:
            say(f"{section.name}: up to {seconds:.0f} s")

            results[section.name] = {"state": "running"}

            def kept(result: dict[str, Any], name: str = section.name) -> None:
                results[name] = result
                keep()

            results[section.name] = run(section, seconds, [sys.executable, str(SIDE)], kept)
            say(f"{section.name}: {results[section.name]['state']}, {results[section.name]['seconds']} s "
                f"{results[section.name].get('reason', '')}")
        waiting.pop(0)
        keep()


def work_folder(args: argparse.Namespace, size: dict[str, Any]) -> tempfile.TemporaryDirectory[str]:
    """Shared memory where the store fits there beside what is loaded of it; else a temporary folder."""
    need = 0.0 if args.stand_in else 1e9 * (LAYER_GB * size["layers"] + REST_GB)
    available = 1024 * number("/proc/meminfo", r"MemAvailable:\s+(\d+)")
    parent = args.work
    if parent is None and SHARED.is_dir() and shutil.disk_usage(SHARED).free > 1.05 * need and (
            available > 2 * need + (0 if args.stand_in else SPARE)):
        parent = SHARED
    return tempfile.TemporaryDirectory(prefix="qmix-gpu-", dir=parent, ignore_cleanup_errors=True)


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
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the store is made, for the time of the run")
    parser.add_argument("-t", "--threads", type=int, help="of the CPU (all physical cores)")
    parser.add_argument("--layers", type=int, help="fewer than 32, to try things out")
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
    size = dict(STAND_IN if args.stand_in else GPU)
    size["layers"] = args.layers or size["layers"]
    archive: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "stand_in": args.stand_in,
        "command": shlex.join(["python", *sys.argv]), "settings": {**size, "seconds": args.seconds, "seed": args.seed},
        "shape": f"Random weights of Mixtral 8x7B's shapes, {size['layers']} layers, hidden {size['hidden']}, inner "
                 f"{size['inner']}, int4 g64 experts, int8 dense.", "sections": {}}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    files = Files(archive, args.out, args.name)

    def terminated(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows cleans up
        raise Terminated

    signal.signal(signal.SIGTERM, terminated)
    code = 0
    try:
        with work_folder(args, size) as work:
            perform(chosen(sections(args, size, Path(work)), args.only), archive, start + args.seconds - CLOSING,
                    files.write)
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
