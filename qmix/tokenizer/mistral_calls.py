"""The calls of Mistral's models since tokenizer v3:

    I look. [TOOL_CALLS] [{"name": "weather", "arguments": {"place": "Lyon"}}]

gives the answer "I look." and Call("weather", '{"place": "Lyon"}'). [TOOL_CALLS] is a control token; behind it stands
one JSON list, whose calls may have an id besides. A list that is not complete, or no list of calls, is shown as it is
spelled, with the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from qmix.tokenizer.call_grammars import mistral_grammar
from qmix.tokenizer.message import Prompt
from qmix.tokenizer.parts import CALL, MARK, AnswerFormat, Call, Part, Span
from qmix.tokenizer.vocabulary import Vocabulary

BEGIN = "[TOOL_CALLS]"
MARKED = MARK + BEGIN
DECODER = json.JSONDecoder(strict=False)


def mistral_calls_format(vocabulary: Vocabulary) -> AnswerFormat | None:
    """The format of answers, where the vocabulary has the control token."""
    found = vocabulary.markers.get(BEGIN)
    if found is None:
        return None
    return AnswerFormat(lambda prompt, opening: MistralParser(prompt), {found: BEGIN}, content=(found,),
                        call_grammar=partial(mistral_grammar, found))


class MistralParser:
    """An AnswerParser."""

    found = False
    thinking: Sequence[Span] = ()

    def __init__(self, prompt: Prompt):
        self.calls: list[Call] = []
        self._held = ""  # before the calls what may begin their mark; then all behind it
        self._calling = False
        self._said = 0  # characters of the answer
        self._exact = True  # whether the parts say no other characters than the text

    @property
    def answering(self) -> bool:
        return not self._calling

    @property
    def answers(self) -> Sequence[Span]:
        return [(0, self._said if self._calling else None)] if self._exact else []

    def push(self, text: str) -> list[Part]:
        """What is certain with this piece; calls are certain when their list is complete."""
        self._held += text
        parts: list[Part] = []
        if not self._calling:
            at = self._held.find(MARKED)
            end = len(self._held) - _tail(self._held) if at < 0 else at
            # White space in front of the calls belongs to them.
            parts = self._say(self._held[:len(self._held[:end].rstrip())])
            if at < 0:
                return parts
            self._calling, self._held = True, self._held.lstrip()[len(MARKED):]
            text = self._held
        if not self.calls and "]" in text:
            parts += self._read()
        return parts

    def finish(self) -> list[Part]:
        """What was held back and became nothing else."""
        if self.calls and not self._held.strip():
            return []
        held, self._held = (BEGIN if self._calling else "") + self._held, ""
        self._exact = self._exact and not self._calling and MARK not in held
        return [Part(held.replace(MARK, ""), "answer")] if held else []

    def _say(self, text: str) -> list[Part]:
        """The next characters are answer."""
        self._held = self._held[len(text):]
        self._said += len(text)
        return [Part(text, "answer")] if text else []

    def _read(self) -> list[Part]:
        """The calls, if their list is complete."""
        held = self._held.lstrip()
        try:
            values, end = DECODER.raw_decode(held)
            calls = [_call(value) for value in values] if isinstance(values, list) else []
        except (ValueError, TypeError, KeyError, RecursionError):
            return []
        if calls:
            self.calls += calls
            self._held = held[end:]
        return [Part(f"{CALL}{call.name} {call.arguments}", "call") for call in calls]


def _call(value: dict[str, object]) -> Call:
    """ValueError, TypeError or KeyError for what is no call."""
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not name or not isinstance(arguments, dict | str):
        raise ValueError
    call = Call(name, arguments if isinstance(arguments, str) else
                json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    "".join(call).encode()  # ValueError for half a character
    return call


def _tail(text: str) -> int:
    """Characters at the end of text that may begin the mark."""
    return next((n for n in range(min(len(text), len(MARKED) - 1), 0, -1) if text.endswith(MARKED[:n])), 0)
