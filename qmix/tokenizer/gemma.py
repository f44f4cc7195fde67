"""The answers of Gemma 4: reasoning in a channel, then the answer, then the functions that it calls.

    <|channel>thought
    hm<channel|>I look.<|tool_call>call:weather{place:<|"|>Lyon<|"|>,days:3}<tool_call|>

gives reasoning "hm", answer "I look." and Call("weather", '{"place": "Lyon", "days": 3}').

A text of a call stands between two <|"|>; what stands bare is a JSON value, an object, whose keys are bare too, or a
list. Only marked control tokens count (parts.py), so an answer may write about <|channel>. A call that is not of this
form is shown as it is spelled, with the answer, and so is a control token where none belongs. A call or a channel that
begins before the last one ended ends it.

Source: Google, "Gemma 4 Prompt Formatting".
"""

from __future__ import annotations

import json
import re
from typing import Any

from qmix.tokenizer.parts import CALL, MARK, AnswerFormat, Call, Part, Span
from qmix.tokenizer.vocabulary import Vocabulary

TURN, CHANNEL, CHANNEL_END, CALLS, CALLS_END, QUOTE = MARKS = (
    "<|turn>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
STOPS = ("<turn|>", "<|tool_response>")  # the second one where the answer waits for a tool's result
THOUGHT = "thought\n"  # the name of the channel
BEGIN = "call:"
DEEPEST = 64  # objects and lists within each other
MARKED = re.compile(f"{MARK}({'|'.join(map(re.escape, MARKS))})")


def gemma_format(vocabulary: Vocabulary, templates: str) -> AnswerFormat | None:
    """The format of answers, where the vocabulary has its control tokens and the templates write them."""
    marks = {vocabulary.markers[text]: text for text in MARKS if text in vocabulary.markers}
    if len(marks) < len(MARKS) or not all(text in templates for text in (TURN, CHANNEL, CALLS)):
        return None
    followed = {i for i, text in marks.items() if text not in (CALLS, QUOTE)}
    return AnswerFormat(lambda prompt, opening: GemmaParser(opening), marks, vocabulary.markers[TURN], followed,
                        verbatim=False)


def gemma_stops(vocabulary: Vocabulary) -> list[int]:
    return [vocabulary.markers[text] for text in STOPS if text in vocabulary.markers]


class GemmaParser:
    """An AnswerParser. opening: what the prompt wrote of the turn that the answer goes on with, marked."""

    def __init__(self, opening: str = ""):
        self._held = ""
        self._at = 0  # characters read
        self._inside: str | None = None  # the mark of the channel or the call that is open
        self._begin = 0  # of that, or of the answer's text
        self._pending = ""  # of a channel what may be its name; of a call all of it; behind a call white space
        self._named = False  # whether the channel's name is behind us
        self._reset()
        self.push(opening)
        self._reset()

    def _reset(self) -> None:
        """Where the prompt ends the answer begins: what came until now is not part of it."""
        self.found = self._inside == CHANNEL
        self.calls: list[Call] = []
        self.thinking: list[Span] = []
        self._answers: list[Span] = []
        self._exact = True  # whether the parts say no other characters than the text
        self._at = self._begin = 0
        self._behind_call = False  # with nothing but white space since
        if self._inside is None:
            self._pending = ""

    @property
    def answering(self) -> bool:
        return self._inside is None

    @property
    def answers(self) -> list[Span]:
        return self._answers if self._exact else []

    def push(self, text: str) -> list[Part]:
        """What is certain with this piece; a call is certain when it is complete."""
        self._held += text
        parts: list[Part] = []
        while self._held:
            found = MARKED.match(self._held)
            if found is not None:
                parts += self._mark(found[1])
                self._take(len(found[0]))
                continue
            if any((MARK + mark).startswith(self._held) for mark in MARKS):
                break
            at = self._held.find(MARK, 1)
            parts += self._text(self._take(len(self._held) if at < 0 else at))
        return parts

    def finish(self) -> list[Part]:
        """What was held back and became nothing else: as it is spelled. White space behind the last call is part of
        it."""
        parts = self._text(self._take(len(self._held)))
        return parts + self._close(self._at)

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._at += count
        return text

    def _mark(self, mark: str) -> list[Part]:
        """A control token, which has not been taken yet."""
        if self._inside == CALLS and mark == QUOTE:
            self._pending += MARK + mark
            return []
        if self._inside == CALLS and mark == CALLS_END:
            return self._call()
        if self._inside == CHANNEL and mark == CHANNEL_END:
            return self._close(self._at + len(MARK + mark))
        if mark not in (CHANNEL, CALLS):
            return self._say(mark, len(MARK + mark)) if self._inside != CHANNEL else self._text(mark)
        parts = self._close(self._at)
        self._inside, self._begin, self._pending = mark, self._at, ""
        self._named = False
        self.found = self.found or mark == CHANNEL
        return parts

    def _close(self, end: int) -> list[Part]:
        """What is open ends here, before its own end mark or with it."""
        inside, pending = self._inside, self._pending
        self._inside, self._pending = None, ""
        if inside == CALLS:
            return self._spell(pending)
        if inside == CHANNEL:
            self.thinking.append((self._begin, end))
            self._behind_call = False
            return [Part(pending, "reasoning")] if pending and pending not in (THOUGHT, THOUGHT.rstrip()) else []
        return []

    def _text(self, text: str) -> list[Part]:
        """Text between two control tokens, or a piece of it; it has been taken already."""
        if self._inside == CALLS:
            self._pending += text
            return []
        if MARK in text:
            self._exact = False
            text = text.replace(MARK, "")
        if not text:
            return []
        if self._inside is None:
            return self._say(text)
        if not self._named:
            self._pending += text
            if THOUGHT.startswith(self._pending) and self._pending != THOUGHT:
                return []
            self._named, text, self._pending = True, self._pending.removeprefix(THOUGHT), ""
        return [Part(text, "reasoning")] if text else []

    def _say(self, text: str, ahead: int = 0) -> list[Part]:
        """A piece of the answer. ahead: characters of the marked text that have not been taken yet, for a control token
        that is spelled."""
        if ahead:
            self._exact = False
        if self._behind_call and not ahead:
            self._pending += text
            if not self._pending.strip():
                return []
            text, self._pending = self._pending, ""
        self._behind_call = False
        end = self._at + ahead
        begin = self._answers.pop()[0] if self._answers and self._answers[-1][1] == end - len(text) else end - len(text)
        self._answers.append((begin, end))
        return [Part(text, "answer")]

    def _spell(self, call: str) -> list[Part]:
        """A call that is none."""
        self._exact = False
        self._answers.append((self._begin, self._at))
        self._behind_call = False
        return [Part(CALLS + call.replace(MARK, ""), "answer")]

    def _call(self) -> list[Part]:
        """A call that its mark has ended."""
        text, self._inside, self._pending = self._pending, None, ""
        try:
            call = _Reading(text).call()
        except _NoCall:
            return [*self._spell(text), *self._say(CALLS_END, len(MARK + CALLS_END))]
        self.calls.append(call)
        self._behind_call = True
        return [Part(f"{CALL}{call.name} {call.arguments}", "call")]


class _NoCall(Exception):
    """What stands between the marks of a call is none."""


class _Reading:
    """A call's text, read from the front."""

    BARE = re.compile(rf"[^,:{{}}\[\]{MARK}]*")

    def __init__(self, text: str):
        self._text = text
        self._at = 0

    def call(self) -> Call:
        text = self._text.strip()
        name, brace, _ = text.removeprefix(BEGIN).partition("{")
        name = name.strip()
        if not text.startswith(BEGIN) or not brace or not name or MARK in name or any(map(str.isspace, name)):
            raise _NoCall
        self._at = self._text.index("{")
        arguments = self._value(0)
        if self._text[self._at:].strip() or not isinstance(arguments, dict):
            raise _NoCall
        try:
            written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            written.encode()
        except ValueError:  # no number of JSON, or half a character
            raise _NoCall from None
        return Call(name, written)

    def _value(self, depth: int) -> Any:
        if depth > DEEPEST:
            raise _NoCall
        if self._next("{"):
            return self._object(depth)
        if self._next("["):
            return self._list(depth)
        if self._next(MARK + QUOTE):
            return self._quoted()
        if not (text := self._word()):
            raise _NoCall
        return _bare(text)

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._next("}"):
            self._comma(bool(found))
            key = self._quoted() if self._next(MARK + QUOTE) else self._word()
            if not self._next(":") or key in found:
                raise _NoCall
            found[key] = self._value(depth + 1)
        return found

    def _list(self, depth: int) -> list[Any]:
        found: list[Any] = []
        while not self._next("]"):
            self._comma(bool(found))
            found.append(self._value(depth + 1))
        return found

    def _comma(self, wanted: bool) -> None:
        if wanted and not self._next(","):
            raise _NoCall

    def _next(self, text: str) -> bool:
        """Whether this comes next, white space aside; then it is read."""
        while self._text[self._at:self._at + 1].isspace():
            self._at += 1
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _quoted(self) -> str:
        end = self._text.find(MARK + QUOTE, self._at)
        if end < 0:
            raise _NoCall
        text, self._at = self._text[self._at:end], end + len(MARK + QUOTE)
        return text

    def _word(self) -> str:
        """What stands bare, which may be nothing: so may a key be."""
        found = self.BARE.match(self._text, self._at)
        assert found is not None
        self._at = found.end()
        return found[0].strip()


def _bare(text: str) -> Any:
    """A value that is no text. A template that knows no null writes Python's None; what is nothing else is a text."""
    if text == "None":
        return None
    try:
        found = json.loads(text, parse_constant=_refuse)
        json.dumps(found, allow_nan=False)  # 1e999, which Python takes for Infinity
        return found
    except (ValueError, RecursionError):
        return text


def _refuse(text: str) -> Any:
    raise ValueError(text)
