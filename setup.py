"""Builds the native kernels. Everything else about the package is in pyproject.toml.

The extension is optional: where there is no C compiler, or the build fails, qmix installs without it and computes
through torch. The reason is kept in a small file beside the package (qmix/kernels/native/loader.py reads it), so that
`qmix doctor` and every run can say why.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("qmix/kernels/native")
FAILURE = "build-error.txt"  # loader.FAILURE
KEPT = 4000  # bytes of the compiler's output, from its end


class BuildAndTell(build_ext):
    """build_ext that leaves FAILURE beside the library that it could not build, and removes it once it can."""

    reasons: dict[str, str]

    def run(self) -> None:
        self.reasons = {}
        super().run()
        for ext in self.extensions:
            for folder in self._folders(ext):
                file = folder / FAILURE
                file.unlink(missing_ok=True)
                if ext.name in self.reasons:
                    folder.mkdir(parents=True, exist_ok=True)
                    file.write_text(self.reasons[ext.name], "utf-8")

    def build_extension(self, ext: Extension) -> None:
        with _recorded_errors() as output:
            try:
                super().build_extension(ext)
            except Exception as e:
                compiler = getattr(self.compiler, "compiler_so", None) or ["cc"]
                if shutil.which(compiler[0]) is None:
                    self.reasons[ext.name] = f"no C compiler was found ({compiler[0]})\n"
                else:
                    said = _end(output)
                    error = next((line for line in said.splitlines() if "error" in line.lower()), None)
                    self.reasons[ext.name] = f"the C compiler failed: {error or e}\n\n{e}\n\n{said}"
                raise

    def _folders(self, ext: Extension) -> set[Path]:
        """Where the library of `ext` belongs: in the build, and, built in place, in the sources."""
        parts = ext.name.split(".")[:-1]
        return {Path(self.build_lib, *parts), *([Path(*parts)] if self.inplace else [])}


@contextmanager
def _recorded_errors() -> Iterator[BinaryIO]:
    """What this process and its children write to stderr meanwhile, which still gets there afterwards."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        real = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            file.seek(0)
            sys.stderr.write(file.read().decode("utf-8", "replace"))


def _end(file: BinaryIO) -> str:
    """The last KEPT bytes, whole lines."""
    sys.stderr.flush()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - KEPT))
    text = file.read().decode("utf-8", "replace")
    file.seek(0, os.SEEK_END)
    return text if size <= KEPT else text.partition("\n")[2]


setup(
    cmdclass={"build_ext": BuildAndTell},
    ext_modules=[Extension(
        "qmix.kernels.native._native",
        sources=sorted(map(str, NATIVE.glob("*.c"))),
        depends=sorted(map(str, NATIVE.glob("*.h"))),
        extra_compile_args=["-O3", "-g0", "-std=c11", "-pthread",
                            "-ffp-contract=off"],  # no -march: each file names its own instruction set
        extra_link_args=["-pthread"],
        libraries=["m"],
        optional=True,
    )],
)
