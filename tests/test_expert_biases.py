"""Biases of an expert's matrices and what joins gate and up: every path of the CPU against float64, and where a store
keeps them.

T tokens, F inner, H hidden.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qmix import formats
from qmix.config import QuantConfig
from qmix.formats import unpack
from qmix.formats.packed import Packed
from qmix.kernels import native, reference
from qmix.kernels.cpu import plain_linear
from qmix.kernels.native import NativeProducts, Product, as_seen
from qmix.kernels.table import KernelTable, select
from qmix.models import ARCHITECTURES, read_model
from qmix.quantize.methods import quantize
from qmix.sizes import MatrixSpec, record_layout, round_up
from qmix.spec import Activation

LEVELS = [(level, activations) for level in native.levels() for activations in ("int8", "bf16")]
KINDS = [Activation(), Activation("geglu"), Activation("swiglu_clamped", 1.702, 1.0)]
kinds = pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
FORMATS = ("int4", "int3", "int8", "mxfp4", "bf16", "fp32")
F, H = 70, 130  # neither fills its blocks


def packed(name: str, activation: Activation, rows: int = 2 * F, cols: int = H, parts: int = 2) -> Packed:
    random = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, cols, generator=random) / cols**0.5
    extra = {"group_size": 32, "block": 64 if name == "mxfp4" else 32} if name in ("int4", "int3", "mxfp4") else {}
    spec = MatrixSpec(name, rows, cols, parts, bias=True, activation=activation, **extra)
    alone = quantize(weight, spec.without_bias, "rtn") if spec.bits else formats.pack(weight, spec.without_bias)
    return Packed.of(spec, {**alone.tensors, "bias": torch.randn(rows, generator=random)}, "matrix")


def x_of(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(5)).to(dtype)


def joined(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """The formulas of spec.Activation, once more and in float64."""
    if activation.kind == "swiglu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation.kind == "geglu":
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate / (1 + torch.exp(-activation.alpha * gate)) * (up + 1)


def wanted(x: Tensor, m: Packed) -> Tensor:
    gate, up = (x.double() @ unpack(m).double().T + m["bias"].double()).split(F, 1)
    return joined(m.spec.activation, gate, up)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.skipif(not LEVELS, reason="the native kernels were not built: no C compiler")
@pytest.mark.parametrize(("level", "activations"), LEVELS)
class TestNative:
    @kinds
    @pytest.mark.parametrize("name", ["int4", "int3", "int8", "mxfp4"])
    def test_gated_against_float64(self, level: str, activations: str, activation: Activation, name: str) -> None:
        """What is compared sees the same rounded activations. fp32: sums of 130 terms and a polynomial for exp, each
        some 1e-6; an activation of 8 bits that lies between two codes may fall to either side, 4e-4 in the product."""
        m, own = packed(name, activation), NativeProducts(level, activations)
        for tokens in (1, 7, 40):
            x = x_of(tokens)
            seen = as_seen(x, activations, m.spec.group_size or native.DENSE_GROUP)
            assert relative(own.gated(x, m), wanted(seen, m)) < (4 * 4e-4 if activations == "int8" else 4e-6)

    def test_a_bias_is_added_to_its_own_row(self, level: str, activations: str) -> None:
        """fp32 sums, then one more addend: the bits of the product without it, plus the bias."""
        for name, parts in (("int4", 1), ("int4", 2), ("int8", 1)):
            m, own = packed(name, Activation(), 100, parts=parts), NativeProducts(level, activations)
            bare = Packed.of(m.spec.without_bias, {k: v for k, v in m.tensors.items() if k != "bias"}, "bare")
            for tokens in (1, 3, 30):
                (got,), (alone,) = own.linear(x_of(tokens), m), own.linear(x_of(tokens), bare)
                assert torch.equal(got, alone + m["bias"])

    @kinds
    def test_a_row_does_not_depend_on_the_others(self, level: str, activations: str, activation: Activation) -> None:
        m, own, x = packed("int4", activation), NativeProducts(level, activations), x_of(33)
        whole = own.gated(x, m)
        for row in (0, 8, 32):
            assert torch.equal(own.gated(x[row:row + 1], m), whole[row:row + 1])

    def test_the_table_adds_a_bias_once(self, level: str, activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whichever kernel of its own has the format."""
        monkeypatch.setenv("QMIX_NATIVE", level)
        table = select([*FORMATS, "int2"], [32], say=lambda line: None, activations=activations)
        assert table.native is not None and table.native.level == level
        for name in FORMATS:
            m = packed(name, Activation(), 100, parts=1)
            bare = Packed.of(m.spec.without_bias, {k: v for k, v in m.tensors.items() if k != "bias"}, "bare")
            for tokens in (1, 5, 20):
                x, want = x_of(tokens), table.linear(x_of(tokens), bare) + m["bias"]
                assert torch.equal(table.linear(x, m), want), name
                assert all(torch.equal(y, want) for y in table.linears(x, m, m)), name

    def test_nan_stays_nan(self, level: str, activations: str) -> None:
        """A clamp that hides an overflow would give a wrong token instead of an error."""
        m = packed("int4", KINDS[2])
        m["bias"][3], m["bias"][F + 5] = torch.nan, torch.nan
        got = torch.empty(1, F)
        NativeProducts(level, activations).run([Product(x_of(1), m, got, gated=True)])
        assert got.isnan().nonzero()[:, 1].tolist() == [3, 5]


@kinds
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_paths_against_float64(name: str, activation: Activation, dtype: torch.dtype) -> None:
    """What computes without the library. bf16: the product and the result are rounded, 2^-9 each, and the activation
    passes at most twice the first on."""
    m = packed(name, activation)
    kernel = plain_linear if name in ("bf16", "fp32") else reference.linear
    table = KernelTable({(name, m.spec.block): kernel}, {})
    for tokens in (1, 20):
        x = x_of(tokens, dtype)
        got = table.gated(x, m)
        assert got.dtype == dtype
        bound = 2e-6 if dtype == torch.float32 else 3 * 2**-9
        assert relative(got, wanted(x, m)) < bound
        down = packed(name, Activation(), 50, F, parts=1)
        down_kernel = KernelTable({(name, down.spec.block): kernel}, {})
        want = got.double() @ unpack(down).double().T + down["bias"].double()
        assert relative(down_kernel.linear(got, down), want) < bound


def test_a_record_places_each_bias_behind_its_matrix() -> None:
    model = read_model(ARCHITECTURES["gpt_oss"].TINY)
    layout = record_layout(model, QuantConfig())
    assert [(p.matrix, p.tensor.name) for p in layout.placed] == [
        (m, name) for m in ("w13", "w2") for name in ("qweight", "qparams", "bias")]
    assert all(p.offset % 64 == 0 for p in layout.placed)
    w13, w2 = layout.w13, layout.w2
    assert w13.tensors[-1].nbytes == 4 * 2 * model.expert_inner and w2.tensors[-1].nbytes == 4 * model.hidden
    assert w13.activation.kind == "swiglu_clamped" and w2.activation == Activation()
    plain = replace(w13, bias=False), replace(w2, bias=False)
    bare = sum(round_up(t.nbytes, 64) for spec in plain for t in spec.tensors)
    assert layout.payload == bare + 4 * (2 * model.expert_inner + model.hidden)
