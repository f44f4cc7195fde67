"""The KV caches that requests find again: each request takes the one whose ids share the longest prefix with its own.

Agents and chats resend the whole conversation; only what follows the common prefix is read. There are as many sessions
as the budget has room for, `most` at the most. A request that shares little with any of them (an agent's small question
between two long ones) takes the one that was used longest ago, so that the long conversation's cache stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmix.errors import DoesNotFit
from qmix.generate import common_prefix

if TYPE_CHECKING:
    from qmix.engine import Engine, Session


class Sessions:
    """Of one engine, for the engine thread alone."""

    def __init__(self, engine: Engine, most: int):
        self._engine = engine
        self._most = most
        self._sessions: list[Session] = [engine.session()]  # the one used last stands at the end
        self._taken: Session | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def take(self, ids: Sequence[int]) -> Session:
        """A session that holds nothing but a prefix of `ids`, none of it where the engine is exact."""
        self._taken = None
        shared = [0 if self._engine.exact else common_prefix(ids, session.ids) for session in self._sessions]
        best = max(range(len(shared)), key=shared.__getitem__)
        session = self._sessions[best]
        if 2 * shared[best] < min(len(ids), session.length):  # it would lose more than it gives
            session = self._another() or next((s for s in self._sessions if not s.length), self._sessions[0])
        self._taken = session
        keep = 0 if self._engine.exact else common_prefix(ids, session.ids)
        if session.length > keep:
            session.trim(keep)
        self._sessions.remove(session)
        self._sessions.append(session)
        return session

    def release(self) -> None:
        """The session taken is in nobody's hands any more."""
        self._taken = None

    def forget_taken(self) -> None:
        """Nothing is found again of what the session taken holds; where none is, nothing is forgotten."""
        if self._taken is not None:
            self._taken.trim(0)

    def _another(self) -> Session | None:
        """One more, where there may be one."""
        if self._engine.exact or len(self._sessions) >= self._most \
                or any(not session.length for session in self._sessions):
            return None
        try:
            self._sessions.append(self._engine.session())
        except DoesNotFit:
            self._most = len(self._sessions)
            return None
        return self._sessions[-1]
