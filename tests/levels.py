"""Runs the whole suite at every instruction level of this processor; `make test-levels` calls it.

    python tests/levels.py [PYTEST ARGUMENTS]

Three things decide bits: the level of the native kernels (QMIX_NATIVE), torch's own (ATEN_CPU_CAPABILITY), and the
number of threads. The runs are not their product, which would take an hour or more: each value of each of the three
is in at least one run. Example, on a processor with AVX2:

    QMIX_NATIVE  ATEN_CPU_CAPABILITY  threads
    avx2         avx2                 2
    portable     default              1
    off          avx2                 2

A test may take TIMEOUT seconds: portable C and torch without its instructions are several times slower.

Exit code 0 where all runs passed, 1 otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from qmix.kernels import native

ROOT = Path(__file__).parents[1]
TORCH_LEVELS = ("default", "avx2", "avx512")  # each with those before it
THREADS = (2, 1)
TIMEOUT = 900


class Run(NamedTuple):
    """native: QMIX_NATIVE; aten: ATEN_CPU_CAPABILITY; threads: torch's and the commands'."""

    native: str
    aten: str
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        return {"QMIX_NATIVE": self.native, "ATEN_CPU_CAPABILITY": self.aten, "QMIX_TEST_THREADS": str(self.threads)}


def runs(native_levels: list[str], torch_levels: list[str]) -> list[Run]:
    """Each level of both lists and each number of threads in at least one run."""
    count = max(len(native_levels), len(torch_levels), len(THREADS))
    return [Run(native_levels[i % len(native_levels)], torch_levels[i % len(torch_levels)], THREADS[i % len(THREADS)])
            for i in range(count)]


def torch_levels() -> list[str]:
    """Those that this processor has, the best first; "default" alone where torch names another kind (ARM)."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    known = TORCH_LEVELS[:TORCH_LEVELS.index(best) + 1] if best in TORCH_LEVELS else TORCH_LEVELS[:1]
    return list(reversed(known))


def main(arguments: list[str]) -> int:
    done = []
    for run in runs([*native.levels(), "off"], torch_levels()):
        print("\n== " + " ".join(f"{name}={value}" for name, value in run.environment.items()), flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "pytest", f"--timeout={TIMEOUT}", *arguments], cwd=ROOT,
                              env=os.environ | run.environment).returncode
        done.append((run, code, time.monotonic() - start))
    print("\n| QMIX_NATIVE | ATEN_CPU_CAPABILITY | threads | result | seconds |\n| --- | --- | --- | --- | --- |")
    for run, code, seconds in done:
        print(f"| {run.native} | {run.aten} | {run.threads} | {'passed' if code == 0 else 'FAILED'} | {seconds:.0f} |")
    return int(any(code for _, code, _ in done))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
