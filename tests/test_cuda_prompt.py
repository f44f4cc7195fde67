"""Products and attention of many tokens against float64; Triton's interpreter gets bf16 products wrong, so those of
the kernels are fp32 and fp16 here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import decode, product, relative
from test_cuda import DEVICE, HALF, NO_SHRINKING, SUMS, here, matrix, needs_triton, operand
from test_cuda_ops import OWN_SCORES, attention, dense, random, there

from qmix.errors import UsageError
from qmix.formats import pack
from qmix.kernels import cuda, cuda_prompt
from qmix.kernels.attend import Softmax
from qmix.kernels.cuda_ops import LOG2_E
from qmix.kernels.cuda_prompt import attend_many, linear_many
from qmix.sizes import MatrixSpec

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:invalid value encountered in divide")]
OFF = {torch.float32: SUMS, torch.float16: 2 * HALF, torch.bfloat16: 2**-6}


class TestLinear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", ["int8", "bf16", "fp16", "fp32", "nf4", "fp4"])
    def test_dense_formats_by_tiles(self, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_prompt, "TILE_BYTES", 20 * 128 * dtype.itemsize)  # 20 rows
        m, x = dense(name, 70, 130), operand(19, 130, 1).to(dtype)
        y, wide = (linear_many(x.to(DEVICE), here(m), want).cpu() for want in (None, torch.float32))
        assert y.dtype == dtype and wide.dtype == torch.float32
        for got in (y, wide):
            assert relative(got, product(x, decode(m))) < OFF[dtype]

    def test_two_quantizations_of_nf4(self) -> None:
        m = pack(operand(70, 130), MatrixSpec("nf4", 70, 130, double_quant=True))
        x = operand(19, 130, 1)
        assert relative(linear_many(x.to(DEVICE), here(m)).cpu(), product(x, decode(m))) < SUMS

    @pytest.mark.parametrize(("name", "parts"), [("int4", 1), ("int3", 2), ("mxfp4", 2)])
    def test_grouped_formats_lose_their_padding(self, name: str, parts: int) -> None:
        m, x = matrix(name, 70 * parts, 60, 32, 32, parts), operand(11, 60)
        y = linear_many(x.to(DEVICE), here(m)).cpu()
        assert y.shape == (11, 70 * parts) and relative(y, product(x, decode(m))) < SUMS

    def test_int8_in_fp16_does_not_overflow(self) -> None:
        m, x = pack(torch.full((4, 4096), 0.001), MatrixSpec("int8", 4, 4096)), torch.ones(9, 4096).half()
        assert relative(linear_many(x.to(DEVICE), here(m)).cpu(), product(x, decode(m))) < OFF[torch.float16]

    def test_refusals(self) -> None:
        m = here(dense("int8", 8, 64))
        for x in (torch.zeros(9, 63), torch.zeros(9, 64).double(), torch.zeros(64)):
            with pytest.raises(UsageError, match=r"x: got .* want fp32, bf16 or fp16 \[T, 64\]"):
                linear_many(x.to(DEVICE), m)


class TestWithoutTensorCores:
    """What cards of compute capability 7.5 use."""

    @pytest.mark.parametrize(("name", "block", "group"), [
        ("int4", 64, 64), ("int4", 32, 128), ("int3", 64, 32), ("int3", 32, 64), ("int2", 64, 128), ("int2", 32, 32),
        ("mxfp4", 64, 32)])
    def test_decoded_weights_are_rounded_once(self, name: str, block: int, group: int) -> None:
        m = matrix(name, 200, 150, group, block)
        want = torch.from_numpy(decode(m))[block:3 * block]
        for dtype in (torch.float32, torch.float16):
            got = cuda.decoded(cuda.Matrices.of(here(m)), 1, 2, dtype)
            assert got.dtype == dtype and got.shape == (2 * block, m.spec.padded_cols)
            assert torch.equal(got[:len(want), :150].cpu(), want.float().to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("name", "parts"), [("int4", 2), ("int3", 1), ("int2", 1), ("mxfp4", 2)])
    def test_products_by_tiles(self, name: str, parts: int, dtype: torch.dtype,
                               monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_prompt, "TILE_BYTES", 64 * 160 * dtype.itemsize)  # two blocks of rows
        m, x = matrix(name, 100 * parts, 150, 32, 32, parts), operand(19, 150, 1).to(dtype)
        for out in (dtype, torch.float32):
            y = cuda_prompt.linear_decoded(x.to(DEVICE), here(m), out).cpu()
            assert y.dtype == out and relative(y, product(x, decode(m))) < OFF[dtype]
        assert cuda_prompt.linear_decoded(x[:0].to(DEVICE), here(m), dtype).shape == (0, 100 * parts)

    @pytest.mark.parametrize(("card", "by_torch"), [((7, 5), True), ((8, 0), False), ((12, 0), False), (None, False)])
    def test_the_card_decides(self, card: tuple[int, int] | None, by_torch: bool,
                              monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []
        m, x = here(matrix("int4", 64, 64, 32, 32)), operand(9, 64).half().to(DEVICE)
        monkeypatch.setattr(cuda_prompt, "linear_decoded", lambda *args: asked.append(args))
        monkeypatch.setattr(cuda_prompt, "capability", lambda place: card)
        linear_many(x, m)
        assert bool(asked) == by_torch
        linear_many(x.float(), m)
        assert len(asked) == by_torch + (card is not None)


class TestAttend:
    @settings(max_examples=12, **NO_SHRINKING)
    @given(st.sampled_from([16, 32, 64, 80, 128]), st.sampled_from([1, 2, 4]), st.integers(1, 2),
           st.sampled_from([1, 9, 32, 33, 70]), st.sampled_from([0, 1, 31, 50]),
           st.sampled_from([None, 1, 16, 33, 200]), st.sampled_from([torch.float32, torch.float16]))
    def test_against_float64(self, size: int, group: int, kv: int, tokens: int, past: int, window: int | None,
                             dtype: torch.dtype) -> None:
        q = random(tokens, group * kv, size).to(dtype)
        cache = random(2, kv, past + tokens + 5, size).to(dtype)
        cache[:, :, past + tokens:] = float("nan")  # what lies beyond is scratch
        keys, values = cache[:, :, :past + tokens]
        got = attend_many(q.to(DEVICE), *cache.to(DEVICE)[:, :, :past + tokens], window)
        assert got.dtype == dtype and got.shape == (tokens, group * kv * size)
        want = attention(q, keys, values, torch.arange(past, past + tokens), window).numpy()
        assert relative(got.cpu(), want) < OFF[dtype]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("softmax", OWN_SCORES, ids=str)
    def test_sinks_scale_and_cap_against_float64(self, softmax: Softmax, dtype: torch.dtype) -> None:
        """A cap as in test_cuda_ops."""
        q, cache = random(40, 8, 32).to(dtype), random(2, 2, 71, 32).to(dtype)
        off = OFF[dtype] + 2 * 8 * 2**-24 * (softmax.softcap or 0) * LOG2_E
        for window in (None, 16):
            got = attend_many(q.to(DEVICE), *cache.to(DEVICE), window, there(softmax)).cpu()
            want = attention(q, *cache, torch.arange(31, 71), window, softmax).numpy()
            assert relative(got, want) < off

    def test_a_sink_that_weighs_nothing_changes_no_bit_and_a_broken_one_is_seen(self) -> None:
        q, cache, sinks = random(20, 4, 32), random(2, 2, 40, 32), torch.tensor([-1e4, -math.inf, 1e4, math.nan])
        plain = attend_many(q.to(DEVICE), *cache.to(DEVICE)).cpu()
        got = attend_many(q.to(DEVICE), *cache.to(DEVICE), None, there(Softmax(sinks))).cpu().view(20, 4, 32)
        assert torch.equal(got[:, :2], plain.view(20, 4, 32)[:, :2])
        assert not got[:, 2].any() and got[:, 3].isnan().all()

    def test_queries_are_rounded_to_the_cache_and_results_are_not(self) -> None:
        q, cache = random(20, 2, 32), random(2, 1, 20, 32).half()
        got = attend_many(q.to(DEVICE), *cache.to(DEVICE)).cpu()
        assert got.dtype == torch.float32
        assert relative(got, attention(q.half(), *cache, torch.arange(20), None).numpy()) < HALF

    def test_broken_queries_stay_with_their_row(self) -> None:
        q, cache = random(20, 2, 32), random(2, 1, 20, 32)
        clean = attend_many(q.to(DEVICE), *cache.to(DEVICE)).cpu()
        q[7, 1, 3] = float("nan")
        got = attend_many(q.to(DEVICE), *cache.to(DEVICE)).cpu().view(20, 2, 32)
        assert got[7, 1].isnan().all()
        got[7, 1] = clean.view(20, 2, 32)[7, 1]
        assert torch.equal(got.flatten(1), clean)

    def test_refusals(self) -> None:
        q, cache = torch.zeros(5, 4, 16), torch.zeros(2, 2, 9, 16)
        for bad in ((q[:0], *cache), (q, *cache[:, :, :4]), (q[:, :3], *cache), (q, cache[0], cache[1].half()),
                    (q, *cache.double()), (q[..., :8], *cache)):
            with pytest.raises(UsageError, match=r"attend_many: got .* want"):
                attend_many(*bad)
