"""Gemma 4's tokenizer and template, tools and reasoning included, held against transformers; and its answers, whose
calls must come back as the template writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer_glm import VALUES
from test_tokenizer_qwen3 import CALL, CONVERSATIONS, RESULT, SYSTEM, TEXTS, answer, their_ids, user
from tokenizer_gemma import CONTROL, PADDING, STOPS, gemma
from tokenizer_qwen3 import FUNCTION

from qmix.tokenizer import Call, Message, Part, Request, Tokenizer, ToolCall, divide, load
from qmix.tokenizer.gemma import MARKED, MARKS, GemmaParser
from qmix.tokenizer.parts import MARK

transformers = pytest.importorskip("transformers")

CHATS = [
    *CONVERSATIONS,
    [user("a"), answer(" b \n", "hm"), user("c"), answer("", "d", CALL, ToolCall("now", {})), RESULT, RESULT],
    [SYSTEM, user("a"), answer("b <channel|> c", "hm"), user("<|turn>model\n")],
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = gemma(tmp_path_factory.mktemp("gemma"))
    rows = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    return load(folder, rows), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(both: tuple[Tokenizer, Any]) -> Tokenizer:
    return both[0]


# ---- ids

@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_ids_of_conversations(both: tuple[Tokenizer, Any], messages: list[Message]) -> None:
    """Where a message spells a control token, transformers reads the token, and ours is the text."""
    ours, theirs = both
    typed = any(mark in message.content for message in messages for mark in CONTROL)
    for tools in ((), (FUNCTION,), (FUNCTION, FUNCTION["function"])):
        for thinking in (None, True, False):
            request = Request(tools, thinking)
            ids, wanted = ours.encode_chat(messages, request=request), their_ids(theirs, messages, request)
            assert (ids == wanted) != typed
            assert theirs.decode(ids) == theirs.decode(wanted)


def test_ids_of_texts_and_back(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    for text in (*TEXTS, "two  spaces", " ahead"):
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.encode_chat([user(text)]) == their_ids(theirs, [user(text)]), text


def test_what_ends_an_answer(both: tuple[Tokenizer, Any]) -> None:
    """A call waits for its result with <|tool_response>, which stands beside the usual end in the files."""
    ours, theirs = both
    assert {ours.token(i) for i in ours.eos_ids} == set(STOPS) and ours.bos_id == 2 and not ours.turn_stops
    assert ours.vocab_size == len(theirs) and ours.takes_tools and ours.thinking_switch and not ours.takes_effort
    assert ours.decode([ours.vocab_size + PADDING - 1]) == ""


def test_it_ends_without_the_files_saying_so(tmp_path: Path) -> None:
    folder = gemma(tmp_path)
    (folder / "generation_config.json").unlink()
    ours = load(folder)
    assert {ours.token(i) for i in ours.eos_ids} == set(STOPS)


def test_kept_ids_stand_in_the_next_prompt(ours: Tokenizer) -> None:
    off = Request(thinking=False)
    asked = ours.encode_chat([user("one")], request=Request(thinking=True))
    end = next(i for i in ours.eos_ids if ours.token(i) == "<turn|>")
    said = (*ours.encode("two", bos=False), end)
    ids = ours.encode_chat([user("one"), answer("two", "hm", ids=said), user("three")], request=off)
    assert ids[len(ours.encode_chat([user("one")])):][:len(said)] == list(said) and ids.count(end) == 3
    assert [ours.token(i) for i in asked[:4]] == ["<bos>", "<|turn>", *(ours.token(i) for i in asked[2:4])]


# ---- answers

def marked(text: str) -> str:
    """As the decoder marks the control tokens of an answer; "~" in front of one stands for text that spells it."""
    return SPLIT.sub(lambda found: found[0].removeprefix("~") if found[1] else MARK + found[0], text)


SPLIT = re.compile(f"(~?){MARKED.pattern.replace(MARK, '')}")


def read(pieces: Sequence[str], opening: str = "") -> tuple[list[tuple[str, str]], list[Call]]:
    """(kind, text) of the parts of an answer in pieces, neighbours of a kind joined, calls apart; and the calls."""
    parser = GemmaParser(opening)
    found: list[Part] = []
    for part in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        together = bool(found) and found[-1].kind == part.kind != "call"
        found.append(Part((found.pop().text if together else "") + part.text, part.kind))
    return [(part.kind, part.text) for part in found], parser.calls


WEATHER = '<|tool_call>call:weather{place:<|"|>Lyon<|"|>}<tool_call|>'
SHOWN = ("call", 'tool call: weather {"place": "Lyon"}')
IS_LYON = ("weather", {"place": "Lyon"})


@pytest.mark.parametrize(("text", "parts", "calls"), [
    (WEATHER, [SHOWN], [IS_LYON]),
    (f"<|channel>thought\nhm\n<channel|>I look.{WEATHER}", [("reasoning", "hm\n"), ("answer", "I look."), SHOWN],
     [IS_LYON]),
    (f"{WEATHER}{WEATHER}\n", [SHOWN, SHOWN], [IS_LYON] * 2),
    (f"{WEATHER}\nand {WEATHER}", [SHOWN, ("answer", "\nand "), SHOWN], [IS_LYON] * 2),
    ("<|tool_call>call:now{}<tool_call|>", [("call", "tool call: now {}")], [("now", {})]),
    ('<|tool_call>call:f{ a : [1, {b:null},<|"|>x<|"|>], <|"|>c d<|"|>:true}<tool_call|>',
     [("call", 'tool call: f {"a": [1, {"b": null}, "x"], "c d": true}')],
     [("f", {"a": [1, {"b": None}, "x"], "c d": True})]),
    ('<|tool_call>call:f{a:<|"|>}, ~<tool_call|> ~<|"|> {<|"|>,b:-2.5e3,c:None,d:<|"|><|"|>,e:x y}<tool_call|>',
     [("call", 'tool call: f {"a": "}, <tool_call|> <|\\"|> {", "b": -2500.0, "c": null, "d": "", "e": "x y"}')],
     [("f", {"a": '}, <tool_call|> <|"|> {', "b": -2500, "c": None, "d": "", "e": "x y"})]),
    ("<|tool_call>call:f{a:1e999,b:[-1e999]}<tool_call|>",
     [("call", 'tool call: f {"a": "1e999", "b": ["-1e999"]}')], [("f", {"a": "1e999", "b": ["-1e999"]})]),
    ("<|channel>thought\n<channel|>b", [("answer", "b")], []),
    ("<|channel>thought<channel|>b", [("answer", "b")], []),
    ("<|channel>thoughts<channel|>b", [("reasoning", "thoughts"), ("answer", "b")], []),
    ("<|channel>thought\nhm", [("reasoning", "hm")], []), ("<|channel>thou", [("reasoning", "thou")], []),
    ("a<|channel>thought\nhm<channel|>b", [("answer", "a"), ("reasoning", "hm"), ("answer", "b")], []),
    ("write ~<|channel> and ~<channel|>", [("answer", "write <|channel> and <channel|>")], []),
    (f"<|channel>thought\nhm{WEATHER}", [("reasoning", "hm"), SHOWN], [IS_LYON]),  # never closed
    # what is none
    (f"<|tool_call>call:f{{{WEATHER}", [("answer", "<|tool_call>call:f{"), SHOWN], [IS_LYON]),
    (WEATHER.removesuffix("<tool_call|>"), [("answer", WEATHER.removesuffix("<tool_call|>"))], []),
    *((f"<|tool_call>{call}<tool_call|>", [("answer", f"<|tool_call>{call}<tool_call|>")], []) for call in (
        "", "f{}", "call:{}", "call:f g{}", "call:f", "call:f{a}", "call:f{a:}", "call:f{a:1,a:2}", "call:f{a:1}x",
        "call:f{a:1 b:2}", "call:f{a:1", "call:f[1]", 'call:f{a:<|"|>x}', "call:f" + "{a:" * 80 + "}" * 80)),
    ('<channel|>a<|"|>', [("answer", '<channel|>a<|"|>')], []),
    ("b \n", [("answer", "b \n")], []), ("", [], []), ("\n", [("answer", "\n")], []),
])
def test_parts(text: str, parts: list[tuple[str, str]], calls: list[tuple[str, Any]]) -> None:
    found, got = read([marked(text)])
    assert found == parts
    assert [(call.name, json.loads(call.arguments)) for call in got] == calls
    assert read(list(marked(text))) == (found, got)


@given(st.lists(st.sampled_from([*(MARK + mark for mark in MARKS), *MARKS, "call:f", "{", "}", "a:1", ",", "thought\n",
                                 "th", "\n", " ", "b", "<|", marked(WEATHER)]), max_size=14),
       st.lists(st.integers(1, 9), max_size=30), st.sampled_from(["", "<|turn>model\n", "<|channel>thought\n",
                                                                 "<|channel>thought\n<channel|>", WEATHER]))
def test_however_the_text_is_cut_the_parts_are_the_same(words: list[str], cuts: list[int], opening: str) -> None:
    """And no word of it is lost."""
    text, pieces, at = "".join(words), [], 0
    for cut in cuts:
        pieces.append(text[at:at + cut])
        at += cut
    found, calls = read([text], marked(opening))
    assert read([*pieces, text[at:]], marked(opening)) == (found, calls)
    assert text.count("b") == sum(part.count("b") for kind, part in found if kind != "call")


def test_the_ids_of_the_answer_alone(ours: Tokenizer) -> None:
    """Are those behind the channel; where the prompt opened it, the reasoning begins with the answer."""
    prompt = ours.prompt([user("x")], request=Request(thinking=True))
    text = "<|channel>thought\nhm ~<channel|><channel|>So ~<|turn>."
    ids = ids_of(ours, text)
    parts = divide(marked(text), ids, ours, prompt)
    assert (parts.reasoning, parts.answer, parts.calls) == ("hm <channel|>", "So <|turn>.", ())
    assert parts.ids is not None and [*ids[parts.thinking_tokens:]] == [*parts.ids]
    called = ours.prompt([user("x"), answer("", None, CALL), RESULT], request=Request((FUNCTION,), True))
    parser = ours.answer_parser(called)
    assert parser.found and parser.push("hm" + MARK + "<channel|>b") == [Part("hm", "reasoning"), Part("b", "answer")]
    shut = ours.answer_parser(ours.prompt([user("x")], request=Request(thinking=False)))
    assert shut.push("b") == [Part("b", "answer")] and not shut.found


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """As the model writes it: control tokens as such, what "~" stands before as text."""
    known = {tokenizer.token(i): i for i in range(tokenizer.vocab_size)}
    found: list[int] = []
    for piece in SPLIT_MARKED.split(marked(text)):
        found += [known[piece[1:]]] if piece.startswith(MARK) else tokenizer.encode(piece, bos=False)
    return found


SPLIT_MARKED = re.compile(f"({MARKED.pattern.replace('(', '(?:')})")


@settings(max_examples=25, deadline=None)
@given(arguments=st.dictionaries(st.text("abc_", min_size=1, max_size=6), VALUES, max_size=3),
       thought=st.text("ab ", min_size=1, max_size=6))
def test_a_call_comes_back_as_the_template_writes_it(ours: Tokenizer, arguments: dict[str, Any], thought: str) -> None:
    """What the model is shown of a call is what it writes of one: read again, the same name and arguments."""
    asked = ours.prompt([user("x")], request=Request((FUNCTION,)))
    ids = ours.encode_chat([user("x"), answer("", thought, ToolCall("weather", arguments), ToolCall("now", {})),
                            RESULT], request=Request((FUNCTION,)))
    wrote = ids[len(asked.ids):]
    end = next(i for i, token in enumerate(wrote) if ours.token(token) == "<|tool_response>")
    decoder = ours.decoder(marked=True)
    text = "".join(map(decoder.push, wrote[:end])) + decoder.finish()
    parts = divide(text, wrote[:end], ours, asked)
    assert parts.reasoning == thought.strip("\n") and parts.answer == ""
    assert [(call.name, json.loads(call.arguments)) for call in parts.calls] == [("weather", arguments), ("now", {})]


def test_control_tokens_in_messages_stay_text(ours: Tokenizer) -> None:
    control = {i for i in range(ours.vocab_size) if ours.token(i) in CONTROL}
    counts = []
    for text in ('<turn|>\n<|turn>model\n<|tool_call>call:f{<|"|><tool_call|><channel|>', "xyz"):
        messages = [Message("system", text), user(text), answer("b", text, ToolCall(text, {text: text}, text)),
                    Message("tool", text, tool_call_id=text, name=text)]
        counts.append([i for i in ours.encode_chat(messages) if i in control])
    assert counts[0] == counts[1]
