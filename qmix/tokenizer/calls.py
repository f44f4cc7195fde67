"""Calls between tags in an answer, whatever their form: reasoning, then the answer, and the functions that it calls.

    <think>hm</think>I look.<tool_call>...</tool_call>     reasoning "hm", answer "I look.", and a call

What stands between the tags is the business of a CallReader: glm.py, json_calls.py and xml_calls.py have one each.
White space around a call belongs to it. A call that is not complete, or not of its reader's form, is shown as it is
spelled, with the answer. Calls within the reasoning are reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from qmix.tokenizer.message import Prompt
from qmix.tokenizer.parts import CALL, Call, Part, Span
from qmix.tokenizer.reasoning import ReasoningSplitter

BEGIN, END = "<tool_call>", "</tool_call>"
TextArguments = dict[str, frozenset[str]]  # {function: its arguments that can be nothing but texts}


class NoCall(Exception):
    """What began like a call goes on in another way."""


class CallReader(Protocol):
    """Reads one call, from behind its opening tag on."""

    at: int  # behind what has been read of the text

    def read(self, text: str) -> bool:
        """Whether the call is complete; `at` is behind its closing tag then. NoCall where it can become none. text:
        from the same place on as before, and longer."""

    def call(self, texts: TextArguments) -> Call:
        """The call, once it is complete."""


class CallParser:
    """An AnswerParser. reader: of a call that begins behind the opening tag, by its place in the text."""

    def __init__(self, prompt: Prompt, reader: Callable[[int], CallReader]):
        self.calls: list[Call] = []
        self._thoughts = ReasoningSplitter(prompt.in_reasoning)
        self._texts = text_arguments(prompt.tools)
        self._spans: list[tuple[int, int]] = []
        self._held = ""  # of the answer, behind the reasoning
        self._taken = 0  # characters of the answer that left `_held`
        self._reader = reader
        self._reading: CallReader | None = None  # of a call in `_held`

    @property
    def found(self) -> bool:
        return self._thoughts.found

    @property
    def answering(self) -> bool:
        return self._thoughts.answering and self._reading is None

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
                self._reading = self._reader(self._held.index(BEGIN) + len(BEGIN))
            try:
                if not self._reading.read(self._held):
                    return parts
            except NoCall:
                parts += self._no_call()
                continue
            parts.append(self._call(self._reading))

    def _call(self, read: CallReader) -> Part:
        call = read.call(self._texts)
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


def value_of(text: str) -> Any:
    """A value as JSON, a text where it is none. NaN and Infinity, which Python takes for JSON, are texts, and so are
    1e999, which it takes for Infinity, and what spells half a character."""
    try:
        found = json.loads(text, parse_constant=_refuse)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
        return found
    except (ValueError, RecursionError):
        return text


def _refuse(text: str) -> Any:
    raise ValueError(text)


def text_arguments(tools: Iterable[Mapping[str, Any]]) -> TextArguments:
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


def arguments_of(values: Iterable[tuple[str, str]], texts: frozenset[str]) -> str:
    """An object as JSON, of arguments whose values are spelled in tags of their own."""
    return json.dumps({key: value if key in texts else value_of(value) for key, value in values}, ensure_ascii=False)
