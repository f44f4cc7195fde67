"""TritonOps, operation by operation, against float64 and against TorchDeviceOps; on the GPU where there is one, else
under Triton's interpreter, which rounds fp32 to bf16 by cutting off: caches that are written are fp32 and fp16 there.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import decode, product, relative
from test_cuda import (
    CLAMPED,
    DEVICE,
    NO_SHRINKING,
    SUMS,
    H,
    biases,
    here,
    int4_matrix,
    joined,
    matrix,
    needs_triton,
    operand,
    silu_product,
    slab,
)
from torch import Tensor

from qmix.errors import UsageError
from qmix.formats import pack
from qmix.formats.packed import Packed, view
from qmix.kernels import cuda, cuda_ops, reference
from qmix.kernels.attend import PLAIN, Softmax
from qmix.kernels.cuda import device_code
from qmix.kernels.cuda_ops import LOG2_E, TritonOps
from qmix.kernels.device_ops import DeviceOps, ExpertSlots, Later, TorchDeviceOps
from qmix.kernels.device_scratch import power_of_two
from qmix.kernels.router import RouterTensors
from qmix.kernels.table import KernelTable
from qmix.sizes import MatrixSpec, RecordLayout
from qmix.spec import Activation, Router

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


class TestExperts:
    """The slab of test_cuda.py, 5 slots: numbers 10 to 14 of a tier. -1 and others are elsewhere."""

    TABLE = (12, -1, 10, 14, 9, 15, 11)
    FIRST = 10

    def compute(self, x: Tensor, ids: list[list[int]], name: str = "int4",
                activation: Activation | None = None) -> tuple[Tensor, np.ndarray]:
        """Rows, 7 where nothing was written, and what they should be; with an activation also with biases."""
        pool, record, w13, w2 = slab(name, 64 if name == "mxfp4" else 32, activation=activation)
        rows = torch.full((len(ids), len(ids[0]), H), 7.0)
        got, want = rows.clone().to(DEVICE), rows.double().numpy()
        TritonOps().experts(x.to(DEVICE), ExpertSlots(pool, record, (), self.FIRST),
                            torch.tensor(ids, dtype=torch.int32, device=DEVICE),
                            torch.tensor(self.TABLE, dtype=torch.int32, device=DEVICE), got)
        for token, chosen in enumerate(ids):
            for rank, expert in enumerate(chosen):
                slot = self.TABLE[expert] - self.FIRST
                if not 0 <= slot < 5:
                    continue
                first = product(x[token:token + 1], w13[slot])
                if activation is None:
                    want[token, rank] = silu_product(first) @ w2[slot].T
                else:
                    inner = joined(first + biases("w13", slot).double().numpy(), activation)
                    want[token, rank] = inner @ w2[slot].T + biases("w2", slot).double().numpy()
        return got.cpu(), want

    def test_biases_and_a_clamped_activation(self) -> None:
        got, want = self.compute(operand(3, H), [[0, 6, 2], [2, 3, 1], [1, 2, 3]], "int3", CLAMPED)
        absent = want == 7
        assert np.array_equal(got.numpy() == 7, absent)
        assert relative(got[torch.from_numpy(~absent)], want[~absent]) < 5 * SUMS

    @pytest.mark.parametrize("name", ["int8", "fp32"])
    def test_an_expert_whose_format_has_no_kernel_for_many(self, name: str) -> None:
        """One at a time, by way of `linear`: what it adds and joins is the reference's."""
        w13 = MatrixSpec(name, 80, 64, 2, bias=True, activation=CLAMPED)
        parts = []
        for spec in (w13, MatrixSpec(name, 64, 40, bias=True)):
            alone = pack(operand(spec.rows, spec.cols), spec.without_bias)
            parts.append(Packed.of(spec, {**alone.tensors, "bias": operand(1, spec.rows, 4)[0]}, name))
        x = operand(3, 64) / 8
        got = TritonOps().expert(x.to(DEVICE), *map(here, parts)).cpu()
        inner = joined(product(x, decode(parts[0])) + parts[0]["bias"].double().numpy(), CLAMPED)
        assert relative(got, inner @ decode(parts[1]).T + parts[1]["bias"].double().numpy()) < 5 * SUMS

    @pytest.mark.parametrize(("name", "ids"), [
        ("int4", [[3, 0]]), ("int3", [[1, 2]]), ("int2", [[4, 5]]), ("int4", [[6]]), ("int4", [[0, 6, 2], [2, 3, 1]]),
        ("mxfp4", [[0, 6, 2], [2, 3, 1]]),
        ("int3", [[4], [2], [5], [2], [3]])], ids=str)
    def test_those_in_slots_are_computed_and_the_rest_stays(self, name: str, ids: list[list[int]]) -> None:
        got, want = self.compute(operand(len(ids), H) / 30, ids, name)
        absent = want == 7
        assert np.array_equal(got.numpy() == 7, absent)
        if not absent.all():
            assert relative(got[torch.from_numpy(~absent)], want[~absent]) < 5 * SUMS

    def test_a_token_has_the_bits_that_it_has_alone(self) -> None:
        x, ids = operand(3, H), [[0, 2], [2, 3], [3, 1]]
        whole, _ = self.compute(x, ids)
        for start, count in ((2, 1), (0, 2)):
            assert torch.equal(self.compute(x[start:start + count], ids[start:start + count])[0],
                               whole[start:start + count])

    def test_small_experts_of_which_there_are_many(self) -> None:
        """Records of Qwen3-30B-A3B's inner size, 12 groups of 64 columns where a program has room for 16; 8 of 128
        chosen, of which 2 are in slots."""
        record = RecordLayout(MatrixSpec("int4", 2 * 768, 64, 2, 64, 64), MatrixSpec("int4", 64, 768, 1, 64, 64))
        pool = torch.zeros(2, record.nbytes, dtype=torch.uint8)
        parts = [(int4_matrix(2 * 768, 64, 64, 64, 2, seed), int4_matrix(64, 768, 64, 64, 1, 9 + seed))
                 for seed in range(2)]
        for slot, (w13, w2) in zip(pool, parts, strict=True):
            for placed in record.placed:
                part = {"w13": w13, "w2": w2}[placed.matrix][placed.tensor.name]
                view(slot, placed.offset, placed.tensor).copy_(part)
        x, table = operand(1, 64) / 30, torch.full((128,), -1, dtype=torch.int32)
        table[127], table[3] = 0, 1
        ids = torch.tensor([[5, 127, 100, 3, 90, 64, 0, 77]], dtype=torch.int32)
        rows = torch.full((1, 8, 64), 7.0, device=DEVICE)
        TritonOps().experts(x.to(DEVICE), ExpertSlots(pool.to(DEVICE), record, ()), ids.to(DEVICE), table.to(DEVICE),
                            rows)
        for rank, expert in enumerate(ids[0].tolist()):
            slot = int(table[expert])
            if slot < 0:
                assert bool((rows[0, rank] == 7).all())
            else:
                w13, w2 = (decode(m) for m in parts[slot])
                assert relative(rows[:, rank].cpu(), silu_product(product(x, w13)) @ w2.T) < 5 * SUMS

    @pytest.mark.parametrize(("experts", "tokens", "k"), [(128, 1, 8), (128, 8, 8), (60, 8, 8), (60, 3, 4)])
    def test_jobs_of_many_experts(self, experts: int, tokens: int, k: int) -> None:
        """Each choice that is in a slot is in one job, that of its expert, by its token and its row."""
        pseudo = torch.Generator().manual_seed(experts + tokens)
        ids = torch.stack([torch.randperm(experts, generator=pseudo)[:k] for _ in range(tokens)]).int()
        table, pairs = (torch.randperm(experts, generator=pseudo) - 20).int(), tokens * k <= experts
        width, count = power_of_two(tokens), min(tokens * k, experts)
        slots, rows, places = (torch.full(shape, 9, dtype=torch.int32, device=DEVICE)
                               for shape in ((count,), (count, width), (count, width)))
        device_code("cuda_layer_jit").jobs[count,](ids.to(DEVICE), table.to(DEVICE), slots, rows, places, 5, 30, tokens,
                                                  k, k, M=width, PAIRS=pairs)
        found = {(int(slot), int(row), int(place)) for slot, own, there in zip(slots, rows, places, strict=True)
                 for row, place in zip(own, there, strict=True) if place >= 0}
        wanted = {(int(table[expert]) - 5, token, token * k + rank) for token, chosen in enumerate(ids.tolist())
                  for rank, expert in enumerate(chosen) if 0 <= table[expert] - 5 < 30}
        assert found == wanted and len(wanted) > 1
        used = [int(slot) for slot in slots if slot >= 0]
        assert len(set(used)) == len(used) == len({slot for slot, *_ in wanted})  # weights are read once

    def test_the_same_buffers_serve_again(self) -> None:
        pool, record, _, _ = slab("int4")
        ops, slots = TritonOps(), ExpertSlots(pool, record, ())
        x, table = operand(2, H).to(DEVICE), torch.tensor([1, -1, 4], dtype=torch.int32, device=DEVICE)
        ids = torch.tensor([[0, 2], [2, 1]], dtype=torch.int32, device=DEVICE)
        results = []
        for _ in range(2):
            rows = torch.zeros(2, 2, H, device=DEVICE)
            ops.experts(x, slots, ids, table, rows)
            ops.experts(x[1:], slots, ids[:1], table, rows[1:].clone())  # other numbers in the same buffers
            addresses = [[room.data_ptr() for room in rooms] for rooms in ops._rooms.values()]
            results.append((rows, addresses, slots.made["matrices"]))
        assert torch.equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]

    @pytest.mark.parametrize(("pairs", "slots", "rows", "places"), [
        (False, [-1, 2, 0], [[-1, -1], [0, -1], [0, 1]], [[-1, -1], [0, -1], [1, 2]]),
        (True, [2, 0, -1, -1], [[0, -1], [0, 1], [-1, -1], [-1, -1]], [[0, -1], [1, 2], [-1, -1], [-1, -1]])])
    def test_the_example_of_jobs(self, pairs: bool, slots: list[int], rows: list[list[int]],
                                 places: list[list[int]]) -> None:
        ids, table = (torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in ([[1, 2], [2, 0]], [-1, 7, 5]))
        made = [torch.full(shape, 9, dtype=torch.int32, device=DEVICE)
                for shape in ((len(slots),), (len(slots), 2), (len(slots), 2))]
        device_code("cuda_layer_jit").jobs[len(slots),](ids, table, *made, 5, 5, 2, 2, 2, M=2, PAIRS=pairs)
        assert [t.tolist() for t in made] == [slots, rows, places]


class NoKernels:
    """Kernels of any name, over any grid, that do nothing."""

    def __getattr__(self, name: str) -> NoKernels:
        return self

    def __getitem__(self, grid: object) -> NoKernels:
        return self

    def __call__(self, *given: object, **constants: object) -> None:
        pass


class TestRooms:
    def test_what_one_token_made_serves_eight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Buffers are made before a launch, so none need be launched."""
        for module in (cuda, cuda_ops):
            monkeypatch.setattr(module, "device_code", lambda name: NoKernels())
        monkeypatch.setattr(cuda, "interpreted", lambda code: True)
        ops = TritonOps()
        for tokens in (1, 8, 3):
            layer = Layer(ops, DEVICE, tokens, "int4")
            layer.forward(torch.arange(tokens, device=DEVICE), torch.arange(tokens, device=DEVICE))
            # the pieces of qkv's products, then those of the experts', for which the first is too small: nobody has
            # said what the model needs
            assert {key[0]: len(made) for key, made in ops._rooms.items()} == \
                {"partial": 2, "attended": 1, "softmax": 1, "jobs": 1, "inner": 1, "logits": 1}

    def test_a_larger_one_leaves_the_smaller_one_alive(self) -> None:
        ops = TritonOps()
        small = ops._room("inner", (2, 3), (8, 3), DEVICE).fill_(5)
        large = ops._room("inner", (4, 9), (8, 9), DEVICE).fill_(6)
        assert bool((small == 5).all()) and ops._room("inner", (1,), (8, 3), DEVICE).data_ptr() == large.data_ptr()
        assert [made.numel() for made in ops._rooms["inner", DEVICE, torch.float32]] == [24, 72]


class Layer:
    """A layer of a small Mixtral, with buffers for `tokens`, on a device: 4 query heads on 2, all experts but number 3
    in slots; its rows stay 0."""

    def __init__(self, ops: DeviceOps, device: torch.device, tokens: int, dense_format: str):
        self.ops, self.tokens = ops, tokens
        pool, self.record, _, _ = slab("int4")
        self.pool = pool.to(device)
        views = [tuple(Packed.of(spec, {
            p.tensor.name: view(slot, p.offset, p.tensor) for p in self.record.placed if p.matrix == name})
            for name, spec in (("w13", self.record.w13), ("w2", self.record.w2))) for slot in self.pool]
        self.slots = ExpertSlots(self.pool, self.record, views, 3)  # type: ignore[arg-type]
        self.qkv, self.o = (Packed.of(m.spec, {name: t.to(device) for name, t in m.tensors.items()})
                            for m in (dense(dense_format, 128, H), dense(dense_format, H, 64, 1)))
        self.table = torch.tensor([7, 3, 5, -1, 6, 4], dtype=torch.int32, device=device)
        self.embedding, self.weights, self.routers, self.inverse = (t.to(device) for t in (
            random(20, H).half(), random(3, H) / 30, random(3, 6, H) / 9, 1 / 1000 ** (torch.arange(8) / 8)))
        self.cache = torch.zeros(2, 2, 200, 16, device=device)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(tokens, *shape, dtype=dtype, device=device)

        self.residual, self.normed, self.both, self.cos_sin, self.attended = \
            buffer(H), buffer(H), buffer(128), buffer(16), buffer(64)
        self.ids, self.gains, self.rows = buffer(2, dtype=torch.int32), buffer(2), buffer(2, H)
        self.guesses = buffer(2, 3, dtype=torch.int32)

    def forward(self, tokens: Tensor, positions: Tensor) -> list[Tensor]:
        self.rows.zero_()
        self.ops.embed(tokens, self.embedding, self.residual)
        self.ops.norm(self.residual, self.weights[0], EPS, self.normed)
        self.ops.linear(self.normed, self.qkv, self.both)
        self.ops.rope_cos_sin(positions, self.inverse, self.cos_sin)
        self.ops.rope_attend(self.both, self.cos_sin, *self.cache, positions, 50, self.attended)
        self.ops.linear(self.attended, self.o, self.residual, add=True)
        routers = [softmax_router(router, 2) for router in self.routers]
        self.ops.route(self.residual, self.weights[1], routers[0], EPS, self.normed, self.ids, self.gains,
                       Later(list(self.weights[1:]), routers[1:], self.guesses))
        self.ops.experts(self.normed, self.slots, self.ids, self.table, self.rows)
        self.ops.norm(self.residual, self.weights[2], EPS, self.normed, self.rows, self.gains)
        return [t.cpu().clone() for t in (self.residual, self.normed, self.cache, self.ids, self.gains, self.guesses)]


@pytest.mark.parametrize(("tokens", "dense_format", "steps"), [(1, "int8", 2), (2, "int4", 2), (3, "fp16", 1)])
def test_a_layer_gives_what_the_reference_gives(tokens: int, dense_format: str, steps: int) -> None:
    """Positions pass 64, where the cache's next block begins, in one step or in two."""
    exact = KernelTable({(dense_format, block): reference.linear for block in (0, 32)}
                        | {("int4", 32): reference.linear}, {})
    both = (Layer(TorchDeviceOps(exact), torch.device("cpu"), tokens, dense_format),
            Layer(TritonOps(), DEVICE, tokens, dense_format))
    for step in range(steps):
        which, positions = torch.arange(tokens) * 3 + step, torch.arange(tokens) + 65 - (steps - step) * tokens
        want, got = (layer.forward(which.to(layer.pool.device), positions.to(layer.pool.device)) for layer in both)
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs) if theirs.dtype == torch.int32 else \
                relative(mine, theirs.double().numpy()) < 5 * SUMS
