"""The C driver of tests/native_driver at every level of this processor; test_native_arm.py runs it on another one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qmix.kernels import native
from qmix.kernels.native import loader

SOURCES = Path(native.__file__).parent
DRIVER = Path(__file__).with_name("native_driver")
COMPILER = shutil.which("cc")
FLAGS = ("-O2", "-std=c11", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")  # as setup.py
pytestmark = pytest.mark.skipif(COMPILER is None or not native.levels(), reason="no C compiler, or no native kernels")

# One number of a result is wrong by a part in ten thousand, or the bits of a token depend on their number.
WRONG = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include "native.h"

int32_t qmix_products(int32_t level, int32_t act, const qmix_job *jobs, int64_t count, int32_t threads) {
    int32_t (*real)(int32_t, int32_t, const qmix_job *, int64_t, int32_t);
    *(void **)&real = dlsym(RTLD_NEXT, "qmix_products");
    int32_t failed = real(level, act, jobs, count, threads);
    if (%s)
        ((float *)jobs->y)[jobs->rows - 1] *= %s;
    return failed;
}
"""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("objects")
    sources = sorted(DRIVER.glob("*.c"))
    subprocess.run([str(COMPILER), *FLAGS, f"-I{SOURCES}", "-c", *sources], cwd=folder, check=True)
    return [folder / f"{source.stem}.o" for source in sources]


def link(folder: Path, *parts: Path) -> Path:
    """The driver, with the library that qmix uses."""
    found = loader.library()
    assert found is not None
    program = folder / "native_driver"
    subprocess.run([str(COMPILER), *FLAGS, f"-I{SOURCES}", "-o", program, *parts, found._name,
                    f"-Wl,-rpath,{SOURCES}", "-lm", "-ldl"], check=True)
    return program


@pytest.fixture(scope="module")
def program(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(tmp_path_factory.mktemp("driver"), *objects)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("level", list(native.levels()) or ["none"])
def test_every_level_is_right(level: str, program: Path) -> None:
    done = run(program, level)
    assert done.returncode == 0, done.stdout
    first, *checks, last = done.stdout.splitlines()
    assert first == "levels: " + " ".join(native.levels()) and last == "0 failed"
    assert len(checks) > 100 and all(line.startswith(f"ok   {level}, ") for line in checks)


@pytest.mark.parametrize(("where", "factor", "words"), [
    ("jobs->tokens == 40 && jobs->bits == 3", "1.0001f", "3 bits in blocks of 32"),
    ("jobs->tokens == 7 && act == QMIX_ACT_BF16", "1.0000002f", "bf16 activations, 1 to 9 tokens as among 40")])
def test_it_notices_one_wrong_number(where: str, factor: str, words: str, objects: list[Path],
                                     tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.c"
    wrong.write_text(WRONG % (where, factor))
    level = next(iter(native.levels()))
    done = run(link(tmp_path, *objects, wrong), level)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == 1 and any(words in line for line in failed)
    assert done.stdout.endswith(f"\n{len(failed)} failed\n")


def test_a_level_that_is_not_here_is_refused(program: Path) -> None:
    done = run(program, "avx1024")
    assert done.returncode == 2 and "avx1024: this processor has no such level" in done.stderr
