"""Routers of a few tokens on a GPU: DeviceOps.route (device_ops.py has the meaning), in two launches for all tokens and
for all routers of one rule, the layer's own and those that are asked for guesses.

Where later layers have another rule or dtype than those before them, two more launches ask them.
T tokens, H hidden, E experts, L layers asked.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.kernels.cuda import device_code
from qmix.kernels.device_ops import FEW, Later
from qmix.kernels.device_scratch import power_of_two
from qmix.kernels.router import RouterTensors

Room = Callable[[tuple[int, ...], tuple[int, ...], torch.device], Tensor]  # (shape, the most that it becomes, device)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class Own:
    """The layer's own router, and where its norm and its choice go."""

    weight: Tensor | None
    router: RouterTensors
    normed: Tensor | None
    ids: Tensor
    weights: Tensor
    more: tuple[Tensor, Tensor] | None


class Routers:
    """room: where logits lie from one launch to the next."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._stacks: dict[tuple[int, ...], tuple[Tensor, Sequence[Tensor]]] = {}

    def route(self, residual: Tensor, weight: Tensor | None, router: RouterTensors, eps: float | None,
              normed: Tensor | None, ids: Tensor, weights: Tensor, later: Later | None,
              more: tuple[Tensor, Tensor] | None) -> None:
        assert eps is not None or (weight is None and normed is None and later is None)
        assert normed is None or normed.data_ptr() != residual.data_ptr()  # which other programs still read
        kinds = [] if later is None else [_kind(r, n) for r, n in zip(later.routers, later.norms, strict=True)]
        end = _alike(kinds, 0, _kind(router, weight))
        own = Own(weight, router, normed, ids, weights, more)
        self._ask(residual, eps, own, None if later is None else _part(later, 0, end))
        while later is not None and end < len(kinds):
            begin, end = end, _alike(kinds, end, kinds[end])
            self._ask(residual, eps, None, _part(later, begin, end))

    def _ask(self, residual: Tensor, eps: float | None, own: Own | None, later: Later | None) -> None:
        """Routers of one kind: the layer's own, or later ones, or both."""
        (count, hidden), none = residual.shape, residual  # none: in place of what is not read
        norms, routers = ([], []) if later is None else (later.norms, later.routers)
        first = own.router if own is not None else routers[0]
        weight, spec = own.weight if own is not None else norms[0], first.spec
        for asked in (first, *routers):
            assert asked.weight.dtype in FLOATS and asked.weight.shape == (spec.experts, hidden)
        matrices = self._together([r.weight for r in routers], first.weight)
        vectors = self._together([n for n in norms if n is not None], none)
        logit_biases, choice_biases = (
            self._together([v for r in routers if (v := getattr(r, name)) is not None], none)
            for name in ("logit_bias", "choice_bias"))
        ids, topk_weights = (none, none) if own is None else (own.ids, own.weights)
        more = own.more if own is not None else None
        ahead = ids[:, None] if later is None else later.ids
        more_ids, more_topk_weights = more or (ids, topk_weights)
        normed = own.normed if own is not None else None
        assert all(t.stride(-1) == 1 for t in (residual, ids, topk_weights, ahead, more_ids, more_topk_weights))
        width, layers = power_of_two(hidden), len(routers) + (own is not None)
        logits = self._room((count, layers, spec.experts), (FEW, layers, spec.experts), residual.device)
        jit = device_code("cuda_router_jit")
        jit.logits[count, layers * spec.experts](
            residual, none if weight is None else weight, first.weight, vectors, matrices,
            none if normed is None else normed, logits, 0.0 if eps is None else eps, hidden, spec.experts,
            residual.stride(0), vectors.stride(0), matrices.stride(0), 0 if normed is None else normed.stride(0),
            OWN=own is not None, NORM=eps is not None, WEIGHT=weight is not None, KEEP=normed is not None, WIDTH=width,
            num_warps=warps_of(width), enable_fp_fusion=True)

        def vector(name: str) -> Tensor:
            found = getattr(first, name)
            return none if found is None else found

        jit.choose[count, layers](
            logits, vector("logit_bias"), logit_biases, vector("choice_bias"), choice_biases, vector("expert_scale"),
            ids, topk_weights, ahead, more_ids, more_topk_weights, spec.experts, float(spec.eps), float(spec.scale),
            logit_biases.stride(0), choice_biases.stride(0), ids.stride(0), topk_weights.stride(0), ahead.stride(0),
            ahead.stride(1), more_ids.stride(0), more_topk_weights.stride(0), OWN=own is not None,
            K=ids.shape[1] if own is not None else 1, GUESSES=0 if later is None else ahead.shape[2],
            EXPERTS=power_of_two(spec.experts), MORE=more is not None,
            SIGMOID=spec.score == "sigmoid", OVER_CHOSEN=spec.score == "softmax" and spec.over == "chosen",
            NORMALIZE=spec.normalize, LOGIT_BIAS=spec.logit_bias, CHOICE_BIAS=spec.choice_bias,
            EXPERT_SCALE=spec.expert_scale, GROUPS=spec.groups, TOP_GROUPS=spec.top_groups,
            TOP2=spec.group_score == "top2", num_warps=1, enable_fp_fusion=True)

    def _together(self, tensors: Sequence[Tensor], none: Tensor) -> Tensor:
        """Them as one tensor: a view where they lie at equal distances in one storage, else a copy, made once. Of no
        tensors `none`."""
        if not tensors:
            return none
        first = tensors[0]
        step = tensors[1].storage_offset() - first.storage_offset() if len(tensors) > 1 else first.numel()
        if step >= 0 and all(
                t.is_contiguous() and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
                and t.storage_offset() == first.storage_offset() + i * step for i, t in enumerate(tensors)):
            return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))
        key = tuple(t.data_ptr() for t in tensors)
        if key not in self._stacks:
            self._stacks[key] = torch.stack(list(tensors)), list(tensors)  # held, so that an address stays theirs
        return self._stacks[key][0]


def _kind(router: RouterTensors, norm: Tensor | None) -> Hashable:
    """What routers that are asked in one launch have in common."""
    return router.spec, router.weight.dtype, norm is None


def _alike(kinds: Sequence[Hashable], begin: int, kind: Hashable) -> int:
    """The end of those from `begin` on that are of this kind."""
    end = begin
    while end < len(kinds) and kinds[end] == kind:
        end += 1
    return end


def _part(later: Later, begin: int, end: int) -> Later | None:
    if begin == end:
        return None
    return Later(later.norms[begin:end], later.routers[begin:end], later.ids[:, begin:end])


def warps_of(width: int) -> int:
    """Of a program with `width` numbers in hand."""
    return max(1, min(8, width // 256))
