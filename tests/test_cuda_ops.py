"""TritonOps, operation by operation, against float64 and against TorchDeviceOps; on the GPU where there is one, else
under Triton's interpreter, which rounds fp32 to bf16 by cutting off: caches that are written are fp32 and fp16 there.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import decode, product, relative
from test_cuda import (
    DEVICE,
    NO_SHRINKING,
    SUMS,
    here,
    matrix,
    needs_triton,
    operand,
)
from torch import Tensor

from qmix.errors import UsageError
from qmix.formats import pack
from qmix.formats.packed import Packed
from qmix.kernels import cuda_ops
from qmix.kernels.attend import PLAIN, Softmax
from qmix.kernels.cuda_ops import LOG2_E, TritonOps
from qmix.kernels.router import RouterTensors
from qmix.sizes import MatrixSpec
from qmix.spec import Router

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:(overflow encountered|All-NaN slice)")]
EPS = 1e-5
HALVES = [torch.bfloat16, torch.float16]
DENSE = ("int8", "bf16", "fp16", "fp32")


def dense(name: str, rows: int, cols: int, seed: int = 0) -> Packed:
    """A matrix as the dense part of a store has it."""
    if name in ("int4", "int3", "int2"):
        return matrix(name, rows, cols, 32, 32, seed=seed)
    return pack(operand(rows, cols, seed), MatrixSpec(name, rows, cols))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def linear(m: Packed, x: Tensor, add: Tensor | None = None) -> Tensor:
    y = torch.full((len(x), m.spec.rows), 9.0, device=DEVICE) if add is None else add.clone().to(DEVICE)
    TritonOps().linear(x.to(DEVICE), here(m), y, add=add is not None)
    return y.cpu()


class TestLinear:
    @settings(max_examples=8, **NO_SHRINKING)
    @given(st.sampled_from(DENSE), st.integers(1, 70), st.integers(1, 400), st.integers(1, 8))
    def test_dense_formats(self, name: str, rows: int, cols: int, tokens: int) -> None:
        m, x = dense(name, rows, cols), operand(tokens, cols, 1)
        assert relative(linear(m, x), product(x, decode(m))) < SUMS

    @pytest.mark.parametrize("name", [*DENSE, "int4", "int2", "nf4", "fp4"])
    def test_added(self, name: str) -> None:
        m, x, before = dense(name, 45, 130), operand(2, 130, 1), random(2, 45)
        assert relative(linear(m, x, before), product(x, decode(m)) + before.double().numpy()) < SUMS

    @pytest.mark.parametrize("name", [*DENSE, "int4", "int3", "nf4"])
    def test_a_token_has_the_bits_that_it_has_alone(self, name: str) -> None:
        m, x = dense(name, 40, 300), operand(8, 300, 1)
        whole = linear(m, x)
        for count in (1, 2, 3):
            assert torch.equal(linear(m, x[4:4 + count]), whole[4:4 + count])

    @pytest.mark.parametrize("name", [*DENSE, "int4", "nf4"])
    def test_broken_activations_stay_with_their_token(self, name: str) -> None:
        m, x = dense(name, 20, 70), operand(3, 70, 1)
        clean = linear(m, x)
        x[1, 69] = float("nan")
        y = linear(m, x)
        assert y[1].isnan().all() and torch.equal(y[[0, 2]], clean[[0, 2]])

    def test_large_matrices_are_cut_coarser_and_strides_are_heeded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_ops, "SMALL", 40)
        m = dense("int8", 41, 70)
        wide, y = operand(2, 100).to(DEVICE), torch.zeros(2, 50, device=DEVICE)
        TritonOps().linear(wide[:, 10:80], here(m), y[:, :41])
        assert relative(y[:, :41].cpu(), product(wide[:, 10:80].cpu(), decode(m))) < SUMS
        assert not y[:, 41:].any()

    def test_refusals(self) -> None:
        m, y = here(dense("int8", 8, 64)), torch.empty(1, 8, device=DEVICE)
        for x in (torch.zeros(9, 64), torch.zeros(0, 64), torch.zeros(1, 63), torch.zeros(1, 64).half()):
            with pytest.raises(UsageError, match=r"x: got .* want fp32 \[1 to 8, 64\]"):
                TritonOps().linear(x.to(DEVICE), m, y)
        with pytest.raises(UsageError, match=r"y: got .* want fp32 \[1, 8\]"):
            TritonOps().linear(torch.zeros(1, 64, device=DEVICE), m, y[:, :7])


@settings(max_examples=5, **NO_SHRINKING)
@given(st.integers(1, 1100), st.integers(1, 8), st.sampled_from([*HALVES, torch.float32]))
def test_embed(hidden: int, tokens: int, dtype: torch.dtype) -> None:
    table, which = random(50, hidden).to(dtype), torch.randint(0, 50, (tokens,))
    got = torch.empty(tokens, hidden, device=DEVICE)
    TritonOps().embed(which.to(DEVICE), table.to(DEVICE), got)
    assert torch.equal(got.cpu(), table[which].float())


@settings(max_examples=8, **NO_SHRINKING)
@given(st.sampled_from([1, 31, 96, 200, 2100]), st.integers(1, 8), st.sampled_from([0, 1, 2, 5]))
def test_norm(hidden: int, tokens: int, k: int) -> None:
    x, weight, rows, gains = random(tokens, hidden) * 10, random(hidden), random(tokens, k, hidden), random(tokens, k)
    residual, out = x.clone().to(DEVICE), torch.empty(tokens, hidden, device=DEVICE)
    given_rows = (rows.to(DEVICE), gains.to(DEVICE)) if k else (None, None)
    TritonOps().norm(residual, weight.to(DEVICE), EPS, out, *given_rows)
    want = x.double() + (rows.double() * gains.double()[..., None]).sum(1)
    torch.testing.assert_close(residual.cpu().double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.cpu().double(), norm64(want, weight), rtol=1e-5, atol=2e-6)


@settings(max_examples=8, **NO_SHRINKING)
@given(st.sampled_from([1, 31, 768, 1100]), st.integers(1, 8), st.sampled_from([1, 2, 5, 8]))
def test_combine(hidden: int, tokens: int, k: int) -> None:
    """Of rows within something wider; a token's bits are those that it has alone."""
    rows, gains = random(tokens, k + 1, hidden).to(DEVICE), random(tokens, k + 2).to(DEVICE)
    out, alone = torch.full((tokens, hidden), 9.0, device=DEVICE), torch.empty(1, hidden, device=DEVICE)
    TritonOps().combine(rows[:, 1:], gains[:, 2:], out)
    TritonOps().combine(rows[-1:, 1:], gains[-1:, 2:], alone)
    terms = rows[:, 1:].double() * gains[:, 2:].double()[..., None]
    off = (k + 1) * 2**-24 * terms.abs().sum(1)  # k sums of k products, each of which is rounded
    assert bool(((out.double() - terms.sum(1)).abs() <= off).all())
    assert torch.equal(alone[0], out[-1])


def test_rows_are_summed_in_the_order_of_the_ranks() -> None:
    rows = torch.tensor([[[1e8], [1.0], [-1e8]]], device=DEVICE)
    summed = torch.empty(1, 1, device=DEVICE)
    TritonOps().combine(rows, torch.ones(1, 3, device=DEVICE), summed)
    assert summed.item() == 0
    residual, out = torch.ones(1, 1, device=DEVICE), torch.empty(1, 1, device=DEVICE)
    TritonOps().norm(residual, out.clone(), EPS, out, rows, torch.ones(1, 3, device=DEVICE))
    assert residual.item() == 1  # (1e8 + 1) - 1e8 is 0 in fp32


def softmax_router(weight: Tensor, k: int) -> RouterTensors:
    """Mixtral's: softmax over the chosen."""
    return RouterTensors(Router(len(weight), k), weight)


def route(x: Tensor, weight: Tensor, router: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    normed, ids, gains = torch.empty_like(x, device=DEVICE), torch.empty(len(x), k, dtype=torch.int32, device=DEVICE), \
        torch.empty(len(x), k, device=DEVICE)
    TritonOps().route(x.to(DEVICE), weight.to(DEVICE), softmax_router(router.to(DEVICE), k), EPS, normed, ids, gains)
    return normed.cpu(), ids.cpu(), gains.cpu()


class TestRoute:
    @pytest.mark.parametrize(("experts", "k", "hidden"), [(8, 2, 96), (1, 1, 7), (5, 5, 33), (64, 8, 40), (60, 4, 300)])
    def test_against_float64(self, experts: int, k: int, hidden: int) -> None:
        x, weight, router = random(4, hidden), random(hidden), random(experts, hidden).double()
        normed, ids, gains = route(x, weight, router, k)
        top, chosen = (norm64(x, weight) @ router.T).topk(k)
        assert torch.equal(ids.long(), chosen)
        torch.testing.assert_close(gains.double(), top.softmax(-1), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(normed.double(), norm64(x, weight), rtol=1e-5, atol=1e-6)

    def test_of_equal_logits_the_first_counts(self) -> None:
        router = torch.ones(6, 32, dtype=torch.float64)
        router[4] = 2
        _, ids, gains = route(torch.ones(1, 32), torch.full((32,), 1e-3), router, 3)
        assert ids.tolist() == [[4, 0, 1]]
        assert gains.sum().item() == pytest.approx(1)

    def test_broken_tokens_choose_experts_that_exist_and_leave_the_others_alone(self) -> None:
        x, weight, router = random(3, 40), random(40), random(6, 40).double()
        clean = route(x, weight, router, 2)
        x[1, 3] = float("nan")
        normed, ids, gains = route(x, weight, router, 2)
        assert ids[1].tolist() == [0, 1] and gains[1].isnan().all() and normed[1].isnan().all()
        for got, want in zip((normed, ids, gains), clean, strict=True):
            assert torch.equal(got[[0, 2]], want[[0, 2]])

    def test_a_token_has_the_bits_that_it_has_alone(self) -> None:
        x, weight, router = random(8, 200), random(200), random(8, 200).double()
        whole = route(x, weight, router, 2)
        for token in (0, 5):
            for got, want in zip(route(x[token:token + 1], weight, router, 2), whole, strict=True):
                assert torch.equal(got[0], want[token])


def rotated(x: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
    """x [T, heads, D] in float64, by angles that are fp32 products."""
    angle = (positions[:, None].float() * inverse).double()[:, None]
    low, high = x.double().chunk(2, -1)
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)


def attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None,
              softmax: Softmax = PLAIN) -> Tensor:
    """In float64, token by token and head by head: q [T, Q, D], keys and values [KV, S, D] -> [T, Q * D]."""
    scale = q.shape[2]**-0.5 if softmax.scale is None else softmax.scale
    out, group = torch.empty(q.shape, dtype=torch.float64), q.shape[1] // len(keys)
    for token, position in enumerate(positions.tolist()):
        seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
        for head, query in enumerate(q[token].double()):
            k, v = keys[head // group, seen].double(), values[head // group, seen].double()
            scores = k @ query * scale
            if softmax.softcap is not None:
                scores = softmax.softcap * (scores / softmax.softcap).tanh()
            if softmax.sinks is not None:
                scores = torch.cat((scores, softmax.sinks[head:head + 1].double()))
            out[token, head] = scores.softmax(0)[:len(k)] @ v
    return out.flatten(1)


SINKS = torch.linspace(-12, 12, 8)
OWN_SCORES = [Softmax(SINKS), Softmax(scale=0.5), Softmax(softcap=2.0), Softmax(SINKS / 3, 0.1, 30.0)]


def there(softmax: Softmax) -> Softmax:
    return softmax if softmax.sinks is None else replace(softmax, sinks=softmax.sinks.to(DEVICE))


class TestAttend:
    def attend(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None,
               softmax: Softmax = PLAIN) -> Tensor:
        out = torch.empty(len(q), q[0].numel(), device=DEVICE)
        TritonOps().attend(*(t.to(DEVICE) for t in (q, keys, values, positions)), window, out, None, there(softmax))
        return out.cpu()

    @settings(max_examples=10, **NO_SHRINKING)
    @given(st.sampled_from([16, 32, 64, 80, 128]), st.sampled_from([1, 2, 4]), st.integers(1, 2),
           st.lists(st.sampled_from([0, 1, 63, 64, 127, 128, 190, 199]), min_size=1, max_size=4),
           st.sampled_from([None, 1, 64, 65, 100, 500]), st.sampled_from([*HALVES, torch.float32]))
    def test_against_float64(self, size: int, group: int, kv: int, positions: list[int], window: int | None,
                             dtype: torch.dtype) -> None:
        q, where = random(len(positions), group * kv, size) * 2, torch.tensor(positions)
        keys, values = random(2, kv, 200, size).to(dtype)
        got = self.attend(q, keys, values, where, window)
        assert relative(got, attention(q, keys, values, where, window).numpy()) < 2 * SUMS

    @pytest.mark.parametrize("softmax", OWN_SCORES, ids=str)
    def test_sinks_scale_and_cap_against_float64(self, softmax: Softmax) -> None:
        """Sinks below all scores, among them and far above. A cap adds an absolute error of 8 roundings of itself to
        each score, to a weight relatively the same."""
        q, positions = random(3, 8, 32) * 2, torch.tensor([0, 63, 190])
        keys, values = random(2, 2, 200, 32)
        off = 2 * SUMS + 2 * 8 * 2**-24 * (softmax.softcap or 0) * LOG2_E
        for window in (None, 70):
            got = self.attend(q, keys, values, positions, window, softmax)
            assert relative(got, attention(q, keys, values, positions, window, softmax).numpy()) < off

    def test_a_sink_that_weighs_nothing_changes_no_bit_and_a_broken_one_is_seen(self) -> None:
        q, positions = random(3, 4, 32), torch.tensor([0, 63, 190])
        keys, values = random(2, 2, 200, 32)
        plain, sinks = self.attend(q, keys, values, positions, 70), torch.tensor([-1e4, -math.inf, 1e4, math.nan])
        got = self.attend(q, keys, values, positions, 70, Softmax(sinks)).view(3, 4, 32)
        assert torch.equal(got[:, :2], plain.view(3, 4, 32)[:, :2])
        assert not got[:, 2].any() and got[:, 3].isnan().all()

    def test_what_a_token_does_not_see_does_not_count(self) -> None:
        q, positions = random(2, 4, 32), torch.tensor([150, 70])
        keys, values = random(2, 2, 200, 32)
        want = self.attend(q, keys, values, positions, 40)
        keys[:, :30] = values[:, :30] = keys[:, 71:100] = values[:, 151:] = float("nan")
        assert torch.equal(self.attend(q, keys, values, positions, 40), want)

    def test_large_scores(self) -> None:
        q, positions = random(1, 2, 32) * 300, torch.tensor([150])
        keys, values = random(2, 1, 200, 32) * 10
        assert relative(self.attend(q, keys, values, positions, None),
                        attention(q, keys, values, positions, None).numpy()) < 1e-4

    def test_a_token_has_the_bits_that_it_has_alone_and_breaks_no_other(self) -> None:
        q, positions = random(4, 4, 32), torch.tensor([3, 130, 131, 64])
        keys, values = random(2, 2, 150, 32)
        whole = self.attend(q, keys, values, positions, 100)
        assert torch.equal(self.attend(q[1:2], keys, values, positions[1:2], 100), whole[1:2])
        q[1, 2, 5] = float("nan")
        broken = self.attend(q, keys, values, positions, 100).view(4, 4, 32)
        assert broken[1, 2].isnan().all() and not broken[1, [0, 1, 3]].isnan().any()
        assert torch.equal(broken[[0, 2, 3]].flatten(1), whole[[0, 2, 3]])

    def test_a_long_cache_has_larger_splits(self) -> None:
        q, positions = random(1, 2, 16), torch.tensor([8300])
        keys, values = random(2, 1, 9000, 16)
        assert relative(self.attend(q, keys, values, positions, 300),
                        attention(q, keys, values, positions, 300).numpy()) < 2 * SUMS
