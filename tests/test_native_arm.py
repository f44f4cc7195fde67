"""The native kernels for ARM, cross-compiled and run under qemu's user mode: they are right, and the level is chosen by
what the processor has.

Debian and Ubuntu: apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_native_driver import DRIVER, SOURCES, run
from test_native_driver import FLAGS as OPTIMIZED

COMPILER = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
pytestmark = [pytest.mark.skipif(COMPILER is None or EMULATOR is None, reason="no compiler or emulator for ARM"),
              pytest.mark.timeout(600)]  # half a minute, most of it compiling; more where others want the processor
FLAGS = ("-O1", *OPTIMIZED[1:])  # what the compiler makes of it is not the point, and takes half as long
PLAIN = ["portable"]
DOT = ["neon-dot", *PLAIN]
MATRICES = ["neon-i8mm", *DOT]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All C files of the library, as setup.py compiles them, and the driver."""
    folder = tmp_path_factory.mktemp("arm")
    trial = folder / "trial.c"
    trial.write_text("#include <stdlib.h>\nint main(void) { return 0; }\n")
    if run(COMPILER, "-static", "-o", folder / "trial", trial).returncode:
        pytest.skip("no C library for ARM to link with")

    def compiled(source: Path) -> Path:
        to = folder / f"{source.parent.name}-{source.stem}.o"
        subprocess.run([str(COMPILER), *FLAGS, f"-I{SOURCES}", "-c", "-o", to, source], check=True)
        return to

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compiled, sorted([*SOURCES.glob("*.c"), *DRIVER.glob("*.c")])))
    subprocess.run([str(COMPILER), "-static", "-pthread", "-o", folder / "driver", *objects, "-lm"], check=True)
    return folder / "driver"


@pytest.mark.parametrize(("processor", "levels"), [("max", MATRICES), ("neoverse-n1", DOT), ("cortex-a53", PLAIN)])
def test_the_best_level_of_a_processor_is_right(processor: str, levels: list[str], program: Path) -> None:
    """cortex-a53 has neither dot products nor products of matrices, neoverse-n1 only the former."""
    if processor not in run(EMULATOR, "-cpu", "help").stdout.split():
        pytest.skip(f"this emulator has no {processor}")
    done = run(EMULATOR, "-cpu", processor, program, levels[0])
    assert done.returncode == 0, done.stdout + done.stderr
    first, *checks, last = done.stdout.splitlines()
    assert first == "levels: " + " ".join(levels) and last == "0 failed"
    assert len(checks) > 100 and all(line.startswith(f"ok   {levels[0]}, ") for line in checks)


@pytest.mark.parametrize("file", ["neon.h", "neon_columns.h"])
def test_a_header_includes_what_it_uses(file: str, tmp_path: Path) -> None:
    source = tmp_path / "alone.c"
    source.write_text(f'#include "{file}"\n')
    done = run(COMPILER, "-std=c11", "-Wall", "-Werror=implicit-function-declaration", "-march=armv8.2-a+dotprod",
               "-fsyntax-only", f"-I{SOURCES}", source)
    assert done.returncode == 0, done.stderr
