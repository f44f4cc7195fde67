"""Where the reasoning of an answer ends and the answer begins.

    <think>\\nThe sky, hm.\\n</think>\\n\\nIt scatters light.     reasoning "The sky, hm.", answer "It scatters light."

Reasoning comes at most once, before the answer: an answer begins with the opening tag, or the prompt wrote that tag
already (`Prompt.in_reasoning`) and only the closing one is generated. A tag later in an answer is text, as in "write
</think> to end it". Tags may arrive in pieces. Reasoning that is never closed has no answer behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from qmix.tokenizer.message import CLOSE, OPEN

if TYPE_CHECKING:
    from qmix.tokenizer import Tokenizer


class Part(NamedTuple):
    """A piece of an answer, without tags."""

    text: str
    reasoning: bool


class ReasoningSplitter:
    """push() the pieces of an answer in turn, then finish(). `found`: whether there is reasoning. `closed`: the
    characters of the answer up to the end of the closing tag, None before it came."""

    def __init__(self, in_reasoning: bool = False):
        self.found = in_reasoning
        self.closed: int | None = None
        self._began = in_reasoning  # whether it is certain what the answer begins with
        self._held = ""
        self._taken = 0  # characters that left `_held`

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
        return [Part(self._take(count), inside)] if count else []

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._taken += count
        return text


class Divided(NamedTuple):
    """An answer in its two parts, without the line breaks around them. reasoning: None where there is none. ids: the
    answer's own, None where a token holds the end of the reasoning and the begin of the answer. thinking_tokens: the
    ids up to the closing tag, that included."""

    reasoning: str | None
    answer: str
    ids: tuple[int, ...] | None
    thinking_tokens: int


def divide(text: str, ids: Sequence[int] | None, tokenizer: Tokenizer, in_reasoning: bool) -> Divided:
    """The parts of a whole answer. ids: those that say `text`, where they are known. An answer without reasoning comes
    back as it is."""
    splitter = ReasoningSplitter(in_reasoning)
    parts = splitter.push(text) + splitter.finish()
    if not splitter.found:
        return Divided(None, text, None if ids is None else tuple(ids), 0)
    reasoning, rest = ("".join(part.text for part in parts if part.reasoning is kind) for kind in (True, False))
    answer = rest.lstrip("\n")
    if ids is None:
        return Divided(reasoning.strip("\n"), answer, None, 0)
    if splitter.closed is None:
        return Divided(reasoning.strip("\n"), answer, (), len(ids))
    thinking, _ = _reach(ids, splitter.closed, tokenizer)
    begin, length = _reach(ids, len(text) - len(answer), tokenizer)
    own = tuple(ids[begin:]) if length == len(text) - len(answer) else None
    return Divided(reasoning.strip("\n"), answer, own, thinking)


def _reach(ids: Sequence[int], characters: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """(how many ids say at least so many characters, how many characters they say)."""
    decoder, length = tokenizer.decoder(), 0
    for count, token in enumerate(ids, 1):
        length += len(decoder.push(token))
        if length >= characters:
            return count, length
    return len(ids), length + len(decoder.finish())


def _tail(text: str) -> int:
    """Characters at the end of text that may begin the closing tag: "hm</th" -> 4."""
    return next((n for n in range(min(len(text), len(CLOSE) - 1), 0, -1) if text.endswith(CLOSE[:n])), 0)
