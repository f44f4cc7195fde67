"""Adds up what windows scored: 20 bytes a token, whatever the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, exp
from typing import Any

import torch
from torch import Tensor

from qmix.evaluate.score import Scores
from qmix.evaluate.windows import Window

EDGES = (1, 16, 64, 256, 1024, 4096, 16384)  # of the rows by position: a row begins at each


class Tally:
    """The scores of windows, added in the text's order."""

    def __init__(self, windows: Sequence[Window], compared: bool):
        size = sum(window.scored for window in windows)
        other = size if compared else 0
        self._scores = Scores(torch.empty(size), torch.empty(other), torch.empty(other), torch.empty(other))
        self._positions = torch.empty(size, dtype=torch.int32)
        self.tokens = 0

    def add(self, window: Window, scores: Scores) -> None:
        at = slice(self.tokens, self.tokens + window.scored)
        for whole, part in zip(self._scores.columns, scores.columns, strict=True):
            if len(whole):
                whole[at] = part
        self._positions[at] = torch.arange(window.first - window.begin, window.end - window.begin, dtype=torch.int32)
        self.tokens = at.stop

    @property
    def perplexity(self) -> float:
        """So far."""
        return exp(_mean(self._scores.loss[:self.tokens]))

    def results(self) -> dict[str, Any]:
        """perplexity, loss, and beside a reference reference_perplexity, kl_mean, kl_p99 (99 % of the tokens are no
        farther, nearest rank) and top1, a share of 1; None where there is none. positions: rows."""
        scores, compared = self._scores, len(self._scores.kl) > 0
        loss = _mean(scores.loss)
        return {"perplexity": exp(loss), "loss": loss,
                "reference_perplexity": exp(_mean(scores.reference_loss)) if compared else None,
                "kl_mean": _mean(scores.kl) if compared else None,
                "kl_p99": float(scores.kl.sort().values[ceil(0.99 * len(scores.kl)) - 1]) if compared else None,
                "top1": _mean(scores.agree) if compared else None,
                "positions": list(self._rows(compared))}

    def _rows(self, compared: bool) -> Iterator[dict[str, Any]]:
        """By position in the window, 0 being its first token: how a longer context helps, and whether it hurts."""
        for first, end in zip(EDGES, (*EDGES[1:], 2**31 - 1), strict=True):
            inside = (self._positions >= first) & (self._positions < end)
            if not (tokens := int(inside.sum())):
                continue
            last = int(self._positions[inside].max())
            row: dict[str, Any] = {"first": first, "last": last, "tokens": tokens,
                                   "loss": _mean(self._scores.loss[inside])}
            if compared:
                row |= {"kl_mean": _mean(self._scores.kl[inside]), "top1": _mean(self._scores.agree[inside])}
            yield row


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
