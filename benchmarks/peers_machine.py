"""Where, when and with what peers.py measured."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import instruction_levels
import torch
from peers_report import GIB

from qmix.hardware import memory, physical_cores
from qmix.kernels import native


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine(peer: str) -> dict[str, Any]:
    """Where, when and with what."""
    here = Path(__file__).parent
    git = [subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True).stdout.strip()
           for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))]
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {"date": now(), "commit": git[0] + (" with changes" if git[1] else ""), "processor": (models or ["?"])[0],
            "cores": physical_cores(), "memory_gib": round(memory().total / GIB, 1), "system": platform.platform(),
            "python": platform.python_version(), "torch": torch.__version__, "peer": peer,
            "instructions": own_instructions(),
            "load_average": os.getloadavg()[0]}


def find_peer(parser: argparse.ArgumentParser, python: str, level: str | None) -> str:
    """"llama-cpp-python 0.3.36 (AVX2 FMA ...)"; argparse's error where `python` lacks something or is of another level.
    gguf is pure Python: where only the peer has it, it is taken from there."""
    code = ("import llama_cpp, gguf, pathlib; print(llama_cpp.__version__, pathlib.Path(gguf.__file__).parents[1])\n"
            "print(llama_cpp.llama_print_system_info().decode())")
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as e:
        parser.error(f"--peer-python {python}: {e.strerror}")
    if done.returncode:
        parser.error(f"--peer-python {python}: wants llama-cpp-python and gguf: {done.stderr.strip().splitlines()[-1]}")
    first, _, system = done.stdout.partition("\n")
    version, folder = first.split(maxsplit=1)
    instruction_levels.check_peer(parser, level, system)
    try:
        import gguf  # noqa: F401
    except ImportError:
        sys.path.append(folder.strip())
    return f"llama-cpp-python {version} ({' '.join(sorted(instruction_levels.features(system)))})"


def own_instructions() -> str:
    """What qmix's side computes with: "native avx2, torch AVX2"."""
    level = next(iter(native.wanted_levels()), "off")
    return f"native {level}, torch {torch.backends.cpu.get_cpu_capability()}"
