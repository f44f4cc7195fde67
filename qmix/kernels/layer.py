"""What a layer does to a few tokens beside products and attention, in torch, and which code does it in this process.

Norm, router and rotation take and give fp32 whatever the compute dtype.
T tokens, H hidden, E experts, K chosen, Q query heads, KV key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qmix.kernels import native
from qmix.kernels.cpu import FEW, few_rows


class LayerOps(Protocol):
    """TorchLayerOps has the meaning of each."""

    name: str

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor: ...

    def route(self, x: Tensor, weight: Tensor, router: Tensor, eps: float, normed: Tensor, ids: Tensor,
              weights: Tensor) -> None: ...

    def guess(self, x: Tensor, weight: Tensor, router: Tensor, eps: float, ids: Tensor) -> None: ...

    def angles(self, positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]: ...

    def rotate(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor: ...


class TorchLayerOps:
    """For any number of tokens. Of up to 8 each gets the bits that it gets alone."""

    name = "torch"

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, in fp32: x [T, H] and weight [H] fp32 -> [T, H] of `dtype`."""
        return rms_norm(x, weight, eps).to(dtype)

    def route(self, x: Tensor, weight: Tensor, router: Tensor, eps: float, normed: Tensor, ids: Tensor,
              weights: Tensor) -> None:
        """norm(x) into normed [T, H]; the K experts with the largest logits router norm(x) into ids [T, K] int64, the
        largest first; softmax over these logits, in fp32, into weights [T, K]. router [E, H] fp64."""
        wide = rms_norm(x, weight, eps)
        top, chosen = router_logits(wide, router).topk(ids.shape[1])
        torch.softmax(top, -1, out=weights)
        ids.copy_(chosen)
        normed.copy_(wide)

    def guess(self, x: Tensor, weight: Tensor, router: Tensor, eps: float, ids: Tensor) -> None:
        """What `route` would put into ids: the router of a later layer, asked now."""
        ids.copy_(router_logits(rms_norm(x, weight, eps), router).topk(ids.shape[1]).indices)

    def angles(self, positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """What rotates heads at `positions` [T]: (cos, signed sin), fp32 [T, 1, D], of position * inverse [D / 2], in
        fp32 as transformers has it. The cosine goes through fp64, so that its last bit does not depend on how many
        positions are computed together."""
        angles = (positions[:, None, None].float() * inverse).double()
        cos, sin = angles.cos().float(), angles.sin().float()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def rotate(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding: queries [T, Q * D], keys [T, KV * D]; cos, sin [T, 1, D] of `angles` ->
        [T, Q, D] and [T, KV, D], fp32."""
        count, _, size = cos.shape
        heads = rotate(torch.cat((queries, keys), 1).view(count, -1, size).float(), cos, sin)
        split = queries.shape[1] // size
        return heads[:, :split], heads[:, split:]

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """sum_k weights[:, k] * rows[:, k], strictly in order: rows [T, K, H], weights [T, K] -> [T, H], all fp32."""
        total = rows[:, 0] * weights[:, 0, None]
        for rank in range(1, rows.shape[1]):
            total += rows[:, rank] * weights[:, rank, None]
        return total


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, fp32 (Zhang & Sennrich 2019). x [T, H]; weight [H], None for 1."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """fp32 [T, E]; x [T, H] fp32, router [E, H] fp64. Summed in fp64: in fp32 the last bits, and with
    them now and then a choice, would depend on how many tokens are routed together. Of few tokens even the
    last bit of the fp64 sum does not."""
    return few_rows(x.double(), router).float() if 1 < len(x) <= FEW else F.linear(x.double(), router).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021), Hugging Face's half-split order: dimension i turns with
    i + D/2. x [T, heads, D] fp32, overwritten and returned; cos, sin [T, 1, D] of `angles`.

    D = 4: (a, b, c, d) -> (a cos0 - c sin0, b cos1 - d sin1, c cos0 + a sin0, d cos1 + b sin1).
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(swapped, sin)


TORCH = TorchLayerOps()


def choose_layer_ops(say: Callable[[str], None]) -> LayerOps:
    """The native code where it is built, wanted and passes a test, else torch's."""
    for level in native.wanted_levels():
        if agrees(own := native.LayerOps(level)):
            return own
        say(f"the native norm and router failed their self-test here ({level}): the next best kernel is used")
    return TORCH


def agrees(own: LayerOps) -> bool:
    """Whether `own` gives what torch gives, on random numbers, up to fp32 sums."""
    random = torch.Generator().manual_seed(6)
    x, weight, router = (torch.randn(*shape, generator=random) for shape in ((3, 200), (200,), (7, 200)))
    results: list[list[Tensor]] = []
    for ops in (own, TORCH):
        normed, ids, weights = torch.empty(3, 200), torch.empty(3, 2, dtype=torch.int64), torch.empty(3, 2)
        ops.route(x, weight, router.double(), 1e-5, normed, ids, weights)
        guesses = torch.empty(3, 2, 3, dtype=torch.int64)[:, 1]
        ops.guess(x, weight, router.double(), 1e-5, guesses)
        cos, sin = ops.angles(torch.tensor([0, 3, 4000]), weight[:20])
        queries, keys = ops.rotate(x[:, :120], x[:, 120:160], cos, sin)
        results.append([normed, weights, ops.norm(x, weight, 1e-5, torch.float32), cos, sin, queries, keys,
                        ops.combine(x.view(3, 2, 100), weights), ids.float(), guesses.float()])
    return all(torch.allclose(got, want, rtol=1e-5, atol=1e-6) for got, want in zip(*results, strict=True))
