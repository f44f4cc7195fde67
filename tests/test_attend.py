"""attend_torch against float64, on the GPU where there is one. On the CPU the branch for torch's fused kernels runs the
same call, for which torch makes the mask itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import relative
from test_cuda import DEVICE, NO_SHRINKING
from test_cuda_ops import OWN_SCORES, there
from test_cuda_ops import attention as in_float64
from torch import Tensor

from qmix.kernels import attend
from qmix.kernels.attend import PLAIN, Softmax, attend_torch

# The operands, products of which are summed in fp32, and the weights of values are rounded to the dtype, and the result
# too: three roundings of half an ulp, 2^-25, 2^-12 or 2^-9, of numbers that are summed with weights; fp32 sums of up to
# 128 products, whose rounding grows no faster than their number.
OFF = {torch.float32: 128 * 2**-24, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-8}
SIZES = st.sampled_from([8, 20, 64, 128])
WINDOWS = st.sampled_from([None, 1, 16, 33, 60, 200])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def attention(query: Tensor, keys: Tensor, values: Tensor, window: int | None, softmax: Softmax = PLAIN) -> Tensor:
    """In float64, of the last T positions."""
    return in_float64(query, keys, values, torch.arange(keys.shape[1] - len(query), keys.shape[1]), window, softmax)


@pytest.mark.parametrize("fused", [False, True])
@settings(max_examples=25, **NO_SHRINKING)
@given(size=SIZES, group=st.sampled_from([1, 4]), kv=st.integers(1, 2), tokens=st.sampled_from([1, 2, 9, 40]),
       past=st.sampled_from([0, 1, 31]), window=WINDOWS, dtype=st.sampled_from(sorted(OFF, key=str)),
       tile=st.sampled_from([1, 3, 100]))
def test_against_float64(fused: bool, size: int, group: int, kv: int, tokens: int, past: int, window: int | None,
                         dtype: torch.dtype, tile: int) -> None:
    query = random(tokens, group * kv, size).to(dtype)
    cache = random(2, kv, past + tokens + 5, size).to(dtype)
    cache[:, :, past + tokens:] = float("nan")  # what lies beyond is scratch
    keys, values = cache[:, :, :past + tokens]
    with pytest.MonkeyPatch.context() as patch:
        # Without a GPU torch says that it has no fused kernel: the branch for one is taken all the same.
        patch.setattr(attend, "has_fused_kernel", lambda *_: fused)
        patch.setattr(attend, "SCORES", tile * 8 * group * kv * (past + tokens))
        got = attend_torch(query.to(DEVICE), *cache.to(DEVICE)[:, :, :past + tokens], window)
    assert got.dtype == dtype and got.shape == (tokens, group * kv * size)
    assert relative(got.cpu(), attention(query, keys, values, window).numpy()) < OFF[dtype]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", sorted(OFF, key=str), ids=str)
@pytest.mark.parametrize("softmax", OWN_SCORES, ids=str)
def test_sinks_scale_and_cap(fused: bool, dtype: torch.dtype, softmax: Softmax, monkeypatch: pytest.MonkeyPatch
                             ) -> None:
    query, cache = random(9, 8, 64).to(dtype), random(2, 2, 40, 64).to(dtype)
    monkeypatch.setattr(attend, "has_fused_kernel", lambda *_: fused)
    monkeypatch.setattr(attend, "SCORES", 3 * 12 * 8 * 40)  # three queries a tile
    for window in (None, 16):
        got = attend_torch(query.to(DEVICE), *cache.to(DEVICE), window, there(softmax))
        assert got.dtype == dtype
        assert relative(got.cpu(), attention(query, *cache, window, softmax).numpy()) < OFF[dtype]


def test_queries_are_rounded_to_the_cache_and_results_are_not() -> None:
    query, cache = random(20, 2, 32), random(2, 1, 20, 32).half()
    got = attend_torch(query.to(DEVICE), *cache.to(DEVICE)).cpu()
    assert got.dtype == torch.float32
    assert relative(got, attention(query.half(), *cache, None).numpy()) < OFF[torch.float16]


@pytest.mark.parametrize(("window", "most"), [(None, 96), (16, 16 + 4)])
def test_no_call_has_more_scores_than_allowed(window: int | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 positions, 4 heads: a call of 4 tokens has 4 * 4 rows of scores, of all positions or those of the window."""
    seen: list[tuple[int, ...]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
        assert len(keys[0]) == 2  # not repeated for the query heads
        seen.append(tuple(mask.shape))
        return real(query, keys, values, mask, scale=scale)

    monkeypatch.setattr(attend.F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attend, "SCORES", 4 * 4 * 96 * 8 if window is None else 4 * 4 * (16 + 64) * 8)
    attend_torch(random(64, 4, 16), *random(2, 2, 96, 16), window)
    assert len(seen) == 16 and all(rows == 2 * 4 and span <= most for rows, span in seen)
