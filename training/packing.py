"""Packs conversations into rows of equal length, the batches of the training.

A row holds whole conversations one after another; the positions start again at 0 with each of
them, by which `transformers` knows that they must not see each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from corpus import stream
from tokenizer import ChatEncoder

# The user's words and the role marks count a little, so that the model learns to read them.
USER_WEIGHT = 0.1

WAITING = 48  # conversations to choose from when a row is filled


@dataclass(frozen=True)
class Batch:
    """`ids`, `positions` int64 and `weights` float32, all of shape (rows, length).

    The weight belongs to the token itself as a target; it is 0 for fillers and first tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor


def rows(encoder: ChatEncoder, seed: int, length: int, longest: int) -> Iterator[tuple]:
    """Endless rows of (ids, positions, weights) lists with `length` entries each.

    A row takes the longest waiting conversation that still fits, so that little is left empty.
    """
    encoded = (encoder.encode(messages) for messages in stream(seed, longest))
    waiting = [next(encoded) for _ in range(WAITING)]
    while True:
        ids: list[int] = []
        positions: list[int] = []
        weights: list[float] = []
        # The oldest one always goes first, cut to the row if need be: none waits for ever.
        pick = 0
        while pick >= 0:
            new, written = (part[:length] for part in waiting.pop(pick))
            waiting.append(next(encoded))
            ids += new
            positions += range(len(new))
            weights += [0.0] + [1.0 if w else USER_WEIGHT for w in written[1:]]
            room = length - len(ids)
            fits = [i for i, (doc, _) in enumerate(waiting) if len(doc) <= room]
            pick = max(fits, key=lambda i: len(waiting[i][0]), default=-1)
        fill = length - len(ids)
        yield ids + [encoder.eos] * fill, positions + list(range(fill)), weights + [0.0] * fill


def batches(encoder: ChatEncoder, seed: int, tokens: int, length: int) -> Iterator[Batch]:
    """Endless batches of `tokens` tokens; every fifth has long conversations in long rows."""
    short = rows(encoder, seed, length, longest=4)
    long = rows(encoder, seed + 1, 2 * length, longest=10)
    number = 0
    while True:
        source, width = (long, 2 * length) if number % 5 == 4 else (short, length)
        picked = [next(source) for _ in range(tokens // width)]
        ids, positions, weights = zip(*picked, strict=True)
        yield Batch(torch.tensor(ids), torch.tensor(positions), torch.tensor(weights))
        number += 1
