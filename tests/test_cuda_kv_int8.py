"""Attention of a few tokens over a cache of int8 codes, on the GPU where there is one, else under Triton's interpreter:
against float64 over the decoded numbers; new keys and values to half a scale; drafts with the bits of single tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import relative
from test_cuda import DEVICE, NO_SHRINKING, SUMS, needs_triton
from test_cuda_fused import cos_sin_of, inverse_of, last_program_first
from test_cuda_ops import attention, random, rotated
from torch import Tensor

from qmix.kernels.cuda_ops import TritonOps
from qmix.kernels.device_ops import DeviceOps, TorchDeviceOps
from qmix.kernels.kv_codes import decoded, quantize
from qmix.kernels.table import KernelTable

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:(overflow encountered|All-NaN slice|invalid value)")]
REFERENCE = TorchDeviceOps(KernelTable({}, {}))
CAPACITY = 200
Cache = tuple[Tensor, Tensor]  # codes int8 [2, KV, S, D], keys before values, and their scales fp32 [2, KV, S]


def cache_of(kv: int, size: int, start: int) -> Cache:
    """Random before `start`; what lies beyond is scratch, and not a number where it were read."""
    dice = torch.Generator().manual_seed(kv + size)
    codes = torch.randint(-127, 128, (2, kv, CAPACITY, size), generator=dice).to(torch.int8)
    scales = torch.rand(2, kv, CAPACITY, generator=dice) / 64
    scales[:, :, start:] = float("nan")
    return codes, scales


def rope_attend(qkv: Tensor, cache: Cache, start: int, window: int | None, ops: DeviceOps) -> tuple[Tensor, Cache]:
    """(What the tokens at positions `start` and on attend to, the cache afterwards)."""
    place = DEVICE if isinstance(ops, TritonOps) else torch.device("cpu")
    codes, scales = (t.clone().to(place) for t in cache)
    size, kv = codes.shape[3], codes.shape[1]
    positions = torch.arange(start, start + len(qkv))
    out = torch.empty(len(qkv), qkv.shape[1] - 2 * kv * size, device=place)
    ops.rope_attend(qkv.to(place), cos_sin_of(ops, positions, size).to(place), codes[0], codes[1], positions.to(place),
                    window, out, (scales[0], scales[1]))
    return out.cpu(), (codes.cpu(), scales.cpu())


@pytest.mark.parametrize("ops", [TritonOps(), REFERENCE], ids=["Triton", "reference"])
@settings(max_examples=5, **NO_SHRINKING)
@given(size=st.sampled_from([16, 32, 80, 128]), group=st.sampled_from([1, 2, 4]), kv=st.integers(1, 2),
       tokens=st.sampled_from([1, 2, 5]), start=st.sampled_from([0, 1, 60, 63, 64, 126, 190]),
       window=st.sampled_from([None, 1, 3, 64, 500]))
def test_against_float64(ops: DeviceOps, size: int, group: int, kv: int, tokens: int, start: int,
                         window: int | None) -> None:
    """New keys and values to half a scale, but for the fp32 roundings of the rotation and of x / scale: 3 * 2^-21 and
    2^-16 of a scale (127 times some 2^-23)."""
    heads, cache = group * kv, cache_of(kv, size, start)
    qkv, positions = random(tokens, (heads + 2 * kv) * size), torch.arange(start, start + tokens)
    got, (codes, scales) = rope_attend(qkv, cache, start, window, ops)
    q, k, v = qkv.view(tokens, -1, size).split((heads, kv, kv), 1)
    new = slice(start, start + tokens)
    for which, x in ((0, rotated(k, positions, inverse_of(size))), (1, v.double())):
        x, step = x.transpose(0, 1), scales[which, :, new].double()
        torch.testing.assert_close(step, x.abs().amax(-1) / 127, rtol=2**-22, atol=2**-26)
        off = (codes[which, :, new].double() * step[..., None] - x).abs()
        assert (off <= (0.5 + 2**-16) * step[..., None] + 3 * 2**-21).all()
    for after, before in zip((codes, scales), cache, strict=True):
        assert torch.equal(after[:, :, :start], before[:, :, :start])
        assert torch.equal(after[:, :, new.stop:].nan_to_num(9), before[:, :, new.stop:].nan_to_num(9))
    wide = [decoded(codes[i], scales[i], torch.float64) for i in (0, 1)]
    want = attention(rotated(q, positions, inverse_of(size)), *wide, positions, window)
    assert relative(got, want.numpy()) < 2 * SUMS


def test_drafts_have_the_bits_that_tokens_have_one_by_one() -> None:
    """Whichever program comes first, and whatever the cache holds where the new keys go: here on both sides of the
    border of a split."""
    start = 62
    cache, qkv = cache_of(1, 16, start), random(4, (2 + 2) * 16)
    want, one = [], cache
    for token, row in enumerate(qkv.split(1)):
        out, one = rope_attend(row, one, start + token, 100, TritonOps())
        want.append(out)
    assert not torch.cat(want).isnan().any()
    got, after = rope_attend(qkv, cache, start, 100, TritonOps())
    with last_program_first():
        other, other_after = rope_attend(qkv, cache, start, 100, TritonOps())
    assert torch.equal(got, other) and torch.equal(got, torch.cat(want))
    for found in (after, other_after):
        assert all(torch.equal(a[:, :, :start + 4], b[:, :, :start + 4]) for a, b in zip(found, one, strict=True))


def test_codes_are_those_of_the_cpu() -> None:
    """Of values, which are not rotated: but where a number lies half between two codes, and the last bits of scales."""
    kv, size = 2, 64
    qkv = random(5, 3 * kv * size) * torch.logspace(-12, 12, 5)[:, None]
    qkv[3] = 0
    _, (codes, scales) = rope_attend(qkv, cache_of(kv, size, 7), 7, None, TritonOps())
    v = qkv.view(5, -1, size)[:, 2 * kv:]
    want, steps = torch.empty(kv, 5, size, dtype=torch.int8), torch.empty(kv, 5)
    quantize(v, want, steps)
    torch.testing.assert_close(scales[1, :, 7:12], steps, rtol=2**-22, atol=0)
    off = (codes[1, :, 7:12].int() - want.int()).abs()
    exact = v.transpose(0, 1).double() / steps.clamp(min=1e-30).double()[..., None]
    between = (exact - exact.floor() - 0.5).abs() < 2**-12
    assert off.max() <= 1 and not off[~between].any() and not scales[:, :, 10].any()


def test_half_a_code_goes_to_the_even_one() -> None:
    v = torch.zeros(1, 16)
    v[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -3.5])
    _, (codes, scales) = rope_attend(torch.cat((torch.zeros(1, 32), v), 1), cache_of(1, 16, 0), 0, None, TritonOps())
    assert scales[1, 0, 0] == 1 and codes[1, 0, 0, :6].tolist() == [127, 0, 2, 2, 0, -4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [32, 48], ids=["key", "value"])
def test_what_is_not_finite_stays_visible_and_breaks_nothing_before_it(bad: float, where: int) -> None:
    cache, qkv = cache_of(1, 16, 62), random(4, 4 * 16)
    clean, _ = rope_attend(qkv, cache, 62, None, TritonOps())
    qkv[2, where + 5] = bad
    got, (_, scales) = rope_attend(qkv, cache, 62, None, TritonOps())
    assert torch.equal(got[:2], clean[:2]) and not got[2:].isfinite().any()
    assert not scales[:, :, 64].isfinite().all() and scales[:, :, [62, 63, 65]].isfinite().all()


def test_attention_alone_reads_codes_too() -> None:
    codes, scales = cache_of(2, 32, 150)
    q, positions = random(3, 4, 32), torch.tensor([0, 77, 149])
    want = attention(q, *(decoded(codes[i], scales[i], torch.float64) for i in (0, 1)), positions, 90)
    for ops, place in ((TritonOps(), DEVICE), (REFERENCE, torch.device("cpu"))):
        here, steps = codes.to(place), scales.to(place)
        out = torch.empty(3, 128, device=place)
        ops.attend(q.to(place), here[0], here[1], positions.to(place), 90, out, (steps[0], steps[1]))
        assert relative(out.cpu(), want.numpy()) < SUMS
