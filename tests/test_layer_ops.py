"""Norm, router, rotary embedding and weighted sum: the native code at every level, and torch's, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qmix.kernels import native
from qmix.kernels.attend import default_inv_freq
from qmix.kernels.layer import TORCH, LayerOps, TorchLayerOps, agrees, choose_layer_ops
from qmix.kernels.router import RouterTensors
from qmix.spec import Router

OPS: list[LayerOps] = [TORCH, *(native.NativeLayerOps(level) for level in native.levels())]
NATIVE = OPS[1:] or [pytest.param(TORCH, marks=pytest.mark.skip(reason="the native kernels were not built"))]
EPS = 1e-5
every_op = pytest.mark.parametrize("ops", OPS, ids=lambda ops: ops.name)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def softmax_of_chosen(matrix: Tensor, k: int) -> RouterTensors:
    """Mixtral's."""
    return RouterTensors(Router(len(matrix), k), matrix)


def routed(ops: LayerOps, x: Tensor, weight: Tensor, matrix: Tensor, k: int,
           dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    normed, ids, topk_weights = torch.empty_like(x, dtype=dtype), torch.empty(len(x), k, dtype=torch.int64), \
        torch.empty(len(x), k)
    ops.route(x, weight, softmax_of_chosen(matrix, k), EPS, normed, ids, topk_weights)
    return normed, ids, topk_weights


@every_op
@pytest.mark.parametrize("size", [1, 31, 32, 200, 4096])
@pytest.mark.parametrize("tokens", [1, 3])
def test_norm(ops: LayerOps, tokens: int, size: int) -> None:
    x, weight = random(tokens, size) * 10, random(size)
    got = ops.norm(x, weight, EPS, torch.float32)
    assert torch.allclose(got.double(), norm64(x, weight), rtol=1e-5, atol=1e-6)
    assert torch.equal(ops.norm(x, weight, EPS, torch.bfloat16), got.bfloat16())


@every_op
@pytest.mark.parametrize(("experts", "k", "size"), [(8, 2, 128), (8, 2, 4096), (1, 1, 7), (5, 5, 33), (160, 6, 64)])
def test_route(ops: LayerOps, experts: int, k: int, size: int) -> None:
    x, weight, router = random(4, size), random(size), random(experts, size)
    normed, ids, topk_weights = routed(ops, x, weight, router, k)
    logits = norm64(x, weight) @ router.T.double()
    top, chosen = logits.topk(k)
    assert torch.equal(ids, chosen)
    assert torch.allclose(topk_weights.double(), top.softmax(-1), rtol=1e-4, atol=1e-6)
    assert torch.allclose(normed.double(), norm64(x, weight), rtol=1e-5, atol=1e-6)
    assert torch.equal(routed(ops, x, weight, router, k, torch.bfloat16)[0], normed.bfloat16())


@every_op
def test_guesses_are_what_that_router_would_choose_and_leave_the_rest(ops: LayerOps) -> None:
    x, weight, router = random(3, 96), random(96), random(8, 96)
    ahead = torch.full((3, 2, 4), -1)
    ops.guess(x, weight, softmax_of_chosen(router, 4), EPS, ahead[:, 1])
    assert torch.equal(ahead[:, 1], routed(ops, x, weight, router, 4)[1])
    assert bool((ahead[:, 0] == -1).all())


@every_op
def test_a_token_has_the_bits_that_it_has_alone(ops: LayerOps) -> None:
    x, weight, router, k = random(8, 200), random(200), random(8, 200), 2
    together = routed(ops, x, weight, router, k)
    alone = [routed(ops, row.clone(), weight, router, k) for row in x.split(1)]
    for part, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(part, torch.cat(parts))


@pytest.mark.parametrize("ops", NATIVE, ids=lambda ops: ops.name)
def test_of_equal_logits_the_first_counts(ops: LayerOps) -> None:
    router = torch.ones(6, 32)
    router[4] = 2
    _, ids, topk_weights = routed(ops, torch.ones(1, 32), torch.full((32,), 1e-3), router, 3)
    assert ids.tolist() == [[4, 0, 1]]
    assert float(topk_weights.sum()) == pytest.approx(1)


@every_op
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(ops: LayerOps, bad: float) -> None:
    x = random(1, 64)
    x[0, 5] = bad
    _, ids, topk_weights = routed(ops, x, torch.ones(64), random(8, 64), 2)
    assert bool(topk_weights.isnan().any()) and bool(((ids >= 0) & (ids < 8)).all())
    assert not ops.norm(x, torch.ones(64), EPS, torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("ops", NATIVE, ids=lambda ops: ops.name)
def test_nan_is_above_all_as_in_torch(ops: LayerOps) -> None:
    router = random(8, 64)
    router[3] = math.nan
    _, ids, _ = routed(ops, random(1, 64), torch.ones(64), router, 2)
    assert int(ids[0, 0]) == 3 == int(routed(TORCH, random(1, 64), torch.ones(64), router, 2)[1][0, 0])


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 32, 128])
def test_rotate(ops: LayerOps, size: int, dtype: torch.dtype) -> None:
    queries, keys = random(3, 4 * size).to(dtype), random(3, 2 * size).to(dtype)
    cos, sin = ops.rope_cos_sin(torch.tensor([0, 7, 30000]), default_inv_freq(size, 1e6))
    got = ops.rotate(queries.clone(), keys.clone(), cos, sin)
    for x, rotated in zip((queries, keys), got, strict=True):
        heads = x.double().view(3, -1, size)
        low, high = heads.split(size // 2, -1)
        c, s = cos.double()[..., :size // 2], sin.double()[..., size // 2:]
        assert rotated.dtype == torch.float32
        assert torch.allclose(rotated.double(), torch.cat((low * c - high * s, high * c + low * s), -1), atol=1e-6)


@every_op
def test_angles_are_fp32_and_their_cosines_as_good_as_it_gets(ops: LayerOps) -> None:
    positions, inv_freq = torch.tensor([0, 1, 500, 32767]), default_inv_freq(128, 1e6)
    cos, sin = ops.rope_cos_sin(positions, inv_freq)
    angles = (positions[:, None].float() * inv_freq).double()
    assert cos.shape == sin.shape == (4, 1, 128) and torch.equal(cos[..., :64], cos[..., 64:])
    assert torch.allclose(cos[:, 0, :64].double(), angles.cos(), atol=6e-8)
    assert torch.allclose(sin[:, 0, 64:].double(), angles.sin(), atol=6e-8)
    assert torch.equal(sin[..., :64], -sin[..., 64:])
    assert torch.equal(ops.rope_cos_sin(positions[2:3], inv_freq)[0][0], cos[2])


@every_op
@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 9), k=st.integers(1, 6), size=st.integers(1, 70))
def test_combine_is_in_order(ops: LayerOps, tokens: int, k: int, size: int) -> None:
    rows, topk_weights = random(tokens, k, size), random(tokens, k)
    got = ops.combine(rows, topk_weights)
    assert torch.allclose(got.double(), (rows.double() * topk_weights.double()[..., None]).sum(1), atol=1e-5)
    assert torch.equal(got[:1], ops.combine(rows[:1].clone(), topk_weights[:1].clone()))


@every_op
def test_rows_with_gaps(ops: LayerOps) -> None:
    """Operands that are views of something larger."""
    x, weight, router = random(3, 256)[:, ::2], random(256)[::2], random(8, 128)
    assert torch.allclose(ops.norm(x, weight, EPS, torch.float32).double(), norm64(x, weight), rtol=1e-5, atol=1e-6)
    logits = norm64(x, weight) @ router.T.double()
    assert torch.equal(routed(ops, x.clone(), weight, router, 2)[1], logits.topk(2).indices)
    both, turn = random(2, 96), ops.rope_cos_sin(torch.tensor([1, 2]), default_inv_freq(32, 1e4))
    queries, keys = both[:, :64], both[:, 64:]
    assert torch.equal(ops.rotate(queries, keys, *turn)[0], ops.rotate(queries.clone(), keys.clone(), *turn)[0])


def test_the_choice_is_tested_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    chosen = choose_layer_ops(said.append)
    assert said == [] and agrees(chosen)
    monkeypatch.setenv("QMIX_NATIVE", "off")
    assert choose_layer_ops(said.append) is TORCH and said == []


@pytest.mark.skipif(not native.levels(), reason="the native kernels were not built")
def test_wrong_code_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QMIX_NATIVE", raising=False)

    class Wrong(native.NativeLayerOps):
        def combine(self, rows: Tensor, topk_weights: Tensor) -> Tensor:
            return super().combine(rows, topk_weights).roll(1)

    monkeypatch.setattr(native, "NativeLayerOps", Wrong)
    said: list[str] = []
    assert isinstance(choose_layer_ops(said.append), TorchLayerOps)
    assert len(said) == len(native.wanted_levels()) and "self-test" in said[0]
