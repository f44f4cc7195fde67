"""int4's bytes, and those of int3 and int2: by hand, by an independent decoder, and between the two block sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import decode_int4, numbers

from qmix.formats import grouped, pad, unpack
from qmix.sizes import MatrixSpec

SHAPES = [(64, 128, 1), (160, 200, 2), (97, 330, 1), (2, 1, 2), (33, 10, 1), (1000, 32, 2)]


def random_packed(spec: MatrixSpec, seed: int = 0):
    """Random codes and parameters with the padding that the format asks for; and the codes."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**spec.bits, (spec.rows, spec.cols), dtype=torch.uint8, generator=random)
    params = torch.zeros(2, spec.padded_rows, spec.padded_cols // spec.group_size, dtype=torch.bfloat16)
    real = torch.randn(2, spec.parts, spec.rows // spec.parts, params.shape[2], generator=random)
    params.view(2, spec.parts, -1, params.shape[2])[:, :, :spec.rows // spec.parts] = real.bfloat16()
    return grouped.pack(pad(q, spec, 2**(spec.bits - 1)), *params, spec), q


def test_golden_bytes() -> None:
    """A 33 x 33 matrix in blocks of 32 rows and groups of 32 columns, every byte written out from the layout:
    code (3 r + 5 c) mod 16 for row r and column c, 8 in the padding (64 rows, 64 columns)."""
    spec = MatrixSpec("int4", 33, 33, group_size=32, block=32)
    q = torch.tensor([[(3 * r + 5 * c) % 16 for c in range(33)] for r in range(33)], dtype=torch.uint8)
    scale = torch.zeros(64, 2, dtype=torch.bfloat16)
    zero = torch.zeros(64, 2, dtype=torch.bfloat16)
    for r in range(33):
        for group in (0, 1):
            scale[r, group], zero[r, group] = 1 + r / 64, -2.0 if group else 0.0
    m = grouped.pack(pad(q, spec, 8), scale, zero, spec)
    want = bytearray()
    for block in (0, 1):
        for c in range(64):
            for j in range(16):
                low, high = 32 * block + j, 32 * block + j + 16
                codes = [(3 * r + 5 * c) % 16 if r < 33 and c < 33 else 8 for r in (low, high)]
                want.append(codes[0] | codes[1] << 4)
    assert m["qweight"].shape == (2, 64, 16)
    assert m["qweight"].numpy().tobytes() == bytes(want)
    assert want[:4] == bytes([0x00, 0x33, 0x66, 0x99])  # column 0: rows 0|16, 1|17, ...; 3 * 16 is 0 mod 16
    assert want[16:18] == bytes([0x55, 0x88])  # column 1
    assert want[64 * 16:64 * 16 + 2] == bytes([0x80, 0x88])  # block 1: row 32, then padding
    assert m["qparams"].shape == (2, 64, 2)
    params = m["qparams"].view(torch.int16).flatten().tolist()
    assert params[:4] == [0x3F80, 0, 0x3F82, 0]  # bf16 1.0, 0.0, 1.015625, 0.0
    assert [n & 0xFFFF for n in params[128:132]] == [0x3F80, 0xC000, 0x3F82, 0xC000]  # group 1: zero = -2.0
    assert params[33 * 2:64 * 2] == [0] * 62


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("block", [64, 32])
@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
def test_decoding_agrees_with_the_definition(shape, group: int, block: int, name: str) -> None:
    rows, cols, parts = shape
    m, q = random_packed(MatrixSpec(name, rows, cols, parts, group, block))
    want = decode_int4(m)
    got = numbers(unpack(m))
    # fp32: (q - 8) is exact, the product and the sum are each rounded once
    bound = 2**-24 * (np.abs(want) + 2 * np.abs(numbers(m["qparams"])).max() * 8)
    assert (np.abs(got - want) <= bound).all()
    params = numbers(m["qparams"])
    part, inside = np.divmod(np.arange(rows), rows // parts)
    row = part * (m.spec.padded_rows // parts) + inside
    scale, zero = (params[np.arange(cols) // group][:, row, i].T for i in (0, 1))
    assert np.array_equal(want, (numbers(q) - 2**(m.spec.bits - 1)) * scale + zero)


@pytest.mark.parametrize("columns", [1, 3, 128])
def test_blocks_convert_both_ways(columns: int) -> None:
    random = torch.Generator().manual_seed(columns)
    rows = torch.randint(0, 16, (192, columns), dtype=torch.uint8, generator=random)

    def blocks_of(block: int) -> torch.Tensor:
        """From the definition, byte by byte."""
        out = torch.empty(192 // block, columns, block // 2, dtype=torch.uint8)
        for j in range(block // 2):
            out[:, :, j] = rows[j::block] | rows[j + block // 2::block] << 4
        return out

    wide, narrow = blocks_of(64), blocks_of(32)
    assert torch.equal(grouped.to_block(wide, 32), narrow)
    assert torch.equal(grouped.to_block(narrow, 64), wide)
    assert grouped.to_block(wide, 64) is wide
    odd = torch.cat((wide.flatten()[:5], wide.flatten()))[5:].view(wide.shape)  # not on an 8-byte boundary
    assert torch.equal(grouped.to_block(odd, 32), narrow)
    with pytest.raises(ValueError, match="5 blocks"):
        grouped.to_block(narrow[:5], 64)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_codes_survive_the_way_there_and_back(bits: int) -> None:
    codes = torch.randint(-2**(bits - 1), 2**(bits - 1), (50, 128)).float()
    for block in (64, 32):
        out = torch.empty(128 // block, 50, block * bits // 8, dtype=torch.uint8)
        grouped.store_codes(codes, out)
        back = torch.empty(50, 128)
        grouped.load_codes(out, back)
        assert torch.equal(back, codes)


def test_golden_bytes_of_int3_and_int2() -> None:
    """One block of 32 rows, one column: row r holds r mod 8 of 3 bits, or r mod 4 of 2, in the places of the
    definition."""
    q = torch.arange(32, dtype=torch.uint8).view(32, 1)
    params = torch.zeros(2, 32, 1, dtype=torch.bfloat16)
    three = MatrixSpec("int3", 32, 1, group_size=32, block=32)
    m = grouped.pack(pad(q % 8, three, 4), *params, three)
    assert m["qweight"].shape == (1, 32, 12)
    pairs = [sum((i + 8 * s) % 4 << 2 * s for s in range(4)) for i in range(8)]
    thirds = [sum((i + 4 * b) % 8 // 4 << b for b in range(8)) for i in range(4)]
    assert m["qweight"][0, 0].tolist() == pairs + thirds and thirds == [0xAA] * 4
    assert m["qweight"][0, 1].tolist() == [0] * 8 + [0xFF] * 4  # padding: the middle code, 4
    two = MatrixSpec("int2", 32, 1, group_size=32, block=32)
    m = grouped.pack(pad(q % 4, two, 2), *params, two)
    assert m["qweight"][0, 0].tolist() == pairs == [0, 0x55, 0xAA, 0xFF] * 2
    assert m["qweight"][0, 1].tolist() == [0xAA] * 8
