"""mxfp4: by hand, against transformers' decoder, and how numbers are rounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MXFP4, decode, numbers
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from qmix.formats import mxfp4
from qmix.formats.mxfp4 import Blocks
from qmix.sizes import MatrixSpec


def spec_of(rows: int, cols: int, parts: int = 1) -> MatrixSpec:
    return MatrixSpec("mxfp4", rows, cols, parts, 32, 64)


def random_blocks(rows: int, cols: int, seed: int = 0, low: int = 0, high: int = 253) -> Blocks:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, cols // 32, 16), dtype=torch.uint8, generator=random)
    return Blocks(codes, torch.randint(low, high, (rows, cols // 32), dtype=torch.uint8, generator=random))


def test_the_sixteen_numbers() -> None:
    assert list(mxfp4.E2M1) == FP4_VALUES == MXFP4


def test_golden_bytes() -> None:
    """66 rows of 32 columns: code (3 r + 5 c) mod 16 for row r and column c, scale 100 + r."""
    codes = torch.tensor([[(3 * r + 5 * c) % 16 for c in range(32)] for r in range(66)], dtype=torch.uint8)
    blocks = Blocks((codes[:, 0::2] | codes[:, 1::2] << 4).view(66, 1, 16),
                    torch.arange(100, 166, dtype=torch.uint8).view(66, 1))
    m = mxfp4.carry(blocks, spec_of(66, 32))
    want = bytearray()
    for block in (0, 1):
        for c in range(32):
            for j in range(32):
                both = [(3 * r + 5 * c) % 16 if r < 66 else 0 for r in (64 * block + j, 64 * block + j + 32)]
                want.append(both[0] | both[1] << 4)
    assert m["qweight"].shape == (2, 32, 32) and m["qweight"].numpy().tobytes() == bytes(want)
    assert m["scale"].shape == (1, 128) and m["scale"][0].tolist() == [*range(100, 166), *[0] * 62]


@pytest.mark.parametrize(("rows", "cols", "parts"), [(64, 32, 1), (70, 96, 1), (2 * 70, 64, 2), (1, 32, 1)])
@pytest.mark.parametrize("low", [0, 110])
def test_carried_codes_are_transformers_numbers(rows: int, cols: int, parts: int, low: int) -> None:
    """Exactly, in fp32 and in bf16, for every code and every scale from the smallest on."""
    blocks = random_blocks(rows, cols, rows + low, low)
    m = mxfp4.carry(blocks, spec_of(rows, cols, parts))
    want = convert_moe_packed_tensors(blocks.codes[None], blocks.scales[None], dtype=torch.float32)[0].T
    assert torch.equal(mxfp4.unpack(m), want) and torch.equal(blocks.numbers(torch.float32), want)
    assert np.array_equal(decode(m), numbers(want))
    assert torch.equal(blocks.numbers(torch.bfloat16).float(), want)
    for start, tile in mxfp4.tiles(m, torch.bfloat16):
        assert torch.equal(tile.float(), want[start:start + len(tile)])


def test_in_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(300, 64)
    whole = mxfp4.carry(blocks, spec_of(300, 64, 2))
    monkeypatch.setattr("qmix.formats.packed.TILE_BYTES", 1)
    tiled = mxfp4.carry(blocks, spec_of(300, 64, 2))
    assert all(torch.equal(whole[name], tiled[name]) for name in ("qweight", "scale"))
    assert torch.equal(mxfp4.unpack(tiled), blocks.numbers(torch.float32))


def nearest(x: float, scale: float) -> float:
    """By the definition: the nearest of all sixteen numbers, of two as near the one whose last bit is 0."""
    ranked = sorted(range(16), key=lambda code: (abs(MXFP4[code] * scale - x), code & 1))
    return MXFP4[ranked[0]] * scale


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.floats(-8, 8, width=16), st.sampled_from([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5])),
                min_size=1, max_size=32), st.integers(-100, 100))
def test_rounding_is_to_the_nearest_with_the_scale_of_the_standard(values: list[float], exponent: int) -> None:
    """OCP MX v1.0, section 6.3: the scale is 2^(floor(log2(largest)) - 2)."""
    x = np.array(values, dtype=np.float64) * 2.0**exponent
    m = mxfp4.pack(torch.tensor(x, dtype=torch.float32)[None], spec_of(1, len(values)))
    got = numbers(mxfp4.unpack(m))[0]
    largest = np.abs(x).max()
    if largest == 0:
        assert not got.any()
        return
    scale = 2.0**(np.floor(np.log2(largest)) - 2)
    assert 2.0**(int(m["scale"][0, 0]) - 127) == scale
    assert np.array_equal(got, [nearest(v, scale) for v in x])


def test_numbers_of_the_format_stay_themselves() -> None:
    """Where each block has one of the two largest exponents, packing finds its scale again."""
    blocks = random_blocks(128, 320, low=100, high=150)
    blocks.codes[:, :, 0] = 0x7f  # 6 and -6
    weight = blocks.numbers(torch.float32)
    assert torch.equal(mxfp4.unpack(mxfp4.pack(weight, spec_of(128, 320))), weight)


def test_the_smallest_and_largest_numbers() -> None:
    weight = torch.zeros(1, 96)
    weight[0, 0], weight[0, 32], weight[0, 64] = 2.0**-149, torch.finfo(torch.float32).max, -2.0**-126
    m = mxfp4.pack(weight, spec_of(1, 96))
    assert m["scale"][:, 0].tolist() == [0, 252, 0]
    assert mxfp4.unpack(m)[0, [0, 32, 64]].tolist() == [0.0, 6 * 2.0**125, -2.0**-126]
