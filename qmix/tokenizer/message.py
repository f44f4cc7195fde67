"""One turn of a conversation, and what a chat format is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qmix.errors import UsageError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """role is "system", "user" or "assistant".

    ids: for an answer of this model, the ids it generated. They are spliced into the next prompt as
    they are, since encoding the text again may give other ids and so another KV cache; a final
    end-of-answer id may be among them and is never doubled. None where only the text is known.
    """

    role: str
    content: str
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"role: got {self.role!r}, want {' or '.join(map(repr, ROLES))}")
        if not isinstance(self.content, str):
            raise UsageError(f"content: got {type(self.content).__name__}, want text")
        if self.ids is not None and self.role != "assistant":
            raise UsageError(f"ids: given for role {self.role!r}, want them only for 'assistant'")


class ChatFormat(Protocol):
    """How a conversation becomes ids: Mistral's segments, a template, or a plain transcript."""

    @property
    def name(self) -> str:
        """What to tell the user about the choice."""

    @property
    def turn_stops(self) -> tuple[str, ...]:
        """Strings that end an answer although they are no special tokens."""

    @property
    def turn_end(self) -> int | None:
        """The id that closes an answer, where it is known from the format alone."""

    def encode(self, messages: Sequence[Message], limit: int | None = None) -> list[int]:
        """ids of the whole conversation, ready for the next answer. limit: see Vocabulary.check_length."""


def check_conversation(messages: Sequence[Message]) -> None:
    """An answer can only follow a user's message; UsageError otherwise."""
    if not messages or messages[-1].role != "user":
        last = repr(messages[-1].role) if messages else "none"
        raise UsageError(f"the last message of the conversation: got {last}, want one of role 'user'")


def without_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """ids without the end-of-answer ids at their end: [5, 6, 2] -> [5, 6] where 2 ends an answer."""
    kept = list(ids)
    while kept and kept[-1] in ends:
        kept.pop()
    return kept
