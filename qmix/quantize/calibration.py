"""A text to calibrate on: tokens, cut into sequences.

S sequences of L tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.store import CalibrationEntry

LENGTH = 512  # tokens of a sequence
TOKENS = 65536  # of all of them, unless asked for otherwise


@dataclass(frozen=True, slots=True)
class Calibration:
    """A text to calibrate on. ids: int64 [S, L], each row beginning as a text of its own does."""

    ids: Tensor

    @classmethod
    def of_text(cls, head: Sequence[int], ids: Sequence[int], tokens: int, most: int) -> Calibration:
        """Cut `ids`, a text, into sequences of up to 512 tokens (or `most`, where the model takes no more), `head` in
        front of each: as many as make `tokens`, spread evenly over the text, or all that it gives. The rest of a text
        that fills no whole sequence is left out, unless there is no other.

        head [1], ids 2..9, length 4: [1 2 3 4], [1 5 6 7]; UsageError for a text without tokens.
        """
        length = min(LENGTH, most, max(len(head) + 1, tokens), len(head) + len(ids))
        body = length - len(head)
        if body < 1 or not ids:
            raise UsageError("the calibration text has no tokens", "name a longer one with --calibration")
        there = len(ids) // body
        count = min(there, max(1, tokens // length))
        starts = [there * i // count * body for i in range(count)]
        return cls(torch.tensor([[*head, *ids[start:start + body]] for start in starts]))

    def part(self, tokens: int) -> Calibration:
        """So many tokens of it, in whole sequences (one at least) spread evenly; all where it has no more."""
        count = max(1, min(len(self.ids), tokens // self.length))
        return Calibration(self.ids[torch.arange(count) * len(self.ids) // count])

    def sample(self, tokens: int, length: int) -> Calibration:
        """About so many tokens of it: the beginnings, of up to `length` tokens, of sequences spread evenly."""
        length = min(length, self.length)
        count = max(1, min(len(self.ids), tokens // length))
        return Calibration(self.ids[torch.arange(count) * len(self.ids) // count, :length].contiguous())

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def entry(self) -> CalibrationEntry:
        """What the manifest says of it."""
        return CalibrationEntry(self.tokens, self.length, self.digest)

    @property
    def digest(self) -> str:
        """Hex digest of the ids and their cut."""
        text = repr((tuple(self.ids.shape), self.ids.flatten().tolist()))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
