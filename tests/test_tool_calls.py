"""Calls between tags in an answer: Qwen3's JSON and Qwen3-Coder's tags. GLM's are in test_tokenizer_glm.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_qwen3 import CODER, HYBRID, qwen3

from qmix.tokenizer import Call, Message, Part, Prompt, Request, Tokenizer, ToolCall, divide, load
from qmix.tokenizer.calls import CallParser, CallReader
from qmix.tokenizer.json_calls import JsonCall
from qmix.tokenizer.xml_calls import XmlCall

Reader = Callable[[int], CallReader]
Found = tuple[list[tuple[str, str]], list[Call]]


def read(reader: Reader, pieces: Sequence[str], prompt: Prompt = Prompt([])) -> Found:  # noqa: B008
    """(kind, text) of the parts of an answer in pieces, neighbours of a kind joined, calls apart; and the calls."""
    parser = CallParser(prompt, reader)
    found: list[Part] = []
    for part in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        together = bool(found) and found[-1].kind == part.kind != "call"
        found.append(Part((found.pop().text if together else "") + part.text, part.kind))
    return [(part.kind, part.text) for part in found], parser.calls


WEATHER = {JsonCall: '<tool_call>\n{"name": "weather", "arguments": {"place": "Lyon"}}\n</tool_call>',
           XmlCall: "<tool_call>\n<function=weather>\n<parameter=place>\nLyon\n</parameter>\n</function>\n</tool_call>"}
SHOWN = ("call", 'tool call: weather {"place": "Lyon"}')
LYON = ("weather", '{"place": "Lyon"}')


@pytest.mark.parametrize("reader", WEATHER, ids=lambda reader: reader.__name__)
def test_a_call_stands_behind_reasoning_and_answer(reader: Reader) -> None:
    call = WEATHER[reader]  # type: ignore[index]
    for text, parts, count in ((call, [SHOWN], 1), (f"{call}\n{call}", [SHOWN, SHOWN], 2),
                               (f"{call}\nand\n{call}\n", [SHOWN, ("answer", "\nand"), SHOWN], 2),
                               (f"<think>hm</think>\nI look.\n{call}", [("reasoning", "hm"), ("answer", "\nI look."),
                                                                       SHOWN], 1),
                               (f"<think>{call}</think>b", [("reasoning", call), ("answer", "b")], 0),
                               (call[:-1], [("answer", call[:-1])], 0)):
        assert read(reader, [text]) == read(reader, list(text)) == (parts, [LYON] * count)


@pytest.mark.parametrize(("inner", "call"), [
    ('{"name": "f", "arguments": {}}', ("f", "{}")), (' {"arguments":{"a":[1,null]},"name":"f"} ', (
        "f", '{"a": [1, null]}')),
    ('{"name": "f", "arguments": {"a": "</tool_call> {\\"b"}}', ("f", '{"a": "</tool_call> {\\"b"}')),
    ('{"name": "f", "arguments": {"a": "two\nlines"}}', ("f", '{"a": "two\\nlines"}')),
    ('{"name": "f", "arguments": "{\\"a\\": 1}"}', ("f", '{"a": 1}')),
    # what is none
    ('{"name": "f"}', None), ('{"name": "", "arguments": {}}', None), ('{"name": "f", "arguments": [1]}', None),
    ('{"name": "f", "arguments": {}, "id": 3}', None), ("f", None), ('["name"]', None), ("", None), ("{", None),
    ('{"name": "f", "arguments": {"a": NaN}}', None), ('{"name": "f", "arguments": {"a": -1e999}}', None),
    ('{"name": "f", "arguments": {"a": "' + 63 * "</tool_call>" + '"}}', ("f", '{"a": "' + 63 * "</tool_call>" + '"}')),
    ('{"name": "f", "arguments": {"a": "' + 64 * "</tool_call>" + '"}}', None),
    ('{"name": "f", "arguments": {"a": "\\ud800"}}', None),
    ('{"name": "f", "arguments": ' + 5000 * "[", None), ('{"name": "f", "arguments": {}} {}', None),
])
def test_json(inner: str, call: Call | None) -> None:
    _same(JsonCall, inner, call)


@pytest.mark.parametrize(("inner", "call"), [
    ("<function=f>\n</function>", ("f", "{}")), ("<function=f></function>", ("f", "{}")),
    ("<function=f><parameter=a>1</parameter><parameter=b>\n\nx\n\n</parameter></function>", (
        "f", '{"a": 1, "b": "\\nx\\n"}')),
    ("<function=f>\n<parameter=a>\n</tool_call> <parameter=\n</parameter>\n</function>", (
        "f", '{"a": "</tool_call> <parameter="}')),
    ("<function=f>\n<parameter=a>\nTrue\n</parameter>\n<parameter=b>\nNone\n</parameter>\n</function>", (
        "f", '{"a": true, "b": null}')),
    ("<function=f>\n<parameter=a>\n[-1e999]\n</parameter>\n</function>", ("f", '{"a": "[-1e999]"}')),
    # what is none
    ('{"name": "f", "arguments": {}}', None), ("<function=>\n</function>", None), ("<function=f\n></function>", None),
    ("<function=f>\nx</function>", None), ("<function=f>", None), ("<function=f></function>x", None),
    ("<function=f>" + 2 * "<parameter=a>1</parameter>" + "</function>", None),
])
def test_xml(inner: str, call: Call | None) -> None:
    _same(XmlCall, inner, call)


def _same(reader: Reader, inner: str, call: Call | None) -> None:
    """However the text is cut; what is no call is answer, as it is spelled."""
    text = f"a <tool_call>\n{inner}\n</tool_call>"
    parts = [("answer", text)] if call is None else [("answer", "a"), ("call", "tool call: {} {}".format(*call))]
    calls = [] if call is None else [call]
    assert read(reader, [text]) == read(reader, list(text)) == (parts, calls)


WORDS = ["<tool_call>", "</tool_call>", "\n", " ", "a", "<", '"', "{", "</think>", "<think>", "<function=f>",
         "<function=", "<parameter=a>", "</parameter>", "</function>",
         '{"name": "f", "arguments": {"a": "', '"}}', *WEATHER.values()]


@given(st.lists(st.sampled_from(WORDS), max_size=14), st.lists(st.integers(1, 9), max_size=30), st.booleans(),
       st.sampled_from([*WEATHER]))
def test_however_the_text_is_cut_the_parts_are_the_same(words: list[str], cuts: list[int], opened: bool,
                                                        reader: Reader) -> None:
    text, pieces, at = "".join(words), [], 0
    for cut in cuts:
        pieces.append(text[at:at + cut])
        at += cut
    prompt = Prompt([], opened)
    assert read(reader, [*pieces, text[at:]], prompt) == read(reader, [text], prompt)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found = {}
    for name, template in (("json", HYBRID), ("xml", CODER)):
        folder: Path = qwen3(tmp_path_factory.mktemp(name), template)
        found[name] = load(folder, json.loads((folder / "config.json").read_text())["vocab_size"])
    return found


VALUES = st.recursive(st.none() | st.booleans() | st.integers(-2**40, 2**40) | st.text("ab \u00e9\"{<", max_size=8),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner,
                                                                                  max_size=3), max_leaves=6)


@pytest.mark.parametrize("form", ["json", "xml"])
@settings(max_examples=25, deadline=None)
@given(arguments=st.dictionaries(st.text("abc_", min_size=1, max_size=6), VALUES, max_size=3))
def test_a_call_comes_back_as_the_template_writes_it(tokenizers: dict[str, Tokenizer], form: str,
                                                     arguments: dict[str, Any]) -> None:
    """What the model is shown of a call is what it writes of one: read again, the same name and arguments."""
    ours = tokenizers[form]
    function = {"name": "weather", "parameters": {"type": "object", "properties": {
        name: {"type": "string"} for name, value in arguments.items() if isinstance(value, str)}}}
    request, question = Request(({"type": "function", "function": function},)), Message("user", "x")
    asked = ours.prompt([question], request=request)
    calls = (ToolCall("weather", arguments), ToolCall("now", {}))
    called = ours.encode_chat([question, Message("assistant", "I look.", None, None, calls),
                               Message("tool", "r", name="weather")], request=request)
    end = next(at for at in range(len(asked.ids), len(called)) if called[at] in ours.eos_ids)
    ids = called[len(asked.ids):end]
    assert called[:len(asked.ids)] == asked.ids
    found = divide(ours.decode(ids), ids, ours, asked)
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == [("weather", arguments), ("now", {})]
    assert found.answer.strip() == "I look."
