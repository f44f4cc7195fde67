"""Routers, norms of heads and partial rotary embedding, as architectures beside Mixtral have them: the native code at
every level, and torch's, against float64.

Bounds: n roundings one after the other change a number by at most n * U of its terms' absolute values (Higham 2002,
section 3.1), U being fp32's unit roundoff.

T tokens, H hidden, E experts, K chosen.
"""

from __future__ import annotations

import pytest
import torch
from bounds import BF16, FP32
from torch import Tensor

from qmix.formats.packed import TILE_BYTES
from qmix.kernels import native
from qmix.kernels.attend import default_inv_freq
from qmix.kernels.layer import TORCH, LayerOps
from qmix.kernels.native import jobs
from qmix.kernels.native.sequence import NORM, CallSequence
from qmix.kernels.router import RouterTensors, router_logits
from qmix.spec import Router

OPS: list[LayerOps] = [TORCH, *(native.NativeLayerOps(level) for level in native.levels())]
every_op = pytest.mark.parametrize("layer_ops", OPS, ids=lambda layer_ops: layer_ops.name)
EPS = 1e-6
NOT_BUILT = "the native kernels were not built"

ROUTERS = {
    "mixtral": Router(8, 2),
    "qwen3-moe": Router(128, 8, over="all", normalize=True),
    "olmoe": Router(64, 8, over="all"),
    "gpt-oss": Router(32, 4, logit_bias=True),
    "glm": Router(128, 8, "sigmoid", normalize=True, eps=1e-20, choice_bias=True, scale=1.5),
    "deepseek": Router(64, 6, "sigmoid", normalize=True, eps=1e-20, choice_bias=True, scale=2.5, groups=8, top_groups=4,
                       group_score="top2"),
    "best groups": Router(24, 4, over="all", groups=6, top_groups=3),
    "gemma": Router(16, 4, over="all", normalize=True, expert_scale=True),
    "512 experts": Router(512, 16, over="all", normalize=True),
    "one": Router(1, 1, "sigmoid"),
}
every_router = pytest.mark.parametrize("spec", ROUTERS.values(), ids=ROUTERS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def router_of(spec: Router, hidden: int, dtype: torch.dtype) -> RouterTensors:
    """Logits of about 2, biases as large as the distances between scores."""
    experts = spec.experts
    return RouterTensors(spec, (random(experts, hidden) * 2 / hidden**0.5).to(dtype),
                         random(experts, seed=1) if spec.logit_bias else None,
                         random(experts, seed=2) / 4 if spec.choice_bias else None,
                         random(experts, seed=3).exp() if spec.expert_scale else None)


def routed(layer_ops: LayerOps, x: Tensor, router: RouterTensors, weight: Tensor | None = None,
           eps: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    k = router.spec.top_k
    normed, ids, topk_weights = torch.empty_like(x), torch.empty(len(x), k, dtype=torch.int64), torch.empty(len(x), k)
    layer_ops.route(x, weight, router, eps, None if eps is None else normed, ids, topk_weights)
    return normed, ids, topk_weights


def scores64(x: Tensor, router: RouterTensors) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, scores, what the choice is made by), [T, E], in float64."""
    spec = router.spec
    logits = x.double() @ router.weight.double().T + (0 if router.logit_bias is None else router.logit_bias.double())
    scores = logits.sigmoid() if spec.score == "sigmoid" else logits.softmax(-1)
    ranked = scores + (0 if router.choice_bias is None else router.choice_bias.double())
    for row in ranked:
        groups = row.view(spec.groups, -1)  # shares the memory
        best = groups.sort(1, descending=True).values[:, :2 if spec.group_score == "top2" else 1].sum(1)
        groups[best.argsort(descending=True)[spec.top_groups:]] = -torch.inf
    return logits, scores, ranked


def weights64(router: RouterTensors, logits: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
    spec = router.spec
    over_chosen = spec.score == "softmax" and spec.over == "chosen"
    topk_weights = logits.gather(1, ids).softmax(-1) if over_chosen else scores.gather(1, ids)
    if spec.normalize:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + spec.eps)
    return topk_weights * spec.scale * (1 if router.expert_scale is None else router.expert_scale.double()[ids])


@every_op
@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_router_chooses_and_weighs_as_its_spec_says(layer_ops: LayerOps, spec: Router, dtype: torch.dtype) -> None:
    x, router = random(5, 100), router_of(spec, 100, dtype)
    _, ids, topk_weights = routed(layer_ops, x, router)
    logits, scores, ranked = scores64(x, router)
    # A logit is rounded to fp32, and again behind its bias; an exponential passes its error on as a relative one, a
    # quotient of exponentials twice that. Their sum adds E roundings at most, the rest is a handful of operations.
    off = 2 * FP32 * float(logits.abs().amax() + (0 if router.logit_bias is None else router.logit_bias.abs().amax()))
    relative = 4 * off + (spec.experts + 3 * spec.top_k + 20) * FP32
    want = weights64(router, logits, scores, ids)
    assert bool(((topk_weights.double() - want).abs() <= relative * want).all())
    got = ranked.gather(1, ids)
    near = relative * scores.amax() + 2 * FP32 * ranked[ranked.isfinite()].abs().amax()
    assert torch.allclose(got, ranked.topk(spec.top_k).values, rtol=0, atol=float(near))
    assert all(len(set(row)) == spec.top_k for row in ids.tolist())


@every_op
@every_router
def test_up_to_eight_tokens_are_routed_as_alone(layer_ops: LayerOps, spec: Router) -> None:
    x, weight, router = random(8, 96), random(96), router_of(spec, 96, torch.bfloat16)
    alone = [routed(layer_ops, row.clone(), router, weight, EPS) for row in x.split(1)]
    for count in range(1, 9):
        together = routed(layer_ops, x[:count].clone(), router, weight, EPS)
        for part, parts in zip(together, zip(*alone[:count], strict=True), strict=True):
            assert torch.equal(part, torch.cat(parts))


@every_op
@every_router
def test_guesses_are_the_choices(layer_ops: LayerOps, spec: Router) -> None:
    x, weight, router = random(3, 96), random(96), router_of(spec, 96, torch.float16)
    ids = torch.empty(3, spec.top_k, dtype=torch.int64)
    layer_ops.guess(x, weight, router, EPS, ids)
    assert torch.equal(ids, routed(layer_ops, x, router, weight, EPS)[1])


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_the_same_numbers_as_wide_ones(layer_ops: LayerOps, dtype: torch.dtype) -> None:
    """Sums that cancel, so that every bit of the fp64 product shows; every fp16 number, subnormal ones included."""
    matrix = torch.arange(0, 2**15 - 2**10, dtype=torch.int16).view(torch.float16).view(8, -1)
    matrix = matrix[:, torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(5))].to(dtype)
    matrix = torch.cat((matrix, -matrix), 1).contiguous()
    half = random(3, matrix.shape[1] // 2)
    x = torch.cat((half, half * (1 + 2**-20)), 1)
    spec = Router(8, 8, "sigmoid", scale=1e-3)
    narrow, wide = (routed(layer_ops, x, RouterTensors(spec, m)) for m in (matrix, matrix.float()))
    assert torch.equal(narrow[1], wide[1]) and torch.equal(narrow[2], wide[2])


@pytest.mark.parametrize("level", list(native.levels()) or [pytest.param("", marks=pytest.mark.skip(reason=NOT_BUILT))])
def test_threads_that_share_a_router_do_not_change_its_bits(level: str) -> None:
    router = router_of(ROUTERS["qwen3-moe"], 2048, torch.bfloat16)  # enough to wake one
    one, four = native.NativeLayerOps(level), native.NativeLayerOps(level)
    one.threads, four.threads = 1, 4
    for count in (1, 3):
        x = random(count, 2048)
        assert all(torch.equal(a, b) for a, b in zip(routed(one, x, router)[1:], routed(four, x, router)[1:],
                                                     strict=True))


@every_op
def test_a_router_is_fused_with_its_norm_or_not(layer_ops: LayerOps) -> None:
    x, weight, router = random(4, 96), random(96), router_of(ROUTERS["qwen3-moe"], 96, torch.bfloat16)
    normed, ids, topk_weights = routed(layer_ops, x, router, weight, EPS)
    assert torch.equal(normed, layer_ops.norm(x, weight, EPS, torch.float32))
    _, ids_apart, topk_weights_apart = routed(layer_ops, normed, router)
    assert torch.equal(ids, ids_apart) and torch.equal(topk_weights, topk_weights_apart)


def test_a_router_of_several_tiles_is_summed_as_in_fp64() -> None:
    """No copy of all the weights in fp64; up to 8 tokens as alone."""
    hidden = 4096
    matrix = random(2 * TILE_BYTES // (8 * hidden) + 3, hidden).bfloat16()
    x = random(8, hidden)
    want = x.double() @ matrix.double().T
    got = router_logits(x, matrix)
    terms = x.double().abs() @ matrix.double().abs().T
    assert bool(((got.double() - want).abs() <= FP32 * want.abs() + 2 * hidden * 2.0**-53 * terms).all())
    assert torch.equal(got, torch.cat([router_logits(row.clone(), matrix) for row in x.split(1)]))


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [(4, 128), (3, 33), (1, 512), (32, 16)])
@pytest.mark.parametrize(("weighted", "clip"), [(True, None), (True, 0.75), (False, None), (False, 1.25)])
def test_norm_of_heads(layer_ops: LayerOps, dtype: torch.dtype, heads: int, size: int, weighted: bool,
                       clip: float | None) -> None:
    x, weight = (random(8, heads * size) * 5).to(dtype), random(size) if weighted else None
    got = layer_ops.head_norm(x, size, weight, EPS, clip)
    rows = x.double().view(8, heads, size)
    want = rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 if weight is None else weight.double())
    want = want if clip is None else want.clamp(-clip, clip)
    assert got.dtype == torch.float32 and got.shape == x.shape
    # The sum of `size` squares errs by size * U, half of which reaches its root; then a few operations.
    assert torch.allclose(got.double().view_as(want), want, rtol=(size / 2 + 8) * FP32, atol=0)
    for count in range(1, 9):
        assert torch.equal(layer_ops.head_norm(x[:count].clone(), size, weight, EPS, clip), got[:count])


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_clamped(layer_ops: LayerOps, dtype: torch.dtype) -> None:
    x = random(3, 70).to(dtype)
    x[1, 5] = torch.nan
    before = x.clone()
    got = layer_ops.head_norm(x, 70, None, None, 0.5)
    assert torch.equal(got.nan_to_num(7), x.float().clamp(-0.5, 0.5).nan_to_num(7)) and bool(got[1, 5].isnan())
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))


@every_op
def test_norm_reads_bf16_and_may_have_no_weight(layer_ops: LayerOps) -> None:
    x = random(3, 200).bfloat16()
    got = layer_ops.norm(x, None, EPS, torch.float32)
    assert torch.equal(got, layer_ops.norm(x.float(), torch.ones(200), EPS, torch.float32))
    assert torch.equal(layer_ops.norm(x, None, EPS, torch.bfloat16), got.bfloat16())


@every_op
@pytest.mark.parametrize(("queries_as", "keys_as"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                                     (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize(("size", "rotary"), [(64, 16), (64, 64), (256, 64), (6, 2)])
@pytest.mark.parametrize("factor", [1.0, 1.1386294])
def test_partial_rotary_with_an_attention_factor(layer_ops: LayerOps, queries_as: torch.dtype, keys_as: torch.dtype,
                                                 size: int, rotary: int, factor: float) -> None:
    queries, keys = random(8, 4 * size).to(queries_as), random(8, 2 * size, seed=1).to(keys_as)
    positions, inv_freq = torch.tensor([0, 7, 30000, 1, 2, 3, 4, 131071]), default_inv_freq(rotary, 1e6)
    cos, sin = layer_ops.rope_cos_sin(positions, inv_freq, factor)
    angle = (positions[:, None].float() * inv_freq).double()[:, None]
    c, s = angle.cos() * factor, angle.sin() * factor
    # The cosine is rounded, the factor may be, and so is their product.
    assert torch.allclose(cos.double(), torch.cat((c, c), -1), rtol=3.01 * FP32, atol=1e-30)
    assert torch.allclose(sin.double(), torch.cat((-s, s), -1), rtol=3.01 * FP32, atol=1e-30)
    found = layer_ops.rotate(queries.clone(), keys.clone(), cos, sin, size)
    for x, rotated in zip((queries, keys), found, strict=True):
        heads = x.double().view(8, -1, size)
        low, high = heads[..., :rotary].split(rotary // 2, -1)
        want = torch.cat((low * c - high * s, high * c + low * s), -1)
        terms = torch.cat((low.abs() + high.abs(),) * 2, -1) * factor
        assert rotated.dtype == torch.float32 and rotated.shape == heads.shape
        # cos and sin err by 3 roundings, either product by one, their sum by one.
        assert bool(((rotated[..., :rotary].double() - want).abs() <= 5.01 * FP32 * terms).all())
        assert torch.equal(rotated[..., rotary:].double(), heads[..., rotary:])
    for count in range(1, 9):
        part = layer_ops.rope_cos_sin(positions[:count], inv_freq, factor)
        alone = layer_ops.rotate(queries[:count].clone(), keys[:count].clone(), *part, size)
        assert all(torch.equal(a, b[:count]) for a, b in zip(alone, found, strict=True))


def test_a_norm_gives_both_its_rounded_and_its_wide_result() -> None:
    if not native.levels():
        pytest.skip(NOT_BUILT)
    x, weight = random(1, 200), random(200)
    out, wide = torch.empty(1, 200, dtype=torch.bfloat16), torch.empty(1, 200)
    for level in native.levels():
        CallSequence(level, 0, 1, [(NORM, jobs.norm(x, weight, EPS, out, wide))]).run()
        assert torch.equal(wide, native.NativeLayerOps(level).norm(x, weight, EPS, torch.float32))
        assert torch.equal(out, wide.bfloat16()) and bool(((out.float() - wide).abs() <= BF16 * wide.abs()).all())
