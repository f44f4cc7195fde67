"""The native kernels on ggml's formats, at every level this processor has, against float64 products."""

from __future__ import annotations

import pytest
import torch
from test_native import LEVELS, SUMS, TIES, needs_library, operand, relative, want

from qmix.formats.carried import HALVES, Blocks, carry
from qmix.formats.packed import Packed
from qmix.kernels import native
from qmix.kernels.native import NativeProducts, Product
from qmix.kernels.table import random_matrix, select
from qmix.sizes import CARRIED, MatrixSpec, with_layout


def carried_matrix(kind: str, rows: int, cols: int, parts: int = 1, extreme: int | None = None,
                   seed: int = 0) -> Packed:
    """Random bytes with scales of about 1. extreme: a byte that every code and small scale has."""
    layout, random = CARRIED[kind], torch.Generator().manual_seed(rows + cols + 1000 * seed)
    nbytes = layout.columns * layout.bits // 8 + layout.params
    raw = torch.randint(0, 256, (rows, cols // layout.columns, nbytes), dtype=torch.uint8, generator=random)
    if extreme is not None:
        raw.fill_(extreme)
    for at in HALVES[kind]:
        raw[..., at + 1] = raw[..., at + 1] & 0x83 | 0x38
    return carry(Blocks(kind, raw), MatrixSpec(rows=rows, cols=cols, parts=parts, **with_layout(kind)))


@needs_library
@pytest.mark.parametrize("kind", CARRIED)
@pytest.mark.parametrize(("level", "activations"), LEVELS)
class TestEveryLevel:
    def bound(self, activations: str) -> float:
        return TIES if activations == "int8" else SUMS

    @pytest.mark.parametrize("shape", [(192, 256, 1), (100, 512, 1), (5, 768, 1), (2 * 72, 256, 2)], ids=str)
    def test_products(self, level: str, activations: str, kind: str, shape: tuple[int, int, int]) -> None:
        m, kernels = carried_matrix(kind, *shape), NativeProducts(level, activations)
        for tokens in (1, 2, 3, 4, 5, 7, 13, 270):
            x = operand(tokens, shape[1])
            (got,) = kernels.linear(x, m)
            assert got.shape == (tokens, shape[0]) and got.dtype == torch.float32
            assert relative(got, want(x, m, activations)) < self.bound(activations), tokens

    def test_rows_do_not_depend_on_their_company(self, level: str, activations: str, kind: str) -> None:
        m, kernels = carried_matrix(kind, 140, 512), NativeProducts(level, activations)
        x = operand(300, 512)
        (whole,) = kernels.linear(x, m)
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 25):
            for first in (0, 290):
                (part,) = kernels.linear(x[first:first + count], m)
                assert torch.equal(part, whole[first:first + count])

    @pytest.mark.parametrize("extreme", [0, 0x7F, 0x80, 0x81, 0xFF])
    def test_the_largest_codes_do_not_overflow(self, level: str, activations: str, kind: str, extreme: int) -> None:
        m, x = carried_matrix(kind, 70, 256, extreme=extreme), torch.ones(7, 256)
        kernels = NativeProducts(level, activations)
        x[1], x[2, ::2], x[3, 1::2] = -1, -1, -1
        wanted = want(x, m, activations)
        for tokens in (slice(0, 7), slice(0, 4), slice(1, 2)):
            (got,) = kernels.linear(x[tokens], m)
            torch.testing.assert_close(got.double(), wanted[tokens], rtol=1e-6, atol=1e-2)

    def test_gate_and_up(self, level: str, activations: str, kind: str) -> None:
        m, x = carried_matrix(kind, 2 * 80, 256, 2), operand(9, 256) / 10000
        y, rows, y_rows = torch.full((12, 80), 7.0), torch.tensor([8, 0, 3]), torch.tensor([1, 11, 5])
        NativeProducts(level, activations).run([Product(x, m, y, x_rows=rows, y_rows=y_rows, gated=True)])
        gate, up = want(x[rows], m, activations).split(80, 1)
        assert relative(y[y_rows], torch.nn.functional.silu(gate) * up) < 4 * self.bound(activations)
        assert (y[[i for i in range(12) if i not in y_rows.tolist()]] == 7).all()

    def test_what_is_not_finite_stays_so(self, level: str, activations: str, kind: str) -> None:
        kernels, m = NativeProducts(level, activations), carried_matrix(kind, 64, 256)
        for count in (3, 6):
            x = operand(count, 256)
            (clean,) = kernels.linear(x, m)
            dirty = x.clone()
            dirty[1, 70] = float("nan")
            (got,) = kernels.linear(dirty, m)
            assert not torch.isfinite(got[1]).any()
            assert torch.equal(got[[0, 2]], clean[[0, 2]])

    def test_subnormal_scales(self, level: str, activations: str, kind: str) -> None:
        """fp16 numbers below 2^-14, as blocks of small weights have them."""
        m, x = carried_matrix(kind, 70, 256), operand(2, 256)
        scales, halves = m["scales"].clone(), range(128 * len(HALVES[kind]))
        scales[..., 1:len(halves):2] &= 0x83
        small = Packed.of(m.spec, {**m.tensors, "scales": scales})
        (got,) = NativeProducts(level, activations).linear(x, small)
        assert relative(got, want(x, small, activations)) < self.bound(activations)


@needs_library
@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q4_0"])
def test_widths_that_are_no_multiple_of_256(kind: str) -> None:
    for level, activations in LEVELS:
        m, x = carried_matrix(kind, 130, 288), operand(9, 288)
        for tokens in (x, x[:1]):
            (got,) = NativeProducts(level, activations).linear(tokens, m)
            assert relative(got, want(tokens, m, activations)) < (TIES if activations == "int8" else SUMS)


@needs_library
@pytest.mark.parametrize("kind", CARRIED)
def test_bits_do_not_depend_on_threads(kind: str) -> None:
    kernels = NativeProducts(next(iter(native.levels())), "int8")
    m, x = carried_matrix(kind, 640, 512), operand(40, 512)
    kernels.threads = 1
    alone = kernels.linear(x, m)[0]
    kernels.threads = 3
    assert torch.equal(kernels.linear(x, m)[0], alone)


def test_the_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setenv("QMIX_NATIVE", "off")
    table = select(CARRIED, say=said.append)
    for kind in CARRIED:
        assert any(line.startswith(f"{kind} without native kernels decodes") for line in said)
        m, x = random_matrix(kind, 64), operand(3, 512).bfloat16()
        assert relative(table.linear(x, m), want(x, m, "bf16")) < 2**-8
