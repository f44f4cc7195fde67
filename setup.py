"""Builds the native kernels. Everything else about the package is in pyproject.toml.

The extension is optional: where there is no C compiler, or it fails, qmix installs without it and computes through
torch, and says so.
"""

from glob import glob

from setuptools import Extension, setup

setup(ext_modules=[Extension(
    "qmix.kernels.native._native",
    sources=sorted(glob("qmix/kernels/native/*.c")),
    depends=sorted(glob("qmix/kernels/native/*.h")),
    extra_compile_args=["-O3", "-g0", "-std=c11", "-pthread"],  # no -march: each file names its own instruction set
    extra_link_args=["-pthread"],
    optional=True,
)])
