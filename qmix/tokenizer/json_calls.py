"""Calls as JSON between tags, as Qwen3 and Qwen2.5 write them (the form of Nous Research's Hermes):

    <tool_call>
    {"name": "weather", "arguments": {"place": "Lyon"}}
    </tool_call>

gives Call("weather", '{"place": "Lyon"}'). A closing tag within a JSON text is text. Arguments that are a JSON text are
taken for what the text says. What has other keys, or no name, is no call.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qmix.tokenizer.call_grammars import json_grammar
from qmix.tokenizer.calls import BEGIN, END, CallParser, NoCall, TextArguments
from qmix.tokenizer.parts import AnswerFormat, Call

MOST_TAGS = 64  # closing tags within a call: the text is read again at each
MARKS = (BEGIN, END, '"name"', '"arguments"')


def json_format(templates: str) -> AnswerFormat | None:
    """The format of answers, where the templates write calls in this form."""
    return AnswerFormat(lambda prompt, opening: CallParser(prompt, JsonCall), call_grammar=json_grammar) if all(
        mark in templates for mark in MARKS) else None


@dataclass(slots=True)
class JsonCall:
    """A CallReader. found: the call; searched: where the search for the closing tag goes on; tags: those that were
    text."""

    at: int
    found: Call | None = None
    searched: int = 0
    tags: int = 0

    def read(self, text: str) -> bool:
        start = self.at
        while start < len(text) and text[start].isspace():
            start += 1
        if text[start:start + 1] not in ("", "{"):
            raise NoCall
        while (end := text.find(END, max(self.searched, self.at))) >= 0:
            self.searched = end + len(END)
            if (value := _parsed(text[start:end])) is not None:
                self.found, self.at = _call(value), self.searched
                return True
            self.tags += 1
            if self.tags == MOST_TAGS:
                raise NoCall
        self.searched = max(self.searched, self.at, len(text) - len(END) + 1)
        return False

    def call(self, texts: TextArguments) -> Call:
        assert self.found is not None
        return self.found


def _parsed(text: str) -> Any:
    """The JSON value; None where the text ends within a JSON text, so that the tag behind it is part of that. NoCall
    for what is no JSON. Line breaks within a text are taken as they are."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except json.JSONDecodeError as e:
        if e.msg.startswith("Unterminated string"):
            return None
        raise NoCall from None
    except (ValueError, RecursionError):
        raise NoCall from None


def _refuse(text: str) -> Any:
    raise NoCall  # NaN and Infinity, which Python takes for JSON


def _call(value: Any) -> Call:
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        raise NoCall
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not name or not isinstance(arguments, dict | str):
        raise NoCall
    try:
        call = Call(name, arguments if isinstance(arguments, str) else
                    json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        "".join(call).encode()
    except ValueError:  # 1e999, which Python takes for Infinity; or JSON that spells half a character
        raise NoCall from None
    return call
