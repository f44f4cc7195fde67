"""Routers on a device, by every rule of spec.Router, against the rule written out in float64 and against the reference;
on the GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from model_configs import TINY, with_keys
from test_cuda import DEVICE, needs_triton
from test_cuda_ops import EPS, norm64, random
from torch import Tensor

from qmix.formats.packed import Packed
from qmix.forward.weights import assemble
from qmix.kernels.cuda_ops import TritonOps
from qmix.kernels.device_ops import DeviceOps, Later, TorchDeviceOps
from qmix.kernels.router import RouterTensors
from qmix.kernels.table import KernelTable
from qmix.models import read_model
from qmix.sizes import MatrixSpec
from qmix.spec import Router

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:(overflow encountered|All-NaN|invalid value)")]
OPS = pytest.mark.parametrize("ops", [TritonOps(), TorchDeviceOps(KernelTable({}, {}))], ids=["Triton", "reference"])
RULES: dict[str, dict[str, Any]] = {
    "chosen": {}, "all": {"over": "all"}, "normalized": {"over": "all", "normalize": True},
    "scaled": {"logit_bias": True, "expert_scale": True, "scale": 1.5},
    "chosen by bias": {"choice_bias": True},
    "sigmoid": {"score": "sigmoid", "normalize": True, "eps": 1e-20, "scale": 2.5, "choice_bias": True},
    "groups": {"score": "sigmoid", "normalize": True, "eps": 0.125, "groups": 4, "top_groups": 2,
               "group_score": "top2", "choice_bias": True, "logit_bias": True},
    "groups by the best": {"over": "all", "groups": 4, "top_groups": 2},
}
RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
SIZES = [(128, 8, 70), (60, 4, 33), (8, 2, 96)]  # experts, chosen, hidden


def router(experts: int, k: int, hidden: int, rule: dict[str, Any], seed: int = 0,
           dtype: torch.dtype = torch.bfloat16) -> RouterTensors:
    """Logits of normed rows have a spread of about 2, biases of about 0.3, near that of the scores."""
    spec = Router(experts, k, **rule)
    vectors = [random(experts, seed=seed + i) / 3 + 0.5 if wanted else None for i, wanted in enumerate(
        (spec.logit_bias, spec.choice_bias, spec.expert_scale))]
    return RouterTensors(spec, (random(experts, hidden, seed=seed) * 2 / hidden**0.5).to(dtype), *vectors)


def there(router: RouterTensors, place: torch.device) -> RouterTensors:
    tensors = (router.logit_bias, router.choice_bias, router.expert_scale)
    return RouterTensors(router.spec, router.weight.to(place), *(None if t is None else t.to(place) for t in tensors))


def route(ops: DeviceOps, x: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None = EPS,
          later: Sequence[tuple[Tensor | None, RouterTensors]] = (), guesses: int = 3) -> tuple[Tensor, ...]:
    """normed, ids, weights and guesses [T, L, A]."""
    place = DEVICE if isinstance(ops, TritonOps) else torch.device("cpu")

    def placed(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(place)

    normed = None if eps is None else torch.empty_like(x, device=place)
    ids = torch.empty(len(x), router.spec.top_k, dtype=torch.int32, device=place)
    weights, ahead = torch.empty(ids.shape, device=place), ids.new_full((len(x), len(later), guesses), -1)
    asked = Later([placed(norm) for norm, _ in later], [there(r, place) for _, r in later], ahead) if later else None
    ops.route(x.to(place), placed(weight), there(router, place), eps, normed, ids, weights, asked)
    return tuple(t.cpu() for t in (x if normed is None else normed, ids, weights, ahead))


def chosen64(x: Tensor, weight: Tensor, router: RouterTensors, count: int) -> tuple[Tensor, Tensor, float]:
    """(ids, weights, the largest logit) of one token x [H], by spec.Router's formulas in float64."""
    spec, experts = router.spec, range(router.spec.experts)
    logits = (router.weight.double() @ norm64(x, weight)).tolist()
    if router.logit_bias is not None:
        logits = [a + b for a, b in zip(logits, router.logit_bias.tolist(), strict=True)]
    every = torch.tensor(logits, dtype=torch.float64)
    scores = (every.softmax(0) if spec.score == "softmax" else every.sigmoid()).tolist()
    bias = [0.0] * len(experts) if router.choice_bias is None else router.choice_bias.tolist()
    biased = [a + b for a, b in zip(scores, bias, strict=True)]
    size = spec.experts // spec.groups
    best = sorted(range(spec.groups), key=lambda g: -sum(sorted(
        biased[g * size:(g + 1) * size])[-(2 if spec.group_score == "top2" else 1):]))[:spec.top_groups]
    ids = sorted((e for e in experts if e // size in best), key=lambda e: -biased[e])[:count]
    over_chosen = spec.score == "softmax" and spec.over == "chosen"
    weights = every[ids].softmax(0) if over_chosen else torch.tensor([scores[e] for e in ids], dtype=torch.float64)
    weights = weights / (weights.sum() + spec.eps) if spec.normalize else weights
    scale = 1 if router.expert_scale is None else router.expert_scale[ids].double()
    return torch.tensor(ids), weights * spec.scale * scale, float(every.abs().max())


@OPS
@RULE
@pytest.mark.parametrize(("experts", "k", "hidden"), SIZES)
def test_against_float64(ops: DeviceOps, rule: dict[str, Any], experts: int, k: int, hidden: int) -> None:
    """The norm is off by some roundings of 2^-24, the same for all of a token's numbers, and so a logit by as much of
    itself; weights by twice the absolute error of the logits, and their own roundings."""
    x, weight = random(1 if experts > 60 else 3, hidden), random(hidden)  # an expert is a program
    own = router(experts, k, hidden, rule)
    normed, ids, weights, _ = route(ops, x, weight, own)
    torch.testing.assert_close(normed.double(), norm64(x, weight), rtol=1e-5, atol=1e-6)
    for row, got, found in zip(x, ids, weights, strict=True):
        want, exact, most = chosen64(row, weight, own, k)
        assert torch.equal(got.long(), want)
        torch.testing.assert_close(found.double(), exact, rtol=(32 * most + 64) * 2**-24, atol=0)


@RULE
def test_guesses_are_what_those_routers_would_choose(rule: dict[str, Any]) -> None:
    """Of as many experts as a layer's own choice does not have; the reference agrees."""
    x, weight, own = random(2, 48), random(48), router(16, 3, 48, rule)
    later = [(random(48, seed=i), router(16, 3, 48, rule, i)) for i in (1, 2)]
    *first, guesses = route(TritonOps(), x, weight, own, later=later, guesses=5)
    for got, want in zip(first, route(TritonOps(), x, weight, own), strict=False):
        assert torch.equal(got, want)
    for distance, (norm, asked) in enumerate(later):
        for row, got in zip(x, guesses[:, distance], strict=True):
            assert torch.equal(got.long(), chosen64(row, norm, asked, 5)[0])
    assert torch.equal(route(TorchDeviceOps(KernelTable({}, {})), x, weight, own, later=later, guesses=5)[3], guesses)


@OPS
def test_later_layers_of_another_rule_dtype_or_norm(ops: DeviceOps) -> None:
    x, weight, own = random(3, 40), random(40), router(12, 2, 40, RULES["all"])
    others = [router(12, 2, 40, RULES["all"], 1), router(12, 2, 40, RULES["groups"], 2),
              router(20, 4, 40, RULES["groups"], 3), router(12, 2, 40, RULES["all"], 4, torch.float16)]
    later = [(random(40, seed=i), other) for i, other in enumerate(others)] + [(None, router(12, 2, 40, {}, 5))]
    guesses = route(ops, x, weight, own, later=later)[3]
    for distance, (norm, other) in enumerate(later):
        alone = RouterTensors(Router(**{**_fields(other.spec), "top_k": 3}), other.weight, other.logit_bias,
                              other.choice_bias, other.expert_scale)
        assert torch.equal(guesses[:, distance], route(ops, x, norm, alone)[1])


def _fields(spec: Router) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_that_are_widened_in_the_kernel_give_the_bits_of_wide_ones(dtype: torch.dtype) -> None:
    """Logits themselves: softmax over all, all experts chosen."""
    own = router(9, 9, 130, RULES["all"], dtype=dtype)
    wide = RouterTensors(own.spec, own.weight.double())
    x, weight = random(2, 130), random(130)
    for got, want in zip(route(TritonOps(), x, weight, own), route(TritonOps(), x, weight, wide), strict=True):
        assert torch.equal(got, want)


@OPS
@RULE
def test_a_token_has_the_bits_that_it_has_alone(ops: DeviceOps, rule: dict[str, Any]) -> None:
    x, weight, own = random(8 if rule == RULES["groups"] else 3, 40), random(40), router(12, 3, 40, rule)
    later = [(random(40, seed=1), router(12, 3, 40, rule, 1))]
    whole = route(ops, x, weight, own, later=later)
    for token in (0, len(x) - 1):
        for got, want in zip(route(ops, x[token:token + 1], weight, own, later=later), whole, strict=True):
            assert torch.equal(got[0], want[token])


@OPS
@RULE
def test_broken_tokens_choose_experts_that_exist_and_leave_the_others_alone(ops: DeviceOps,
                                                                            rule: dict[str, Any]) -> None:
    """All logits of one token are NaN; of another those of one expert, by its weights: it comes first, or with scores
    over all experts all are NaN."""
    x, weight, own = random(3, 40), random(40), router(16, 3, 40, rule)
    later = [(random(40, seed=1), router(16, 3, 40, rule, 1))]
    clean = route(ops, x, weight, own, later=later, guesses=16)
    x[1, 3] = float("nan")
    broken = route(ops, x, weight, own, later=later, guesses=16)
    for got, want in zip(broken, clean, strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert broken[0][1].isnan().all() and broken[2][1].isnan().all()
    own.weight[7] = float("nan")
    one = route(ops, x, weight, own, later=[(weight, own)], guesses=16)
    for ids in (*broken[1], *broken[3].flatten(0, 1), *one[1], *one[3].flatten(0, 1)):
        assert len(set(ids.tolist())) == len(ids) and int(ids.min()) >= 0 and int(ids.max()) < 16
    by_scores = own.spec.choice_bias or own.spec.groups > 1
    assert one[1][[0, 2], 0].tolist() == ([0, 0] if by_scores and own.spec.score == "softmax" else [7, 7])


@OPS
@pytest.mark.parametrize(("rule", "want"), [("all", [1, 0, 2]), ("groups by the best", [1, 0, 2]),
                                            ("groups", [1, 0, 2])])
def test_of_equals_the_first_counts(ops: DeviceOps, rule: str, want: list[int]) -> None:
    """Groups of three; the second expert is better than the others, which are all alike, and so are their groups."""
    spec, weight = Router(12, 3, **RULES[rule]), torch.ones(12, 32)
    weight[1] = 1.25
    flat = torch.zeros(12)
    own = RouterTensors(spec, weight, flat if spec.logit_bias else None, flat if spec.choice_bias else None)
    _, ids, _, ahead = route(ops, torch.ones(1, 32), torch.full((32,), 0.03), own,
                             later=[(torch.full((32,), 0.03), own)], guesses=12)
    assert ids.tolist() == [want]
    # Beyond the two best groups, the others in order.
    assert ahead.tolist() == [[[1, 0, *range(2, 12)]]]


@OPS
def test_what_is_normed_already(ops: DeviceOps) -> None:
    x, weight, own = random(2, 40), random(40), router(16, 3, 40, RULES["sigmoid"])
    normed, ids, weights, _ = route(ops, x, weight, own)
    _, again, same, _ = route(ops, normed, None, own, eps=None)
    assert torch.equal(again, ids) and torch.equal(same, weights)
    plain = route(ops, x, None, own)
    torch.testing.assert_close(plain[0].double(), norm64(x, torch.ones(40)), rtol=1e-6, atol=1e-6)


def test_routers_of_a_model_on_a_device_are_not_copied_for_guesses() -> None:
    """Three layers with experts around a dense one, whose biases and norms are small; the routers keep their numbers
    and their dtype."""
    model = read_model(with_keys(TINY["qwen3_moe"], {"mlp_only_layers": [1], "num_hidden_layers": 4}))
    tensors = {t.name: random(*t.shape).bfloat16() for t in model.tensors()}

    def read(name: str) -> Tensor | Packed:
        plain = tensors[name]
        packed = Packed.of(MatrixSpec("bf16", *plain.shape), {"weight": plain}) if plain.dim() == 2 else plain
        return plain if "router" in name or name == "embedding" else packed

    weights = assemble(model, torch.bfloat16, read, DEVICE).tensors
    names = [f"layers.{i}.router.weight" for i in model.moe_layers]
    assert len(names) == 3 and all(torch.equal(weights[name].cpu(), tensors[name]) for name in names)
    specs = [model.layers[i].mlp.router for i in model.moe_layers]
    routers = [RouterTensors(spec, weights[name]) for spec, name in zip(specs, names, strict=True)]
    ops, x, k = TritonOps(), random(1, model.hidden).to(DEVICE), model.top_k
    ids = torch.empty(1, k, dtype=torch.int32, device=DEVICE)
    ops.route(x, None, routers[0], EPS, None, ids, torch.empty(1, k, device=DEVICE),
              Later([None, None], routers[1:], torch.empty(1, 2, k, dtype=torch.int32, device=DEVICE)))
    assert not ops._routers._stacks
