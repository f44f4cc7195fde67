"""Judges logits: how likely the text's own next token was, and how far from a reference's distribution they are.

All is computed in fp64, a few rows at a time: near a good quantization the divergence is a small difference of large
logarithms.

    loss = -log p(target)                             natural logarithm
    KL(ref || model) = sum over the vocabulary of p_ref (log p_ref - log p)
    agree: whether both models find the same token the likeliest; among equal ones the lowest id

n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import QmixError
from qmix.offload.workspace import SCORED_ROWS


@dataclass(frozen=True, slots=True)
class Scores:
    """By token, fp32 [n]: loss, and beside a reference its loss, the KL divergence (nats, >= 0) and agreement (0 or 1);
    these three are empty without one."""

    loss: Tensor
    reference_loss: Tensor
    kl: Tensor
    agree: Tensor

    @property
    def columns(self) -> tuple[Tensor, ...]:
        return self.loss, self.reference_loss, self.kl, self.agree


def score(pieces: Iterator[Tensor], targets: Tensor, reference: Iterator[Tensor] | None = None) -> Scores:
    """Logits in pieces [n, V] fp32, after which the `targets` int64 came; the reference's in the same pieces.

    One piece of each is alive at a time. QmixError where a logit is not a number.
    """
    shape = (0 if reference is None else len(targets),)
    scores = Scores(torch.empty(len(targets)), torch.empty(shape), torch.empty(shape), torch.empty(shape))
    done = 0
    while done < len(targets):
        logits = next(pieces)
        other = None if reference is None else next(reference)
        for first in range(0, len(logits), SCORED_ROWS):
            part, at = slice(first, first + SCORED_ROWS), slice(done + first, done + min(len(logits),
                                                                                         first + SCORED_ROWS))
            _judge(scores, at, logits[part], targets[at], None if other is None else other[part])
        done += len(logits)
        del logits, other  # before the next are made
    return scores


def continuations(pieces: Iterator[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of m continuations [n, m] int64, whose ids come after the n rows of the pieces: log-likelihood fp64 [m], and
    whether each of its ids is the likeliest [m]."""
    likely = torch.zeros(targets.shape[1], dtype=torch.float64)
    greedy = torch.ones(targets.shape[1], dtype=torch.bool)
    done = 0
    for logits in pieces:
        for part in logits.split(SCORED_ROWS):
            wanted = targets[done:done + len(part)]
            likely += _log_probabilities(part, "the model").gather(1, wanted).sum(0)
            greedy &= (part.argmax(1)[:, None] == wanted).all(0)
            done += len(part)
        del logits, part
    return likely, greedy


def _judge(scores: Scores, at: slice, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
    ours = _log_probabilities(logits, "the model")
    scores.loss[at] = -_of(ours, targets)
    if reference is not None:
        theirs = _log_probabilities(reference, "the reference")
        scores.reference_loss[at] = -_of(theirs, targets)
        scores.agree[at] = (logits.argmax(1) == reference.argmax(1)).float()
        scores.kl[at] = ours.neg_().add_(theirs).mul_(theirs.exp_()).sum(1).clamp_(min=0).float()


def _log_probabilities(logits: Tensor, whose: str) -> Tensor:
    if not torch.isfinite(logits).all():
        raise QmixError(f"{whose}'s output is not a number",
                        "its store may be damaged: check it with `qmix verify --deep`")
    return logits.double().log_softmax(1)


def _of(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return log_probabilities.gather(1, targets[:, None])[:, 0].float()
