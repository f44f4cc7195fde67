"""One conversation: a KV cache and its contents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from qmix.config import Cancel
from qmix.forward.kv_cache import SessionCache
from qmix.forward.mtp import MtpState

if TYPE_CHECKING:
    from qmix.engine.engine import Engine


class Session:
    """One conversation's positions: its KV cache and the ids whose keys and values are in it. mtp: what the model's
    multi-token-prediction head knows of it, where the engine has one."""

    def __init__(self, engine: Engine, number: int, cache: SessionCache, mtp: MtpState | None = None):
        self._engine = engine
        self.number = number
        self.cache = cache
        self.mtp = mtp
        self.ids: list[int] = []
        self._drafts = 0  # of the last ids, verified, before `discard_drafts`

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def context(self) -> int:
        """Positions that fit."""
        return self.cache.capacity

    def prefill(self, ids: Sequence[int], cancel: Cancel | None = None) -> Tensor:
        """Append `ids`; logits [V] fp32 after the last one. When interrupted or failing the session is
        as it was before."""
        return self._engine.step([self], [ids], "prefill", cancel)[0]

    def decode(self, token: int, cancel: Cancel | None = None) -> Tensor:
        """Append one token; logits [V] fp32 after it."""
        return self._engine.step([self], [[token]], "decode", cancel)[0]

    def read(self, ids: Sequence[int], skip: int = 0, cancel: Cancel | None = None) -> Iterator[Tensor]:
        """Append `ids`, then give the logits after each of them but the first `skip`, in order: pieces [n, V] fp32 of
        at most BLOCK rows, each computed when it is asked for. Let go of one before asking for the next: a piece of
        Mixtral's is 64 MiB. Errors come at the call, as of prefill. The engine must have been loaded for `scoring`."""
        return self._engine.read(self, ids, skip, cancel)

    def verify(self, ids: Sequence[int], cancel: Cancel | None = None) -> Tensor:
        """Append a token and drafts for those after it, at most 8 in all; logits [T, V] fp32 after each, bit for bit
        those of decode. `trim` must follow: the drafts that stay were right, and count in the statistics."""
        logits = self._engine.step([self], [ids], "decode", cancel, drafts=len(ids) - 1)
        self._drafts = len(ids) - 1
        return logits

    def draft(self, token: int, count: int, cancel: Cancel | None = None) -> list[int]:
        """What the model's multi-token-prediction head guesses for the tokens after `token`, the next to be appended:
        `count` of them, as many as the context has room for; or none, where the engine has no head or the head has
        not seen the session's last token."""
        return self._engine.draft(self, token, count, cancel)

    def catch_up(self, cancel: Cancel | None = None) -> None:
        """Let the model's multi-token-prediction head read what it has not read yet of the session's tokens, where that
        is more than a few: `draft` would do it first."""
        self._engine.catch_up(self, cancel)

    @property
    def warm(self) -> bool:
        """See Engine.warm."""
        return self._engine.warm

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on, or from `reachable(length)` on: `length` says afterwards what is
        left. What `verify` appended can be trimmed to any length."""
        drafts, self._drafts = self._drafts, 0
        if drafts:
            self._engine.discard_drafts(min(drafts, self.length - length))
        del self.ids[self._engine.rewind(self.cache, length):]
        if self.mtp is not None:
            self.mtp.trim(self.length)

    def reachable(self, length: int) -> int:
        """What `trim(length)` leaves: less than `length` where the model has recurrent states, of which only some
        earlier ones are kept."""
        return self.cache.reachable(length)
