"""Which earlier states of a session are kept, so that a recurrent model can go back.

Of each prompt two: where it begins, to which `/undo` goes; and TAIL tokens before its end, to which `/regen` goes.
There the next prompt stops being the same, too, if a chat template drops the reasoning of earlier turns: TAIL is longer
than what templates put before an answer ("<|im_start|>assistant\\n<think>\\n" has 5 tokens).

At most SNAPSHOTS are kept. The one that saves the fewest tokens goes first, the newest two aside: of 40, 5000, 5016,
5400 and 5500 the one at 5016, since going back to 5000 instead costs 16 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qmix.kernels.kv_size import SNAPSHOTS

TAIL = 16
NEWEST = 2  # that stay


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session at `length` positions. cuts: how often it had been cut back by then."""

    length: int
    cuts: int
    layers: Sequence[tuple[Tensor, ...]]


class Snapshots:
    """Of one session, by length, ascending."""

    def __init__(self) -> None:
        self._snapshots: list[Snapshot] = []

    def prepare(self, before: Snapshot, count: int) -> tuple[int, ...]:
        """A prompt of `count` tokens begins: keep the session before it, and make room for those within it, whose
        lengths are returned."""
        mark = before.length + count - TAIL
        marks = (mark,) if mark > before.length else ()
        if before.length > self.best(before.length):
            self._snapshots.append(before)
        while len(self._snapshots) + len(marks) > SNAPSHOTS:
            saved = [one.length - earlier for one, earlier in zip(
                self._snapshots, (0, *(one.length for one in self._snapshots)), strict=False)]
            del self._snapshots[min(range(len(saved) - NEWEST + len(marks)), key=saved.__getitem__)]
        return marks

    def add(self, snapshot: Snapshot) -> None:
        """Keep one behind all others, for which `prepare` made room."""
        assert self.best(snapshot.length) < snapshot.length and len(self._snapshots) < SNAPSHOTS
        self._snapshots.append(snapshot)

    def best(self, length: int) -> int:
        """The length of the longest one that has at most `length`; 0 for none."""
        return max((one.length for one in self._snapshots if one.length <= length), default=0)

    def at(self, length: int) -> Snapshot:
        return next(one for one in self._snapshots if one.length == length)

    def cut(self, length: int) -> None:
        """The session goes back to `length`: longer ones have other tokens than will follow."""
        self._snapshots = [one for one in self._snapshots if one.length <= length]
