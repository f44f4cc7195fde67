"""Operations that were several launches: attention that rotates and keeps the new keys, and a router that guesses.
Against float64 and, bit for bit, against themselves token by token; on the GPU where there is one, else under Triton's
interpreter, whose programs run one after another, here also in the opposite order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import relative
from test_cuda import DEVICE, NO_SHRINKING, SUMS, needs_triton
from test_cuda_ops import EPS, OWN_SCORES, attention, random, rotated, route, softmax_router, there
from torch import Tensor

from qmix.kernels.attend import PLAIN, Softmax
from qmix.kernels.cuda_ops import LOG2_E, TritonOps
from qmix.kernels.device_ops import DeviceOps, Later, TorchDeviceOps
from qmix.kernels.table import KernelTable

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:(overflow encountered|All-NaN slice|invalid value)")]
REFERENCE = TorchDeviceOps(KernelTable({}, {}))
CAPACITY = 200


@contextmanager
def last_program_first() -> Iterator[None]:
    """Under the interpreter programs run from the last to the first: what one takes from another, that comes before it
    otherwise, is not there yet. On a GPU nothing changes."""
    from triton.runtime.interpreter import interpreter_builder as builder

    real = builder.set_grid_idx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx",
                      lambda *place: real(*(n - 1 - i for n, i in zip(builder.grid_dim, place, strict=True))))
        yield


def inverse_of(size: int) -> Tensor:
    return 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)


def cos_sin_of(ops: DeviceOps, positions: Tensor, size: int, factor: float = 1.0) -> Tensor:
    place = DEVICE if isinstance(ops, TritonOps) else torch.device("cpu")
    out = torch.empty(len(positions), size, device=place)
    ops.rope_cos_sin(positions.to(place), inverse_of(size).to(place), out, factor)
    return out.cpu()


def rope_attend(qkv: Tensor, cache: Tensor, start: int, window: int | None, ops: DeviceOps,
                turned: int | None = None, softmax: Softmax = PLAIN) -> tuple[Tensor, Tensor]:
    """(What the tokens at positions `start` and on attend to, the cache afterwards). turned: dimensions of a head that
    rotate, None for all."""
    place = DEVICE if isinstance(ops, TritonOps) else torch.device("cpu")
    size, kv = cache.shape[3], cache.shape[1]
    positions = torch.arange(start, start + len(qkv))
    cos_sin, here = cos_sin_of(ops, positions, size if turned is None else turned), cache.clone().to(place)
    out = torch.empty(len(qkv), qkv.shape[1] - 2 * kv * size, device=place)
    ops.rope_attend(qkv.to(place), None if turned == 0 else cos_sin.to(place), here[0], here[1], positions.to(place),
                    window, out, None, there(softmax) if isinstance(ops, TritonOps) else softmax)
    return out.cpu(), here.cpu()


def partly(x: Tensor, positions: Tensor, turned: int) -> Tensor:
    """x [T, heads, D] in float64, of each head the first `turned` dimensions rotated."""
    return torch.cat((rotated(x[..., :turned], positions, inverse_of(turned)), x[..., turned:].double()), -1)


@pytest.mark.parametrize("ops", [TritonOps(), REFERENCE], ids=["Triton", "reference"])
def test_cosines(ops: DeviceOps) -> None:
    """To half an ulp of fp32: the angle is a product in fp32, as models are trained, its cosine is taken in fp64."""
    positions, inverse = torch.tensor([0, 1, 7, 32767, 131071]), inverse_of(80)
    angle = (positions[:, None].float() * inverse).double()
    want = torch.cat((angle.cos(), angle.sin()), 1).float()
    assert torch.equal(cos_sin_of(ops, positions, 80), want)
    assert torch.equal(cos_sin_of(ops, positions, 80, 1.25), want * 1.25)


class TestRopeAttend:
    @pytest.mark.parametrize("ops", [TritonOps(), REFERENCE], ids=["Triton", "reference"])
    @settings(max_examples=8, **NO_SHRINKING)
    @given(size=st.sampled_from([16, 32, 64, 80, 96, 128]), group=st.sampled_from([1, 2, 4, 12]), kv=st.integers(1, 2),
           part=st.sampled_from([1, 1, 0.5, 0]),
           tokens=st.sampled_from([1, 2, 5]), start=st.sampled_from([0, 1, 60, 63, 64, 126, 190]),
           window=st.sampled_from([None, 1, 3, 64, 500]), dtype=st.sampled_from([torch.float32, torch.float16]))
    def test_against_float64(self, ops: DeviceOps, size: int, group: int, kv: int, part: float, tokens: int,
                             start: int, window: int | None, dtype: torch.dtype) -> None:
        """Keys to an ulp of the cache's dtype; attention over the keys that are in the cache then, with queries that
        the rotation may have moved by an ulp: each of D products of a score by 2^-23."""
        heads, cache = group * kv, random(2, kv, CAPACITY, size).to(dtype)
        cache[:, :, start:] = float("nan")  # what lies beyond is scratch
        qkv, positions = random(tokens, (heads + 2 * kv) * size), torch.arange(start, start + tokens)
        turn = int(size * part)
        got, after = rope_attend(qkv, cache, start, window, ops, turn)
        q, k, v = qkv.view(tokens, -1, size).split((heads, kv, kv), 1)
        (queries, turned), ulp = (partly(x, positions, turn) for x in (q, k)), torch.finfo(dtype).eps
        # Products and their sum are rounded to fp32: by 2^-24 of numbers below 8.
        torch.testing.assert_close(after[0, :, positions].transpose(0, 1).double(), turned, rtol=ulp, atol=3 * 2**-21)
        assert torch.equal(after[1, :, positions].transpose(0, 1), v.to(dtype))
        assert torch.equal(after[:, :, :start], cache[:, :, :start]) and after[:, :, start + tokens:].isnan().all()
        if ops is REFERENCE and dtype != torch.float32:
            return  # it rounds queries to the cache's dtype too
        want = attention(queries, *after, positions, window)
        assert relative(got, want.numpy()) < 2 * SUMS

    @pytest.mark.parametrize(("start", "dtype", "heads"), [(62, torch.bfloat16, 2), (127, torch.float32, 10)], ids=str)
    def test_drafts_have_the_bits_that_tokens_have_one_by_one(self, start: int, dtype: torch.dtype,
                                                              heads: int) -> None:
        """Whichever program comes first, and whatever the cache holds where the new keys go. Ten query heads of a
        key-value head have two programs."""
        cache, qkv = random(2, 1, CAPACITY, 16).to(dtype), random(4, (heads + 2) * 16)
        cache[:, :, start:] = float("nan")
        want, one = [], cache
        for token, row in enumerate(qkv.split(1)):
            out, one = rope_attend(row, one, start + token, 100, TritonOps())
            want.append(out)
        assert not torch.cat(want).isnan().any()
        for tokens in (4, 3):
            got, after = rope_attend(qkv[:tokens], cache, start, 100, TritonOps())
            with last_program_first():
                other, other_after = rope_attend(qkv[:tokens], cache, start, 100, TritonOps())
            assert torch.equal(got, other) and torch.equal(got, torch.cat(want[:tokens]))
            for found in (after, other_after):
                assert torch.equal(found[:, :, :start + tokens], one[:, :, :start + tokens])
                assert found[:, :, start + tokens:].isnan().all()

    @pytest.mark.parametrize("softmax", OWN_SCORES, ids=str)
    def test_sinks_scale_and_cap(self, softmax: Softmax) -> None:
        """As test_cuda_ops has it for `attend`; drafts have the bits of tokens one by one."""
        cache, qkv, positions = random(2, 2, CAPACITY, 32), random(3, 12 * 32) * 2, torch.arange(62, 65)
        (got, after), (want, same) = (rope_attend(qkv, cache, 62, None, ops, softmax=softmax)
                                      for ops in (TritonOps(), REFERENCE))
        off = 4 * SUMS + 2 * 8 * 2**-24 * (softmax.softcap or 0) * LOG2_E
        assert relative(got, want.double().numpy()) < off and relative(after, same.double().numpy()) < SUMS
        queries = rotated(qkv[:, :256].view(3, 8, 32), positions, inverse_of(32))
        assert relative(got, attention(queries, *after, positions, None, softmax).numpy()) < off
        one, alone = cache, []
        for token, row in enumerate(qkv.split(1)):
            out, one = rope_attend(row, one, 62 + token, None, TritonOps(), softmax=softmax)
            alone.append(out)
        assert torch.equal(torch.cat(alone), got)

    def test_it_gives_what_attending_to_the_new_cache_gives(self) -> None:
        """Up to fp32 sums, and queries that are rotated to an ulp."""
        cache, qkv, positions = random(2, 2, CAPACITY, 32), random(3, 8 * 32), torch.arange(70, 73)
        got, after = rope_attend(qkv, cache, 70, None, TritonOps())
        query, out = rotated(qkv[:, :128].view(3, 4, 32), positions, inverse_of(32)), torch.empty(3, 128, device=DEVICE)
        TritonOps().attend(query.float().to(DEVICE), *after.to(DEVICE), positions.to(DEVICE), None, out)
        assert relative(got, out.cpu().double().numpy()) < SUMS

    def test_a_broken_draft_breaks_none_before_it(self) -> None:
        cache, qkv = random(2, 2, CAPACITY, 32), random(4, 8 * 32)
        clean, _ = rope_attend(qkv, cache, 62, None, TritonOps())
        qkv[2] = float("nan")
        got, _ = rope_attend(qkv, cache, 62, None, TritonOps())
        assert torch.equal(got[:2], clean[:2]) and got[2:].isnan().all()


class TestRoute:
    """Of 4 layers with 8 experts of 96 numbers, the first asked by its own tokens, 3 of them."""

    def route(self, ops: DeviceOps, apart: bool = False) -> tuple[Tensor, ...]:
        """normed, ids, weights; ids and weights once more, within wider buffers; guesses, within a larger buffer."""
        place = DEVICE if isinstance(ops, TritonOps) else torch.device("cpu")
        x, norms, weights = (t.to(place) for t in (random(3, 96), random(4, 96), random(4, 8, 96).double()))
        guesses = torch.full((3, 5, 4), -1, dtype=torch.int32, device=place)
        lists = [[t.clone() if apart else t for t in layers[1:]] for layers in (norms, weights)]
        routers = [softmax_router(weight, 2) for weight in (weights[0], *lists[1])]
        ids, more = torch.empty(3, 2, dtype=torch.int32, device=place), torch.full((3, 4), -1.0, device=place)
        normed, weights, again = torch.empty_like(x), torch.empty(3, 2, device=place), more.int()
        ops.route(x, norms[0], routers[0], EPS, normed, ids, weights, Later(lists[0], routers[1:], guesses[:, 1:4]),
                  (again[:, 1:3], more[:, 1:3]))
        return tuple(t.cpu() for t in (normed, ids, weights, again, more, guesses))

    @pytest.mark.parametrize("ops", [TritonOps(), REFERENCE], ids=["Triton", "reference"])
    @pytest.mark.parametrize("apart", [True, False])
    def test_guesses_are_what_those_routers_would_choose(self, ops: DeviceOps, apart: bool) -> None:
        x, norms, routers = random(3, 96), random(4, 96), random(4, 8, 96).double()
        normed, ids, weights, again, more, guesses = self.route(ops, apart)
        for layer in (1, 2, 3):
            assert torch.equal(guesses[:, layer], route(x, norms[layer], routers[layer], 4)[1])
        assert bool((guesses[:, [0, 4]] == -1).all())
        for got, want in zip((normed, ids, weights), route(x, norms[0], routers[0], 2), strict=True):
            torch.testing.assert_close(got, want, rtol=0 if ops is not REFERENCE else 1e-5, atol=0)
        assert torch.equal(again[:, 1:3], ids) and torch.equal(more[:, 1:3], weights)
        assert bool((again[:, [0, 3]] == -1).all() and (more[:, [0, 3]] == -1).all())

    def test_routers_that_lie_apart_are_put_together_once(self) -> None:
        ops = TritonOps()
        for _ in range(2):
            self.route(ops)
        assert not ops._routers._stacks
        norm, router = random(96).to(DEVICE), softmax_router(random(8, 96).to(DEVICE), 2)
        asked = Later([norm, norm.clone()], [router, softmax_router(router.weight.clone(), 2)],
                      torch.empty(1, 2, 2, dtype=torch.int32, device=DEVICE))
        for _ in range(2):
            ops.route(random(1, 96).to(DEVICE), norm, router, EPS, torch.empty(1, 96, device=DEVICE),
                      torch.empty(1, 2, dtype=torch.int32, device=DEVICE), torch.empty(1, 2, device=DEVICE), asked)
        assert len(ops._routers._stacks) == 2
