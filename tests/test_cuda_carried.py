"""The Triton kernels for ggml's formats against float64 products of what the bytes say; on the GPU where there is one,
else under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import decode, product, relative
from test_cuda import DEVICE, HALF, SUMS, here, logical, needs_triton, operand, padding
from test_cuda_rooms import NoKernels
from test_native_carried import carried_matrix
from test_prompt_experts import CLAMPED, error, routing, rows_of, slab, triton
from torch.utils._python_dispatch import TorchDispatchMode

from qmix.errors import QmixError
from qmix.formats import unpack
from qmix.formats.packed import Packed
from qmix.kernels import cuda, cuda_carried, cuda_ops, device_table
from qmix.kernels.cuda_ops import TritonOps
from qmix.kernels.table import random_expert, random_matrix
from qmix.sizes import CARRIED

pytestmark = needs_triton


def most(*kinds: str) -> list[Any]:
    """One of each way in which scales are made and codes become numbers; the others with the marker `models`."""
    return [kind if kind in ("q8_0", "q4_k", "q6_k", "iq4_nl") else pytest.param(kind, marks=pytest.mark.models)
            for kind in kinds]


class TestEveryFormat:
    @pytest.mark.parametrize("kind", most(*CARRIED))
    def test_few_tokens(self, kind: str) -> None:
        """Two programs share the columns, and a run of them ends early where a block of ggml's has 32."""
        cols = 1280 if CARRIED[kind].columns == 256 else 1312
        m, x = carried_matrix(kind, 2 * 70, cols, 2), operand(3, cols)
        y = cuda.linear(x.to(DEVICE), here(m))
        assert y.shape == (3, m.spec.padded_rows) and y.dtype == torch.float32
        assert relative(logical(y, m.spec), product(x, decode(m))) < SUMS
        assert not padding(y, m.spec).any()

    @pytest.mark.parametrize("kind", most(*CARRIED))
    def test_many_tokens(self, kind: str) -> None:
        m, x = carried_matrix(kind, 2 * 70, 256, 2), operand(20, 256)
        for dot, bound in (("fp32", SUMS), ("fp16", HALF)):
            y = cuda.linear(x.to(DEVICE), here(m), dot=dot)
            assert relative(logical(y, m.spec), product(x, decode(m))) < bound
            assert not padding(y, m.spec).any()

    @pytest.mark.parametrize("kind", CARRIED)
    def test_decoded_rows_are_ggmls_numbers(self, kind: str) -> None:
        m = carried_matrix(kind, 130, 256)
        found = cuda.decoded(cuda.Matrices.of(here(m)), 1, 2, torch.float32)
        assert torch.equal(found[:66].cpu(), unpack(m)[64:])

    @pytest.mark.parametrize("kind", CARRIED)
    def test_rows_of_an_embedding(self, kind: str) -> None:
        """Bit for bit those of torch on the CPU, scaled too, of more columns than a program has."""
        cols = 768 if CARRIED[kind].columns == 256 else 544
        m, which = carried_matrix(kind, 150, cols), torch.tensor([149, 0, 31, 32, 63, 64, 64, 111])
        out = torch.full((9, cols + 3), torch.nan, device=DEVICE)
        for scale in (1.0, 8.3):
            TritonOps().embed(which.to(DEVICE), here(m), out[:8, :cols], scale)
            assert torch.equal(out[:8, :cols].cpu(), unpack(m)[which].mul_(scale))
        assert out[8].isnan().all() and out[:, cols:].isnan().all()


class Called(TorchDispatchMode):
    """torch's operations that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "iq4_xs"])
def test_a_graph_can_have_the_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the kernel there are views alone: nothing is allocated, copied or asked for by the host."""
    monkeypatch.setattr(cuda_ops, "device_code", lambda name: NoKernels())
    m, out = here(carried_matrix(kind, 70, 256)), torch.empty(2, 256, device=DEVICE)
    tokens = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with torch.inference_mode(), Called() as called:
        TritonOps().embed(tokens, m, out, 2.0)
    assert set(called.names) <= {"view", "detach"}


EXPERTS = [("q8_0", 64, 96), pytest.param("q5_1", 96, 64, marks=pytest.mark.models),
           ("q4_k", 256, 256), ("q6_k", 256, 256), ("iq4_nl", 96, 64)]


class TestExperts:
    """Records of experts in slots of a slab, as experts of a GGUF file are stored."""

    @pytest.mark.parametrize(("kind", "hidden", "inner"), EXPERTS)
    def test_of_a_few_tokens(self, kind: str, hidden: int, inner: int) -> None:
        slots, exact = slab(kind, 64, CARRIED[kind].group, 3, hidden, inner, bias=True, activation=CLAMPED)
        x, ids = operand(3, hidden) / 30, torch.tensor([[2, 0], [1, 2], [0, 1]])
        table, rows = torch.tensor([1, 2, 0], dtype=torch.int32), torch.zeros(3, 2, hidden, device=DEVICE)
        ops = TritonOps()
        assert ops.handles(slots)
        ops.experts(x.to(DEVICE), slots, ids.int().to(DEVICE), table.to(DEVICE), rows)
        assert error(rows, x, ids, table, exact, CLAMPED) < 5 * SUMS

    @pytest.mark.parametrize(("kind", "hidden", "inner"), EXPERTS)
    def test_of_a_prompt(self, kind: str, hidden: int, inner: int) -> None:
        slots, exact = slab(kind, 64, CARRIED[kind].group, 3, hidden, inner, bias=True, activation=CLAMPED)
        ids, x, table = routing(20, 2, 3), operand(20, hidden) / 30, torch.tensor([1, 2, 0]).int()
        assert triton().handles(slots, torch.float16)
        got = rows_of(triton(), x, ids, [slots], table)
        assert error(got, x, ids, table, exact, CLAMPED) < 5 * SUMS


@pytest.mark.parametrize("kind", most("q5_k", "iq4_nl"))
def test_a_token_has_the_bits_that_it_has_alone(kind: str) -> None:
    m, x = here(carried_matrix(kind, 70, 512)), operand(5, 512).to(DEVICE)
    whole = cuda.linear(x, m)
    assert torch.equal(whole[2:3], cuda.linear(x[2:3], m)) and torch.equal(whole[3:], cuda.linear(x[3:], m))


@pytest.mark.parametrize("kind", most("q5_0", "q6_k"))
def test_the_self_test_of_a_card_passes_and_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As choose_device_kernels makes it before anything is loaded."""
    from qmix.kernels import cuda_prompt

    ops, experts = TritonOps(), triton()
    device_table._check(DEVICE, torch.float16, random_matrix(kind, 64), cuda_prompt.linear_many, ops)
    device_table._check_experts(DEVICE, torch.float16, *random_expert(kind, 64), experts)
    real = cuda_carried.format_of
    monkeypatch.setattr(cuda_carried, "format_of", lambda spec: {**real(spec), "MIDDLE": 3})
    with pytest.raises(QmixError, match="wrong numbers"):
        device_table._check(DEVICE, torch.float16, random_matrix(kind, 64), cuda_prompt.linear_many, ops)


def test_subnormal_scales() -> None:
    """fp16 numbers below 2^-14, as blocks of small weights have them."""
    m = carried_matrix("q4_k", 64, 256)
    scales = m["scales"].clone()
    scales[..., 1:256:2] &= 0x83
    small, x = Packed.of(m.spec, {**m.tensors, "scales": scales}), operand(2, 256)
    assert relative(cuda.linear(x.to(DEVICE), here(small)), product(x, decode(small))) < SUMS
