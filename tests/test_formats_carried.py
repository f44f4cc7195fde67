"""ggml's formats in qmix's layout: the numbers of the package gguf, bit for bit, and the bytes by their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

import gguf
from oracles import decode, numbers
from test_gguf_types import blocks

from qmix.errors import QmixError
from qmix.formats import carried, carry, unpack
from qmix.formats.carried import Blocks
from qmix.formats.packed import Packed
from qmix.gguf.types import BY_NAME
from qmix.sizes import CARRIED, MatrixSpec, with_layout

SHAPES = [(64, 256, 1), (70, 512, 1), (2 * 70, 256, 2), (1, 768, 1)]


def spec_of(kind: str, rows: int, cols: int, parts: int = 1) -> MatrixSpec:
    return MatrixSpec(rows=rows, cols=cols, parts=parts, **with_layout(kind))


def random_blocks(kind: str, rows: int, cols: int) -> Blocks:
    """Every byte random but for finite fp16 numbers, subnormal ones among them."""
    each = BY_NAME[kind.upper()]
    assert (each.weights, each.nbytes) == (CARRIED[kind].columns, cols_bytes(kind))
    return Blocks(kind, torch.from_numpy(blocks(kind.upper(), rows * cols // each.weights)).view(rows, -1, each.nbytes))


def cols_bytes(kind: str) -> int:
    return CARRIED[kind].columns * CARRIED[kind].bits // 8 + CARRIED[kind].params


def of_package(found: Blocks) -> torch.Tensor:
    rows = found.raw.shape[0]
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(gguf.dequantize(found.raw.reshape(-1, found.raw.shape[2]).numpy(),
                                                         gguf.GGMLQuantizationType[found.kind.upper()]))).view(rows, -1)


@pytest.mark.parametrize("kind", CARRIED)
class TestEveryFormat:
    @pytest.mark.parametrize(("rows", "cols", "parts"), SHAPES)
    def test_carried_blocks_are_the_packages_numbers(self, kind: str, rows: int, cols: int, parts: int) -> None:
        found = random_blocks(kind, rows, cols)
        m = carry(found, spec_of(kind, rows, cols, parts))
        want = of_package(found)
        assert torch.equal(unpack(m).view(torch.int32), want.view(torch.int32))
        assert torch.equal(found.numbers(torch.float32).view(torch.int32), want.view(torch.int32))

    def test_rows_are_those_of_the_whole_matrix(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """An embedding's, in any order, some of them twice; decoded a few at a time."""
        m = carry(random_blocks(kind, 140, 256), spec_of(kind, 140, 256))
        ids = torch.tensor([139, 0, 63, 64, 5, 5, 100, *range(16, 48), 127])
        want = unpack(m)[ids].view(torch.int32)
        assert torch.equal(carried.rows(m, ids).view(torch.int32), want)
        monkeypatch.setattr(carried, "FEW_ROWS", 3)
        assert torch.equal(carried.rows(m, ids).view(torch.int32), want)

    def test_a_matrix_on_a_device_is_decoded_there(self, kind: str) -> None:
        """No table and no result on the CPU, which one on a device cannot be indexed by."""
        m = carry(random_blocks(kind, 70, 256), spec_of(kind, 70, 256))
        there = Packed.of(m.spec, {name: tensor.to("meta") for name, tensor in m.tensors.items()})
        assert carried.unpack(there).device.type == "meta"
        assert carried.rows(there, torch.arange(65, device="meta")).device.type == "meta"

    def test_bytes_are_where_they_are_said_to_be(self, kind: str) -> None:
        """An oracle that addresses the bits of each weight, in float64: equal but for ggml's roundings to fp32."""
        m = carry(random_blocks(kind, 2 * 70, 256), spec_of(kind, 140, 256, 2))
        exact, got = decode(m), numbers(unpack(m))
        with np.errstate(invalid="ignore"):
            largest = np.abs(exact).max(1, keepdims=True)  # a difference of two products
        assert (np.abs(got - exact) <= 3 * 2.0**-24 * largest).all()

    def test_no_byte_is_added(self, kind: str) -> None:
        spec = spec_of(kind, 128, 512)
        assert spec.nbytes == 128 * 512 // CARRIED[kind].columns * BY_NAME[kind.upper()].nbytes

    def test_in_several_tiles(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        found = random_blocks(kind, 300, 256)
        whole = carry(found, spec_of(kind, 300, 256, 2))
        monkeypatch.setattr("qmix.formats.packed.TILE_BYTES", 1)
        tiled = carry(found, spec_of(kind, 300, 256, 2))
        assert all(torch.equal(whole[name], tiled[name]) for name in ("qweight", "scales"))
        assert torch.equal(unpack(tiled), unpack(whole))
        for start, tile in carried.tiles(tiled, torch.bfloat16):
            assert torch.equal(tile, unpack(whole)[start:start + len(tile)].bfloat16())

    def test_a_scale_that_is_not_finite_is_seen(self, kind: str) -> None:
        found = random_blocks(kind, 3, 256)
        assert not found.nonfinite()
        for at in carried.HALVES[kind]:
            for bits in (0x7C00, 0xFC00, 0x7E01):
                bad = found.raw.clone()
                bad[2, -1, at], bad[2, -1, at + 1] = bits & 255, bits >> 8
                assert Blocks(kind, bad).nonfinite()


@pytest.mark.parametrize(("kind", "cols"), [("q8_0", 32), ("q4_0", 96), ("q5_1", 2880)])
def test_widths_that_are_no_multiple_of_256(kind: str, cols: int) -> None:
    found = random_blocks(kind, 65, cols)
    assert torch.equal(unpack(carry(found, spec_of(kind, 65, cols))), of_package(found))


@pytest.mark.parametrize("count", [1, 70])
def test_rows_are_decoded_into_their_place(count: int) -> None:
    """The result keeps no padding alive, and no pieces that it was decoded in."""
    m = carried.pack(torch.randn(70, 100), spec_of("q8_0", 70, 100))
    found = carried.rows(m, torch.arange(count))
    assert found.is_contiguous() and found.untyped_storage().nbytes() == count * 100 * 4
    assert torch.equal(found.view(torch.int32), unpack(m)[:count].view(torch.int32))


@pytest.mark.parametrize("cols", [256, 100])
def test_q8_0_is_packed_as_the_package_does_it(cols: int) -> None:
    weight = torch.randn(70, cols, generator=torch.Generator().manual_seed(1))
    weight[3, :32], weight[4, 5] = 0, -60.0
    m = carried.pack(weight, spec_of("q8_0", 70, cols))
    padded = torch.nn.functional.pad(weight, (0, -cols % 32))
    raw = torch.from_numpy(gguf.quantize(padded.numpy(), gguf.GGMLQuantizationType.Q8_0)).view(70, -1, 34)
    want = carry(Blocks("q8_0", raw), spec_of("q8_0", 70, padded.shape[1]))
    assert all(torch.equal(m[name], want[name]) for name in ("qweight", "scales"))
    assert unpack(m).shape == (70, cols)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e10])
def test_numbers_that_q8_0_cannot_hold_are_refused(bad: float) -> None:
    weight = torch.zeros(3, 64)
    weight[1, 40] = bad
    with pytest.raises(QmixError, match="no quantized format can hold"):
        carried.pack(weight, spec_of("q8_0", 3, 64))


def test_padding_is_zero() -> None:
    for kind in CARRIED:
        m = carry(random_blocks(kind, 1, 512), spec_of(kind, 1, 512))
        rest = Packed(spec_of(kind, 64, 512), m.tensors)
        assert (unpack(rest)[1:] == 0).all()
