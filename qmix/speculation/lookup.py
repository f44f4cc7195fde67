"""Drafts from the text itself (prompt lookup, Saxena 2023; the n-gram drafts of llama.cpp and vLLM): what followed the
last few ids when they occurred together before. Pure, with a constant cost per id however long the text is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GRAMS = (3, 2)  # ids that must stand together again, the longer tried first; one alone is right too rarely
REACH = 16  # how far back a match is measured


@dataclass(frozen=True, slots=True)
class Draft:
    """ids: what may come next. match: how many of the last ids stood before `ids` in the earlier place too, at
    most REACH; the longer, the more the draft is worth."""

    ids: tuple[int, ...]
    match: int


class Lookup:
    """An index over a growing sequence of ids."""

    def __init__(self, ids: Iterable[int] = ()):
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n ids: where the id stands that followed them last
        for token_id in ids:
            self.push(token_id)

    def push(self, token_id: int) -> None:
        """The sequence goes on with `token_id`."""
        ids = self._ids
        for n in GRAMS:
            if len(ids) >= n:
                self._after[tuple(ids[-n:])] = len(ids)
        ids.append(token_id)

    def draft(self, longest: int) -> Draft | None:
        """`longest` ids that followed the most recent earlier occurrence of the last ids, None where there is none.

        Where the occurrence reaches into the draft, the draft repeats itself: 7 8 9 8 9 -> 8 9 8 9 ...
        """
        ids = self._ids
        for n in GRAMS:
            start = self._after.get(tuple(ids[-n:])) if len(ids) >= n else None
            if start is not None:
                match = n
                while match < min(REACH, start) and ids[start - 1 - match] == ids[-1 - match]:
                    match += 1
                found = ids[start:start + longest]
                while len(found) < longest:
                    found.append(found[len(found) - len(ids) + start])
                return Draft(tuple(found), match)
        return None
