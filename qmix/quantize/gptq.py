"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): codes are chosen so that the outputs of a matrix change little on
inputs that were seen, not so that its weights do. The columns that are not yet rounded compensate the error of each
column.

With inputs X [n, K] the damage done by an error D [N, K] of the weights is |D X^T|^2 = tr(D S D^T), S = X^T X. With
the Cholesky factor S = L L^T, L' = L / diag(L) and pivots diag(L)^2 it is |D L'|^2 weighed by the pivots, and column j
of D L' is D_j + sum over i > j of D_i L'_ij. So columns are walked from the last to the first. Column j is rounded
after adding what the errors of the columns behind it require,

    q_j = round to grid(w_j + sum over i > j of (w_i - q_i) L'_ij)

and the rounding error there is column j of D L'. This is GPTQ with the columns in reverse, in the form of QuIP's LDLQ
(Chee et al. 2023, arXiv 2307.13304, theorem 6 proves the two equal). It needs neither the inverse of S nor a second
factorization, and gives the damage without extra work.

The scale and zero point of a group are fitted when the walk arrives at it, to the weights that would be best if there
were no grid. With M [N, W], what the errors behind require of the group's columns, and its diagonal block L'_g, these
weights are w + M L'_g^-1 (and not w + M: if a column may move, those before it need not move for its sake).

S is damped: its diagonal is raised by 1 % of its mean, and by more the fewer inputs there are for K columns. Without
damping, 512 inputs for 512 columns make a model worse than hqq does. With damping they make it better, and with ever
fewer inputs the codes approach those of rounding to the grid.

Memory: S, fp32 [K, K], is factored in place: 784 MiB for K = 14336. A worker holds strips of 1024 rows: their errors,
fp32, 56 MiB. Sums are cut by shapes only, each piece computed by one thread: no bit depends on how many threads the
pool has.

n inputs, N rows, K columns, g group size, G groups of W columns (W = g, or less in the last), R rows of a strip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

TILE = 512  # rows and columns of S that one task multiplies
DAMPING = 0.01  # of the mean of S's diagonal, added to it at least: the authors' value
SCARCE = 0.3  # times K / n of that mean, where it is more: few inputs show directions that are accidents of theirs
HARDER = 10.0  # times as much where the factorization fails

Item = TypeVar("Item")
Fit = Callable[[Tensor], tuple[Tensor, Tensor]]  # weights fp32 [W, R] -> (scale, zero) fp32 [R], exact in bf16


@dataclass(frozen=True, slots=True)
class Factor:
    """lower fp32 [K, K]: L' below its diagonal, anything on and above; pivots fp32 [K]; damping: what was added to
    S's diagonal before."""

    lower: Tensor
    pivots: Tensor
    damping: float


class DegenerateInputs(Exception):
    """They tell nothing of what a matrix is given: all of them are zero, or one is not finite."""


class Moments:
    """S = X^T X of the inputs of a matrix, summed up batch by batch. Only tiles on and below the diagonal are."""

    def __init__(self, cols: int):
        self._sum = torch.zeros(cols, cols)
        self._count = 0

    def add(self, x: Tensor, pool: Executor | None = None) -> None:
        """x fp32 [n, K]."""
        def multiply(tile: tuple[slice, slice]) -> None:
            rows, cols = tile
            self._sum[rows, cols].addmm_(x[:, rows].T, x[:, cols])

        _run(pool, multiply, _tiles(len(self._sum)))
        self._count += len(x)

    def factor(self, pool: Executor | None = None) -> Factor:
        """Add the damping and factor S in its own memory: this object is used up. Damped harder where that fails;
        DegenerateInputs where S is not finite or zero."""
        s = self._sum
        diagonal = s.diagonal().clone()
        mean = diagonal.mean().item()
        if not 0 < mean < float("inf"):
            raise DegenerateInputs(f"inputs with a mean square sum of {mean}")
        del self._sum
        for rows, cols in _tiles(len(s)):  # the sum once more above the diagonal, should the first try fail
            if rows != cols:
                s[cols, rows] = s[rows, cols].T
        blocks = [s[rows, rows].clone() for rows in _ranges(len(s))]
        damping = max(DAMPING, SCARCE * len(s) / self._count) * mean
        while True:
            s.diagonal().copy_(diagonal + damping)
            if _cholesky(s, pool):
                break
            damping *= HARDER
            for rows, block in zip(_ranges(len(s)), blocks, strict=True):
                s[rows, rows] = block
                s[rows.stop:, rows] = s[rows, rows.stop:].T
        roots = s.diagonal().clone()
        s.div_(roots)
        return Factor(s, roots.square_(), damping)


def _cholesky(s: Tensor, pool: Executor | None) -> bool:
    """Replace the lower triangle of S [K, K] by that of L, block column by block column; the upper triangle outside the
    diagonal blocks is left alone. False where S is not positive definite."""
    for here in _ranges(len(s)):
        block, failed = torch.linalg.cholesky_ex(s[here, here])
        if failed:
            return False
        s[here, here] = block
        below = [slice(here.stop + rows.start, here.stop + rows.stop) for rows in _ranges(len(s) - here.stop)]

        def solve(rows: slice, here: slice = here, block: Tensor = block) -> None:
            s[rows, here] = torch.linalg.solve_triangular(block.mT, s[rows, here], upper=True, left=False)

        def subtract(tile: tuple[slice, slice], here: slice = here) -> None:
            rows, cols = tile
            s[rows, cols].addmm_(s[rows, here], s[cols, here].T, alpha=-1)

        _run(pool, solve, below)
        _run(pool, subtract, [(rows, cols) for i, rows in enumerate(below) for cols in below[:i + 1]])
    return True


@dataclass(frozen=True, slots=True)
class Walked:
    """What came of a strip: codes fp32 [K, R], centred (q - 2^(bits - 1)); scale, zero fp32 [G, R]; damage: tr(D S D^T)
    with the damped S; sum_sq_err: |D|^2, both in float64."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    damage: float
    sum_sq_err: float


def walk(weights: Tensor, factor: Factor, group_size: int, bits: int, fit: Fit) -> Walked:
    """Choose the codes of a strip: weights fp32 [K, R], transposed, overwritten. R rows do not depend on each other."""
    cols, rows = weights.shape
    groups, half = -(-cols // group_size), 1 << (bits - 1)
    errors, codes = weights, torch.empty(cols, rows)  # behind the walk `weights` holds w - q
    scale, zero = torch.empty(2, groups, rows).unbind()
    damage = sum_sq_err = 0.0
    for group in reversed(range(groups)):
        begin, end = group * group_size, min(cols, (group + 1) * group_size)
        here = slice(begin, end)
        moves, block = factor.lower[end:, here].T @ errors[end:], factor.lower[here, here]
        best = torch.linalg.solve_triangular(block.mT, moves, upper=True, unitriangular=True).add_(weights[here])
        scale[group], zero[group] = fit(best)
        left = moves.add_(weights[here])
        _round_group(left, weights[here], codes[here], block, scale[group], zero[group], half)
        damage += left.square_().mul_(factor.pivots[here, None]).sum(dtype=torch.float64).item()
        sum_sq_err += errors[here].square().sum(dtype=torch.float64).item()
    return Walked(codes, scale, zero, damage, sum_sq_err)


def _round_group(asked: Tensor, weights: Tensor, codes: Tensor, lower: Tensor, scale: Tensor, zero: Tensor,
                 half: int) -> None:
    """Columns of a group, last to first: asked [W, R] becomes what rounding leaves of it, weights [W, R] w - q; codes
    [W, R] are filled. lower [W, W]."""
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    for j in reversed(range(len(asked))):
        code, error = codes[j], weights[j]
        torch.sub(asked[j], zero, out=code)
        code.mul_(inverse).round_().clamp_(-half, half - 1)
        decoded = torch.addcmul(zero, code, scale)
        error.sub_(decoded)
        asked[j].sub_(decoded)
        if j:
            asked[:j].addr_(lower[j, :j], error)


def _ranges(count: int) -> list[slice]:
    return [slice(i, min(count, i + TILE)) for i in range(0, count, TILE)]


def _tiles(count: int) -> list[tuple[slice, slice]]:
    """(rows, columns) of every tile on and below the diagonal."""
    ranges = _ranges(count)
    return [(rows, cols) for i, rows in enumerate(ranges) for cols in ranges[:i + 1]]


def _run(pool: Executor | None, task: Callable[[Item], None], items: Iterable[Item]) -> None:
    for _ in (map if pool is None else pool.map)(task, items):
        pass
