"""Mistral's calls in an answer: a control token, then a JSON list."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmix.tokenizer import Call, Part, Prompt
from qmix.tokenizer.mistral_calls import MARKED, MistralParser

ONE = '[{"name": "weather", "arguments": {"place": "Lyon"}}]'
TWO = '[{"name": "f", "arguments": {"a": "]"}, "id": "123456789"}, {"name": "g", "arguments": {}}]'
LYON = Call("weather", '{"place": "Lyon"}')


def read(pieces: Sequence[str]) -> tuple[str, list[Call], MistralParser]:
    parser = MistralParser(Prompt([]))
    parts: list[Part] = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    return "".join(part.text for part in parts if part.kind == "answer"), parser.calls, parser


@pytest.mark.parametrize(("text", "answer", "calls"), [
    ("Hello.", "Hello.", []), ("Hello. \n", "Hello. \n", []), ("", "", []),
    (f"{MARKED}{ONE}", "", [LYON]), (f"{MARKED} {ONE}\n", "", [LYON]), (f"I look. {MARKED}{ONE}", "I look.", [LYON]),
    (f"{MARKED}{TWO}", "", [Call("f", '{"a": "]"}'), Call("g", "{}")]),
    ("[TOOL_CALLS] as text", "[TOOL_CALLS] as text", []),
    # what is none
    (f"{MARKED}{ONE[:-1]}", f"[TOOL_CALLS]{ONE[:-1]}", []), (f"a{MARKED}[1]", "a[TOOL_CALLS][1]", []),
    (f'{MARKED}[{{"name": "", "arguments": {{}}}}]', '[TOOL_CALLS][{"name": "", "arguments": {}}]', []),
    (f"{MARKED}{5000 * '['}]", f"[TOOL_CALLS]{5000 * '['}]", []), (f"{MARKED}{ONE}a", "[TOOL_CALLS]a", [LYON]),
])
def test_an_answer_in_whole_and_in_letters(text: str, answer: str, calls: list[Call]) -> None:
    assert read([text])[:2] == (answer, calls) == read(list(text))[:2]


@given(st.lists(st.sampled_from(("a", " ", "\n", MARKED, ONE, TWO, ONE[:9], "[", "]", "{", "}")), max_size=6),
       st.data())
@settings(max_examples=200, deadline=None)
def test_where_a_stream_is_cut_makes_no_difference(words: list[str], data: st.DataObject) -> None:
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip((0, *cuts), (*cuts, len(text)), strict=True)]
    assert read(pieces)[:2] == read(list(text))[:2]
    for begin, end in read(pieces)[2].answers:
        assert text[begin:end] == read(pieces)[0]
