"""The parts of the model against their own definition: naive attention and rotation, the cache, weights and what is
computed in which dtype. Parity with transformers is test_model_parity."""

from __future__ import annotations

import cmath
import math
from pathlib import Path
from typing import Any

import bounds
import pytest
import tiny_runners
import torch
from helpers import (
    UNQUANTIZED,
    decode,
    prefill,
    unquantized_model,
    unquantized_weights,
    write_tiny_checkpoint,
)
from tiny_runners import IDS, close
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.errors import StoreError, UsageError
from qmix.formats import pack
from qmix.forward.kv_cache import SessionCache
from qmix.forward.kv_layers import FullLayer
from qmix.forward.program import model_program
from qmix.forward.runner import Runner
from qmix.forward.weights import assemble, compute_dtype
from qmix.kernels.attend import causal_attention, default_inv_freq
from qmix.kernels.kv_size import kv_bytes
from qmix.kernels.layer import TORCH, rms_norm, rotate
from qmix.models import read_model
from qmix.sizes import MatrixSpec

checkpoint = pytest.fixture(scope="module")(tiny_runners.checkpoint)
model = pytest.fixture(scope="module")(tiny_runners.model)


# --- layers ---

def test_rms_norm_against_float64() -> None:
    x, weight = torch.randn(9, 64) * 3, torch.randn(64)
    wide = x.double()
    want = weight * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(rms_norm(x, weight, 1e-5).double(), want, atol=1e-6)
    assert torch.equal(rms_norm(x, None, 1e-5) * weight, rms_norm(x, weight, 1e-5))


def test_rotate_turns_pairs_of_halves() -> None:
    """Dimensions i and i + D/2 are one complex number, turned by position * theta^(-2i/D)."""
    size, theta = 16, 100.0
    x, positions = torch.randn(3, 2, size), torch.tensor([0, 5, 40])
    got = rotate(x.clone(), *TORCH.rope_cos_sin(positions, default_inv_freq(size, theta)))
    for t, position in enumerate(positions.tolist()):
        for i in range(size // 2):
            turn = cmath.exp(1j * position * theta ** (-2 * i / size))
            for head in range(2):
                want = complex(x[t, head, i], x[t, head, i + size // 2]) * turn
                assert got[t, head, i] == pytest.approx(want.real, abs=1e-5)
                assert got[t, head, i + size // 2] == pytest.approx(want.imag, abs=1e-5)


def test_rotation_of_a_position_does_not_depend_on_its_neighbours() -> None:
    together = TORCH.rope_cos_sin(torch.arange(3000), default_inv_freq(128, 1e6))
    for position in (0, 1, 17, 511, 2999):
        own = TORCH.rope_cos_sin(torch.tensor([position]), default_inv_freq(128, 1e6))
        for alone, row in zip(own, together, strict=True):
            assert torch.equal(alone[0], row[position])


def naive_attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """float64, one query and head at a time."""
    count, heads, size = q.shape
    kv_heads, length, _ = keys.shape
    out = torch.zeros(count, heads, size, dtype=torch.float64)
    for t in range(count):
        position = length - count + t
        lowest = 0 if window is None else max(0, position - window + 1)
        for h in range(heads):
            seen = slice(lowest, position + 1)
            scores = keys[h // (heads // kv_heads), seen].double() @ q[t, h].double() / math.sqrt(size)
            out[t, h] = scores.softmax(0) @ values[h // (heads // kv_heads), seen].double()
    return out.view(count, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 20), (2, 5), (20, 20), (7, 20), (1, 9)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_against_a_loop(count: int, length: int, window: int | None, kv_heads: int,
                                  dtype: torch.dtype) -> None:
    q = torch.randn(count, 6, 16).to(dtype)
    room = torch.randn(2, kv_heads, length + 9, 16).to(dtype)  # a cache with room left, as the model has
    keys, values = room[0, :, :length], room[1, :, :length]
    got = causal_attention(q, keys, values, window).double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(got, naive_attention(q, keys, values, window), atol=tolerance)


# --- the cache ---

def test_cache_size_is_what_the_plan_counts(checkpoint: Checkpoint) -> None:
    for dtype, item in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = SessionCache(checkpoint.model, 33, dtype)
        assert cache.nbytes == 33 * kv_bytes(checkpoint.model, 1, item)


def test_cache_hands_out_views(checkpoint: Checkpoint) -> None:
    cache = SessionCache(checkpoint.model, 10, torch.bfloat16)
    new = torch.randn(3, 2, 16)
    layer = cache.layers[1]
    assert isinstance(layer, FullLayer)
    keys, values = layer.append(0, new, -new)
    again, _ = layer.append(3, new, new)
    assert keys.data_ptr() == again.data_ptr()
    assert torch.equal(again[:, :3], keys)
    assert torch.equal(keys, new.bfloat16().transpose(0, 1))
    assert torch.equal(values, -keys)


def test_full_cache_is_an_error_with_the_numbers(model: Runner) -> None:
    cache = model.new_cache(10)
    with pytest.raises(UsageError, match=r"0 \+ 11 tokens do not fit a context of 10"):
        prefill(model, IDS[:11], cache)
    prefill(model, IDS[:10], cache)
    with pytest.raises(UsageError, match=r"10 \+ 1 tokens do not fit a context of 10"):
        decode(model, 1, cache)
    assert cache.length == 10


@pytest.mark.parametrize("length", [-1, 6])
def test_trim_refuses_what_is_not_there(model: Runner, length: int) -> None:
    cache = model.new_cache(10)
    prefill(model, IDS[:5], cache)
    with pytest.raises(ValueError, match="want 0 to 5"):
        cache.trim(length)


def test_trim_then_extend_equals_fresh(model: Runner) -> None:
    used = model.new_cache(200)
    prefill(model, IDS[:100], used)
    used.trim(60)
    assert used.length == 60
    fresh = model.new_cache(200)
    prefill(model, IDS[:60], fresh)
    # Positions 0 to 59 were computed in another company, so the last bits may differ.
    assert close(prefill(model, IDS[200:240], used, True), prefill(model, IDS[200:240], fresh, True))
    used.trim(0)
    once = model.new_cache(200)
    assert torch.equal(prefill(model, IDS[:30], used, True), prefill(model, IDS[:30], once, True))


# --- weights and compute dtype ---

def test_bf16_weights_compute_in_bf16(tmp_path: Path) -> None:
    with Checkpoint.open(write_tiny_checkpoint(tmp_path / "half")) as opened:
        half = unquantized_model(opened)
    wide_path = write_tiny_checkpoint(tmp_path / "wide", dtype=torch.float32)
    with Checkpoint.open(wide_path) as opened:
        wide = unquantized_model(opened)
    cache = half.new_cache(40)
    got = prefill(half, IDS[:40], cache, True)
    assert got.dtype == torch.float32
    assert cache.nbytes == 40 * kv_bytes(opened.model, 1)
    want = prefill(wide, IDS[:40], wide.new_cache(40), True)
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert errors.median() < bounds.model_rounded(opened.model.num_layers)


@pytest.mark.parametrize(("dtype", "experts", "dense", "want"), [
    ("float32", "keep", "keep", torch.float32), ("float16", "keep", "keep", torch.float32),
    ("bfloat16", "keep", "keep", torch.bfloat16), ("float32", "keep", "bf16", torch.bfloat16),
    ("float32", "int4", "keep", torch.bfloat16), ("float16", "nf4", "bf16", torch.bfloat16),
])
def test_compute_dtype(checkpoint: Checkpoint, dtype: str, experts: str, dense: str,
                       want: torch.dtype) -> None:
    raw = {**checkpoint.raw_config, "dtype": dtype}
    quant = QuantConfig(experts, dense) if experts == "int4" else QuantConfig(experts, dense, "", 0, 0)
    assert compute_dtype(read_model(raw), quant) == want


def test_tied_head_shares_the_embedding(tmp_path: Path) -> None:
    with Checkpoint.open(write_tiny_checkpoint(tmp_path, tie_word_embeddings=True)) as opened:
        weights = unquantized_weights(opened)
    assert weights.matrices["embedding"]["weight"].data_ptr() == weights.tensors["embedding"].data_ptr()


def test_every_dense_tensor_is_used(checkpoint: Checkpoint) -> None:
    used = {weight.name for op in model_program(checkpoint.model) for weight in op.weights}
    assert used == {tensor.name for tensor in checkpoint.model.tensors()}


@pytest.mark.parametrize(("name", "bad"), [
    ("layers.1.attention.v", torch.zeros(32, 64)),
    ("layers.1.attention.v", pack(torch.zeros(32, 63), MatrixSpec("fp32", 32, 63))),
    ("layers.2.router.weight", torch.zeros(5, 64)),
    ("final_norm", pack(torch.zeros(1, 64), MatrixSpec("fp32", 1, 64))),
])
def test_misshapen_weights_are_named(checkpoint: Checkpoint, name: str, bad: Any) -> None:
    roles = {t.name: t.role for t in checkpoint.model.tensors()}

    def read(asked: str) -> Any:
        tensor = checkpoint.dense(asked)
        if asked == name:
            return bad
        packed = roles[asked] in ("linear", "head")
        return pack(tensor, MatrixSpec("fp32", *tensor.shape)) if packed else tensor

    with pytest.raises(StoreError, match=rf"{name}: got"):
        assemble(checkpoint.model, compute_dtype(checkpoint.model, UNQUANTIZED), read)
