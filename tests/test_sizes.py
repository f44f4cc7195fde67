"""sizes.py against real packing: the plan and the store compute with its integers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtrals import MIXTRAL_8X7B, mixtral

from qmix import formats
from qmix.config import QuantConfig
from qmix.errors import UsageError
from qmix.kernels.kv_size import kv_bytes
from qmix.quantize.methods import quantize
from qmix.sizes import (
    GIB,
    MX_BLOCK,
    MX_GROUP,
    MatrixSpec,
    dense_bytes,
    dense_spec,
    format_bytes,
    parse_bytes,
    record_layout,
    round_up,
)
from qmix.spec import Tensor

MIXTRAL = MIXTRAL_8X7B
PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@st.composite
def specs(draw: st.DrawFn) -> MatrixSpec:
    parts = draw(st.sampled_from((1, 2)))
    rows, cols = parts * draw(st.integers(1, 70)), draw(st.integers(1, 200))
    name = draw(st.sampled_from(("int4", "int3", "int2", "int8", "mxfp4", "nf4", "fp4", *PLAIN)))
    if name == "mxfp4":
        return MatrixSpec(name, rows, cols, parts, MX_GROUP, MX_BLOCK)
    if name in ("int4", "int3", "int2"):
        return MatrixSpec(name, rows, cols, parts, draw(st.sampled_from((32, 64, 128))),
                          draw(st.sampled_from((64, 32))))
    return MatrixSpec(name, rows, cols, parts, double_quant=name in ("nf4", "fp4") and draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(0, 2**31))
def test_real_packing_has_the_computed_bytes_and_gives_the_matrix_back(spec: MatrixSpec, seed: int) -> None:
    weight = torch.randn(spec.rows, spec.cols, generator=torch.Generator().manual_seed(seed))
    packed = quantize(weight, spec, "rtn") if spec.bits else formats.pack(weight, spec)
    assert sum(t.nbytes for t in packed.tensors.values()) == spec.nbytes
    shapes = [(name, tuple(t.shape)) for name, t in packed.tensors.items()]
    assert shapes == [(t.name, t.shape) for t in spec.tensors]
    back = formats.unpack(packed)
    assert back.shape == weight.shape and back.dtype == torch.float32
    step = {"int4": 1 / 7, "int3": 1 / 3, "int2": 1, "mxfp4": 0.25, "nf4": 0.16, "fp4": 0.18, "int8": 0.004,
            "bf16": 2**-8, "fp16": 2**-10, "fp32": 0}
    assert (back - weight).abs().max() <= step[spec.format] * weight.abs().max()


def test_mixtral_numbers_of_the_design() -> None:
    layout = record_layout(MIXTRAL, QuantConfig())
    assert layout.nbytes == 99_090_432
    assert 256 * layout.nbytes == 25_367_150_592
    assert kv_bytes(MIXTRAL, 1) == 128 * 1024
    assert layout.w13.padded_rows == 28672 and layout.w2.padded_cols == 14336
    plain = QuantConfig(experts="keep", dense="keep", method="", group_size=0, block=0)
    assert record_layout(MIXTRAL, plain).nbytes == 3 * 4096 * 14336 * 2


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(("int4", "int3", "int2", "nf4", "fp4", "keep")),
       st.sampled_from((32, 64, 128)), st.sampled_from((64, 32)), st.booleans())
def test_records_are_aligned_and_their_tensors_do_not_overlap(
        hidden: int, inner: int, experts: str, group: int, block: int, double: bool) -> None:
    config = mixtral(16, hidden, inner, 1, 1, 1, 2, 1, 1, 1e4, 1e-5, 16)
    int4 = experts in ("int4", "int3", "int2")
    quant = QuantConfig(experts, "keep", "rtn" if int4 else "", group if int4 else 0, block if int4 else 0,
                        double and experts in ("nf4", "fp4"))
    layout = record_layout(config, quant)
    assert layout.nbytes % 4096 == 0 and 0 <= layout.nbytes - layout.payload < 4096
    assert all(p.offset % 64 == 0 for p in layout.placed)
    for a, b in pairwise(layout.placed):
        assert a.offset + a.tensor.nbytes <= b.offset < a.offset + a.tensor.nbytes + 64
    tensors = [*layout.w13.tensors, *layout.w2.tensors]
    assert [p.tensor for p in layout.placed] == tensors
    assert layout.payload >= layout.w13.nbytes + layout.w2.nbytes


def test_padding_of_the_docstring() -> None:
    spec = MatrixSpec("int4", 160, 100, parts=2, group_size=64, block=64)
    assert (spec.padded_rows, spec.padded_cols) == (256, 128)
    weight = torch.arange(160.0).unsqueeze(1).expand(160, 100)
    padded = formats.pad(weight, spec, value=-1)
    assert padded.shape == (256, 128)
    assert padded[79, 99] == 79 and padded[80, 0] == -1 and padded[128, 0] == 80 and padded[0, 100] == -1


@pytest.mark.parametrize("dense", ["int8", "int4", "bf16", "keep"])
def test_dense_tensors(dense: str) -> None:
    quant = QuantConfig(dense=dense)
    linear, norm = Tensor("a", (100, 70), "linear"), Tensor("b", (70,), "norm")
    router, head = Tensor("c", (8, 70), "router"), Tensor("d", (100, 70), "head")
    assert dense_spec(MIXTRAL, quant, norm) is None and dense_spec(MIXTRAL, quant, router) is None
    assert dense_bytes(MIXTRAL, quant, norm) == 140
    want = {"int8": 100 * 128 + 200, "int4": 128 * 128 // 2 + 4 * 128 * 2}.get(dense, 14000)
    assert dense_bytes(MIXTRAL, quant, linear) == dense_bytes(MIXTRAL, quant, head) == want


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_round_up(n: int, multiple: int) -> None:
    up = round_up(n, multiple)
    assert up % multiple == 0 and 0 <= up - n < multiple


def test_sizes_in_words() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 99 * 2**20, 24 * GIB, 5000 * GIB)] == [
        "0 B", "1023 B", "1.5 KiB", "99.0 MiB", "24.0 GiB", "5000 GiB"]


@pytest.mark.parametrize(("text", "want"), [
    ("24G", 24 * GIB), ("24GiB", 24 * GIB), ("8gib", 8 * GIB), ("1.5G", 3 * GIB // 2), ("512M", 512 * 2**20),
    ("64K", 65536), ("2T", 2**41), ("4096", 4096), (" 4096 B ", 4096), ("0.3G", 322122547), ("1.0G", GIB),
    ("1048576T", 2**60)])
def test_sizes_as_people_write_them(text: str, want: int) -> None:
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", [
    "", " ", "G", "-1G", "+1G", "0", "0G", "0.0000000001K", "nan", "inf", "1e9", "1_000", "24GB", "24 MB", "1.5",
    "1.5B", "1,5G", "1..5G", ".5G", "24G24G", "1048577T", "9" * 21, "9" * 10**5, "1." + "0" * 10**5 + "G", "٣G",
    "1\u212a", "1P", "24G\nx", "auto"])
def test_sizes_that_make_no_sense_are_named(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert repr(text)[:40] in caught.value.message and len(caught.value.message) < 200


@given(st.integers(1, 2**60))
def test_plain_bytes_come_back(n: int) -> None:
    assert parse_bytes(str(n)) == n
