"""Packs conversations into rows of equal length, the batches of the training.

A row holds whole conversations one after another; the positions start again at 0 with each of
them, by which `transformers` knows that they must not see each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
import words
from corpus import stream
from drills import drill, echo
from tokenizer import ChatEncoder

# The user's words and the role marks count a little, so that the model learns to read them. Words
# of the lists that were named before count more: using what was asked for is the hardest to learn.
USER_WEIGHT = 0.1
COPY_WEIGHT = 3.0

WAITING = 48  # conversations to choose from when a row is filled


@dataclass(frozen=True)
class Batch:
    """`ids`, `positions` int64 and `weights` float32, all of shape (rows, length).

    The weight belongs to the token itself as a target; it is 0 for fillers and first tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor


def listed_pieces(encoder: ChatEncoder) -> frozenset[int]:
    """The ids of the pieces that make up the nouns and names of the word lists."""
    listed = [*words.KINDS, *words.FEMALE_NAMES, *words.MALE_NAMES]
    listed += [thing.noun for thing in words.THINGS] + [place.noun for place in words.PLACES]
    found = {piece for text in listed for piece in encoder.pieces.encode(text)}
    return frozenset(p for p in found if len(encoder.pieces.id_to_piece(p)) > 3)


def token_weights(ids: list[int], written: list[bool], listed: frozenset[int]) -> list[float]:
    """The weight of each token of a conversation as a target."""
    weights = [0.0]
    seen: set[int] = set()
    for number, answer in zip(ids[1:], written[1:], strict=True):
        copied = answer and number in seen and number in listed
        weights.append(COPY_WEIGHT if copied else 1.0 if answer else USER_WEIGHT)
        seen.add(number)
    return weights


Document = tuple[list[int], list[int], list[float]]  # ids, positions, weights, of one length


def conversations(encoder: ChatEncoder, seed: int, longest: int) -> Iterator[Document]:
    """The conversations of the corpus as endless documents."""
    listed = listed_pieces(encoder)
    for messages in stream(seed, longest):
        ids, written = encoder.encode(messages)
        yield ids, list(range(len(ids))), token_weights(ids, written, listed)


def exercises(encoder: ChatEncoder, seed: int) -> Iterator[Document]:
    """Endless exercises in copying: tiny tales, and every third time random tokens to repeat."""
    rng = Random(seed)
    listed = listed_pieces(encoder)
    user, assistant = encoder.roles["user"], encoder.roles["assistant"]
    first_word = 6 + 256  # after the special tokens and the single bytes
    while True:
        if rng.random() < 0.33:
            said = echo(rng, encoder.pieces.vocab_size(), first_word)
            ids = [encoder.bos, user, *said, encoder.eos, assistant, *said, encoder.eos]
            weights = [0.0] * (len(said) + 4) + [1.0] * (len(said) + 1)
        else:
            ids, written = encoder.encode(drill(rng))
            weights = token_weights(ids, written, listed)
        yield ids, list(range(len(ids))), weights


def rows(documents: Iterator[Document], length: int, filler: int) -> Iterator[Document]:
    """Endless rows with `length` entries each.

    A row takes the longest waiting document that still fits, so that little is left empty.
    """
    waiting = [next(documents) for _ in range(WAITING)]
    while True:
        ids: list[int] = []
        positions: list[int] = []
        weights: list[float] = []
        # The oldest one always goes first, cut to the row if need be: none waits for ever.
        pick = 0
        while pick >= 0:
            document = waiting.pop(pick)
            waiting.append(next(documents))
            ids += document[0][:length]
            positions += document[1][:length]
            weights += document[2][:length]
            room = length - len(ids)
            fits = [i for i, d in enumerate(waiting) if len(d[0]) <= room]
            pick = max(fits, key=lambda i: len(waiting[i][0]), default=-1)
        fill = length - len(ids)
        yield ids + [filler] * fill, positions + list(range(fill)), weights + [0.0] * fill


class Batches:
    """Makes batches of `tokens` tokens in rows of `length`, or of twice that for long chats."""

    def __init__(self, encoder: ChatEncoder, seed: int, tokens: int, length: int) -> None:
        self.rng = Random(seed)
        self.tokens, self.length = tokens, length
        self.short = rows(conversations(encoder, seed, 4), length, encoder.eos)
        self.long = rows(conversations(encoder, seed + 1, 10), 2 * length, encoder.eos)
        self.drills = rows(exercises(encoder, seed + 2), length // 3, encoder.eos)

    def next(self, drills: float) -> Batch:
        """The next batch; with probability `drills` it has exercises, and else one in five has
        long conversations."""
        source, width = self.short, self.length
        if self.rng.random() < drills:
            source, width = self.drills, self.length // 3
        elif self.rng.random() < 0.2:
            source, width = self.long, 2 * self.length
        picked = [next(source) for _ in range(self.tokens // width)]
        ids, positions, weights = zip(*picked, strict=True)
        return Batch(torch.tensor(ids), torch.tensor(positions), torch.tensor(weights))
