"""Routers in torch: logits of widened weights, and which experts they choose by which weights (spec.Router).

T tokens, H hidden, E experts, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.formats.packed import TILE_BYTES
from qmix.kernels.cpu import FEW, few_rows
from qmix.spec import Router

Best = Callable[[Tensor, int], Tensor]  # (x [T, N], count) -> where the largest of each row stand, int64 [T, count]


@dataclass(frozen=True, slots=True)
class RouterTensors:
    """A router with its tensors: weight [E, H] of the checkpoint's dtype (bf16, fp16, fp32); [E] fp32 each, and there
    where the spec says so: logit_bias, choice_bias, expert_scale."""

    spec: Router
    weight: Tensor
    logit_bias: Tensor | None = None
    choice_bias: Tensor | None = None
    expert_scale: Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.weight) == self.spec.experts and self.weight.is_contiguous(), (self.weight.shape, self.spec)
        for name in ("logit_bias", "choice_bias", "expert_scale"):
            vector, wanted = getattr(self, name), getattr(self.spec, name)
            assert (vector is not None) == wanted, (name, self.spec)
            assert vector is None or (vector.dtype == torch.float32 and vector.shape == (self.spec.experts,)
                                      and vector.is_contiguous()), name


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 [T, E]; x [T, H] fp32, weight [E, H]. Summed in fp64: in fp32 the last bits, and with them now and then a
    choice, would depend on how many tokens are routed together. Of few tokens even the last bit of the fp64 sum does
    not. The weights are widened TILE_BYTES of fp64 at a time, so that no wide copy stays."""
    x = x.double()
    step = max(1, TILE_BYTES // (weight.shape[1] * torch.float64.itemsize))
    product = few_rows if 1 < len(x) <= FEW else F.linear
    parts = [product(x, tile.double()) for tile in weight.split(step)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).float()


def _topk(x: Tensor, count: int) -> Tensor:
    return x.topk(count).indices


def stable_best(x: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row of x [T, N] stand, the largest first: NaN above all, of equals the first,
    which topk promises nothing about."""
    return torch.sort(x, dim=1, descending=True, stable=True).indices[:, :count]


def choose_experts(logits: Tensor, router: RouterTensors, top_k: int, best: Best = _topk) -> tuple[Tensor, Tensor]:
    """(ids [T, top_k] int64, the best first; their weights, fp32) by logits [T, E] fp32, without their bias. Of the
    same number of tokens as the logits are: each gets what it gets alone. best: _topk, or stable_best."""
    spec = router.spec
    logits = logits if router.logit_bias is None else logits + router.logit_bias
    scores = torch.softmax(logits, -1) if spec.score == "softmax" else logits.double().sigmoid().float()
    bias = router.choice_bias
    # Scores rise with their logits, which do not saturate: equal scores of unequal logits would leave the choice open.
    ranked = logits if bias is None and spec.groups == spec.top_groups else _allowed(
        spec, scores if bias is None else scores + bias, best)
    ids = best(ranked, top_k)
    over_chosen = spec.over == "chosen" and spec.score == "softmax"
    topk_weights = torch.softmax(logits.gather(1, ids), -1) if over_chosen else scores.gather(1, ids)
    if spec.normalize:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + spec.eps)
    topk_weights = topk_weights if spec.scale == 1 else topk_weights * spec.scale
    return ids, topk_weights if router.expert_scale is None else topk_weights * router.expert_scale[ids]


def _allowed(spec: Router, scores: Tensor, best: Best) -> Tensor:
    """scores [T, E], -inf outside the best groups."""
    if spec.groups == spec.top_groups:
        return scores
    grouped = scores.view(len(scores), spec.groups, -1)
    groups = grouped.topk(2).values.sum(-1) if spec.group_score == "top2" else grouped.amax(-1)
    chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best(groups, spec.top_groups), True)
    return grouped.masked_fill(~chosen[..., None], -torch.inf).view(scores.shape)
