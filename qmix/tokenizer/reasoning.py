"""Where the reasoning of an answer ends and the answer begins.

    <think>\\nThe sky, hm.\\n</think>\\n\\nIt scatters light.     reasoning "The sky, hm.", answer "It scatters light."

Reasoning comes at most once, before the answer: an answer begins with the opening tag, or the prompt wrote that tag
already (`Prompt.in_reasoning`) and only the closing one is generated. A tag later in an answer is text, as in "write
</think> to end it". Tags may arrive in pieces. Reasoning that is never closed has no answer behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from qmix.tokenizer.message import CLOSE, OPEN
from qmix.tokenizer.parts import AnswerFormat, Call, Part, Span


class ReasoningSplitter:
    """The AnswerParser of the tags. `closed`: the characters of the answer up to the end of the closing tag, None
    before it came."""

    calls: Sequence[Call] = ()

    def __init__(self, in_reasoning: bool = False):
        self.found = in_reasoning
        self.closed: int | None = None
        self._began = in_reasoning  # whether it is certain what the answer begins with
        self._held = ""
        self._taken = 0  # characters that left `_held`

    @property
    def answering(self) -> bool:
        return self.closed is not None if self.found else self._began or not self._held.strip()

    @property
    def thinking(self) -> Sequence[Span]:
        return [(0, self.closed)] if self.found else []

    @property
    def answers(self) -> Sequence[Span]:
        return [(self.closed or 0, None)] if self.closed is not None or not self.found else []

    def push(self, text: str) -> list[Part]:
        """What is certain with this piece; text that may still become a tag is held back."""
        self._held += text
        if not self._began:
            start = self._held.lstrip()
            if OPEN.startswith(start):  # also where there is nothing but white space
                return []
            self._began, self.found = True, start.startswith(OPEN)
            if self.found:
                self._take(len(self._held) - len(start) + len(OPEN))
        if not self.found or self.closed is not None:
            return self._parts(len(self._held))
        at = self._held.find(CLOSE)
        if at < 0:
            return self._parts(len(self._held) - _tail(self._held))
        parts = self._parts(at)
        self._take(len(CLOSE))
        self.closed = self._taken
        return parts + self._parts(len(self._held))

    def finish(self) -> list[Part]:
        """What was held back and became no tag."""
        return self._parts(len(self._held))

    def _parts(self, count: int) -> list[Part]:
        inside = self.found and self.closed is None
        return [Part(self._take(count), "reasoning" if inside else "answer")] if count else []

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._taken += count
        return text


def _tail(text: str) -> int:
    """Characters at the end of text that may begin the closing tag: "hm</th" -> 4."""
    return next((n for n in range(min(len(text), len(CLOSE) - 1), 0, -1) if text.endswith(CLOSE[:n])), 0)


THINK = AnswerFormat(lambda prompt, opening: ReasoningSplitter(prompt.in_reasoning))
