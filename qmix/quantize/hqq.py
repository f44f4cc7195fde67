"""Half-quadratic quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog): the zero point that serves
most of a group's weights, a few being allowed to end far off.

Minimized is |w - dequantized(w)|^p with p < 1, split in two by an auxiliary error e that is held to the
true one, r, with strength beta. In turn e = shrink(r) = sign(r) relu(|r| - |r|^(p-1) / beta), and the zero
point moves by the mean of r - e = sign(r) min(|r|, |r|^(p-1) / beta): a large error hardly moves it.

Where this differs from the authors' code:
- errors are in steps of the scale. Theirs are in units of the weights, far below the threshold (0.17 for
  beta = 10) in any real layer, so that e is always zero there and the zero point follows plain means;
- the zero point moves twice as far as the mean, which halves the iterations;
- each group keeps the best zero point it has met, rounding to nearest's included, so that no
  group's mean absolute error is larger than rtn's.

A tile has G groups of W columns and R rows, [G, W, R]: G * R groups, each with its own scale.
"""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

P, BETA, KAPPA = 0.7, 10.0, 1.01  # the norm, and beta with its growth per iteration: the authors' values
ITERATIONS = 12
RELAX = 2.0
ENOUGH = 0.999  # a tile stops after an iteration that left more than this share of its error
LOG_CENTER = 0.0430  # the middle of log2(1 + m) - m for m in 0..1


def refine(steps: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, work: Tensor) -> Tensor:
    """A better zero point for each group: fp32 [G, R], exact in bf16.

    steps fp32 [G, W, R]: weights divided by the scale, kept; scale, its inverse and zero: fp32 [G, R];
    work: fp32 [4, G, W, R], overwritten.
    """
    width = steps.shape[1]
    residual, size, scratch, limit = work.unbind()
    start, error, best, move = torch.empty(4, *zero.shape).unbind()
    place, total = zero * inverse, float("inf")
    best_place = place.clone()
    _rounding_error(steps, place, residual, size)
    torch.sum(torch.abs(residual, out=size), 1, out=start)
    best.copy_(start)
    for offset in _shrink_offsets():
        _shrink_limit(size, offset, scratch, limit)
        torch.clamp(residual, torch.neg(limit, out=scratch), limit, out=residual)
        place = torch.add(place, torch.sum(residual, 1, out=move), alpha=RELAX / width)
        _rounding_error(steps, place, residual, size)
        torch.sum(torch.abs(residual, out=size), 1, out=error)
        torch.where(error < best, place, best_place, out=best_place)
        torch.minimum(best, error, out=best)
        total, last = best.sum().item(), total
        if total > ENOUGH * last:
            break
    rounded = (best_place * scale).bfloat16().float()
    _rounding_error(steps, rounded * inverse, residual, size)
    torch.sum(torch.abs(residual, out=size), 1, out=error)
    return torch.where(error < start, rounded, zero)


def _rounding_error(steps: Tensor, place: Tensor, out: Tensor, scratch: Tensor) -> None:
    """out = what rounding to a code in -8..7 leaves of `steps` [G, W, R] around `place` [G, R]."""
    torch.sub(steps, place.unsqueeze(1), out=out)
    out.sub_(torch.round(out, out=scratch).clamp_(-8, 7))


def _shrink_offsets() -> tuple[Tensor, ...]:
    """What `_shrink_limit` needs to know of beta, per iteration: fp32 scalars."""
    growth = torch.arange(ITERATIONS, dtype=torch.float64) * log2(KAPPA) + log2(BETA)
    return (2**23 * ((127 - LOG_CENTER) * (2 - P) - growth)).float().unbind()


def _shrink_limit(size: Tensor, offset: Tensor, scratch: Tensor, out: Tensor) -> None:
    """out = size^(P-1) / beta within 4 %, and a large finite number where size is 0.

    `pow` would take half of the time. A positive float's bits, read as an integer, are nearly its base-2
    logarithm, times 2^23 and shifted by 127; so a power is a multiplication and an addition.
    """
    scratch.copy_(size.view(torch.int32))
    out.view(torch.int32).copy_(torch.add(offset, scratch, alpha=P - 1, out=scratch))
