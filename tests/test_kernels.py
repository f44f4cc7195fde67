"""Every kernel against an independent float64 decode and product; also under smaller instruction sets.

Tolerances are derived, not tuned. A bf16 kernel's result is the exact product of the decoded weights and
the bf16 operand, summed in fp32 and rounded once to bf16, which errs by at most 2^-8 of a result: so the
norm of the error is below 2^-8 of the norm of the result. A wrong nibble, row or group is an error
of order 1. Where the decoded weights are rounded to bf16 too (nf4, fp4), their 2^-8 adds up likewise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import decode, product, relative
from warm_python import WarmPython

from qmix.errors import UsageError
from qmix.formats import Packed, pack
from qmix.kernels import cpu, native, reference, table
from qmix.kernels.table import KernelTable, select
from qmix.quantize.methods import quantize
from qmix.sizes import MatrixSpec

TOKENS = (1, 2, 7, 64, 300)
SHAPES = [(64, 128, 1), (160, 200, 2), (97, 330, 1), (2, 40, 2), (33, 10, 1), (257, 1000, 1)]
ROUNDING = 2**-8
# What torch computes with here is compared in this process.
LESS = [name for name in ("avx2", "default") if name.upper() != torch.backends.cpu.get_cpu_capability()]
FORMATS = ("int4", "int3", "int2", "int8", "mxfp4", "nf4", "fp4", "bf16", "fp16", "fp32")


@pytest.fixture(scope="module", autouse=True)
def without_native() -> Iterator[None]:
    """These are torch's kernels and the reference; test_native.py has the native ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QMIX_NATIVE", "off")
        yield


@pytest.fixture(scope="module")
def kernels(without_native: None) -> KernelTable:
    return select(FORMATS, say=lambda line: None)


def random_matrix(spec: MatrixSpec, seed: int = 0) -> Packed:
    """Weights whose rows and groups differ in scale and offset, so that a mix-up cannot go unnoticed."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.rows, spec.cols, generator=random)
    weight *= torch.rand(spec.rows, 1, generator=random) + 0.5
    weight += torch.linspace(-2, 2, spec.cols)
    return quantize(weight, spec, "rtn") if spec.bits else pack(weight, spec)


def operand(tokens: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def name_of(spec: MatrixSpec) -> str:
    return f"{spec.format}-{spec.rows}x{spec.cols}-p{spec.parts}-g{spec.group_size}-b{spec.block}"


LAYOUTS = [(32, 64), (64, 32), (128, 64), (32, 32), (64, 64), (128, 32)]  # groups and blocks
# Each format has each layout in two shapes, and each shape in two layouts.
INT4 = [MatrixSpec(name, *shape, *LAYOUTS[(i + j + half) % 6]) for i, name in enumerate(("int4", "int3", "int2"))
        for j, shape in enumerate(SHAPES) for half in (0, 3)]


@pytest.mark.parametrize("spec", INT4, ids=name_of)
def test_agree_int4(kernels: KernelTable, spec: MatrixSpec) -> None:
    m = random_matrix(spec)
    weight = decode(m)
    for tokens in TOKENS:
        x = operand(tokens, spec.cols)
        want = product(x, weight)
        got = kernels.linear(x, m)
        assert got.shape == (tokens, spec.rows) and got.dtype == torch.bfloat16
        assert relative(got, want) < ROUNDING
        wide = kernels.linear(x.float(), m)
        assert wide.dtype == torch.float32 and torch.equal(wide, got.float())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [f for f in FORMATS if not f.startswith("int") or f == "int8"])
def test_agree_others(kernels: KernelTable, shape: tuple[int, int, int], name: str) -> None:
    rows, cols, parts = shape
    m = random_matrix(MatrixSpec(name, rows, cols, parts, *((32, 64) if name == "mxfp4" else ())))
    weight = decode(m)
    bnb = name in ("nf4", "fp4")
    for tokens in TOKENS:
        x = operand(tokens, cols)
        got = kernels.linear(x, m)
        assert got.shape == (tokens, rows) and got.dtype == torch.bfloat16
        spread = product(x.abs(), np.abs(weight))  # rounded weights err by 2^-8 of each product
        bound = ROUNDING * (1 + bnb * np.linalg.norm(spread) / np.linalg.norm(product(x, weight)))
        assert relative(got, product(x, weight)) < bound
        wide = operand(tokens, cols, torch.float32)
        got = kernels.linear(wide, m)
        assert got.dtype == torch.float32
        if name == "int8":  # computes in bf16
            assert relative(got, product(wide.bfloat16(), weight)) < ROUNDING
        else:
            assert relative(got, product(wide, weight)) < 1e-6


@pytest.mark.parametrize("double", [False, True])
def test_agree_double_quantization_in_several_tiles(kernels: KernelTable, double: bool, monkeypatch) -> None:
    monkeypatch.setattr("qmix.formats.packed.TILE_BYTES", 7 * 192 * 4)
    m = random_matrix(MatrixSpec("nf4", 100, 150, double_quant=double))
    x = operand(5, 150, torch.float32)
    assert relative(kernels.linear(x, m), product(x, decode(m))) < 1e-6


@pytest.mark.parametrize("spec", [s for s in INT4 if s.group_size == 64], ids=name_of)
def test_agree_reference(spec: MatrixSpec, monkeypatch) -> None:
    """The reference sums in fp32 and does not round, in one tile or in several."""
    m = random_matrix(spec)
    x = operand(20, spec.cols, torch.float32)
    want = product(x, decode(m))
    for tile_bytes in (4 * 2**20, 1):
        monkeypatch.setattr("qmix.formats.packed.TILE_BYTES", tile_bytes)
        got = reference.linear(x, m)
        assert got.shape == (20, spec.padded_rows)
        logical = got.view(20, spec.parts, -1)[:, :, :spec.rows // spec.parts].reshape(20, -1)
        assert relative(logical, want) < 1e-6


@pytest.mark.parametrize("spec", [s for s in INT4 if s.group_size == 32], ids=name_of)
def test_agree_converted(spec: MatrixSpec, monkeypatch) -> None:
    """Conversion to the block that this torch reads, in one tile and in many."""
    reads = [b for b in (64, 32) if table._agrees(cpu.int4_linear, table._random_grouped("int4", b))]
    if not reads:
        pytest.skip("this torch reads neither block")
    m = random_matrix(spec)
    x = operand(7, spec.cols)
    want = product(x, decode(m))
    for tile_bytes in (4 * 2**20, 1):
        monkeypatch.setattr("qmix.kernels.cpu.TILE_BYTES", tile_bytes)
        got = cpu.int4_converted(reads[0])(x, m)
        logical = got.view(7, spec.parts, -1)[:, :, :spec.rows // spec.parts].reshape(7, -1)
        assert relative(logical, want) < ROUNDING


@pytest.mark.parametrize("spec", [
    MatrixSpec("int4", 160, 1000, 2, 64, 64),
    MatrixSpec("int4", 97, 1000, 1, 32, 32),
    MatrixSpec("int8", 70, 1000),
], ids=lambda s: s.format)
def test_agree_rows_are_the_same_bits_alone_and_in_company(kernels: KernelTable, spec: MatrixSpec) -> None:
    m = random_matrix(spec)
    x = operand(64, spec.cols)
    for kernel in (kernels.linear, reference.linear):
        whole = kernel(x, m)
        for tokens in (1, 2, 3, 7, 16, 33):
            for first in (0, 5, 31):
                assert torch.equal(kernel(x[first:first + tokens], m), whole[first:first + tokens])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_agree_bits_do_not_depend_on_threads(kernels: KernelTable, threads: int) -> None:
    m = random_matrix(MatrixSpec("int4", 640, 512, 1, 64, 64))
    x = operand(30, 512)
    before = torch.get_num_threads()
    want = kernels.linear(x, m)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(kernels.linear(x, m), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["int4", "nf4", "bf16", "fp32"])
def test_agree_expert(kernels: KernelTable, name: str) -> None:
    """w2(silu(gate) * up) from decoded matrices; with F = 80 both parts and w2's columns are padded."""
    extra = {"group_size": 64, "block": 64} if name == "int4" else {}
    w13 = random_matrix(MatrixSpec(name, 160, 100, parts=2, **extra))
    w2 = random_matrix(MatrixSpec(name, 100, 80, **extra), seed=1)
    gate, up = np.split(decode(w13), 2)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        x = operand(9, 100, dtype)
        h = product(x, gate)
        want = (h / (1 + np.exp(-h)) * product(x, up)) @ decode(w2).T
        got = kernels.expert(x, w13, w2)
        assert got.shape == (9, 100) and got.dtype == dtype
        assert relative(got, want) < (0.02 if name == "int4" else bound)


def test_padding_cannot_leak_into_a_result(kernels: KernelTable) -> None:
    """Garbage in the codes of padded columns must not matter: x is zero there."""
    spec = MatrixSpec("int4", 64, 70, 1, 64, 64)
    m = random_matrix(spec)
    dirty = m["qweight"].clone()
    dirty[:, 70:] = 0xF0
    x = operand(3, 70)
    got = kernels.linear(x, Packed.of(spec, {**m.tensors, "qweight": dirty}))
    assert torch.equal(got, kernels.linear(x, m))


def test_the_oracle_would_notice_mix_ups(kernels: KernelTable) -> None:
    """The tolerance is worth something: swapped nibbles, a shifted group and a swapped row all exceed it."""
    spec = MatrixSpec("int4", 64, 256, 1, 64, 64)
    m = random_matrix(spec)
    x = operand(7, 256)
    want = product(x, decode(m))
    q, params = m["qweight"], m["qparams"]
    swapped = (q >> 4) | (q << 4)
    one_pair = q.clone()
    one_pair[:, :, [0, 1]] = q[:, :, [1, 0]]
    for name, bad in (("qweight", swapped), ("qweight", one_pair), ("qparams", params.roll(1, 0)),
                      ("qparams", params.flip(2))):
        got = kernels.linear(x, Packed.of(spec, {**m.tensors, name: bad.contiguous()}))
        assert relative(got, want) > 4 * ROUNDING


def test_what_is_not_the_fast_path_is_said() -> None:
    lines: list[str] = []
    found = select({"int4", "int8", "bf16"}, {64, 32}, say=lines.append)
    fast = [block for block in (64, 32) if found.kernels["int4", block] is cpu.int4_linear]
    assert set(found.names) == {"int4", "int8", "bf16"} and len(fast) <= 1 and len(lines) == 1
    assert ("converting" in lines[0]) == bool(fast)
    if fast:
        lines.clear()
        select({"int4"}, {fast[0]}, say=lines.append)
        assert lines == []


def test_an_op_that_gives_wrong_numbers_or_is_gone_is_replaced_and_said(monkeypatch) -> None:
    def wrong(x: torch.Tensor, m: Packed) -> torch.Tensor:
        return reference.linear(x, m) * 1.02

    def gone(x: torch.Tensor, m: Packed) -> torch.Tensor:
        raise RuntimeError("no such operator")

    for broken in (wrong, gone):
        monkeypatch.setattr(cpu, "int4_linear", broken)
        monkeypatch.setattr(cpu, "int8_linear", broken)
        lines: list[str] = []
        found = select({"int4", "int8"}, {64}, say=lines.append)
        assert found.kernels["int4", 64] is found.kernels["int8", 0] is reference.packed_linear
        assert len(lines) == 2 and all("failed its self-test" in line for line in lines)
        m = random_matrix(MatrixSpec("int4", 160, 70, 2, 64, 64))
        x = operand(3, 70)
        assert relative(found.linear(x, m), product(x, decode(m))) < ROUNDING


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="'int5'"):
        select({"int5"})
    with pytest.raises(UsageError, match="'tpu'"):
        select({"int4"}, device="tpu")


def test_agree_on_what_computes_at_a_capability() -> None:
    capability, names = torch.backends.cpu.get_cpu_capability(), select({"int4"}, say=lambda line: None).names["int4"]
    assert capability == os.environ.get("QMIX_TEST_CAPABILITY", capability).upper()
    if capability == "AVX2":
        assert "cpu, block 32" in names and "block 64 converted to 32" in names
    if capability == "DEFAULT":
        assert names.count("reference") == 2


@pytest.mark.parametrize("capability", LESS)
def test_everything_again_under(capability: str, warm_python: WarmPython) -> None:
    """The same comparisons where torch has only AVX2, or no vector instructions at all. It asks for them when it first
    computes, which in a forked process is later than its import."""
    less = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "QMIX_TEST_CAPABILITY": capability}
    args = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "test_agree", __file__]
    run = warm_python.run(*args, env=less, timeout=600, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.mark.skipif(not native.levels(), reason="the native kernels were not built")
def test_the_block_is_64_for_the_native_kernels_and_else_the_one_that_torch_reads(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QMIX_NATIVE", raising=False)
    monkeypatch.setattr(table, "_agrees", lambda kernel, m: m.spec.block == 32)
    assert table.native_block() == 64
    monkeypatch.setenv("QMIX_NATIVE", "off")
    assert table.native_block() == 32
    monkeypatch.setattr(table, "_agrees", lambda kernel, m: False)
    assert table.native_block() == 64
