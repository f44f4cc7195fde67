"""OpenAI's responses, driven by OpenAI's own client; what Codex CLI sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import Running, ScriptedEngine, says, serving, spelled
from tokenizer_qwen3 import qwen3

from qmix.serve.openai.responses_store import ResponseStore
from qmix.tokenizer import Message, Tokenizer, load

TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "description": "The weather.", "strict": False, "parameters": {
        "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}},
    {"type": "custom", "name": "apply_patch", "description": "Edit files.", "format": {
        "type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
    {"type": "web_search"}]
CALLS = ('<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Lyon"}}\n'
         '</tool_call>\n<tool_call>\n{"name": "apply_patch", "arguments": {"input": "*** Begin"}}\n</tool_call>')


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(qwen3(tmp_path_factory.mktemp("qwen3")))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    engine = ScriptedEngine(tokenizer, says(tokenizer, "Hello there."))
    engine.seen = []  # type: ignore[attr-defined]
    return engine


@pytest.fixture
def running(engine: ScriptedEngine) -> Iterator[Running]:
    with serving(lambda: engine) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def listens(engine: ScriptedEngine, text: str) -> list[str]:
    """From now on the engine says `text`; what it was asked."""
    seen: list[str] = []

    def script(ids: Any) -> list[int]:
        seen.append(engine.tokenizer.decode(ids))
        return spelled(engine.tokenizer, text)

    engine.script = script
    return seen


def test_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="demo", input="Hi")
    assert (whole.output_text, whole.status) == ("Hello there.", "completed")
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    with client.responses.stream(model="demo", input="Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "Hello there."
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.completed"]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}


def test_reasoning_and_calls_are_items(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    listens(engine, CALLS)
    raw = client.responses.with_raw_response.create(model="demo", input="Hi", tools=TOOLS)
    assert raw.headers["x-qmix-left-out"] == "web_search"
    whole = raw.parse()
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "custom_tool_call"]
    thoughts, message, call, patch = whole.output
    assert (thoughts.content[0].text, message.content[0].text) == ("hm", "I look.")
    assert (call.name, json.loads(call.arguments)) == ("weather", {"place": "Lyon"})
    assert (patch.name, patch.input) == ("apply_patch", "*** Begin")
    with client.responses.stream(model="demo", input="Hi", tools=TOOLS[:1]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 4
    assert "response.reasoning_text.delta" in kinds and "response.function_call_arguments.done" in kinds


def test_a_conversation_goes_on_from_its_id(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    seen = listens(engine, CALLS)
    first = client.responses.create(model="demo", input="How is it in Lyon?", tools=TOOLS[:1], instructions="Be brief.")
    call = next(item for item in first.output if item.type == "function_call")
    second = client.responses.create(model="demo", previous_response_id=first.id, tools=TOOLS[:1], input=[
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}])
    assert "Be brief." in seen[0] and "Be brief." not in seen[1], "instructions are of one request"
    for text in ("How is it in Lyon?", "I look.", '"place": "Lyon"', "rain"):
        assert text in seen[1]
    client.responses.create(model="demo", previous_response_id=second.id, input="And now?", store=False)
    assert "rain" in seen[2] and "And now?" in seen[2]
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        client.responses.create(model="demo", previous_response_id="resp_none", input="x")
    unkept = client.responses.create(model="demo", input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="demo", previous_response_id=unkept.id, input="x")


def test_limits_and_formats(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    got = client.responses.create(model="demo", input="Hi", max_output_tokens=1)
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    got = client.responses.create(model="demo", input="Hi", reasoning={"effort": "none"}, text={"format": {
        "type": "json_schema", "name": "x", "schema": schema}})
    assert json.loads(got.output_text) == {"a": 1}


def test_what_codex_sends(running: Running, engine: ScriptedEngine) -> None:
    """The keys of its requests, as the request structs of its open source have them; not recorded from a run."""
    seen = listens(engine, "Done.")
    body = {"model": "demo", "instructions": "You are a coding agent.", "stream": True, "store": False,
            "tools": [*TOOLS, {"type": "local_shell"}], "tool_choice": "auto", "parallel_tool_calls": False,
            "reasoning": {"effort": "medium", "summary": "auto"}, "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "0199", "text": {"verbosity": "medium"}, "client_metadata": {"a": "b"}, "input": [
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandboxed."}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<cwd>/x</cwd>"}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List files."}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": None},
                {"type": "function_call", "name": "weather", "arguments": '{"place": "Nice"}', "call_id": "c1"},
                {"type": "function_call_output", "call_id": "c1", "output": "sun"},
                {"type": "custom_tool_call", "name": "apply_patch", "input": "*** End", "call_id": "c2",
                 "status": "completed"},
                {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "ok"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Listed."}]},
                {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Go on."}]}]}
    with httpx.stream("POST", running.url + "/v1/responses", json=body) as got:
        lines = [line for line in got.iter_lines() if line]
    assert got.status_code == 200 and got.headers["x-qmix-left-out"] == "web_search, local_shell"
    assert json.loads(lines[-1].removeprefix("data: "))["response"]["status"] == "completed"
    for text in ("You are a coding agent.\n\nSandboxed.", "List files.", '"place": "Nice"', "sun", "*** End", "ok",
                 "Listed.", "Go on."):
        assert text in seen[0]


@pytest.mark.parametrize(("body", "param"), [
    ({"wibble": 1}, "wibble"), ({"input": [{"type": "wibble"}]}, "input.0"), ({"background": True}, "background"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}]}, "input.0.content.0"),
    ({"input": [{"type": "function_call", "name": "f", "call_id": "c"}]}, "input.0.arguments"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
    ({"tool_choice": "sometimes"}, "tool_choice"), ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"), ({"text": {"format": {"type": "json_schema"}}},
                                                         "text.format.schema"),
    ({"top_logprobs": 3}, "top_logprobs"),
])
def test_what_is_wrong_is_named(running: Running, body: dict[str, Any], param: str) -> None:
    got = httpx.post(running.url + "/v1/responses", json={"model": "demo", "input": "x", **body})
    assert (got.status_code, got.json()["error"]["param"]) == (400, param)


def test_a_stream_that_is_cut_fails(running: Running, engine: ScriptedEngine) -> None:
    engine.may_go.clear()
    with httpx.stream("POST", running.url + "/v1/responses", json={"input": "x", "stream": True}) as got:
        lines = got.iter_lines()
        next(lines)
        running.server.stop()
        running.server.stop()
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert json.loads(last[6:])["type"] == "response.failed"


def test_the_store_is_bounded() -> None:
    store = ResponseStore(most=2, largest=10)
    for name in "abc":
        store.add(name, [Message("user", "xx")])
    assert [store.get(name) is None for name in "abc"] == [True, False, False]
    store.add("d", [Message("user", 8 * "x")])
    assert [store.get(name) is None for name in "bcd"] == [True, False, False]
    store.add("e", [Message("user", 11 * "x")])
    assert all(store.get(name) is None for name in "cde")
