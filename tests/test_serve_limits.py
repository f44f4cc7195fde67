"""What a request may not ask for, each told with a 4xx in its API's form, and what a server does for any client."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import Running, ScriptedEngine, says, serving
from tokenizer_qwen3 import CODER, qwen3

from qmix.serve import guard
from qmix.tokenizer import allowance, load
from qmix.tokenizer.call_grammars import glm_grammar, xml_grammar

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
MESSAGES: dict[str, Any] = {**ASK, "model": "demo", "max_tokens": 4}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    tokenizer = load(qwen3(tmp_path_factory.mktemp("qwen3"), CODER))
    engine = ScriptedEngine(tokenizer, says(tokenizer, "So."), context=512)
    with serving(lambda: engine, origins=("*",), largest=1 << 20) as running:
        yield running


@pytest.mark.parametrize(("path", "body"), [
    (CHAT, {**ASK, "stop": ["x"] * 33}), (CHAT, {**ASK, "stop": "x" * 1001}),
    ("/v1/messages", {**MESSAGES, "stop_sequences": ["x"] * 33}),
    ("/api/chat", {**ASK, "model": "demo", "options": {"stop": ["x" * 1001]}}),
    (CHAT, {**ASK, "logit_bias": {"1" * 5000: 1}}), (CHAT, {**ASK, "n": 65}),
    ("/v1/completions", {"prompt": ["x"] * 33, "n": 2}), ("/v1/responses", {"input": [{}] * 10_001}),
    (CHAT, {"messages": [*ASK["messages"], {"role": "assistant", "content": "So"}]}),
])
def test_too_much_is_refused(running: Running, path: str, body: Any) -> None:
    got = httpx.post(running.url + path, json=body)
    assert got.status_code == 400 and got.json()["error"], got.text


def test_a_prompt_too_long_is_told_in_one_line(running: Running) -> None:
    """Claude Code shortens its conversation where it finds these words."""
    long = {**MESSAGES, "messages": [{"role": "user", "content": "a word " * 3000}]}
    got = httpx.post(running.url + "/v1/messages", json=long)
    message = got.json()["error"]["message"]
    assert got.status_code == 400 and message.startswith("prompt is too long: ") and " maximum" in message
    assert "\n" not in message
    got = httpx.post(running.url + CHAT, json={"messages": long["messages"]})
    assert got.json()["error"]["code"] == "context_length_exceeded" and "\n" not in got.json()["error"]["message"]


@pytest.mark.parametrize("tools", [False, True])
def test_a_conversation_that_is_too_much_for_the_template_is_too_long(
        running: Running, monkeypatch: pytest.MonkeyPatch, tools: bool) -> None:
    """The template is rendered before the prompt can be counted, and its work is bounded. A client must shorten."""
    monkeypatch.setattr(allowance, "MAX_STEPS", 40)
    asked: dict[str, Any] = {"tools": [{"name": "f", "input_schema": {"type": "object"}}]} if tools else {}
    turns = [*ASK["messages"], {"role": "assistant", "content": "So"}] * 20
    for text, words in (("a word " * 200, " tokens > 512 maximum"), ("Hi", "ran more than 40 steps")):
        body = {**MESSAGES, **asked, "messages": [*turns[:-2], {"role": "user", "content": text * 30}]}
        got = httpx.post(running.url + "/v1/messages", json=body)
        message = got.json()["error"]["message"]
        assert got.status_code == 400 and message.startswith("prompt is too long: ") and words in message, got.text
    if tools:
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for path in (CHAT, "/v1/responses", "/api/chat"):
        key = "input" if path == "/v1/responses" else "messages"
        flat = body["tools"] if tools else []
        if tools and key == "input":
            flat = [{"type": "function", "name": "f", "parameters": {}}]
        got = httpx.post(running.url + path, json={"model": "demo", key: body["messages"], "tools": flat})
        error = got.json()["error"]
        assert got.status_code == 400 and "too long for the model's chat template" in str(error), got.text
        assert path == "/api/chat" or error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("parameters", [
    {"properties": ["a"]}, {"properties": {"a": True}, "required": 3}, {"properties": {"a": {"enum": 3}}}])
def test_a_schema_of_any_kind_makes_a_grammar_or_a_400(running: Running, parameters: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert xml_grammar(tools, True) and glm_grammar(tools, True)
    got = httpx.post(running.url + CHAT, json={**ASK, "tools": tools, "tool_choice": "required", "max_tokens": 50})
    assert got.status_code in (200, 400), got.text


def test_origins(running: Running) -> None:
    got = httpx.get(running.url + "/v1/models", headers={"Origin": "https://any.example"})
    assert got.status_code == 200 and got.headers["access-control-allow-origin"] == "*"
    assert guard._netloc("http://[") is None and guard._netloc("http://a:1") == "a:1"


def test_a_key_may_have_any_letters() -> None:
    options = guard.ServerOptions(("m",), keys=("schl\u00fcssel",))
    guarded = guard.Guard(None, options, None)  # type: ignore[arg-type]
    for key, found in (("schl\u00fcssel", True), ("schlussel", False)):
        headers = guard.Headers(raw=[(b"x-api-key", key.encode())])
        assert guarded._has_key(headers) is found


@pytest.mark.parametrize("path", ["/", "/health", "/api/tags", "/api/version", "/v1/models"])
def test_head_is_answered(running: Running, path: str) -> None:
    got = httpx.head(running.url + path)
    assert got.status_code == 200 and not got.content


def test_bodies_in_memory_are_bounded_and_none_may_be_slow(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODIES", 0)
    got = httpx.post(running.url + CHAT, json=ASK)
    assert got.status_code == 503 and got.json()["error"]["code"] == "server_busy" and "retry-after" in got.headers
    monkeypatch.setattr(guard, "BODIES", 1)
    for _ in range(3):  # what has been answered is no more in memory
        assert httpx.post(running.url + CHAT, content=json.dumps(ASK) + " " * 700_000).status_code == 200
    monkeypatch.setattr(guard, "SLOWEST", 0.05)
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\n{{".encode())
        assert b" 408 " in slow.recv(65536).splitlines()[0]


def test_a_body_that_drips_has_an_end_too() -> None:
    """Of a body that never ends a piece is there at once, each time; the clock is the loop's own."""

    async def drip() -> dict[str, Any]:
        loop.now += 50.0
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x", "more_body": True}

    class Loop(asyncio.SelectorEventLoop):
        now = 0.0

        def time(self) -> float:
            return self.now

    async def read() -> int:
        body = guard._Body()
        receive = guarded._bounded(drip, body)  # type: ignore[arg-type]
        with pytest.raises(guard.BodyRefused, match="the body took more than 600 s"):
            while True:
                await receive()
        return body.taken

    guarded = guard.Guard(None, guard.ServerOptions(("m",)), None)  # type: ignore[arg-type]
    loop = Loop()
    try:
        assert 10 <= loop.run_until_complete(read()) <= 12
    finally:
        loop.close()


def test_a_picture_that_a_tool_gives_is_left_out(running: Running) -> None:
    messages = [*ASK["messages"], {"role": "assistant", "content": [
        {"type": "tool_use", "id": "1", "name": "f", "input": {}}]}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}]}]}]
    got = httpx.post(running.url + "/v1/messages", json={**MESSAGES, "messages": messages})
    assert got.status_code == 200, got.text
