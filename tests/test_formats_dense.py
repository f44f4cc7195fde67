"""int8 and plain weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import decode, numbers

from qmix.formats import pack, unpack
from qmix.sizes import MatrixSpec


@pytest.mark.parametrize("cols", [1, 17, 33, 64, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_is_rounding_to_the_stored_scale(cols: int, dtype: torch.dtype) -> None:
    weight = torch.randn(70, cols, generator=torch.Generator().manual_seed(cols)).to(dtype)
    weight[3] = 0
    m = pack(weight, MatrixSpec("int8", 70, cols))
    w, scale = numbers(weight), numbers(m["scale"])
    want_scale = np.abs(w).max(1) / 127
    assert (np.abs(scale - want_scale) <= 2**-8 * want_scale).all()  # bf16
    q = np.round(np.divide(w, scale[:, None], out=np.zeros_like(w), where=scale[:, None] > 0)).clip(-127, 127)
    stored = numbers(m["qweight"])
    assert np.abs(stored[:, :cols] - q).max() <= 1  # fp32 may fall on the other side of a tie
    assert (stored[:, :cols] != q).mean() < 1e-3
    assert not stored[:, cols:].any() and stored.shape[1] % 64 == 0
    assert np.abs(numbers(unpack(m)) - decode(m)).max() <= 2**-23 * np.abs(w).max()
    assert (np.abs(decode(m) - w) <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16),
                                             ("fp32", torch.float32)])
def test_plain_weights_are_the_checkpoints_bytes(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(70, 33).to(dtype)
    m = pack(weight, MatrixSpec(name, 70, 33))
    assert m["weight"].dtype == dtype and torch.equal(m["weight"], weight)
    assert torch.equal(unpack(m), weight.float())
    turned = pack(weight.T.contiguous().T, MatrixSpec(name, 70, 33))  # a strided source is made contiguous
    assert turned["weight"].is_contiguous() and torch.equal(turned["weight"], weight)


def test_int8_of_huge_and_tiny_rows() -> None:
    weight = torch.tensor([[1e30, -3e38], [1e-30, 1e-42], [1e-45, 0.0]])
    got = unpack(pack(weight, MatrixSpec("int8", 3, 2)))
    assert torch.isfinite(got).all()
    assert ((got - weight).abs() <= 0.005 * weight.abs().amax(1, keepdim=True) + 1e-40).all()
