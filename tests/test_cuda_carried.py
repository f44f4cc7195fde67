"""The Triton kernels for ggml's formats against float64 products of what the bytes say; on the GPU where there is one,
else under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from oracles import decode, product, relative
from test_cuda import DEVICE, HALF, SUMS, here, logical, needs_triton, operand, padding
from test_native_carried import carried_matrix

from qmix.formats import unpack
from qmix.kernels import cuda
from qmix.sizes import CARRIED

pytestmark = needs_triton


@pytest.mark.parametrize("kind", CARRIED)
class TestEveryFormat:
    def test_few_tokens(self, kind: str) -> None:
        """Two programs share the columns, and a run of them ends early where a block of ggml's has 32."""
        cols = 1280 if CARRIED[kind].columns == 256 else 1312
        m, x = carried_matrix(kind, 2 * 70, cols, 2), operand(3, cols)
        y = cuda.linear(x.to(DEVICE), here(m))
        assert y.shape == (3, m.spec.padded_rows) and y.dtype == torch.float32
        assert relative(logical(y, m.spec), product(x, decode(m))) < SUMS
        assert not padding(y, m.spec).any()

    def test_many_tokens(self, kind: str) -> None:
        m, x = carried_matrix(kind, 2 * 70, 256, 2), operand(20, 256)
        for dot, bound in (("fp32", SUMS), ("fp16", HALF)):
            y = cuda.linear(x.to(DEVICE), here(m), dot=dot)
            assert relative(logical(y, m.spec), product(x, decode(m))) < bound
            assert not padding(y, m.spec).any()

    def test_decoded_rows_are_ggmls_numbers(self, kind: str) -> None:
        m = carried_matrix(kind, 130, 256)
        found = cuda.decoded(cuda.Matrices.of(here(m)), 1, 2, torch.float32)
        assert torch.equal(found[:66].cpu(), unpack(m)[64:])
