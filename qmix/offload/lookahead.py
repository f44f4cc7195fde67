"""Prefetched guesses: which records are read before their router has spoken, and whether the guess was right.

A guess takes a slot only when its read begins, a few at a time, because a guess that only waits for the disk would keep
out a record that may be needed. Guesses from one layer ahead withdraw guesses made from farther ahead. The router's
choice withdraws the wrong ones.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import chain

from qmix.config import ExpertKey
from qmix.offload.prefetch import Prefetcher
from qmix.offload.tiers import Tier

Guesses = list[list[list[int]]]  # [T][D][A]: of each token, by distance, the experts guessed, best ranks first


class Lookahead:
    """Reads ahead into `tier` what it is told to expect, and keeps the prefetcher's account of it. window: records
    that are read ahead at a time; with two the disk goes on without a gap."""

    def __init__(self, tier: Tier, prefetcher: Prefetcher, window: int = 2):
        self._tier = tier
        self._prefetcher = prefetcher
        self._window = window
        self._hopes: list[ExpertKey] = []  # nothing was read for them yet, nearest first
        self._account = True
        self._reading: dict[ExpertKey, bool] = {}  # begun, their router has not spoken; whether to account for it

    def expect(self, keys: Sequence[ExpertKey], account: bool = True) -> None:
        """What the coming layers will likely want, nearest and likeliest first. Replaces what was expected before.
        account: these are guesses, to be judged; not so in prefill, where nearly all experts are wanted."""
        for key in [key for key in self._reading if key not in keys]:
            self._withdraw(key)
        self._hopes = [key for key in keys if key not in self._tier]
        self._account = account
        self.pursue()

    def pursue(self) -> None:
        """Begin to read what is expected, as far as the window allows. Worth a call whenever time has passed."""
        if not self._hopes:
            return
        waiting = sum(not self._tier.ready(key) for key in self._reading if key in self._tier)
        while self._hopes and waiting < self._window:
            key = self._hopes.pop(0)
            if key not in self._tier and self._tier.want(key, "speculative"):
                self._reading[key] = self._account
                self._prefetcher.figures[key.layer].issued += self._account
                waiting += 1

    def score_guesses(self, layer: int, chosen: Container[int]) -> int:
        """The router of `layer` has spoken. Returns how many of the records it chose were read ahead in time."""
        figures, in_time = self._prefetcher.figures[layer], 0
        self._hopes = [key for key in self._hopes if key.layer != layer]
        for key in [key for key in self._reading if key.layer == layer]:
            if key.expert not in chosen:
                self._withdraw(key)
                continue
            ready, account = self._tier.ready(key), self._reading.pop(key)
            in_time += ready
            figures.used += account
            figures.late += account and not ready
        return in_time

    def _withdraw(self, key: ExpertKey) -> None:
        """A guess was wrong. What is not there yet is cancelled; what is there may serve another token, but
        counts as wasted."""
        account = self._reading.pop(key)
        taken = self._tier.cancel_guess(key)
        if account:
            figures = self._prefetcher.figures[key.layer]
            figures.cancelled += key not in self._tier
            figures.wasted_bytes += taken if key not in self._tier else len(self._tier.bytes_of(key))


def merged(ahead: Guesses | None) -> list[list[int]]:
    """[T][D][A] -> for each distance the experts of all tokens, best ranks first, each once."""
    if ahead is None:
        return []
    if len(ahead) == 1:
        return ahead[0]
    return [list(dict.fromkeys(chain.from_iterable(zip(*tokens, strict=True)))) for tokens in zip(*ahead, strict=True)]
