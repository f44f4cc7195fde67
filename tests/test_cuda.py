"""The Triton kernels against float64 products of what the bytes say: on the GPU where there is one, else under
Triton's interpreter on the CPU (conftest.py sees to that). test_cuda_launches.py compiles them for cards that are not
here.

The interpreter rounds fp32 to bf16 by cutting off and gets bf16 products wrong; both are left to the GPU.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fast_interpreter import HAVE_TRITON
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracles import decode, numbers, product, relative
from test_native import int4_matrix, mxfp4_matrix
from test_native_carried import carried_matrix
from torch import Tensor
from warm_python import WarmPython

from qmix.errors import UsageError
from qmix.formats import int8
from qmix.formats.packed import Packed, view
from qmix.kernels import cuda
from qmix.kernels.configs import Configs, Gemv
from qmix.sizes import CARRIED, MatrixSpec, RecordLayout
from qmix.spec import Activation

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, as the interpreter uses it
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
FORMATS = ("int4", "int3", "int2")
MXFP4 = ("mxfp4", 64)
SUMS = 2e-6  # fp32 sums
HALF = 1e-3  # activations rounded to fp16, which the weights are not
COARSE = 2**-7  # results in bf16, cut off by the interpreter


def matrix(name: str, rows: int, cols: int, group: int, block: int, parts: int = 1, seed: int = 0) -> Packed:
    """Random codes; scales and zeros of the padded rows are 0, as in a store. mxfp4 and ggml's formats have their own
    group and block."""
    if name in CARRIED:
        return carried_matrix(name, rows, cols, parts, seed=seed)
    if name == "mxfp4":
        return mxfp4_matrix(rows, cols, parts)
    m = int4_matrix(rows, cols, group, block, parts, seed, name)
    m["qparams"].view(len(m["qparams"]), parts, -1, 2)[:, :, rows // parts:] = 0
    return m


def here(m: Packed) -> Packed:
    return Packed.of(m.spec, {name: t.to(DEVICE) for name, t in m.tensors.items()})


def operand(tokens: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))


def logical(y: Tensor, spec: MatrixSpec) -> Tensor:
    """The rows that are not padding."""
    return y.cpu().view(len(y), spec.parts, -1)[:, :, :spec.rows // spec.parts].reshape(len(y), spec.rows)


def padding(y: Tensor, spec: MatrixSpec) -> Tensor:
    return y.cpu().view(len(y), spec.parts, -1)[:, :, spec.rows // spec.parts:]


def silu_product(both: np.ndarray) -> np.ndarray:
    gate, up = np.split(both, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def joined(both: np.ndarray, activation: Activation) -> np.ndarray:
    """By the formulas of spec.Activation."""
    if activation.kind == "swiglu":
        return silu_product(both)
    gate, up = np.split(both, 2, axis=1)
    if activation.kind == "geglu":
        return 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
    return gate / (1 + np.exp(-activation.alpha * gate)) * (up + 1)


CLAMPED = Activation("swiglu_clamped", 1.702, 0.5)
KINDS = [Activation(), Activation("geglu"), CLAMPED]


matrices = st.builds(
    lambda name, rows, cols, group, block, parts: matrix(name, parts * rows, cols, group, block, parts),
    st.sampled_from((*FORMATS, "mxfp4")), st.integers(17, 70), st.integers(32, 300), st.sampled_from([32, 64, 128]),
    st.sampled_from([64, 32]), st.sampled_from([1, 2]))
NO_SHRINKING = {"deadline": None, "derandomize": True, "phases": [Phase.generate]}  # it is slow under the interpreter


@needs_triton
class TestOneMatrix:
    @settings(max_examples=6, **NO_SHRINKING)
    @given(matrices, st.integers(1, 8))
    def test_few_tokens(self, m: Packed, tokens: int) -> None:
        x = operand(tokens, m.spec.cols)
        y = cuda.linear(x.to(DEVICE), here(m))
        assert y.shape == (tokens, m.spec.padded_rows) and y.dtype == torch.float32
        assert relative(logical(y, m.spec), product(x, decode(m))) < SUMS
        assert not padding(y, m.spec).any()

    @pytest.mark.parametrize(("name", "block"), [*((name, block) for name in FORMATS for block in (64, 32)), MXFP4])
    def test_each_format_and_block(self, name: str, block: int) -> None:
        """More groups than a program takes: sums of splits, with a ragged end."""
        m = matrix(name, 70, 32 * 17 - 5, 32, block)
        x = operand(1, m.spec.cols)
        y = cuda.linear(x.to(DEVICE), here(m), configs=Configs(gemv=Gemv(threads=32)))
        assert relative(logical(y, m.spec), product(x, decode(m))) < SUMS

    @settings(max_examples=30, **NO_SHRINKING)
    @given(matrices, st.sampled_from([9, 17, 33, 70, 130]))
    def test_many_tokens(self, m: Packed, tokens: int) -> None:
        x = operand(tokens, m.spec.cols)
        y = cuda.linear(x.to(DEVICE), here(m))
        assert y.shape == (tokens, m.spec.padded_rows)
        assert relative(logical(y, m.spec), product(x, decode(m))) < SUMS
        assert not padding(y, m.spec).any()

    @pytest.mark.parametrize("name", [*FORMATS, "mxfp4"])
    def test_products_in_fp16_round_activations_only(self, name: str) -> None:
        m = matrix(name, 100, 200, 64, 64)
        x = operand(40, 200)
        y = cuda.linear(x.to(DEVICE), here(m), dot="fp16")
        assert relative(logical(y, m.spec), product(x, decode(m))) < HALF
        assert relative(logical(y, m.spec), product(x.half(), decode(m))) < SUMS

    @pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU: the interpreter gets bf16 products wrong")
    def test_products_in_bf16(self) -> None:
        m = int4_matrix(100, 200, 64, 64)
        x = operand(40, 200).bfloat16()
        y = cuda.linear(x.to(DEVICE), here(m), torch.float32, dot="bf16")
        assert relative(logical(y, m.spec), product(x, decode(m))) < SUMS

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [2, 12])
    def test_dtypes(self, dtype: torch.dtype, tokens: int) -> None:
        m = int4_matrix(40, 64, 32, 32)
        x = operand(tokens, 64).to(dtype)
        y, wide = (cuda.linear(x.to(DEVICE), here(m), want, dot="fp32") for want in (None, torch.float32))
        assert y.dtype == dtype and wide.dtype == torch.float32
        assert relative(logical(wide, m.spec), product(x, decode(m))) < SUMS
        assert relative(logical(y, m.spec), product(x, decode(m))) < COARSE

    @pytest.mark.parametrize("tokens", [2, 20])
    @pytest.mark.parametrize(("name", "block"), [("int4", 64), ("int3", 32), ("int2", 64), MXFP4])
    def test_gated(self, name: str, block: int, tokens: int) -> None:
        m = matrix(name, 2 * 40, 60, 32, block, 2)
        x = operand(tokens, 60) / 30
        y = cuda.gated(x.to(DEVICE), here(m))
        assert y.shape == (tokens, 40)
        assert relative(y.cpu(), silu_product(product(x, decode(m)))) < 3 * SUMS

    @pytest.mark.parametrize("tokens", [2, 20])
    @pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
    def test_gated_with_a_bias(self, activation: Activation, tokens: int) -> None:
        """A NaN that is clamped stays one."""
        plain = matrix("int4", 2 * 40, 60, 32, 32, 2)
        bias = operand(1, 80, 3)[0]
        bias[3] = bias[45] = torch.nan
        m = Packed.of(replace(plain.spec, bias=True, activation=activation), {**plain.tensors, "bias": bias}, "m")
        x = operand(tokens, 60) / 30
        y = cuda.gated(x.to(DEVICE), here(m)).cpu()
        assert y.isnan().nonzero()[:, 1].unique().tolist() == [3, 5]
        want = joined(product(x, decode(plain)) + bias.double().numpy(), activation)
        fine = [column for column in range(40) if column not in (3, 5)]
        assert relative(y[:, fine], want[:, fine]) < 3 * SUMS

    def test_gates_of_any_size(self) -> None:
        m = int4_matrix(2 * 32, 32, 32, 32, 2)
        x = torch.logspace(-6, 3, 8)[:, None] * torch.ones(1, 32)
        y = cuda.gated(x.to(DEVICE), here(m)).cpu()
        with np.errstate(over="ignore"):
            want = silu_product(product(x, decode(m)))
        torch.testing.assert_close(y.double(), torch.from_numpy(want), rtol=2e-3, atol=1e-9)

    @pytest.mark.parametrize("name", [*FORMATS, "mxfp4"])
    def test_a_token_has_the_bits_that_it_has_alone(self, name: str) -> None:
        m = here(matrix(name, 60, 60, 32, 64))
        x = operand(8, 60).to(DEVICE)
        whole = cuda.linear(x, m)
        for count in (1, 3):
            assert torch.equal(cuda.linear(x[5:5 + count], m), whole[5:5 + count])

    @pytest.mark.parametrize("name", [*FORMATS, "mxfp4"])
    @pytest.mark.parametrize("exponent", [-38, 60])
    def test_activations_of_any_size(self, exponent: int, name: str) -> None:
        """They are multiplied by a power of two on the way, and codes are subnormal numbers."""
        m, x = matrix(name, 60, 60, 32, 64), operand(2, 60) * 2.0**exponent
        assert relative(logical(cuda.linear(x.to(DEVICE), here(m)), m.spec), product(x, decode(m))) < SUMS

    def test_rows_of_a_larger_matrix_and_no_tokens(self) -> None:
        m = here(int4_matrix(40, 64, 32, 32))
        wide = operand(4, 100).to(DEVICE)
        # Triton compiles another kernel for operands that begin between 16 bytes: its sums have another order.
        want = cuda.linear(wide[:, 10:74].clone(), m)
        assert relative(cuda.linear(wide[:, 10:74], m).cpu(), want.cpu().numpy()) < SUMS
        assert cuda.linear(wide[:0, :64], m).shape == (0, 64)

    def test_broken_activations_stay_with_their_token(self) -> None:
        m = here(int4_matrix(32, 64, 32, 32))
        x = operand(3, 64).to(DEVICE)
        clean = cuda.linear(x, m)
        x[1, 40] = float("nan")
        y = cuda.linear(x, m)
        assert y[1].isnan().all() and torch.equal(y[[0, 2]], clean[[0, 2]])


H, F, SLOTS = 40, 30, 5


def slab(name: str, block: int = 32, activation: Activation | None = None
         ) -> tuple[Tensor, RecordLayout, list[np.ndarray], list[np.ndarray]]:
    """Records in slots: (uint8 [S, bytes], layout, w13 and w2 of each slot in float64); with an activation also with
    biases: `biases` of slots."""
    record = RecordLayout(MatrixSpec(name, 2 * F, H, 2, 32, block), MatrixSpec(name, H, F, 1, 32, block))
    if activation is not None:
        record = RecordLayout(replace(record.w13, bias=True, activation=activation), replace(record.w2, bias=True))
    pool = torch.full((SLOTS, record.nbytes), 0xA5, dtype=torch.uint8)
    found: dict[str, list[np.ndarray]] = {"w13": [], "w2": []}
    for slot in range(SLOTS):
        parts = {"w13": mxfp4_matrix(2 * F, H, 2, 110 + slot), "w2": mxfp4_matrix(H, F, 1, 110 + slot)} \
            if name == "mxfp4" else {"w13": int4_matrix(2 * F, H, 32, block, 2, 10 + slot, name),
                                     "w2": int4_matrix(H, F, 32, block, 1, 20 + slot, name)}
        for placed in record.placed:
            part = {**parts[placed.matrix].tensors, "bias": biases(placed.matrix, slot)}[placed.tensor.name]
            view(pool[slot], placed.offset, placed.tensor).copy_(part)
        for matrix, m in parts.items():
            found[matrix].append(decode(m))
    return pool.to(DEVICE), record, found["w13"], found["w2"]


def biases(matrix: str, slot: int) -> Tensor:
    return operand(1, 2 * F if matrix == "w13" else H, 30 + slot)[0]


@needs_triton
class TestSlots:
    @pytest.mark.parametrize(("name", "block"), [("int4", 32), ("int3", 64), ("int2", 32), MXFP4])
    @pytest.mark.parametrize("chosen", [[[3, 0]], [[4, 1], [1, 2]]], ids=["one", "two"])
    def test_chosen_experts(self, name: str, block: int, chosen: list[list[int]]) -> None:
        pool, record, w13, w2 = slab(name, block)
        x = operand(len(chosen), H) / 30
        y = cuda.chosen_experts(x.to(DEVICE), cuda.Matrices.in_slots(pool, record, "w13"),
                                cuda.Matrices.in_slots(pool, record, "w2"), chosen)
        assert y.shape == (len(chosen), 2, H) and y.dtype == torch.float32
        for token, slots in enumerate(chosen):
            for rank, slot in enumerate(slots):
                inner = silu_product(product(x[token:token + 1], w13[slot]))
                assert relative(y[token, rank].cpu(), (inner @ w2[slot].T)[0]) < 5 * SUMS

    @pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
    def test_biases_are_those_of_the_slot(self, activation: Activation) -> None:
        pool, record, w13, w2 = slab("int4", 64, activation)
        both, x = [cuda.Matrices.in_slots(pool, record, matrix) for matrix in ("w13", "w2")], operand(2, H)
        chosen = [[4, 1], [1, 2]]
        y = cuda.chosen_experts(x.to(DEVICE), *both, chosen)
        for token, slots in enumerate(chosen):
            for rank, slot in enumerate(slots):
                first = product(x[token:token + 1], w13[slot]) + biases("w13", slot).double().numpy()
                want = joined(first, activation) @ w2[slot].T + biases("w2", slot).double().numpy()
                assert relative(y[token, rank].cpu(), want[0]) < 5 * SUMS

    @pytest.mark.parametrize("activation", [None, CLAMPED], ids=["plain", "biases"])
    def test_neither_slot_nor_company_decides_bits(self, activation: Activation | None) -> None:
        pool, record, _, _ = slab("int4", 32, activation)
        pool[1] = pool[4]
        both = [cuda.Matrices.in_slots(pool, record, matrix) for matrix in ("w13", "w2")]
        x = operand(3, H).to(DEVICE)
        alone = cuda.chosen_experts(x[2:3], *both, [[4, 0]])[0]
        assert torch.equal(cuda.chosen_experts(x[2:3], *both, [[0, 1]])[0], alone.flip(0))
        assert torch.equal(cuda.chosen_experts(x, *both, [[4, 2], [2, 4], [4, 0]])[2], alone)

    @pytest.mark.parametrize("name", [*FORMATS, "mxfp4"])
    def test_many_tokens_of_one_slot(self, name: str) -> None:
        pool, record, w13, _ = slab(name, *MXFP4[1:] if name == "mxfp4" else ())
        weights = cuda.Matrices.in_slots(pool, record, "w13")
        for slot, tokens in ((4, 70), (0, 1), (2, 20)):
            x = operand(tokens, H)
            y = torch.full((tokens, weights.spec.padded_rows), 7.0, device=DEVICE)
            cuda.many(x.to(DEVICE), weights, slot, y)
            assert relative(logical(y, weights.spec), product(x, w13[slot])) < SUMS
            h = torch.empty(tokens, F, device=DEVICE)
            cuda.join(y / 50, weights, h)
            assert relative(h.cpu(), silu_product(numbers(logical(y / 50, weights.spec)))) < SUMS

    def test_offsets_beyond_two_gigabytes(self) -> None:
        """Slots are addressed in 64 bits. The pages between the records are never touched."""
        if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
            pytest.skip("needs 5 GiB of GPU memory")
        small, record, w13, w2 = slab("int4")
        far = torch.empty(2, 9 * 2**29 // 2, dtype=torch.uint8, device=DEVICE)
        far[1, :record.nbytes] = small[3]
        both = [cuda.Matrices.in_slots(far, record, matrix) for matrix in ("w13", "w2")]
        x = operand(1, H) / 30
        y = cuda.chosen_experts(x.to(DEVICE), *both, [[1]])
        assert relative(y[0, 0].cpu(), (silu_product(product(x, w13[3])) @ w2[3].T)[0]) < 5 * SUMS
        many = torch.empty(9, both[0].spec.padded_rows, device=DEVICE)
        cuda.many(x.expand(9, H).contiguous().to(DEVICE), both[0], 1, many)
        assert relative(logical(many, both[0].spec)[4], product(x, w13[3])[0]) < SUMS

    def test_the_example_of_jobs(self) -> None:
        first, second = cuda.Jobs.of([[5, 2], [2, 9]], 10, DEVICE)
        assert first.slots.tolist() == [5, 2, 9] and first.rows.tolist() == [[0, -1], [0, 1], [1, -1]]
        assert first.out_rows.tolist() == second.rows.tolist() == [[0, -1], [1, 2], [3, -1]]

    @pytest.mark.parametrize(("chosen", "match"), [
        ([[0, 5]], "token 0: got .0, 5."), ([[0, 1], [2]], "token 1"), ([[1, 1]], "2 different"), ([], "got 0 tokens"),
        ([[0]] * 9, "got 9 tokens"), ([[-1, 0]], "token 0")])
    def test_impossible_choices_are_refused(self, chosen: list[list[int]], match: str) -> None:
        with pytest.raises(UsageError, match=match):
            cuda.Jobs.of(chosen, SLOTS, DEVICE)


@needs_triton
class TestRefusals:
    def test_what_does_not_fit(self) -> None:
        m, x = here(int4_matrix(32, 64, 32, 32)), operand(2, 64).to(DEVICE)
        with pytest.raises(UsageError, match=r"want fp32, bf16 or fp16 \[T, 64\]"):
            cuda.linear(x[:, :32], m)
        with pytest.raises(UsageError, match="float64"):
            cuda.linear(x.double(), m)
        with pytest.raises(UsageError, match="rows contiguous"):
            cuda.linear(x.T.contiguous().T, m)
        with pytest.raises(UsageError, match="dot: got 'tf32'"):
            cuda.linear(x.repeat(9, 1), m, dot="tf32")
        with pytest.raises(UsageError, match="is on meta"):
            cuda.linear(x.to("meta"), m)
        with pytest.raises(UsageError, match="int8: these GPU kernels support int4, int3, int2, mxfp4 and ggml's"):
            cuda.linear(x, int8.pack(operand(3, 64), MatrixSpec("int8", 3, 64)))
        with pytest.raises(UsageError, match="slot 1: want 0 to 0"):
            cuda.many(x, cuda.Matrices.of(m), 1, x)
        pool, record, _, _ = slab("int4")
        with pytest.raises(UsageError, match=r"slab: got torch\.uint8"):
            cuda.Matrices.in_slots(pool[:, :-4096], record, "w13")

    @pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU, and it has them")
    def test_bf16_products_without_a_card_that_has_them(self) -> None:
        with pytest.raises(UsageError, match="cpu has no bf16 products"):
            cuda.linear(operand(9, 64), int4_matrix(32, 64, 32, 32), dot="bf16")


def in_another_process(python: WarmPython, code: str, *args: str, **environment: str
                       ) -> subprocess.CompletedProcess[str]:
    """Where Triton is not imported yet, and will not be interpreted: the server imports torch and qmix alone."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {"PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    return python.run("-c", code, *args, cwd=Path(__file__).parent, timeout=1800, env=kept | own | environment)


CALL = """
import torch
from qmix.errors import UsageError
from qmix.formats import grouped
from qmix.kernels import cuda
from qmix.kernels.configs import Configs, Gemv
from qmix.sizes import MatrixSpec
ones = torch.ones(32, 1, dtype=torch.bfloat16)
m = grouped.pack(torch.zeros(32, 32, dtype=torch.uint8), ones, ones, MatrixSpec("int4", 32, 32, 1, 32, 32))
try: cuda.linear(torch.zeros(1, 32), m)
except UsageError as e: print(e)
"""


def test_without_triton_it_is_said(warm_python: WarmPython) -> None:
    done = in_another_process(warm_python, f"import sys; sys.modules['triton'] = None{CALL}")
    assert "need Triton, which is not installed\n  pip install triton" in done.stdout, done.stderr


@needs_triton
def test_tensors_of_the_cpu_are_refused_without_the_interpreter(warm_python: WarmPython) -> None:
    done = in_another_process(warm_python, CALL)
    assert "weights on cpu: Triton's kernels need them on a CUDA device\n" in done.stdout, done.stderr


def test_importing_it_imports_no_triton(warm_python: WarmPython) -> None:
    done = in_another_process(warm_python, "import sys, qmix.kernels.cuda, qmix.kernels.table\n"
                                           "print('triton' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
