"""The numbers of GGUF's blocks against the package gguf's own decoding, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qmix.formats.ggml import READ, decode_into, dequantize
from qmix.formats.ggml.tables import mxfp4_blocks
from qmix.gguf.types import BY_NAME, TYPES

gguf = pytest.importorskip("gguf")
# Where each type has its fp16 numbers: any byte is allowed elsewhere.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
          "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}


def blocks(kind: str, count: int) -> np.ndarray:
    """Random blocks, uint8 [count, bytes], whose fp16 numbers are finite, subnormal ones among them."""
    random = np.random.default_rng(sum(map(ord, kind)))
    found = random.integers(0, 256, (count, BY_NAME[kind].nbytes), np.uint8)
    for at in HALVES.get(kind, ()):
        exponent = random.integers(-26, 15, count)
        exponent[:2] = -24, 15
        d = np.ldexp(random.uniform(-1, 1, count), exponent).astype(np.float16)
        found[:, at:at + 2] = d.view(np.uint8).reshape(count, 2)
    if kind == "MXFP4":
        found[:, 0] = np.arange(count) % 255
    return found


@pytest.mark.parametrize("kind", [kind for kind in READ if kind != "F32"])
def test_numbers_are_those_of_the_package(kind: str) -> None:
    if kind in ("F16", "BF16"):
        raw = np.arange(2**16, dtype=np.uint16)
        finite = (raw & (0x7C00 if kind == "F16" else 0x7F80)) != (0x7C00 if kind == "F16" else 0x7F80)
        data = raw[finite].view(np.uint8).reshape(-1, 2)
    else:
        data = blocks(kind, 513)
    with np.errstate(over="ignore"):
        want = gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(len(data), -1)
    got = dequantize(kind, torch.from_numpy(data))
    assert np.array_equal(got.numpy().view(np.int32), want.astype(np.float32).view(np.int32))


def test_the_table_of_types_is_the_packages() -> None:
    for number, kind in TYPES.items():
        if kind.nbytes:
            assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.weights, kind.nbytes)
            assert gguf.GGMLQuantizationType[kind.name] == number
    assert {kind.name for kind in TYPES.values()} >= {kind.name for kind in gguf.GGMLQuantizationType}


def test_a_long_tensor_is_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.formats.ggml.PIECE", 100)
    raw = torch.from_numpy(blocks("Q5_1", 17))
    out = torch.empty(17 * 32, dtype=torch.bfloat16)
    decode_into("Q5_1", raw.flatten(), out)
    assert torch.equal(out, dequantize("Q5_1", raw).flatten().bfloat16())


def test_blocks_of_mxfp4_are_the_same_numbers() -> None:
    data = blocks("MXFP4", 252)
    raw = torch.from_numpy(data).view(6, 42, 17)
    assert torch.equal(mxfp4_blocks(raw).numbers(torch.float32), dequantize("MXFP4", raw.flatten(0, 1)).view(6, -1))
