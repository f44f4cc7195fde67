"""Bodies of any kind: each route answers what is wrong with a 4xx in its API's form, and never with a fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Running, ScriptedEngine, says, serving
from tokenizer_qwen3 import qwen3

from qmix.tokenizer import load

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CHAT: dict[str, Any] = {
    "model": "demo", "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "r"}],
    "max_tokens": 2, "n": 1, "stop": ["z"], "tools": [TOOL], "tool_choice": "auto", "logit_bias": {"1": 1},
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}, "stream": False,
    "temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1, "repetition_penalty": 1.1,
    "frequency_penalty": 0.5, "presence_penalty": 0.5, "seed": 1, "top_logprobs": 2, "logprobs": True}
MESSAGES: dict[str, Any] = {
    "model": "demo", "max_tokens": 2, "system": [{"type": "text", "text": "s"}], "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "h", "signature": ""},
                                          {"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r", "is_error": False}]}],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
    "thinking": {"type": "enabled", "budget_tokens": 1}, "temperature": 1.0, "top_p": 0.9, "top_k": 5,
    "stop_sequences": ["z"]}
RESPONSES: dict[str, Any] = {
    "model": "demo", "max_output_tokens": 2, "instructions": "s", "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "h"}]},
        {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"},
        {"type": "custom_tool_call", "name": "g", "input": "i", "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "r"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "r"}]}],
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}, {"type": "custom", "name": "g"}],
    "tool_choice": {"type": "function", "name": "f"}, "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "low"}, "temperature": 1.0, "top_p": 0.9}
OLLAMA: dict[str, Any] = {
    "model": "demo", "stream": False, "think": True, "format": {"type": "object"}, "options": {
        "num_predict": 2, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "seed": 1, "stop": ["z"]},
    "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "f", "arguments": {}}}]}, {"role": "tool", "tool_name": "f", "content": "r"}],
    "tools": [TOOL]}
BODIES = {"/v1/chat/completions": CHAT, "/v1/messages": MESSAGES, "/v1/messages/count_tokens": {
    key: value for key, value in MESSAGES.items()
    if key not in ("max_tokens", "temperature", "top_p", "top_k", "stop_sequences")}, "/v1/responses": RESPONSES,
    "/api/chat": OLLAMA, "/v1/completions": {"model": "demo", "prompt": "x", "max_tokens": 2, "logprobs": 1},
    "/api/generate": {"model": "demo", "prompt": "x", "stream": False, "options": {"num_predict": 2}}}
JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(
    allow_nan=False, allow_infinity=False) | st.floats(0, 100) | st.text(max_size=4) | st.sampled_from(
        ("auto", "required", "text", "function", "demo", "user", "assistant", "tool", "low")),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(("type", "text", "name", "role", "content", "function", "format", "schema", "id")), inner,
        max_size=3), max_leaves=6)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    tokenizer = load(qwen3(tmp_path_factory.mktemp("qwen3")))
    with serving(lambda: ScriptedEngine(tokenizer, says(tokenizer, "<think>h</think>a"))) as running:
        yield running


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a body stand."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*here, key)
        yield from places(one, (*here, key))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """The same body with another value there."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(copy[place[0]], place[1:], new)
    return copy


@pytest.mark.parametrize("path", BODIES)
def test_a_good_body_is_answered(client: httpx.Client, path: str) -> None:
    got = client.post(path, json=BODIES[path])
    assert got.status_code == 200, got.text


@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_value_anywhere_is_answered_or_refused(client: httpx.Client, path: str, data: st.DataObject) -> None:
    body = BODIES[path]
    place = data.draw(st.sampled_from(list(places(body))))
    got = client.post(path, json=changed(body, place, data.draw(JSON)))
    assert got.status_code in (200, 400, 404), got.text
    if got.status_code != 200 and got.headers["content-type"] == "application/json":
        found = got.json()["error"]
        assert found if isinstance(found, str) else found["message"]


@given(st.binary(max_size=200), st.sampled_from(list(BODIES)))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_refused(client: httpx.Client, body: bytes, path: str) -> None:
    assert client.post(path, content=body).status_code == 400


def test_the_openapi_document_holds_together(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    refs: list[str] = []

    def look(value: Any) -> None:
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            if key == "$ref":
                refs.append(one)
            elif isinstance(one, dict | list):
                look(one)

    look(document)
    assert set(BODIES) <= set(document["paths"]) and refs
    for ref in refs:
        assert ref.removeprefix("#/components/schemas/") in document["components"]["schemas"]
