"""The native kernels' sources compile without a warning that newer compilers make an error of; and a build that fails
leaves its reason where the loader finds it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from qmix.commands.doctor import report
from qmix.kernels import native
from qmix.kernels.native import loader

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "qmix" / "kernels" / "native"
COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
FULL = ("int qmix_abi(void) { return %d; } const char *qmix_level_name(int i) { return i ? 0 : \"portable\"; }\n"
        "long qmix_peak(void) { return 0; } int qmix_sequence(void) { return 0; }\n")


@needs_compiler
@pytest.mark.parametrize("file", sorted(path.name for path in NATIVE.glob("*.c")))
def test_every_function_is_declared(file: str) -> None:
    done = subprocess.run([COMPILER, "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", NATIVE / file],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize("file", ["native.h", "level.h", "pool.h", "x86_columns.h", "x86_pairs.h", "x86_256.h"])
def test_a_header_includes_what_it_uses(file: str, tmp_path: Path) -> None:
    """Alone, in a file that includes nothing else."""
    if file.startswith("x86") and "x86_64" not in subprocess.run([COMPILER, "-dumpmachine"], capture_output=True,
                                                                 text=True).stdout:
        pytest.skip("another processor")
    source = tmp_path / "alone.c"
    source.write_text(f'#include "{file}"\n')
    done = subprocess.run([COMPILER, "-std=c11", "-Wall", "-Werror=implicit-function-declaration", "-mavx2", "-mfma",
                           "-fsyntax-only", f"-I{NATIVE}", source] if file.startswith("x86") else
                          [COMPILER, "-std=c11", "-Wall", "-Werror=implicit-function-declaration", "-fsyntax-only",
                           f"-I{NATIVE}", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(folder: Path, source: str, compiler: str) -> subprocess.CompletedProcess[str]:
    """setup.py, over one C file instead of the kernels."""
    there = folder / "qmix" / "kernels" / "native"
    there.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "setup.py", folder)
    (folder / "pyproject.toml").write_text('[project]\nname = "qmix"\nversion = "0"\n'
                                           "[tool.setuptools]\npackages = []\n")
    (there / "native.c").write_text(source)
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, text=True,
                          capture_output=True, env={"PATH": "/usr/bin:/bin", "CC": compiler})
    assert done.returncode == 0, done.stderr
    return done


@needs_compiler
def test_a_build_that_fails_leaves_its_reason_until_one_succeeds(tmp_path: Path) -> None:
    there = tmp_path / "qmix" / "kernels" / "native"
    done = build(tmp_path, "int f(void) { return undeclared; }\n", "cc")
    opened, trouble = loader.open_library(there)
    assert opened is None and trouble.startswith("the C compiler failed: ") and "undeclared" in trouble
    kept = (there / loader.FAILURE).read_text()
    assert "return undeclared" in kept and len(kept) < 10_000
    assert "return undeclared" in done.stderr  # it is still seen where it was
    build(tmp_path, FULL % loader.ABI, "cc")
    opened, trouble = loader.open_library(there)
    assert opened is not None and trouble == "" and not (there / loader.FAILURE).exists()
    build(tmp_path, "int f(void) { return undeclared; }\n", "cc")
    opened, trouble = loader.open_library(there)
    assert opened is not None and "an earlier build is in use" in trouble and "undeclared" in trouble


def test_without_a_compiler_that_is_the_reason(tmp_path: Path) -> None:
    build(tmp_path, "int f(void) { return 1; }\n", "no-such-compiler")
    assert loader.open_library(tmp_path / "qmix" / "kernels" / "native") == (
        None, "no C compiler was found (no-such-compiler)")


def test_what_cannot_be_used_says_why(tmp_path: Path) -> None:
    assert "not installed" in loader.open_library(tmp_path)[1]
    library = tmp_path / f"_native{EXTENSION_SUFFIXES[0]}"
    (tmp_path / "_native.cpython-27-x86_64-linux-gnu.so").write_bytes(b"")
    assert "not built for this Python" in loader.open_library(tmp_path)[1]
    library.write_bytes(b"not a library" * 100)
    opened, trouble = loader.open_library(tmp_path)
    assert opened is None and "cannot be opened" in trouble and "invalid ELF header" in trouble
    (tmp_path / loader.FAILURE).write_bytes(b"\x1b[1mbad\x00 \xff\n" + b"more\n" * 10**5)
    assert "cannot be opened" in loader.open_library(tmp_path)[1]
    library.unlink()
    trouble = loader.open_library(tmp_path)[1]
    assert trouble.startswith("[1mbad") and trouble.isprintable()


@needs_compiler
@pytest.mark.parametrize(("source", "word"), [(FULL % (loader.ABI - 1), f"version {loader.ABI - 1}"),
                                              ("int other(void) { return 1; }\n", "undefined symbol")])
def test_a_library_of_another_qmix_is_named(source: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "old.c").write_text(source)
    library = tmp_path / f"_native{EXTENSION_SUFFIXES[0]}"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, tmp_path / "old.c"], check=True)
    opened, trouble = loader.open_library(tmp_path)
    assert opened is None and "another version of qmix" in trouble and word in trouble


def test_the_doctor_names_the_reason_and_where_the_output_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QMIX_NATIVE", raising=False)
    (tmp_path / loader.FAILURE).write_text("the C compiler failed: x.c:12: error: memcpy\n\nmore\n")
    monkeypatch.setattr(loader, "HERE", tmp_path)
    monkeypatch.setattr(loader, "_found", lambda: loader.open_library(tmp_path))
    found, problems = report.kernels()
    assert native.levels() == {} and found["native_levels"] == "none: the C compiler failed: x.c:12: error: memcpy"
    assert "x.c:12: error: memcpy" in problems[0].problem and str(tmp_path / loader.FAILURE) in problems[0].cure
    assert any("x.c:12" in row["note"] for row in found["notes"])
