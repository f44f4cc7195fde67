"""Conversations that previous_response_id stands for: in memory, the newest ones, so many characters in all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from qmix.tokenizer import Message

MOST = 256  # conversations
LARGEST = 64 << 20  # characters in all


class ResponseStore:
    """For the event loop alone."""

    def __init__(self, most: int = MOST, largest: int = LARGEST):
        self._most = most
        self._largest = largest
        self._conversations: OrderedDict[str, tuple[Message, ...]] = OrderedDict()
        self._size = 0

    def get(self, name: str) -> tuple[Message, ...] | None:
        """None for one that is not, or no longer, there."""
        found = self._conversations.get(name)
        if found is not None:
            self._conversations.move_to_end(name)
        return found

    def add(self, name: str, messages: Sequence[Message]) -> None:
        self._conversations[name] = tuple(messages)
        self._size += _characters(messages)
        while self._conversations and (len(self._conversations) > self._most or self._size > self._largest):
            _, dropped = self._conversations.popitem(last=False)
            self._size -= _characters(dropped)


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message.content) + len(message.reasoning or "") + sum(
        len(str(call.arguments)) for call in message.tool_calls) for message in messages)
