"""The reference of the Ops beside plain twins: rotary scalings against transformers, attention, the router's choice and
the delta rule in float64, the convolution against torch's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qmix.kernels import attend, ops, torch_ops
from qmix.kernels.attend import softmax_attention, softmax_of
from qmix.kernels.layer import capped
from qmix.kernels.rope import inv_freq
from qmix.kernels.torch_ops import PlainWeights
from qmix.spec import (
    Activation,
    Attention,
    DeltaNet,
    Linear,
    Llama3,
    LongRope,
    Norm,
    Proportional,
    Rope,
    Router,
    Yarn,
)
from qmix.spec import Tensor as Named
from qmix.spec.model import rounded

SCALINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (Linear(4.0), {"factor": 4.0}),
    "yarn": (Yarn(512, 8.0), {"factor": 8.0, "original_max_position_embeddings": 512}),
    "yarn, betas": (Yarn(512, 8.0, 16.0, 2.0, False), {
        "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
        "original_max_position_embeddings": 512}),
    "yarn, own factor": (Yarn(512, None, mscale=0.7, mscale_all_dim=1.2), {
        "factor": None, "mscale": 0.7, "mscale_all_dim": 1.2, "original_max_position_embeddings": 512}),
    "yarn, attention": (Yarn(512, 8.0, attention_factor=1.3), {
        "factor": 8.0, "attention_factor": 1.3, "original_max_position_embeddings": 512}),
    "llama3": (Llama3(8.0, 1.0, 4.0, 512), {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                            "original_max_position_embeddings": 512}),
    "longrope": (LongRope(512, tuple(1 + i / 10 for i in range(8)), tuple(2.0 + i for i in range(8))), {
        "short_factor": [1 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 512}),
    "longrope, factor": (LongRope(512, (1.5,) * 8, (3.0,) * 8, factor=6.0), {
        "short_factor": [1.5] * 8, "long_factor": [3.0] * 8, "factor": 6.0, "original_max_position_embeddings": 512}),
    "proportional": (Proportional(6, 2.0), {"partial_rotary_factor": 6 / 16, "factor": 2.0}),
}


@pytest.mark.parametrize("context", [500, 4000])
@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_scalings(name: str, context: int) -> None:
    """Frequencies to the last bit or two of fp32, which powers are computed to."""
    scaling, parameters = SCALINGS[name]
    kind = name.split(",")[0]
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=4096,
                         rope_parameters={"rope_type": kind, "rope_theta": 5000.0, **parameters})
    want, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=context)
    got, own = inv_freq(Rope(5000.0, 16, scaling), 4096, context)
    torch.testing.assert_close(got, want, rtol=5e-7, atol=0)
    assert own == pytest.approx(factor, rel=1e-12)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("changes", [{}, {"softcap": 2.0}, {"sinks": True}, {"window": 4}, {"scale": 0.9},
                                     {"softcap": 1.0, "sinks": True, "window": 3, "scale": 0.7}], ids=str)
def test_attention_against_sums_in_float64(changes: dict[str, Any], count: int,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 sums of some 20 terms of size 1: 2e-6 is some 30 roundings."""
    monkeypatch.setattr(attend, "SCORES", 4 * 20 * 3 * 4 * 2)  # two queries a tile
    attention = replace(Attention(4, 2, 8, None), **changes)
    q, keys, values, sinks = randn(count, 32), randn(2, 20, 8, seed=1), randn(2, 20, 8, seed=2), randn(4, seed=3)
    got = softmax_attention(q.view(count, 4, 8), keys, values, attention.window,
                            softmax_of(attention, sinks if attention.sinks else None))
    got = got.view(count, 4, 8)
    for t in range(count):
        at = 20 - count + t
        first = 0 if attention.window is None else max(0, at - attention.window + 1)
        for h in range(4):
            scores = [float(q[t].view(4, 8)[h].double() @ keys[h // 2, s].double()) for s in range(first, at + 1)]
            scores = [s * (attention.scale or 8**-0.5) for s in scores]
            if attention.softcap:
                scores = [attention.softcap * np.tanh(s / attention.softcap) for s in scores]
            weights = np.exp(scores)
            total = weights.sum() + (np.exp(float(sinks[h])) if attention.sinks else 0)
            want = (weights[:, None] * values[h // 2, first:at + 1].double().numpy()).sum(0) / total
            np.testing.assert_allclose(got[t, h].numpy(), want, atol=2e-6)


ROUTERS = {
    "mixtral": Router(8, 2), "qwen": Router(8, 3, over="all", normalize=True), "olmoe": Router(8, 3, over="all"),
    "gpt-oss": Router(8, 3, logit_bias=True), "glm": Router(
        8, 3, "sigmoid", "all", True, 1e-3, choice_bias=True, groups=4, top_groups=2, group_score="top2", scale=1.5),
    "best of a group": Router(8, 2, "sigmoid", "all", groups=4, top_groups=1, expert_scale=True),
    "biased softmax": Router(8, 2, choice_bias=True, logit_bias=True, scale=0.5),
    "all of them": Router(8, 8, over="all"),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_choice_against_the_definition(name: str) -> None:
    """Weights in float64, up to fp32 exponentials: 1e-6."""
    router, x, weight = ROUTERS[name], randn(33, 16), randn(8, 16, seed=1)
    vectors = {"logit_bias": randn(8, seed=2), "choice_bias": randn(8, seed=3) * 0.3, "expert_scale": randn(8, seed=4)}
    tensors = {name: Named(name, (8,), "router") if getattr(router, name) else None for name in vectors}
    op = ops.Route("x", "ids", "w", router, Named("weight", (8, 16), "router"), **tensors)
    ids, topk_weights = torch_ops.route(op, PlainWeights({"weight": weight, **vectors}), x)
    for t in range(len(x)):
        logits = weight.double().numpy() @ x[t].double().numpy()
        logits = logits + vectors["logit_bias"].double().numpy() if router.logit_bias else logits
        scores = np.exp(logits) / np.exp(logits).sum() if router.score == "softmax" else 1 / (1 + np.exp(-logits))
        ranked = scores + vectors["choice_bias"].double().numpy() if router.choice_bias else scores
        groups = ranked.reshape(router.groups, -1)
        best = np.sort(groups, 1)[:, -2:].sum(1) if router.group_score == "top2" else groups.max(1)
        open_groups = np.argsort(-best)[:router.top_groups]
        allowed = [e for e in range(8) if e // (8 // router.groups) in open_groups]
        chosen = sorted(allowed, key=lambda e: -ranked[e])[:router.top_k]
        assert ids[t].tolist() == chosen
        want = scores[chosen]
        if router.over == "chosen" and router.score == "softmax":
            want = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        want = want / (want.sum() + router.eps) if router.normalize else want
        want = want * router.scale
        want = want * vectors["expert_scale"].double().numpy()[chosen] if router.expert_scale else want
        np.testing.assert_allclose(topk_weights[t].numpy(), want, rtol=2e-6)


def test_logits_that_saturate_leave_the_choice_to_themselves() -> None:
    """Sigmoids of 40 and 50 are both 1 in fp32."""
    op = ops.Route("x", "ids", "w", Router(4, 2, "sigmoid", "all"), Named("w", (4, 4), "router"))
    ids, _ = torch_ops.route(op, PlainWeights({"w": torch.eye(4)}), torch.tensor([[30.0, 40.0, 50.0, 45.0]]))
    assert ids.tolist() == [[2, 3]]


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 7], [2, 1, 9]])
def test_a_convolution_goes_on_where_it_stopped(cuts: list[int]) -> None:
    """Against torch's, over all tokens at once; rows of any cut have the same bits."""
    a, b, taps = randn(12, 3), randn(12, 5, seed=1), randn(8, 4, seed=2)
    op, w = ops.Conv(("a", "b"), Named("taps", (8, 4), "other"), 0), PlainWeights({"taps": taps})
    past, parts = torch.zeros(3, 8), []
    for x, y in zip(a.split(cuts), b.split(cuts), strict=True):
        found, past = torch_ops.conv(op, w, past, x, y)
        parts.append(torch.cat(found, 1))
    both = torch.cat((a, b), 1)
    want = F.silu(F.conv1d(F.pad(both.T, (3, 0)), taps[:, None], groups=8)).T
    torch.testing.assert_close(torch.cat(parts), want)
    assert torch.equal(torch.cat(parts), torch.cat(torch_ops.conv(op, w, torch.zeros(3, 8), a, b)[0], 1))
    assert torch.equal(past, both[-3:])


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 5]])
def test_the_delta_rule_against_its_definition(cuts: list[int]) -> None:
    """In float64, head by head; 1e-5 is what fp32 leaves of nine steps whose state grows to about ten."""
    d = DeltaNet(2, 4, 6, 5, 4, Norm(1e-5))
    inputs = [randn(9, n, seed=i) for i, n in enumerate((12, 12, 20, 4, 4))]
    vectors = {"a_log": randn(4, seed=7) * 0.5, "dt": randn(4, seed=8)}
    op = ops.Delta(*"qkvab", "out", 0, d, Named("a_log", (4,), "other"), Named("dt", (4,), "bias"))
    state, parts = torch.zeros(4, 6, 5), []
    for part in zip(*(x.split(cuts) for x in inputs), strict=True):
        out, state = torch_ops.delta(op, PlainWeights(vectors), state, *part)
        parts.append(out)
    q, k, v, a, b = (x.double().numpy() for x in inputs)
    for h in range(4):
        own = slice(h // 2 * 6, h // 2 * 6 + 6)
        memory = np.zeros((6, 5))
        for t in range(9):
            unit = [x[t, own] / np.sqrt((x[t, own] ** 2).sum() + 1e-6) for x in (q, k)]
            rate = np.log1p(np.exp(a[t, h] + float(vectors["dt"][h])))
            memory *= np.exp(-np.exp(float(vectors["a_log"][h])) * rate)
            wrong = v[t, h * 5:h * 5 + 5] - memory.T @ unit[1]
            memory += np.outer(unit[1], wrong / (1 + np.exp(-b[t, h])))
            want = memory.T @ unit[0] / np.sqrt(6)
            np.testing.assert_allclose(torch.cat(parts)[t, h * 5:h * 5 + 5].numpy(), want, atol=1e-5)


def test_norms_and_clips() -> None:
    x, weight = randn(3, 8), randn(4, seed=1)
    w, named = PlainWeights({"w": weight}, torch.bfloat16), Named("w", (4,), "norm")
    heads = x.double().view(3, 2, 4)
    unit = heads / (heads.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    for norm, factor in ((Norm(1e-3), weight), (Norm(1e-3, "one_plus"), 1 + weight),
                         (Norm(1e-3, "none"), torch.ones(4)), (Norm(1e-3, factor=0.25), weight / 4)):
        op = ops.HeadNorm("x", 4, norm, None if norm.weight == "none" else named, 0.8)
        want = (unit * factor.double()).clamp(-0.8, 0.8).view(3, 8).float()
        torch.testing.assert_close(torch_ops.head_norm(op, w, x), want)
    assert torch.equal(torch_ops.head_norm(ops.HeadNorm("x", 4, None, None, 0.5), w, x), x.clamp(-0.5, 0.5))
    rounded, wide = torch_ops.norm(ops.Norm("x", "n", "wide", Norm(1e-3), 4, named), w, x[:, :4])
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(wide.to(torch.bfloat16), rounded)


def test_activations() -> None:
    gate, up = randn(5, 7) * 3, randn(5, 7, seed=1) * 3
    torch.testing.assert_close(torch_ops.activate(Activation(), gate, up), gate / (1 + torch.exp(-gate)) * up)
    tanh = 0.5 * gate * (1 + torch.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(torch_ops.activate(Activation("geglu"), gate, up), tanh * up)
    low = gate.clamp(max=1.5)
    want = low / (1 + torch.exp(-1.7 * low)) * (up.clamp(-1.5, 1.5) + 1)
    torch.testing.assert_close(torch_ops.activate(Activation("swiglu_clamped", 1.7, 1.5), gate, up), want)


@pytest.mark.parametrize("activation", [Activation(), Activation("geglu"), Activation("swiglu_clamped", 1.7, 1.5)])
def test_an_activation_of_few_rows_is_that_of_each_alone(activation: Activation) -> None:
    """torch's own has other bits where a row is no multiple of its vectors."""
    for width in (12, 40, 100):
        gate, up = randn(8, width) * 3, randn(8, width, seed=1)
        alone = [torch_ops.activate(activation, *rows) for rows in zip(gate.split(1), up.split(1), strict=True)]
        assert torch.equal(torch_ops.activate(activation, gate, up), torch.cat(alone))


def test_capped_logits() -> None:
    """Up to FEW rows have the bits that each has alone, whatever torch's vectors are."""
    x = randn(10, 1003) * 40
    want = 30 * (x.double() / 30).tanh()
    for count in (1, 3, 8, 10):
        got = capped(x[:count].clone(), 30.0)
        torch.testing.assert_close(got.double(), want[:count], rtol=4 * 2**-24, atol=0)
        assert count > 8 or torch.equal(got, torch.cat([capped(row.clone(), 30.0) for row in x[:count].split(1)]))


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16),
                                             ("float32", torch.float32)])
def test_the_scale_of_embeddings_is_a_number_of_the_weights_dtype(dtype: str, kind: torch.dtype) -> None:
    """As transformers has it, ties included."""
    for number in (2816**0.5, 2304**0.5, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 257 / 2, 1e-3):
        assert rounded(number, dtype) == torch.tensor(number, dtype=torch.float32).to(kind).item()
    assert rounded(1e6, "float16") == float("inf")
