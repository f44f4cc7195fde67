"""One turn: the conversation's ids through the session and the generator, text out as it comes.

Of the ids only those after the common prefix with the KV cache are computed. The prefix is what the
session holds, not what the chat remembers, so whatever happened before (an undo, a cancelled turn, a
changed system prompt) the next turn is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qmix.chat.conversation import spoken_ids
from qmix.config import Cancel, SamplingParams
from qmix.errors import Interrupted, QmixError, UsageError
from qmix.generate import generate
from qmix.tokenizer import Tokenizer


class Session(Protocol):
    """What the chat needs of an engine's session, beyond what generate needs."""

    ids: list[int]

    @property
    def length(self) -> int: ...

    @property
    def context(self) -> int: ...

    def trim(self, length: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """text: what was shown, raw; ids: its own ids, None where the text must be encoded again;
    tokens: generated; finish: "stop" | "length" | "cancelled" | "error"; error: what stopped it;
    prompt, reused: tokens of the prompt, and how many of them the KV cache had; times in seconds."""

    text: str
    ids: tuple[int, ...] | None
    tokens: int
    finish: str
    prompt: int
    reused: int
    prefill_s: float
    decode_s: float
    error: QmixError | None = None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids at the start are the same: [1, 2, 3], [1, 2, 9, 3] -> 2."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
