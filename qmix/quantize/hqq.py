"""Half-quadratic quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog): the zero point that suits most weights
of a group, while a few weights may end with a large error.

It minimizes |w - dequantized(w)|^p with p < 1. An auxiliary error e splits this in two, and is held to the true error r
with strength beta. The two steps alternate: e = shrink(r) = sign(r) relu(|r| - |r|^(p-1) / beta), and the zero point
moves by the mean of r - e = sign(r) min(|r|, |r|^(p-1) / beta). So a large error hardly moves it.

Where this differs from the authors' code:
- errors are in steps of the scale. Theirs are in units of the weights, far below the threshold (0.17 for
  beta = 10) in any real layer, so that e is always zero there and the zero point follows plain means;
- r - e is replaced by two straight lines, within 6 % of it up to half a step: the power takes most of the time;
- the zero point moves four times as far as the mean, which takes a quarter of the iterations;
- each group keeps the best zero point it has met, rounding to nearest's included, so that no
  group's mean absolute error is larger than rtn's.

A tile has G groups of W columns and R rows, [G, W, R]: G * R groups, each with its own scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

P, BETA, KAPPA = 0.7, 10.0, 1.01  # the norm, and beta with its growth per iteration: the authors' values
ITERATIONS = 12
RELAX = 4.0
ENOUGH = 0.999  # a tile stops after an iteration that left more than this share of its error


def refine(steps: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, work: Tensor, middle: int = 8) -> Tensor:
    """A better zero point for each group: fp32 [G, R], exact in bf16.

    steps fp32 [G, W, R]: weights divided by the scale, kept; scale, its inverse and zero: fp32 [G, R];
    work: fp32 [2, G, W, R], overwritten; middle: half the number of codes.
    """
    width = steps.shape[1]
    residual, scratch = work.unbind()
    start, error, best, move, bent = torch.empty(5, *zero.shape).unbind()
    shift, total = zero * inverse, float("inf")
    best_shift = shift.clone()
    _rounding_error(steps, shift, residual, scratch, middle)
    torch.sum(torch.abs(residual, out=scratch), 1, out=start)
    best.copy_(start)
    for iteration in range(ITERATIONS):
        knee, slope = shrink_lines(BETA * KAPPA**iteration)
        torch.sum(residual, 1, out=move)
        torch.sum(torch.clamp(residual, -knee, knee, out=scratch), 1, out=bent)
        shift = shift.add(move, alpha=-slope * RELAX / width).add_(bent, alpha=(1 + slope) * RELAX / width)
        _rounding_error(steps, shift, residual, scratch, middle)
        torch.sum(torch.abs(residual, out=scratch), 1, out=error)
        torch.where(error < best, shift, best_shift, out=best_shift)
        torch.minimum(best, error, out=best)
        total, last = best.sum().item(), total
        if total > ENOUGH * last:
            break
    rounded = (best_shift * scale).bfloat16().float()
    _rounding_error(steps, rounded * inverse, residual, scratch, middle)
    torch.sum(torch.abs(residual, out=scratch), 1, out=error)
    return torch.where(error < start, rounded, zero)


def _rounding_error(steps: Tensor, shift: Tensor, out: Tensor, scratch: Tensor, middle: int) -> None:
    """out = what rounding to a code in -middle..middle - 1 leaves of `steps` [G, W, R] around `shift` [G, R]."""
    torch.sub(steps, shift.unsqueeze(1), out=out)
    out.sub_(torch.round(out, out=scratch).clamp_(-middle, middle - 1))


def shrink_lines(beta: float) -> tuple[float, float]:
    """(knee, slope): r - shrink(r) is r up to the knee, and from there falls along the chord to half a step,
    the largest error of a weight that is not clipped: (1 + slope) clamp(r, -knee, knee) - slope r."""
    knee = beta ** (-1 / (2 - P))
    return knee, (knee - 0.5 ** (P - 1) / beta) / (0.5 - knee)
