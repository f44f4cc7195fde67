"""The passes of one answer: the logits for each next id, from a pass of its own or from one with drafts.

A pass with drafts runs the last id together with several guesses for the ids after it. Its first row of logits chooses
the next id as always. If that is the first guess, the second row is what a pass of its own would have given, and so on.
At the first difference the rest is forgotten. Sampling is the same as without drafts, so the text is the same if the
rows are, and they are, bit for bit (see Mixtral.forward).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from qmix.config import Cancel
from qmix.speculation.lookup import Draft, Lookup
from qmix.speculation.pace import Pace

if TYPE_CHECKING:
    from torch import Tensor


class Session(Protocol):
    """A sequence with its KV cache."""

    @property
    def length(self) -> int:
        """Positions in the KV cache."""

    @property
    def context(self) -> int:
        """Positions that it can hold."""

    @property
    def warm(self) -> bool:
        """Whether the last pass took as long as another one like it will; not where something was compiled in it."""

    def prefill(self, ids: Sequence[int], cancel: Cancel) -> Tensor:
        """Append ids; logits [V] after the last. Raises Interrupted when `cancel` is set meanwhile."""

    def decode(self, token_id: int, cancel: Cancel) -> Tensor:
        """Append one id; logits [V] after it."""

    def verify(self, ids: Sequence[int], cancel: Cancel) -> Tensor:
        """Append an id and drafts for those after it; logits [T, V] after each, the bits those of decode. `trim`
        must follow, whatever stays: it says which drafts were right. Needed only where drafts are asked for."""

    def draft(self, token_id: int, count: int, cancel: Cancel) -> Sequence[int]:
        """What the model's multi-token-prediction head guesses for the ids after `token_id`, which is the next to be
        appended: `count` of them, or none where it has not seen what came before. Needed only where it is asked."""

    def catch_up(self, cancel: Cancel) -> None:
        """Let the head read what it has not read yet, so that the next `draft` takes the time of its guesses alone.
        Needed only where it is asked."""

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on. Where a recurrent state cannot go back there more are forgotten, as
        `length` then says, but none before the last `verify`."""


class Passes:
    """Runs `session` after prompt_ids, with drafts where `pace` says that they pay; None for no drafts. Of
    drafts from the text and from the model's multi-token-prediction head the one with the larger gain is tried.

    ends: ids that end an answer, after which no draft goes on. clock: seconds.
    seconds, decode_passes, drafted and accepted add up what was done; a draft that another one cut short, or whose
    answer ended, counts as drafted whole.
    """

    def __init__(self, session: Session, prompt_ids: Sequence[int], pace: Pace | None, ends: Collection[int],
                 clock: Callable[[], float]):
        self._session = session
        self._pace = pace if pace is not None and pace.longest else None
        self._mtp = self._pace.mtp if self._pace is not None else None
        if self._mtp is not None:
            self._mtp.begin()
        self._lookup = Lookup(prompt_ids if self._pace else ())
        self._ends = ends
        self._clock = clock
        self._rows: Tensor | None = None  # of the last pass, while its drafts are right
        self._tried: tuple[int, ...] = ()  # its drafts
        self._by_head = False  # whether the multi-token-prediction head made them
        self._used = 0  # its rows that were handed out
        self._draft: Draft | None = None  # tried or not, compared with what comes
        self._right = 0  # ids of it that have come
        self.prefill_seconds = self.decode_seconds = 0.0
        self.decode_passes = self.drafted = self.accepted = 0

    def prefill(self, ids: Sequence[int], cancel: Cancel) -> Tensor:
        """Append ids of the prompt; logits [V] after the last."""
        start = self._clock()
        before = self._session.length
        try:
            return self._session.prefill(ids, cancel)
        except BaseException:
            self._session.trim(before)
            raise
        finally:
            self.prefill_seconds += self._clock() - start

    def after(self, token_id: int, most: int, cancel: Cancel) -> Tensor:
        """Logits [V] after `token_id`, which was chosen out of the last ones. most: ids that may still come after
        the next one, -1 for no limit. When it raises, the KV cache is as after the last call."""
        if self._pace is not None:
            self._compare(token_id)
        if self._mtp is not None:
            self._mtp.token()
        if self._rows is not None:
            right = self._tried[self._used - 1] == token_id
            if self._mtp is not None and self._by_head:
                self._mtp.judge(self._used - 1, right)
            if right:
                self.accepted += 1
                self._used += 1
                row = self._rows[self._used - 1]
                if self._used > len(self._tried):
                    self.discard_drafts()
                return row
            self.discard_drafts()
        return self._run(token_id, most, cancel)

    def discard_drafts(self) -> None:
        """Forget the drafts that did not come true. Afterwards the KV cache holds what logits were handed out for."""
        if self._rows is not None:
            self._rows = None
            self._session.trim(self._session.length - (1 + len(self._tried) - self._used))

    def _run(self, token_id: int, most: int, cancel: Cancel) -> Tensor:
        session = self._session
        drafts = self._choose(token_id, most, cancel)
        before, start = session.length, self._clock()
        try:
            found = session.verify((token_id, *drafts), cancel) if drafts else session.decode(token_id, cancel)
        except BaseException:
            session.trim(before)
            raise
        finally:
            seconds = self._clock() - start
            self.decode_seconds += seconds
        self.decode_passes += 1
        self.drafted += len(drafts)
        if self._pace is not None and session.warm:
            self._pace.took(1 + len(drafts), seconds)
        if not drafts:
            return found
        self._rows, self._tried, self._used = found, drafts, 1
        return found[0]

    def _choose(self, token_id: int, most: int, cancel: Cancel) -> tuple[int, ...]:
        """The drafts for the ids after token_id, which is to be run; () where none is worth it."""
        draft, pace, mtp = self._draft, self._pace, self._mtp
        room = self._session.context - self._session.length - 1
        room = room if most < 0 else min(room, most)
        self._by_head = False
        if pace is None or room < 1 or (mtp is not None and mtp.single_due):
            return ()
        found, match = tuple[int, ...](), 0
        if draft is not None:
            match, left = draft.match + self._right, self._cut(draft.ids[self._right:])
            found = left[:pace.length(match, min(room, len(left)))]
        count = 0 if mtp is None else mtp.length(room)
        if mtp is None or not count or (found and pace.gain(match, len(found)) >= mtp.gain(count)):
            return found
        start = ready = self._clock()
        try:
            self._session.catch_up(cancel)
            ready = self._clock()
            guessed = tuple(self._session.draft(token_id, count, cancel))
        finally:
            done = self._clock()
            self.decode_seconds += done - start
        mtp.spend(ready - start)
        if not guessed:
            return found
        mtp.took(len(guessed), done - ready)
        self._by_head = True
        return self._cut(guessed)

    def _cut(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Up to the first one that ends the answer."""
        return ids[:next((i + 1 for i, token_id in enumerate(ids) if token_id in self._ends), len(ids))]

    def _compare(self, token_id: int) -> None:
        """Judge the draft by what came, and find another where it is at its end."""
        pace = self._pace
        assert pace is not None
        self._lookup.push(token_id)
        if self._draft is not None:
            right = self._draft.ids[self._right] == token_id
            pace.judge(self._draft.match + self._right, right)
            self._right += 1
            if right and self._right < len(self._draft.ids) and self._rows is not None:
                return
        self._draft, self._right = self._lookup.draft(pace.longest), 0
