"""The level avx2-vnni without a processor that has it: its one instruction is emulated in scalar C, and everything else
of the level is compiled as it is. Its sums are exact, so its bits must be those of the level avx2."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_native import int4_matrix, int8_matrix, mxfp4_matrix, operand, relative, want
from test_native_carried import carried_matrix

from qmix.formats.packed import Packed
from qmix.kernels import native
from qmix.kernels.native import NativeProducts, loader
from qmix.sizes import CARRIED

SOURCES = Path(native.__file__).parent
COMPILER = shutil.which("cc")
EMULATED = """
#include <immintrin.h>
#include "level.h"

static int supported(void) { return 1; }
static int never(void) { return 0; }
#define OTHER(name) const qmix_level qmix_##name = {#name, never};
OTHER(avx512bf16) OTHER(avx512vnni) OTHER(avx512) OTHER(avx2) OTHER(portable)

TARGET("avx2,fma,f16c")
/* A call each time: inlined, it takes the compiler minutes. */
static __attribute__((noinline)) __m256i emulated(__m256i sum, __m256i w, __m256i x) {
    int32_t sums[8];
    uint8_t unsigned_bytes[32];
    int8_t signed_bytes[32];
    _mm256_storeu_si256((__m256i *)sums, sum);
    _mm256_storeu_si256((__m256i *)unsigned_bytes, w);
    _mm256_storeu_si256((__m256i *)signed_bytes, x);
    for (int i = 0; i < 32; i++)
        sums[i / 4] += unsigned_bytes[i] * signed_bytes[i];
    return _mm256_loadu_si256((const __m256i *)sums);
}
#define _mm256_dpbusd_avx_epi32 emulated
#define HAS_VNNI
#define LEVEL avx2vnni
#define NAME "avx2-vnni"
#include "x86_256.h"

#include "products.h"
END_TARGET
"""

pytestmark = pytest.mark.skipif(COMPILER is None or "avx2" not in native.levels(),
                                reason="no C compiler, or a processor without AVX2")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "emulated.c").write_text(EMULATED)
    built = folder / "emulated.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-std=c11", "-pthread", "-ffp-contract=off", f"-I{SOURCES}",
                    "-o", built, folder / "emulated.c", SOURCES / "native.c", SOURCES / "pool.c",
                    SOURCES / "experts.c", "-lm"], check=True)
    found = ctypes.CDLL(str(built))
    found.qmix_level_name.restype, found.qmix_peak.restype = ctypes.c_char_p, ctypes.c_int64
    return found


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> dict[str, NativeProducts]:
    """By activations."""
    monkeypatch.setattr(loader, "_found", lambda: (library, ""))
    assert list(native.levels()) == ["avx2-vnni"]
    return {name: NativeProducts("avx2-vnni", name) for name in ("int8", "bf16")}


MATRICES = [*(int4_matrix(130, 320, group, block, name=name) for name in ("int4", "int3", "int2")
              for block in (64, 32) for group in (32, 64)),
            int4_matrix(100, 640, 128, 64), int8_matrix(100, 320), int8_matrix(33, 64),
            mxfp4_matrix(130, 320), mxfp4_matrix(140, 64, 2), *(carried_matrix(kind, 130, 512) for kind in CARRIED)]


@pytest.mark.parametrize("m", MATRICES, ids=lambda m: f"{m.spec.format}-{m.spec.block}-{m.spec.group_size}")
def test_its_bits_are_those_of_avx2(m: Packed, emulated: dict[str, NativeProducts],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = (*range(1, 10), 40)
    got = {(name, count): own.linear(operand(count, m.spec.cols), m)[0]
           for name, own in emulated.items() for count in tokens}
    monkeypatch.undo()
    for (name, count), y in got.items():
        x = operand(count, m.spec.cols)
        assert torch.equal(y, NativeProducts("avx2", name).linear(x, m)[0]), (name, count)
        assert relative(y, want(x, m, name)) < 1e-3
