"""Reasoning and tool calls of each family's format, through OpenAI's client: what a scripted model writes comes out in
its parts, whole and streamed; and forced calls of a model that knows nothing of tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Running, ScriptedEngine, says, serving, spelled
from tokenizer_gemma import gemma
from tokenizer_glm import glm
from tokenizer_harmony import harmony
from tokenizer_qwen3 import CODER, HYBRID, THINKING, qwen3

from qmix.serve.answering import Trimmer
from qmix.tokenizer import Message, Prompt, Tokenizer, divide, load
from qmix.tokenizer.parts import MARK

ASK = [{"role": "user", "content": "How is the weather in Lyon and in Nice?"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather at a place.", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["place"]}}},
    {"type": "function", "function": {"name": "now"}}]


class Family(NamedTuple):
    """folder: writes a tokenizer. answer: reasoning "hm", answer "I look.", and two calls, as the model writes them."""

    folder: Callable[[Path], Path]
    answer: str


def _json(place: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"place": "{place}"}}}}\n</tool_call>'


def _xml(place: str) -> str:
    return (f"<tool_call>\n<function=weather>\n<parameter=place>\n{place}\n</parameter>\n</function>\n</tool_call>")


def _glm(place: str) -> str:
    return f"<tool_call>weather\n<arg_key>place</arg_key>\n<arg_value>{place}</arg_value>\n</tool_call>"


FAMILIES = {
    "qwen3": Family(lambda path: qwen3(path, HYBRID),
                    f"<think>\nhm\n</think>\n\nI look.\n{_json('Lyon')}\n{_json('Nice')}"),
    "thinking": Family(lambda path: qwen3(path, THINKING),
                       f"hm\n</think>\n\nI look.\n{_json('Lyon')}\n{_json('Nice')}"),
    "coder": Family(lambda path: qwen3(path, CODER), f"<think>hm</think>I look.\n{_xml('Lyon')}\n{_xml('Nice')}"),
    "glm": Family(glm, f"\n<think>hm</think>\nI look.\n{_glm('Lyon')}\n{_glm('Nice')}"),
    "gemma": Family(gemma, "<|channel>thought\nhm<channel|>I look.<|tool_call>call:weather{place:<|\"|>Lyon<|\"|>}"
                           "<tool_call|><|tool_call>call:weather{place:<|\"|>Nice<|\"|>}<tool_call|>"),
}
HARMONY = ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
           "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
           '{"place": "Lyon"}<|call|>')


@contextmanager
def scripted(tokenizer: Tokenizer, *texts: str) -> Iterator[tuple[ScriptedEngine, openai.OpenAI, Running]]:
    engine = ScriptedEngine(tokenizer, says(tokenizer, *texts))
    with serving(lambda: engine) as running, openai.OpenAI(base_url=running.url + "/v1", api_key="none",
                                                           max_retries=0) as client:
        yield engine, client, running


def streamed(client: openai.OpenAI, **request: Any) -> tuple[dict[str, str], list[list[str]], str]:
    """The texts of a stream, the calls put together from their deltas, and why it ended."""
    texts, calls, reason = {"content": "", "reasoning_content": ""}, {}, ""
    for chunk in client.chat.completions.create(model="demo", stream=True, **request):
        delta = chunk.choices[0].delta
        for kind in texts:
            texts[kind] += getattr(delta, kind, None) or ""
        for call in delta.tool_calls or ():
            one = calls.setdefault(call.index, ["", ""])
            one[0] += call.function.name or ""
            one[1] += call.function.arguments or ""
            assert (call.id is None) == (call.function.name is None)
        reason = chunk.choices[0].finish_reason or reason
    return texts, [calls[n] for n in sorted(calls)], reason


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, str]:
    found = FAMILIES[request.param]
    return load(found.folder(tmp_path_factory.mktemp(request.param))), found.answer


def test_reasoning_answer_and_calls_come_apart(family: tuple[Tokenizer, str]) -> None:
    tokenizer, answer = family
    want = [["weather", '{"place": "Lyon"}'], ["weather", '{"place": "Nice"}']]
    with scripted(tokenizer, answer) as (_, client, _running):
        whole = client.chat.completions.create(model="demo", messages=ASK, tools=TOOLS)
        message = whole.choices[0].message
        assert (message.content, message.reasoning_content) == ("I look.", "hm")
        assert [[c.function.name, c.function.arguments] for c in message.tool_calls] == want
        assert len({c.id for c in message.tool_calls}) == 2 and whole.choices[0].finish_reason == "tool_calls"
        assert 0 < whole.usage.completion_tokens_details.reasoning_tokens < whole.usage.completion_tokens
        texts, calls, reason = streamed(client, messages=ASK, tools=TOOLS)
        assert texts == {"content": "I look.", "reasoning_content": "hm"} and calls == want and reason == "tool_calls"
        one = client.chat.completions.create(model="demo", messages=ASK, tools=TOOLS, parallel_tool_calls=False)
        assert [[c.function.name, c.function.arguments] for c in one.choices[0].message.tool_calls] == want[:1]
        assert one.choices[0].finish_reason == "tool_calls"


def test_harmonys_channels(tmp_path: Path) -> None:
    tokenizer = load(harmony(tmp_path))
    with scripted(tokenizer, HARMONY) as (_, client, _running):
        message = client.chat.completions.create(model="demo", messages=ASK, tools=TOOLS,
                                                 reasoning_effort="high").choices[0].message
        assert (message.content, message.reasoning_content) == ("I look.", "hm")
        assert [[c.function.name, c.function.arguments] for c in message.tool_calls] == [
            ["weather", '{"place": "Lyon"}']]
        texts, calls, reason = streamed(client, messages=ASK, tools=TOOLS)
        assert (texts["content"], len(calls), reason) == ("I look.", 1, "tool_calls")
        with pytest.raises(openai.BadRequestError, match="no call can be forced"):
            client.chat.completions.create(model="demo", messages=ASK, tools=TOOLS, tool_choice="required")


def test_calls_and_results_go_back_to_the_model(tmp_path: Path) -> None:
    tokenizer = load(qwen3(tmp_path))
    seen: list[str] = []

    def script(ids: Any) -> list[int]:
        seen.append(tokenizer.decode(ids))
        return spelled(tokenizer, "Rain.")

    engine = ScriptedEngine(tokenizer, script)
    with serving(lambda: engine) as running, openai.OpenAI(base_url=running.url + "/v1", api_key="n") as client:
        client.chat.completions.create(model="demo", tools=TOOLS, messages=[
            *ASK, {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather",
                                                                  "arguments": '{"place": "Lyon"}'}},
                {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": "no json"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
            {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]}])
    for text in ('"place": "Lyon"', "no json", "rain", "noon", "The weather at a place."):
        assert text in seen[0]


def test_no_tools_are_shown_with_tool_choice_none_and_thinking_is_switched(tmp_path: Path) -> None:
    tokenizer = load(qwen3(tmp_path))
    with scripted(tokenizer, "So.") as (_, client, _running):
        shown = [client.chat.completions.create(model="demo", messages=ASK, tools=TOOLS, **more).usage.prompt_tokens
                 for more in ({}, {"tool_choice": "none"}, {"tool_choice": "none", "reasoning_effort": "none"},
                              {"tool_choice": "none", "extra_body": {"chat_template_kwargs": {
                                  "enable_thinking": False}}})]
        assert shown[0] > shown[1] < shown[2] == shown[3], "the switch writes empty reasoning into the prompt"


FEW = [{"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"place": {"type": "string", "enum": ["Lyon", "Nice"]},
                                     "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["place", "days"], "additionalProperties": False}}}, {"type": "function", "function": {
        "name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}]


@pytest.mark.parametrize("name", ["qwen3", "coder", "glm"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_forced(name: str, choice: Any, tmp_path: Path) -> None:
    """The model would say something else: only what the grammar allows comes through."""
    tokenizer = load(FAMILIES[name].folder(tmp_path))
    with scripted(tokenizer, "I will not call anything. " * 8) as (_, client, _running):
        got = client.chat.completions.create(model="demo", messages=ASK, tools=FEW, tool_choice=choice,
                                             parallel_tool_calls=False, max_tokens=300, temperature=1, seed=1)
        call, = got.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather" or (choice == "required" and arguments == {})
        if call.function.name == "weather":
            assert arguments["place"] in ("Lyon", "Nice") and 1 <= arguments["days"] <= 9
        assert got.choices[0].finish_reason == "tool_calls"


def test_a_schema_holds_behind_the_reasoning(tmp_path: Path) -> None:
    """The reasoning is free; what follows keeps to the schema."""
    tokenizer = load(qwen3(tmp_path))
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"],
              "additionalProperties": False}
    with scripted(tokenizer, '<think>\nI think {"b": 1}.\n</think>{"a": 7} and more') as (_, client, _running):
        got = client.chat.completions.create(model="demo", messages=ASK, response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert got.choices[0].message.reasoning_content == 'I think {"b": 1}.'
        assert json.loads(got.choices[0].message.content) == {"a": 7}


def marked_text(tokenizer: Tokenizer, answer: str) -> str:
    """As a generator gives it to a parser."""
    decoder = tokenizer.decoder(marked=True)
    return "".join(map(decoder.push, spelled(tokenizer, answer))) + decoder.finish()


def shown(tokenizer: Tokenizer, prompt: Prompt, pieces: list[str]) -> tuple[str, str, list[Any]]:
    """Reasoning, answer and calls of a stream that is cut into pieces."""
    parser, trimmer, texts = tokenizer.answer_parser(prompt), Trimmer(), {"reasoning": "", "answer": ""}
    for part in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        if part.kind != "call":
            texts[part.kind] += trimmer.push(part, parser.found)
    return texts["reasoning"], texts["answer"], list(parser.calls)


def test_every_cut_of_a_stream_gives_the_same_parts(family: tuple[Tokenizer, str]) -> None:
    tokenizer, answer = family
    prompt = tokenizer.prompt([Message("user", "x")])
    text = marked_text(tokenizer, answer)
    want = divide(text, None, tokenizer, prompt)
    for at in range(len(text) + 1):
        assert shown(tokenizer, prompt, [text[:at], text[at:]]) == (want.reasoning, want.answer, list(want.calls))
    assert shown(tokenizer, prompt, list(text)) == (want.reasoning, want.answer, list(want.calls))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_stream_in_any_pieces_gives_the_parts_of_the_whole(family: tuple[Tokenizer, str], data: st.DataObject
                                                               ) -> None:
    """Streams that are malformed in any way: parts of well-formed ones, in any order."""
    tokenizer, answer = family
    prompt = tokenizer.prompt([Message("user", "x")])
    text = marked_text(tokenizer, answer)
    span = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(lambda ends: text[min(ends):max(ends)])
    mixed = "".join(data.draw(st.lists(st.one_of(span, st.sampled_from(("\n", " ", MARK, "<", "x"))), max_size=5)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(mixed)), max_size=6)))
    pieces = [mixed[a:b] for a, b in zip((0, *cuts), (*cuts, len(mixed)), strict=True)]
    want = divide(mixed, None, tokenizer, prompt)
    assert shown(tokenizer, prompt, pieces) == (want.reasoning or "", want.answer, list(want.calls))
