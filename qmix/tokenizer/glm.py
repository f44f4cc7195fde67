"""The answers of GLM-4.5: reasoning between tags, then the answer, then the functions that it calls.

    <think>hm</think>
    I look.
    <tool_call>weather
    <arg_key>place</arg_key>
    <arg_value>Lyon</arg_value>
    </tool_call>

gives reasoning "hm", answer "I look." and Call("weather", '{"place": "Lyon"}').

A value is text where the tools of the request say that the argument is a text. Any other value is JSON, and what is no
JSON is text. White space around a call belongs to it. A call that is not complete, or not of this form, is shown as it
is spelled, with the answer; so is one that gives an argument twice. Calls within the reasoning are reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmix.tokenizer.message import Prompt
from qmix.tokenizer.parts import CALL, AnswerFormat, Call, Part, Span
from qmix.tokenizer.reasoning import ReasoningSplitter

BEGIN, END = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


def glm_format(templates: str) -> AnswerFormat | None:
    """The format of answers, where the templates write calls in this form."""
    return AnswerFormat(lambda prompt, opening: GlmParser(prompt)) if all(
        tag in templates for tag in (BEGIN, KEY, VALUE)) else None


class _NoCall(Exception):
    """What began like a call goes on in another way."""


@dataclass(slots=True)
class _Reading:
    """A call as far as it has been read. at: behind the last complete element of the text; searched: where the search
    for the end of the next one goes on."""

    at: int
    name: str | None = None
    key: str | None = None
    values: list[tuple[str, str]] = field(default_factory=list)
    searched: int = 0

    def read(self, text: str) -> bool:
        """Whether the call is complete; `at` is behind it then. _NoCall where it can become none. text: from the same
        place on as before, and longer."""
        while True:
            if self.name is None:
                if not self._read_name(text):
                    return False
            elif self.key is None:
                self._skip_space(text)
                if text.startswith(END, self.at):
                    self.at += len(END)
                    return True
                if not self._begins(text, KEY, END) or (key := self._until(text, KEY, KEY_END)) is None:
                    return False
                self.key = key
            else:
                self._skip_space(text)
                if not self._begins(text, VALUE) or (value := self._until(text, VALUE, VALUE_END)) is None:
                    return False
                if any(key == self.key for key, _ in self.values):
                    raise _NoCall
                self.values.append((self.key, value))
                self.key = None

    def _read_name(self, text: str) -> bool:
        """The name ends with its line, or where a tag begins."""
        ends = [at for stop in ("\n", "<") if (at := text.find(stop, self.at)) >= 0]
        if not ends:
            return False
        name = text[self.at:min(ends)].strip()
        if not name or any(map(str.isspace, name)):
            raise _NoCall
        self.name, self.at = name, min(ends)
        return True

    def _skip_space(self, text: str) -> None:
        while self.at < len(text) and text[self.at].isspace():
            self.at += 1

    def _begins(self, text: str, *tags: str) -> bool:
        """Whether the first of the tags stands there whole; _NoCall where none of them can."""
        there = text[self.at:self.at + max(map(len, tags))]
        if not any(there.startswith(tag) or tag.startswith(there) for tag in tags):
            raise _NoCall
        return there.startswith(tags[0])

    def _until(self, text: str, tag: str, end: str) -> str | None:
        """What stands between the tags, None as long as the second is missing."""
        begin = self.at + len(tag)
        found = text.find(end, max(begin, self.searched))
        if found < 0:
            self.searched = max(begin, len(text) - len(end) + 1)
            return None
        self.at = found + len(end)
        return text[begin:found]


class GlmParser:
    """An AnswerParser."""

    def __init__(self, prompt: Prompt):
        self.calls: list[Call] = []
        self._thoughts = ReasoningSplitter(prompt.in_reasoning)
        self._texts = _texts(prompt.tools)
        self._spans: list[tuple[int, int]] = []
        self._held = ""  # of the answer, behind the reasoning
        self._taken = 0  # characters of the answer that left `_held`
        self._reading: _Reading | None = None  # of a call in `_held`

    @property
    def found(self) -> bool:
        return self._thoughts.found

    @property
    def thinking(self) -> list[Span]:
        return list(self._thoughts.thinking)

    @property
    def answers(self) -> list[Span]:
        if not self.calls:
            return list(self._thoughts.answers)
        first = self._thoughts.closed or 0
        return [(first + begin, first + end) for begin, end in self._spans]

    def push(self, text: str) -> list[Part]:
        """What is certain with this piece; a call is certain when it is complete."""
        return self._apart(self._thoughts.push(text))

    def finish(self) -> list[Part]:
        """What was held back and became no call; white space behind the last call is part of it."""
        parts = self._apart(self._thoughts.finish())
        while self._reading is not None:
            parts += self._no_call() + self._read()
        if self.calls and not self._held.strip() and not self._goes_on:
            self._take(len(self._held))
        return parts + self._say(len(self._held))

    @property
    def _goes_on(self) -> bool:
        """Whether the last thing that was taken is answer."""
        return bool(self._spans) and self._spans[-1][1] == self._taken

    def _apart(self, parts: Iterable[Part]) -> list[Part]:
        """The same parts, with calls taken out of the answer."""
        found: list[Part] = []
        for part in parts:
            if part.kind == "reasoning":
                found.append(part)
            else:
                self._held += part.text
                found += self._read()
        return found

    def _read(self) -> list[Part]:
        parts: list[Part] = []
        while True:
            if self._reading is None:
                at = self._held.find(BEGIN)
                before = self._held if at < 0 else self._held[:at]
                parts += self._say(len(before[:len(before) - (_tail(before) if at < 0 else 0)].rstrip()))
                if at < 0:
                    return parts
                self._reading = _Reading(self._held.index(BEGIN) + len(BEGIN))
            try:
                if not self._reading.read(self._held):
                    return parts
            except _NoCall:
                parts += self._no_call()
                continue
            parts.append(self._call(self._reading))

    def _call(self, read: _Reading) -> Part:
        assert read.name is not None
        typed = self._texts.get(read.name, frozenset())
        arguments = {key: value if key in typed else _value(value) for key, value in read.values}
        call = Call(read.name, json.dumps(arguments, ensure_ascii=False))
        self.calls.append(call)
        self._reading = None
        self._take(read.at)
        return Part(f"{CALL}{call.name} {call.arguments}", "call")

    def _no_call(self) -> list[Part]:
        """The tag that seemed to begin a call is text."""
        self._reading = None
        return self._say(self._held.index(BEGIN) + len(BEGIN))

    def _say(self, count: int) -> list[Part]:
        """The next characters are answer."""
        if not count:
            return []
        begin = self._spans.pop()[0] if self._goes_on else self._taken
        text = self._take(count)
        self._spans.append((begin, self._taken))
        return [Part(text, "answer")]

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._taken += count
        return text


def _tail(text: str) -> int:
    """Characters at the end of text that may begin a call's tag: "hm<tool" -> 5."""
    return next((n for n in range(min(len(text), len(BEGIN) - 1), 0, -1) if text.endswith(BEGIN[:n])), 0)


def _value(text: str) -> Any:
    """A value as JSON, a text where it is none. NaN and Infinity, which Python takes for JSON, are texts, and so is
    what spells half a character."""
    try:
        found = json.loads(text, parse_constant=_refuse)
        json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError):
        return text


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _texts(tools: Iterable[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """{function: its arguments that can be nothing but texts}."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, Mapping) else None
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(properties, Mapping) and isinstance(function.get("name"), str):
            found[function["name"]] = frozenset(
                name for name, schema in properties.items()
                if isinstance(schema, Mapping) and schema.get("type") in ("string", ["string"]))
    return found
