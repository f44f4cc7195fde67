"""Builds the native kernels. Everything else about the package is in pyproject.toml.

The extension is optional: where there is no C compiler, or it fails, qmix installs without it and computes through
torch, and says so.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("qmix/kernels/native")

setup(ext_modules=[Extension(
    "qmix.kernels.native._native",
    sources=sorted(map(str, NATIVE.glob("*.c"))),
    depends=sorted(map(str, NATIVE.glob("*.h"))),
    extra_compile_args=["-O3", "-g0", "-std=c11", "-pthread",
                        "-ffp-contract=off"],  # no -march: each file names its own instruction set
    extra_link_args=["-pthread"],
    libraries=["m"],
    optional=True,
)])
