"""How the new tokens of one or several sessions are cut: into spans, passes and blocks.

In prefill a span is at most BLOCK tokens of one session, and a pass as many spans as fit `most` tokens, counted from
the first new token: the cut, and with it every bit, depends on the prompt alone, never on a budget. In decode a span is
one token, also of those of one session.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor

from qmix.config import Step
from qmix.forward.kv_cache import SessionCache
from qmix.spec import Rope

BLOCK = 512  # query positions of one attention call


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [begin, end) of a forward's tokens, all new positions of one session from `start` on."""

    cache: SessionCache
    start: int
    begin: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.begin


@dataclass(slots=True)
class Block:
    """Rows [begin, end) of a pass, those of `spans` if it still has all; tables: cos and sin by rope, made once."""

    begin: int
    end: int
    spans: Sequence[Span] = ()
    tables: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)


def counts_of(tokens: int, sessions: int, step: Step) -> list[int]:
    """New tokens of each session: sequence (4, 9, 9) -> [1, 2]."""
    counts = [len(list(run)) for _, run in groupby(step.sequence)] or [tokens]
    if sum(counts) != tokens or len(counts) != sessions or tokens == 0:
        raise ValueError(f"{tokens} tokens, {sessions} caches, but sequence has runs of {counts}")
    return counts


def split_passes(counts: Sequence[int], caches: Sequence[SessionCache], step: Step, most: int) -> list[list[Span]]:
    """The spans of each pass."""
    return list(_passes(_spans(counts, caches, 1 if step.phase == "decode" else BLOCK), most))


def blocks_of(spans: Sequence[Span]) -> list[Block]:
    """What goes through the Ops between two Experts together. A longer span is a block of its own, so that it is
    computed as it would be alone; neighbouring single tokens, of sessions that decode together or of one with drafts,
    share one."""
    first, found = spans[0].begin, []
    for single, group in groupby(spans, lambda span: span.tokens == 1):
        for together in [list(group)] if single else [[span] for span in group]:
            found.append(Block(together[0].begin - first, together[-1].end - first, together))
    return found


def blocks_of_rows(rows: int) -> list[Block]:
    """The same of rows that no span is known of any more: the wanted ones."""
    return [Block(begin, min(rows, begin + BLOCK)) for begin in range(0, rows, BLOCK)]


def _spans(counts: Sequence[int], caches: Sequence[SessionCache], size: int) -> Iterator[Span]:
    """The new tokens of each session, cut into pieces of `size`."""
    first = 0
    for cache, count in zip(caches, counts, strict=True):
        for begin in range(0, count, size):
            yield Span(cache, cache.length + begin, first + begin, first + min(count, begin + size))
        first += count


def _passes(spans: Iterable[Span], most: int) -> Iterator[list[Span]]:
    """Spans in order, as many to a pass as fit `most` tokens."""
    group: list[Span] = []
    for span in spans:
        if group and span.end - group[0].begin > most:
            yield group
            group = []
        group.append(span)
    yield group
