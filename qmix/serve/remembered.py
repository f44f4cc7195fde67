"""The ids of answers, by their text: a client sends text back, and encoding that again may give other ids than were
generated, and so another KV cache from there on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from qmix.tokenizer import Message

MOST = 512  # answers


class Remembered:
    """Any thread may call any method."""

    def __init__(self, most: int = MOST):
        self._most = most
        self._ids: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, text: str, ids: tuple[int, ...]) -> None:
        """An answer that said `text`. An empty one is not worth a place."""
        if text:
            with self._lock:
                self._ids[text] = ids
                self._ids.move_to_end(text)
                if len(self._ids) > self._most:
                    self._ids.popitem(last=False)

    def recall(self, messages: Sequence[Message]) -> list[Message]:
        """The same messages; answers that were given here have their ids."""
        with self._lock:
            return [replace(message, ids=self._ids.get(message.content))
                    if message.role == "assistant" and not message.tool_calls and message.ids is None else message
                    for message in messages]
