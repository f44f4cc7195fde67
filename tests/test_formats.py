"""What the formats share: the check before the first kernel, padding, tiles, lookup by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmix import formats
from qmix.errors import ModelFileError, QmixError, UsageError
from qmix.formats import Packed
from qmix.formats.packed import TILE_BYTES, row_tiles
from qmix.quantize.methods import quantize
from qmix.sizes import MatrixSpec, TensorSpec

SPECS = [MatrixSpec("int4", 64, 128, group_size=64, block=64), MatrixSpec("int3", 64, 128, group_size=64, block=64),
         MatrixSpec("int8", 20, 100), MatrixSpec("mxfp4", 20, 100, 1, 32, 64),
         MatrixSpec("nf4", 20, 100), MatrixSpec("fp4", 20, 100, double_quant=True),
         MatrixSpec("bf16", 20, 100)]


def some(spec: MatrixSpec) -> Packed:
    weight = torch.randn(spec.rows, spec.cols, generator=torch.Generator().manual_seed(3))
    return quantize(weight, spec, "rtn") if spec.bits else formats.pack(weight, spec)


def short(t: torch.Tensor) -> torch.Tensor:
    return t[:-1]


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same shape and values, every other element of a larger buffer."""
    wide = torch.stack((t, t), dim=-1)
    return wide[..., 0]


def reshaped(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(1, *t.shape)


def retyped(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.float64)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.format)
@pytest.mark.parametrize("break_it", [short, strided, reshaped, retyped])
def test_a_broken_tensor_is_refused_by_name(spec: MatrixSpec, break_it) -> None:
    good = some(spec)
    for name in good.tensors:
        if break_it is strided and good[name].numel() == 1:
            continue
        with pytest.raises(ModelFileError, match=f"layer 3: {name}: "):
            Packed.of(spec, {**good.tensors, name: break_it(good[name])}, "layer 3")


def test_missing_and_extra_tensors_are_refused_by_name() -> None:
    good = some(SPECS[0])
    with pytest.raises(ModelFileError, match=r"m: qparams: missing"):
        Packed.of(good.spec, {"qweight": good["qweight"]}, "m")
    with pytest.raises(ModelFileError, match=r"m: zeros: not a tensor of int4"):
        Packed.of(good.spec, {**good.tensors, "zeros": good["qparams"]}, "m")


def test_views_into_a_record_are_checked_and_share_memory() -> None:
    buffer = torch.arange(256, dtype=torch.uint8)
    spec = TensorSpec("t", "BF16", (4, 8))
    found = formats.view(buffer, 64, spec)
    assert found.shape == (4, 8) and found.data_ptr() == buffer.data_ptr() + 64
    assert bytes(found.view(torch.uint8).flatten().tolist()) == bytes(range(64, 128))
    for offset in (-64, 256 - 63, 1000):
        with pytest.raises(ValueError):
            formats.view(buffer, offset, spec)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 20000), st.sampled_from((1, 2)), st.sampled_from((0, 32, 64)),
       st.sampled_from((2, 4)))
def test_tiles_cover_every_row_once_within_4_mib(
        rows: int, cols: int, parts: int, block: int, item: int) -> None:
    rows *= parts
    int4 = {"group_size": 64, "block": block} if block else {}
    spec = MatrixSpec("int4" if block else "int8", rows, cols, parts, **int4)
    seen = []
    for logical, padded, n in row_tiles(spec, item):
        part, inside = divmod(logical, rows // parts)
        assert padded == part * (spec.padded_rows // parts) + inside
        assert inside + n <= rows // parts
        assert block == 0 or padded % block == 0
        assert n * spec.padded_cols * item <= TILE_BYTES or n <= max(block, 1)
        seen += range(logical, logical + n)
    assert seen == list(range(rows))


@pytest.mark.parametrize("name", ["int8", "nf4", "fp4", "mxfp4"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_place(name: str, bad: float) -> None:
    weight = torch.randn(40, 70)
    weight[33, 5] = bad
    with pytest.raises(QmixError, match=r"weight\[33, 5\] is -?(inf|nan)"):
        formats.pack(weight, MatrixSpec(name, 40, 70, 1, *((32, 64) if name == "mxfp4" else ())))


def test_unknown_formats_and_int4_without_a_method_are_refused() -> None:
    with pytest.raises(UsageError, match="'int5'"):
        formats.unpack(Packed(MatrixSpec("int5", 4, 4), {}))
    with pytest.raises(UsageError, match="method"):
        formats.pack(torch.zeros(64, 64), SPECS[0])


def test_only_nf4_and_fp4_import_bitsandbytes() -> None:
    """And importing it does not look for `kernels`, which would have it fetch code from the network."""
    code = """
import sys, torch, types
from qmix import formats
from qmix.kernels.table import select
from qmix.sizes import MatrixSpec
select({"int4", "int8", "bf16"}, say=lambda line: None)
formats.pack(torch.ones(4, 64), MatrixSpec("int8", 4, 64))
assert "bitsandbytes" not in sys.modules
class Trap(types.ModuleType):
    def get_kernel(self, *args, **kwargs):
        raise SystemExit("bitsandbytes asked the network for code")
sys.modules["kernels"] = Trap("kernels")
formats.pack(torch.ones(4, 64), MatrixSpec("nf4", 4, 64))
assert "bitsandbytes" in sys.modules and isinstance(sys.modules["kernels"], Trap)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "kernels" not in run.stderr
