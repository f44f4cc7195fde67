"""nf4 and fp4 against a decoder of our own and against bitsandbytes on the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import FP4, NF4, decode_bnb, numbers

from qmix.formats import pack, unpack
from qmix.sizes import MatrixSpec

COLS = [1, 32, 64, 96, 100, 160, 192, 512]  # at 32, 96 and 160 bitsandbytes' own decoder goes wrong


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_decoding_agrees_with_the_papers_tables(name: str, cols: int, double: bool) -> None:
    weight = torch.randn(37, cols, generator=torch.Generator().manual_seed(cols)) * 0.02
    m = pack(weight, MatrixSpec(name, 37, cols, double_quant=double))
    want = decode_bnb(m)
    assert np.abs(numbers(unpack(m)) - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("cols", COLS)
def test_each_weight_takes_the_nearest_value_of_its_table(name: str, cols: int) -> None:
    """What packing may cost, computed from the weights alone: absmax of 64, then the nearest value."""
    weight = torch.randn(37, cols, generator=torch.Generator().manual_seed(cols)) * 0.02
    m = pack(weight, MatrixSpec(name, 37, cols))
    table = np.array(NF4 if name == "nf4" else FP4)
    got, w = numbers(unpack(m)), numbers(weight)
    for start in range(0, cols, 64):
        piece = w[:, start:start + 64]
        absmax = np.abs(piece).max(1, keepdims=True)
        nearest = np.abs(piece[..., None] - absmax[..., None] * table).min(-1)
        error = np.abs(got[:, start:start + 64] - piece)
        assert (error <= nearest + 1e-5 * absmax).all()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bytes_are_bitsandbytes_own(name: str, double: bool, dtype: torch.dtype, monkeypatch) -> None:
    """Several tiles together give what `quantize_4bit` gives on the whole matrix, so that any tool that
    reads bitsandbytes' format reads ours."""
    from bitsandbytes import functional
    monkeypatch.setattr("qmix.formats.packed.TILE_BYTES", 10 * 192 * 4)
    weight = (torch.randn(48, 192, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    m = pack(weight, MatrixSpec(name, 48, 192, double_quant=double))
    codes, state = functional.quantize_4bit(weight.float(), blocksize=64, quant_type=name,
                                            compress_statistics=double)
    assert torch.equal(m["qweight"], codes)
    assert torch.equal(m["absmax"], state.absmax)
    if double:
        assert torch.equal(m["nested_absmax"], state.state2.absmax)
        assert torch.equal(m["offset"], state.offset.view(1))


def test_zero_weights_stay_zero() -> None:
    for name in ("nf4", "fp4"):
        assert not unpack(pack(torch.zeros(4, 100), MatrixSpec(name, 4, 100))).any()
