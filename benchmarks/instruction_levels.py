"""One instruction set for both sides of peers.py, decode_turns.py and offload_peers.py: --level.

A level is one of the native kernels (qmix/kernels/native/loader.py). qmix and torch are held to it by QMIX_NATIVE and
ATEN_CPU_CAPABILITY, which torch reads once, at its start; so the benchmark starts itself again with them. What
llama.cpp uses was decided when it was built, so each level has a peer of its own:

    avx2   GGML_NATIVE=OFF, and AVX2, FMA, F16C and BMI2 on:
           CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" pip install ...
    the others   besides, GGML_AVX_VNNI; or GGML_AVX512, then GGML_AVX512_VBMI and GGML_AVX512_VNNI, then
                 GGML_AVX512_BF16
"""

from __future__ import annotations

import argparse
import os
import re
import sys

BASE = frozenset({"AVX2", "FMA", "F16C", "BMI2"})
VNNI = frozenset({"AVX512", "AVX512_VBMI", "AVX512_VNNI"})
# {level: (torch's capability, what llama.cpp names as its own)}
LEVELS = {"avx2": ("avx2", BASE), "avx2-vnni": ("avx2", BASE | {"AVX_VNNI"}), "avx512": ("avx512", BASE | {"AVX512"}),
          "avx512-vnni": ("avx512", BASE | VNNI), "avx512-bf16": ("avx512", BASE | VNNI | {"AVX512_BF16"})}
KNOWN = frozenset().union(*(peer for _, peer in LEVELS.values()))


def environment(level: str) -> dict[str, str]:
    return {"QMIX_NATIVE": level, "ATEN_CPU_CAPABILITY": LEVELS[level][0]}


def start_at(level: str | None) -> None:
    """Nothing without a level; else this program again, unless its environment is the level's already."""
    if level is None or environment(level).items() <= os.environ.items():
        return
    os.environ.update(environment(level))
    os.execv(sys.executable, [sys.executable, *sys.argv])


def features(system: str) -> set[str]:
    """llama_print_system_info's line -> what it has. "CPU : AVX2 = 1 | AVX512 = 0 | " -> {"AVX2"}"""
    return {name for name, value in re.findall(r"(\w+) = (\d+)", system) if value != "0"}


def check_peer(parser: argparse.ArgumentParser, level: str | None, system: str) -> None:
    """argparse's error where llama.cpp was built for another level."""
    if level is None:
        return
    wanted, found = LEVELS[level][1], features(system) & KNOWN
    if found != wanted:
        more, less = sorted(found - wanted), sorted(wanted - found)
        parser.error(f"--level {level}: this llama.cpp was built " + " and ".join(
            [f"with {', '.join(more)}"] * bool(more) + [f"without {', '.join(less)}"] * bool(less))
            + ": name one that was built for this level (benchmarks/instruction_levels.py has the flags)")
