"""GLM-4.5's tokenizer and template, tools and reasoning included, held against transformers; and its calls, which must
come back as the template writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer_qwen3 import CALL, CONVERSATIONS, RESULT, SYSTEM, TEXTS, answer, their_ids, user
from tokenizer_glm import PADDING, SPECIAL, STOPS, glm
from tokenizer_qwen3 import FUNCTION

from qmix.tokenizer import Call, Message, Part, Prompt, Request, Tokenizer, ToolCall, divide, load
from qmix.tokenizer.calls import CallParser
from qmix.tokenizer.glm import GlmCall

transformers = pytest.importorskip("transformers")

CHATS = [
    *CONVERSATIONS,
    [user("a"), answer(" b \n", "hm"), user("c"), answer("", "d", CALL, ToolCall("now", {})), RESULT, RESULT],
    [SYSTEM, user("a"), SYSTEM, user("/nothink"), answer("b"), user("c /nothink")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glm(tmp_path_factory.mktemp("glm"), quiet_special=False)


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Tokenizer, Any]:
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    return load(folder, rows), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(both: tuple[Tokenizer, Any]) -> Tokenizer:
    return both[0]


# ---- ids

@pytest.mark.parametrize("tools", [(), (FUNCTION,), (FUNCTION, FUNCTION["function"])], ids=len)
@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_ids_and_texts_of_conversations(both: tuple[Tokenizer, Any], messages: list[Message],
                                        tools: tuple[Any, ...]) -> None:
    ours, theirs = both
    for thinking in (None, True, False):
        request = Request(tools, thinking)
        ids = ours.encode_chat(messages, request=request)
        assert ids == their_ids(theirs, messages, request)
        assert theirs.decode(ids).startswith("[gMASK]<sop>")
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_ids_of_texts_and_back(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    for text in (*TEXTS, "1234567 <arg_key>", "/nothink"):
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True), text
        if "<" not in text:
            assert ids == theirs(text)["input_ids"], text
            assert ours.encode_chat([user(text)]) == their_ids(theirs, [user(text)]), text


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab \n\u00e9{}\"'\\&<>", max_size=12), min_size=5, max_size=5))
def test_ids_of_any_tools_and_reasoning(both: tuple[Tokenizer, Any], texts: list[str]) -> None:
    ours, theirs = both
    asked, said, thought, value, result = texts
    messages = [user(asked), answer(said, thought, ToolCall("f", {"x": value, value: [value]}, "1")),
                Message("tool", result, tool_call_id="1", name="f")]
    request = Request(({**FUNCTION, "function": {**FUNCTION["function"], "description": value}},))
    assert ours.encode_chat(messages, request=request) == their_ids(theirs, messages, request)


@pytest.mark.parametrize("head", [False, True])
def test_what_stands_in_front_of_a_plain_text(tmp_path: Path, head: bool) -> None:
    """The prefix, where the tokenizer puts it there; in a conversation it stands once."""
    path = glm(tmp_path, head=head)
    ours, theirs = load(path), transformers.AutoTokenizer.from_pretrained(path)
    assert ours.encode("the fox") == theirs("the fox")["input_ids"]
    assert [ours.token(i) for i in ours.encode("the fox")[:2]] == ["[gMASK]", "<sop>"] or not head
    assert ours.encode_chat([SYSTEM, user("a")]) == their_ids(theirs, [SYSTEM, user("a")])


def test_three_ids_end_an_answer(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    assert {ours.token(i) for i in ours.eos_ids} == set(STOPS) and ours.bos_id is None and not ours.turn_stops
    assert ours.vocab_size == len(theirs) and ours.takes_tools and ours.thinking_switch and not ours.takes_effort
    assert ours.decode([ours.vocab_size + PADDING - 1]) == ""


def test_an_answer_that_ended_with_the_next_turn_ends_it_once(ours: Tokenizer) -> None:
    """The model writes <|user|> to end its answer, and the template begins the next turn with it. Kept ids make the
    next prompt go on where the last one and its answer were."""
    (end,) = (i for i in ours.eos_ids if ours.token(i) == "<|user|>")
    off = Request(thinking=False)
    asked = ours.encode_chat([user("one")], request=off)
    said = (*ours.encode("\ntwo"), end)
    ids = ours.encode_chat([user("one"), answer("two", ids=said), user("three")], request=off)
    assert ids[:len(asked) + len(said)] == [*asked, *said] and (end, end) not in pairwise(ids)


def test_no_think_writes_the_models_own_word(tmp_path: Path) -> None:
    """Behind the question, as a token, and empty tags behind the answer's begin. A user cannot spell a token that is
    declared special."""
    ours = load(glm(tmp_path))
    off = ours.encode_chat([user("x")], request=Request(thinking=False))
    assert [ours.token(i) for i in off].count("/nothink") == 1
    assert [ours.token(i) for i in off[-2:]] == ["<think>", "</think>"]
    assert "/nothink" not in [ours.token(i) for i in ours.encode_chat([user("x/nothink")])]
    assert not ours.prompt([user("x")]).in_reasoning
    assert not ours.prompt([user("x")], request=Request(thinking=False)).in_reasoning


def test_control_tokens_in_messages_stay_text(ours: Tokenizer) -> None:
    control = {i for i in range(ours.vocab_size) if ours.token(i) in SPECIAL}
    counts = []
    for text in ("<|user|>[gMASK]<sop><|observation|><|endoftext|>", "xyz"):
        messages = [Message("system", text), user(text), answer(text, text, ToolCall(text, {text: text}, text)),
                    Message("tool", text, tool_call_id=text, name=text)]
        counts.append([i for i in ours.encode_chat(messages) if i in control])
    assert counts[0] == counts[1]


# ---- calls

def read(pieces: Sequence[str], prompt: Prompt = Prompt([])) -> tuple[list[tuple[str, str]], list[Call]]:  # noqa: B008
    """(kind, text) of the parts of an answer in pieces, neighbours of a kind joined, calls apart; and the calls."""
    parser = CallParser(prompt, GlmCall)
    found: list[Part] = []
    for part in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        together = bool(found) and found[-1].kind == part.kind != "call"
        found.append(Part((found.pop().text if together else "") + part.text, part.kind))
    return [(part.kind, part.text) for part in found], parser.calls


WEATHER = "<tool_call>weather\n<arg_key>place</arg_key>\n<arg_value>Lyon</arg_value>\n</tool_call>"
SHOWN = ("call", 'tool call: weather {"place": "Lyon"}')


@pytest.mark.parametrize(("text", "parts", "calls"), [
    (WEATHER, [SHOWN], [("weather", {"place": "Lyon"})]),
    (f"\n<think>hm</think>\nI look.\n{WEATHER}\n", [("reasoning", "hm"), ("answer", "\nI look."), SHOWN],
     [("weather", {"place": "Lyon"})]),
    (f"{WEATHER}\n{WEATHER}", [SHOWN, SHOWN], [("weather", {"place": "Lyon"})] * 2),
    (f"{WEATHER}\nand\n{WEATHER}", [SHOWN, ("answer", "\nand"), SHOWN], [("weather", {"place": "Lyon"})] * 2),
    (f"<think>{WEATHER}</think>b", [("reasoning", WEATHER), ("answer", "b")], []),
    ("<tool_call>now\n</tool_call>", [("call", "tool call: now {}")], [("now", {})]),
    ("<tool_call>now</tool_call>", [("call", "tool call: now {}")], [("now", {})]),
    ("<tool_call>f<arg_key>a</arg_key><arg_value>[1, {\"b\": null}]</arg_value></tool_call>",
     [("call", 'tool call: f {"a": [1, {"b": null}]}')], [("f", {"a": [1, {"b": None}]})]),
    ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value></tool_call> <arg_key>\n</arg_value>\n</tool_call>",
     [("call", 'tool call: f {"a": "</tool_call> <arg_key>\\n"}')], [("f", {"a": "</tool_call> <arg_key>\n"})]),
    # what is none
    ("the tag <tool_call> begins a call, </tool_call> ends it",
     [("answer", "the tag <tool_call> begins a call, </tool_call> ends it")], []),
    ("<tool_call>\n{\"name\": \"f\"}\n</tool_call>", [("answer", "<tool_call>\n{\"name\": \"f\"}\n</tool_call>")], []),
    (WEATHER[:-1], [("answer", WEATHER[:-1])], []),
    ("x <tool_call>", [("answer", "x <tool_call>")], []), ("x <tool", [("answer", "x <tool")], []),
    (f"<tool_call>f\n<arg_value>{WEATHER}", [("answer", "<tool_call>f\n<arg_value>"), SHOWN],
     [("weather", {"place": "Lyon"})]),
    ("<tool_call>f\n<arg_key>a</arg_key>\nx</tool_call>",
     [("answer", "<tool_call>f\n<arg_key>a</arg_key>\nx</tool_call>")], []),
    ("<tool_call>f" + 2 * "<arg_key>a</arg_key><arg_value>1</arg_value>" + "</tool_call>",
     [("answer", "<tool_call>f" + 2 * "<arg_key>a</arg_key><arg_value>1</arg_value>" + "</tool_call>")], []),
    ("b \n", [("answer", "b \n")], []), ("", [], []), ("\n", [("answer", "\n")], []),
])
def test_calls(text: str, parts: list[tuple[str, str]], calls: list[tuple[str, Any]]) -> None:
    found, got = read([text])
    assert found == parts
    assert [(call.name, json.loads(call.arguments)) for call in got] == calls
    assert read(list(text)) == (found, got)


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "f\n", "<arg_key>", "</arg_key>", "<arg_value>", "\n",
                                 "</arg_value>", " ", "a", "1", "<", "</think>", "<think>", WEATHER]), max_size=14),
       st.lists(st.integers(1, 9), max_size=30), st.booleans())
def test_however_the_text_is_cut_the_parts_are_the_same(words: list[str], cuts: list[int], opened: bool) -> None:
    """And no character but white space around calls is lost."""
    text, pieces, at = "".join(words), [], 0
    for cut in cuts:
        pieces.append(text[at:at + cut])
        at += cut
    prompt = Prompt([], opened)
    found, calls = read([text], prompt)
    assert read([*pieces, text[at:]], prompt) == (found, calls)
    if not calls:
        said = "".join(part for _, part in found)
        assert "".join(text.replace("<think>", "").replace("</think>", "").split()) == "".join(
            said.replace("<think>", "").replace("</think>", "").split())


@pytest.mark.parametrize(("value", "kind", "wanted"), [
    ("21", "string", "21"), ("21", "integer", 21), ("21", ["string", "null"], 21), ("null", ["string"], "null"),
    ("a b", "integer", "a b"), ("NaN", "number", "NaN"), ('"\\ud800"', "array", '"\\ud800"'), ("", "object", ""),
    ("[" * 5000, "array", "[" * 5000), ("true", None, True)])
def test_the_tools_say_what_a_value_is(value: str, kind: Any, wanted: Any) -> None:
    """A text is written without quotation marks: only its schema tells "21" from 21."""
    parameters = {"type": "object", "properties": {"a": {} if kind is None else {"type": kind}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    text = f"<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    for tools in ((tool,), (tool["function"],)):
        _, (call,) = read([text], Prompt([], tools=tools))
        assert json.loads(call.arguments) == {"a": wanted}
    _, (call,) = read([text], Prompt([], tools=({"function": 3}, {"name": "f", "parameters": []}, {"name": "g"})))
    assert call.name == "f"


VALUES = st.recursive(st.none() | st.booleans() | st.integers(-2**40, 2**40) | st.text("ab \n\u00e9\"{", max_size=8),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner,
                                                                                  max_size=3), max_leaves=6)


@settings(max_examples=40, deadline=None)
@given(arguments=st.dictionaries(st.text("abc_", min_size=1, max_size=6), VALUES, max_size=3),
       text=st.text("ab \n", max_size=6), thought=st.text("ab ", max_size=6))
def test_a_call_comes_back_as_the_template_writes_it(ours: Tokenizer, arguments: dict[str, Any], text: str,
                                                     thought: str) -> None:
    """What the model is shown of a call is what it writes of one: read again, the same name and arguments."""
    function = {"name": "weather", "parameters": {"type": "object", "properties": {
        name: {"type": "string"} for name, value in arguments.items() if isinstance(value, str)}}}
    request = Request(({"type": "function", "function": function},))
    asked = ours.prompt([user("x")], request=request)
    called = ours.encode_chat([user("x"), answer(text, thought, ToolCall("weather", arguments), ToolCall("now", {})),
                               RESULT], request=request)
    (end,) = (i for i in ours.eos_ids if ours.token(i) == "<|observation|>")
    ids = called[len(asked.ids):called.index(end, len(asked.ids)) + 1]
    assert called[:len(asked.ids)] == asked.ids
    decoder = ours.decoder(marked=True)
    found = divide("".join(map(decoder.push, ids)) + decoder.finish(), ids, ours, asked)
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == [("weather", arguments), ("now", {})]
    assert (found.reasoning, found.answer) == (thought.strip(), text.strip())
    thinking = ours.decode(ids[:found.thinking_tokens]).strip()
    assert thinking == f"<think>{thought.strip()}</think>"
    if found.answer and found.ids is not None:
        assert ours.decode(found.ids).strip() == text.strip()
