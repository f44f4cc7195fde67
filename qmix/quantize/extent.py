"""How much of a model and a text a sampled measurement (sampled.py) looks at, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.quantize.calibration import Calibration
from qmix.spec import Model

SHARE = 128  # tokens an expert on average, of the text, and again of all copies together
LENGTH = 128  # tokens of a sequence
PROBES = 8  # layers with a copy, at most
ONE_IN = 128  # rows of a matrix, of which one is quantized, but of w2 at least
LEAST_ROWS = 8  # and twice as many inner units
GOLDEN = 0.6180339887498949  # multiples of it are spread evenly over the fractions


@dataclass(frozen=True, slots=True)
class Extent:
    """text: of which copies have the first `copied` tokens; layers: in which a copy begins, each perturbed there."""

    text: Calibration
    copied: int
    layers: tuple[int, ...]

    @classmethod
    def of(cls, model: Model, calibration: Calibration) -> Extent:
        share = SHARE * model.num_experts // model.top_k
        text = calibration.sample(share, LENGTH)
        layers = probed(model.record_layers)
        sequences = max(1, min(len(text.ids), round(share / len(layers) / text.length)))
        return cls(text, sequences * text.length, layers)

    @property
    def rows(self) -> int:
        """Of the text and of all copies."""
        return self.text.tokens + len(self.layers) * self.copied


def probed(layers: Sequence[int]) -> tuple[int, ...]:
    """Of a model's layers with records those with a copy: all of a few, else PROBES of them, closer together at both
    ends, where the quotient changes most (the abscissas of Chebyshev): of 32 layers 0, 2, 6, 12, 19, 25, 29, 31."""
    if len(layers) <= PROBES:
        return tuple(layers)
    at = ((1 - math.cos(math.pi * i / (PROBES - 1))) / 2 for i in range(PROBES))
    return tuple(layers[i] for i in sorted({round((len(layers) - 1) * share) for share in at}))


def spread(count: int, most: int, turn: int = 0) -> Tensor:
    """Up to `most` of range(count), evenly spread; others in another `turn`: 8, 2 -> [0, 4]; 8, 2, 1 -> [2, 6]."""
    if count <= most:
        return torch.arange(count)
    return torch.arange(most) * count // most + int(turn * GOLDEN % 1 * (count // most))


def sampled_rows(count: int, fold: int = 1) -> int:
    """Of so many rows, how many are quantized; `fold` times as many of a few."""
    return min(count, max(fold * LEAST_ROWS, count // ONE_IN))


def interpolated(factors: Mapping[int, float], layer: int) -> float:
    """The factor of a layer, geometrically between its neighbours: {0: 1, 4: 16}, 2 -> 4; beyond the ends theirs."""
    if layer in factors:
        return factors[layer]
    before, after = [i for i in factors if i < layer], [i for i in factors if i > layer]
    if not before or not after:
        return factors[max(before) if before else min(after)]
    low, high = max(before), min(after)
    share = (layer - low) / (high - low)
    if min(factors[low], factors[high]) <= 0:  # nothing was measured there
        return factors[low] + share * (factors[high] - factors[low])
    return math.exp((1 - share) * math.log(factors[low]) + share * math.log(factors[high]))
