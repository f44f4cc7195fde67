"""The native kernels at every level this processor has, against float64 products of what they see."""

import ctypes
import itertools
import os
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from warm_python import WarmPython

from qmix.formats import grouped, int8, mxfp4, unpack
from qmix.formats.mxfp4 import Blocks
from qmix.formats.packed import Packed
from qmix.kernels import native
from qmix.kernels.native import NativeProducts, Product, as_seen, jobs
from qmix.sizes import MX_BLOCK, MX_GROUP, MatrixSpec

needs_library = pytest.mark.skipif(not native.levels(), reason="the native kernels were not built: no C compiler")
LEVELS = [(level, activations) for level in native.levels() or ["none"] for activations in ("int8", "bf16")]
SUMS = 1e-6  # fp32 sums
TIES = 4e-4  # an activation between two codes may go to either: half a step of 127, now and then


def int4_matrix(rows: int, cols: int, group: int, block: int, parts: int = 1, seed: int = 0,
                name: str = "int4") -> Packed:
    spec = MatrixSpec(name, rows, cols, parts, group, block)
    random = torch.Generator().manual_seed(seed)
    n, k = spec.padded_rows, spec.padded_cols
    q = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8, generator=random)
    scale = (torch.rand(n, k // group, generator=random) + 0.5).bfloat16()
    zero = torch.randn(n, k // group, generator=random).bfloat16()
    return grouped.pack(q, scale, zero, spec)


def int8_matrix(rows: int, cols: int) -> Packed:
    random = torch.Generator().manual_seed(rows)
    return int8.pack(torch.randn(rows, cols, generator=random), MatrixSpec("int8", rows, cols))


def mxfp4_matrix(rows: int, cols: int, parts: int = 1, low: int = 120, high: int = 132) -> Packed:
    """Random codes; scales in some range, whose smallest, 0, is subnormal in fp32."""
    spec, random = MatrixSpec("mxfp4", rows, cols, parts, MX_GROUP, MX_BLOCK), torch.Generator().manual_seed(rows + low)
    groups = spec.padded_cols // MX_GROUP
    codes = torch.randint(0, 256, (rows, groups, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(low, high, (rows, groups), dtype=torch.uint8, generator=random)
    return mxfp4.carry(Blocks(codes, scales), MatrixSpec("mxfp4", rows, 32 * groups, parts, MX_GROUP, MX_BLOCK)) \
        if cols % 32 == 0 else mxfp4.pack(Blocks(codes, scales).numbers(torch.float32)[:, :cols], spec)


def operand(tokens: int, cols: int, seed: int = 0) -> Tensor:
    """Activations whose groups differ in size a hundredfold."""
    random = torch.Generator().manual_seed(1000 * tokens + cols + seed)
    return torch.randn(tokens, cols, generator=random) * 10 ** torch.rand(1, cols, generator=random).mul(2).sub(1)


def want(x: Tensor, m: Packed, activations: str) -> Tensor:
    seen = as_seen(x, activations, m.spec.group_size or native.DENSE_GROUP)
    return seen.double() @ unpack(m).double().T


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@needs_library
@pytest.mark.parametrize(("level", "activations"), LEVELS)
class TestEveryLevel:
    def bound(self, activations: str) -> float:
        return TIES if activations == "int8" else SUMS

    @pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 13, 300])
    @pytest.mark.parametrize("shape", [(192, 256, 64, 64), (100, 200, 32, 32), (130, 320, 128, 64), (64, 130, 64, 32),
                                       (1, 1, 32, 64)], ids=str)
    def test_grouped(self, level: str, activations: str, shape: tuple[int, int, int, int], tokens: int) -> None:
        for name in ("int4", "int3", "int2"):
            m = int4_matrix(*shape, name=name)
            x = operand(tokens, shape[1])
            (got,) = NativeProducts(level, activations).linear(x, m)
            assert got.shape == (tokens, shape[0]) and got.dtype == torch.float32
            assert relative(got, want(x, m, activations)) < self.bound(activations), name

    @pytest.mark.parametrize("tokens", [1, 2, 7, 70])
    @pytest.mark.parametrize("shape", [(192, 256), (100, 200), (33, 64), (1, 5), (65, 1000)], ids=str)
    def test_int8(self, level: str, activations: str, shape: tuple[int, int], tokens: int) -> None:
        m = int8_matrix(*shape)
        x = operand(tokens, shape[1])
        (got,) = NativeProducts(level, activations).linear(x, m)
        assert relative(got, want(x, m, activations)) < self.bound(activations)

    @pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 13, 300])
    @pytest.mark.parametrize("shape", [(192, 256), (100, 200), (64, 32), (1, 1), (65, 1000)], ids=str)
    def test_mxfp4(self, level: str, activations: str, shape: tuple[int, int], tokens: int) -> None:
        m, x = mxfp4_matrix(*shape), operand(tokens, shape[1])
        (got,) = NativeProducts(level, activations).linear(x, m)
        assert relative(got, want(x, m, activations)) < self.bound(activations)

    def test_the_smallest_scales_of_mxfp4(self, level: str, activations: str) -> None:
        """0, 1 and 2: weights from 2^-128 on, which x brings back into the range of fp32."""
        m, x = mxfp4_matrix(70, 96, low=0, high=3), operand(5, 96) * 2.0**100
        for tokens in (x, x[:1]):
            (got,) = NativeProducts(level, activations).linear(tokens, m)
            assert relative(got * 2.0**20, want(tokens, m, activations) * 2.0**20) < self.bound(activations)

    @pytest.mark.parametrize("part", [1, 40, 64, 72, 100])
    @pytest.mark.parametrize("parts", [2, 3])
    def test_every_row_of_matrices_in_parts_is_written(self, level: str, activations: str, parts: int, part: int
                                                       ) -> None:
        """int8 has no padding between parts, so that 64 rows may belong to several; the grouped formats have."""
        rows = parts * part
        x, whole = operand(5, 96), int8_matrix(rows, 96)
        for m in (Packed(replace(whole.spec, parts=parts), whole.tensors),
                  int4_matrix(rows, 96, 32, 64, parts), int4_matrix(rows, 96, 32, 32, parts)):
            y = torch.full((5, rows), torch.nan)
            NativeProducts(level, activations).run([Product(x, m, y)])
            assert relative(y, want(x, m, activations)) < self.bound(activations), m.spec

    @pytest.mark.parametrize("m", [
        int4_matrix(130, 320, 64, 64), int4_matrix(96, 256, 32, 32), int8_matrix(100, 320), mxfp4_matrix(140, 320, 2),
        *(int4_matrix(130, 384, group, block, name=name) for name, group, block in (
            ("int4", 128, 64), ("int3", 64, 64), ("int3", 128, 32), ("int2", 32, 32), ("int2", 64, 64)))],
        ids=lambda m: f"{m.spec.format}-{m.spec.block}-{m.spec.group_size}")
    def test_rows_do_not_depend_on_their_company(self, level: str, activations: str, m: Packed) -> None:
        kernels = NativeProducts(level, activations)
        x = operand(300, m.spec.cols)
        (whole,) = kernels.linear(x, m)
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 25):
            for first in (0, 11, 290):
                (part,) = kernels.linear(x[first:first + count], m)
                assert torch.equal(part, whole[first:first + count])

    def test_gate_and_up_of_int8_have_no_padding_between(self, level: str, activations: str) -> None:
        m = int8.pack(int8_matrix(200, 100)["qweight"].float()[:, :100] / 500, MatrixSpec("int8", 200, 100, parts=2))
        x = operand(9, 100) / 10
        both = want(x, m, activations)
        got = NativeProducts(level, activations).gated(x, m)
        wanted = torch.nn.functional.silu(both[:, :100]) * both[:, 100:]
        assert relative(got, wanted) < 10 * self.bound(activations)

    def test_gate_and_up_with_padding_and_chosen_rows(self, level: str, activations: str) -> None:
        """Both halves are padded; tokens are picked by index and put elsewhere; other rows are left alone."""
        kernels, m = NativeProducts(level, activations), int4_matrix(160, 100, 32, 64, parts=2)
        x = (operand(9, 100) / 100).bfloat16()  # gates of a few units
        y = torch.full((12, 80), 7.0)
        rows, y_rows = torch.tensor([8, 0, 3]), torch.tensor([1, 11, 5])
        kernels.run([Product(x, m, y, x_rows=rows, y_rows=y_rows, gated=True)])
        gate, up = want(x[rows].float(), m, activations).split(80, 1)
        wanted = torch.nn.functional.silu(gate) * up
        assert relative(y[y_rows], wanted) < 4 * self.bound(activations)
        left = [i for i in range(12) if i not in y_rows.tolist()]
        assert (y[left] == 7).all()

    def test_silu_of_large_and_small_numbers(self, level: str, activations: str) -> None:
        m = int4_matrix(128, 32, 32, 64, parts=2)
        x = torch.logspace(-6, 3, 40)[:, None] * torch.ones(1, 32)
        y = torch.empty(40, 64)
        NativeProducts(level, activations).run([Product(x, m, y, gated=True)])
        gate, up = want(x, m, activations).split(64, 1)
        wanted = torch.nn.functional.silu(gate) * up
        assert torch.isfinite(y).all()
        torch.testing.assert_close(y.double(), wanted, rtol=2e-3, atol=1e-9)

    def test_bf16_results_are_rounded_once(self, level: str, activations: str) -> None:
        m, kernels = int4_matrix(70, 128, 64, 64), NativeProducts(level, activations)
        x = operand(5, 128).bfloat16()
        (wide,), (narrow,) = kernels.linear(x.float(), m), kernels.linear(x, m)
        assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.bfloat16())

    def test_what_is_not_finite_stays_so(self, level: str, activations: str) -> None:
        """A broken activation must not turn into a harmless number; the other tokens are not touched by it."""
        kernels = NativeProducts(level, activations)
        for m in (int4_matrix(64, 128, 64, 64), int8_matrix(64, 128), mxfp4_matrix(64, 128)):
            x = operand(3, 128)
            (clean,) = kernels.linear(x, m)
            for bad in (float("nan"), float("inf")):
                dirty = x.clone()
                dirty[1, 70] = bad
                (got,) = kernels.linear(dirty, m)
                assert not torch.isfinite(got[1]).any()
                assert torch.equal(got[[0, 2]], clean[[0, 2]])

    def test_zeros_and_tiny_numbers(self, level: str, activations: str) -> None:
        m = int4_matrix(64, 128, 64, 64)
        x = torch.zeros(2, 128)
        x[1, :64] = 1e-30
        (got,) = NativeProducts(level, activations).linear(x, m)
        assert (got[0] == 0).all() and torch.isfinite(got).all() and (got.abs() < 1e-26).all()

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_largest_codes_do_not_overflow(self, level: str, activations: str, sign: int) -> None:
        """Every weight and every activation at its end: no sum of two or four products may be cut off."""
        kernels, x = NativeProducts(level, activations), torch.ones(7, 256)
        x[1], x[2, ::2], x[3, 1::2] = -1, -1, -1
        wide = torch.full((70, 256), 3.0 * sign)
        wide[1, ::2], wide[2, 1::2] = -3.0, -3.0
        matrices = [int8.pack(wide, MatrixSpec("int8", 70, 256))]
        for name, block, group in itertools.product(("int4", "int3", "int2"), (64, 32), (32, 64, 128)):
            spec = MatrixSpec(name, 70, 256, group_size=group, block=block)
            codes = torch.full((spec.padded_rows, 256), 2**spec.bits - 1 if sign > 0 else 0, dtype=torch.uint8)
            ones = torch.ones(spec.padded_rows, 256 // group).bfloat16()
            matrices.append(grouped.pack(codes, ones, 0 * ones, spec))
        matrices.append(mxfp4.pack(2 * wide, MatrixSpec("mxfp4", 70, 256, 1, MX_GROUP, MX_BLOCK)))  # 6 and -6
        for m in matrices:
            for tokens in (x, x[:4], x[1:2]):  # at most a panel's, and one, may go another way
                (got,) = kernels.linear(tokens, m)
                torch.testing.assert_close(got.double(), want(tokens, m, activations), rtol=1e-6, atol=1e-4)

    def test_codes_of_padded_columns_do_not_count(self, level: str, activations: str) -> None:
        m = int4_matrix(64, 70, 64, 64)
        dirty = m["qweight"].clone()
        dirty[:, 70:] ^= 0xF0
        (a,), (b,) = (NativeProducts(level, activations).linear(operand(3, 70), w)
                      for w in (m, Packed.of(m.spec, {**m.tensors, "qweight": dirty})))
        assert torch.equal(a, b)


@needs_library
def test_bits_do_not_depend_on_threads_or_on_other_products() -> None:
    kernels = NativeProducts(next(iter(native.levels())), "int8")
    matrices = [int4_matrix(640, 512, 64, 64), int8_matrix(1000, 512), int4_matrix(65, 512, 32, 32),
                mxfp4_matrix(640, 512)]
    x = operand(40, 512)
    kernels.threads = 1
    alone = [kernels.linear(x, m)[0] for m in matrices]
    for threads in (2, 3, 8):
        kernels.threads = threads
        for got, wanted in zip(kernels.linear(x, *matrices), alone, strict=True):
            assert torch.equal(got, wanted)


@needs_library
def test_several_callers_at_once() -> None:
    """The pool serves one at a time; the others work alone, with memory of their own."""
    kernels = NativeProducts(next(iter(native.levels())), "int8")
    kernels.threads = 3
    m = int4_matrix(640, 512, 64, 64)
    xs = [operand(1 + i % 40, 512, seed=i) for i in range(80)]
    alone = [kernels.linear(x, m)[0] for x in xs]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            for got, wanted in zip(threads.map(lambda x: kernels.linear(x, m)[0], xs), alone, strict=True):
                assert torch.equal(got, wanted)


@needs_library
def test_a_forked_child_computes_too(warm_python: WarmPython) -> None:
    script = ("import os, sys, torch; sys.path.insert(0, 'tests')\n"
              "from test_native import *\n"
              "k = NativeProducts(next(iter(native.levels())), 'int8'); k.threads = 2\n"
              "m = int4_matrix(640, 512, 64, 64)\n"
              "x = operand(9, 512); want = k.linear(x, m)[0]; pid = os.fork()\n"
              "same = torch.equal(k.linear(x, m)[0], want)\n"
              "if pid == 0: os._exit(0 if same else 1)\n"
              "sys.exit(os.waitpid(pid, 0)[1] or not same)\n")
    run = warm_python.run("-c", script, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr


@needs_library
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes")
def test_more_threads_than_cores(warm_python: WarmPython) -> None:
    """On one core no thread gets on unless the others let it: who waits must sleep, and be woken."""
    script = ("import os, sys, time, torch; sys.path.insert(0, 'tests')\n"
              "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
              "from test_native import *\n"
              "k = NativeProducts(next(iter(native.levels())), 'int8'); m = int4_matrix(1280, 512, 64, 64)\n"
              "x = operand(3, 512); k.threads = 1; want = k.linear(x, m)[0]; k.threads = 7\n"
              "for turn in range(300):\n"
              "    assert torch.equal(k.linear(x, m)[0], want)\n"
              "    time.sleep(0.001 * (turn % 10 == 0))\n")  # now and then all threads are asleep
    run = warm_python.run("-c", script, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr


@needs_library
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 150), cols=st.integers(1, 300), tokens=st.integers(1, 20),
       group=st.sampled_from((32, 64, 128)), block=st.sampled_from((32, 64)),
       activations=st.sampled_from(("int8", "bf16")), level=st.sampled_from(list(native.levels()) or ["none"]),
       name=st.sampled_from(("int4", "int3", "int2")))
def test_any_shape(rows: int, cols: int, tokens: int, group: int, block: int, activations: str, level: str,
                   name: str) -> None:
    m = int4_matrix(rows, cols, group, block, name=name)
    x = operand(tokens, cols)
    (got,) = NativeProducts(level, activations).linear(x, m)
    assert relative(got, want(x, m, activations)) < (4 * TIES if activations == "int8" else 4 * SUMS)


@needs_library
def test_eight_bits_are_close_to_none() -> None:
    """What rounding activations to 8 bits costs on one product: well below what 4-bit weights cost (about 10 %)."""
    m = int4_matrix(256, 1024, 64, 64)
    x = torch.randn(50, 1024, generator=torch.Generator().manual_seed(3))
    exact = x.double() @ unpack(m).double().T
    (got,) = NativeProducts(next(iter(native.levels())), "int8").linear(x, m)
    assert 1e-3 < relative(got, exact) < 1e-2


def test_jobs_are_laid_out_as_in_c() -> None:
    header = Path(native.__file__).with_name("native.h").read_text()
    sizes = {"qmix_norm": jobs.NORM.size}
    route = struct.Struct(jobs.NORM.format + jobs.ROUTE_REST.format.removeprefix("@"))
    for name, packed in (("qmix_job", jobs.PRODUCT), ("qmix_attention", jobs.ATTENTION), ("qmix_norm", jobs.NORM),
                         ("qmix_route", route), ("qmix_rotate", jobs.ROTATE), ("qmix_angles", jobs.ROPE_COS_SIN),
                         ("qmix_combine", jobs.COMBINE), ("qmix_addition", jobs.ADDITION), ("qmix_call", jobs.CALL),
                         ("qmix_matrix", jobs.MATRIX), ("qmix_experts", jobs.EXPERTS)):
        body = header[:header.index(f"}} {name};")].rpartition("typedef struct {")[2]
        size = 0
        for line in body.splitlines():
            declared = re.sub(r"/\*.*?(\*/|$)", "", line).strip().removeprefix("const ")
            if not declared or not re.match(r"(void|float|double|u?int\d+_t|qmix_\w+) ", declared):
                continue
            kind, each = declared.split()[0], declared.count(",") + 1
            width = 8 if "*" in declared else sizes.get(kind) or {"int64_t": 8, "int32_t": 4, "float": 4}[kind]
            size += each * width
        assert packed.size == -(-size // 8) * 8, name


@needs_library
@pytest.mark.parametrize(("level", "activations"), LEVELS)
def test_the_peak_counts_its_operations(level: str, activations: str) -> None:
    ticks = iter([0.0, 0.0, 2.0, 2.5, 3.0, 3.5, 9.0])
    own = NativeProducts(level, activations)
    rate = own.peak(1, seconds=5, clock=lambda: next(ticks))
    done = [own._library.qmix_peak(own._number, own.code, ctypes.c_int64(turns), threads)
            for turns, threads in ((100_000, 1), (10, 1), (10, 3))]
    assert rate == done[0] / 0.5  # the second of the stretches
    assert done[0] == 10_000 * done[1] and done[2] == 3 * done[1] > 0
