"""ollama's API, driven by its own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest
from serving import Running, ScriptedEngine, says, serving, spelled
from tokenizer_qwen3 import qwen3

from qmix.tokenizer import Tokenizer, load

ASK: list[Any] = [{"role": "user", "content": "Hi"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}]
ANSWER = ('<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Lyon"}}\n'
          '</tool_call>')


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(qwen3(tmp_path_factory.mktemp("qwen3")))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer, says(tokenizer, ANSWER))


@pytest.fixture
def running(engine: ScriptedEngine) -> Iterator[Running]:
    with serving(lambda: engine) as running:
        yield running


@pytest.fixture
def client(running: Running) -> ollama.Client:
    return ollama.Client(running.url)


def test_the_model_is_listed_and_shown(client: ollama.Client, running: Running) -> None:
    assert [model.model for model in client.list().models] == ["demo"]
    assert client.show("demo").capabilities == ["completion", "tools", "thinking"]
    assert [model.model for model in client.ps().models] == ["demo"]
    assert httpx.get(running.url + "/api/version").json()["version"]
    assert client.chat("demo", []).done_reason == "load" and client.generate("demo", "").done_reason == "load"


def test_a_chat_whole_and_streamed(client: ollama.Client) -> None:
    whole = client.chat("demo:latest", ASK, tools=TOOLS, think=True)
    assert (whole.message.thinking, whole.message.content, whole.done) == ("hm", "I look.", True)
    assert [(c.function.name, c.function.arguments) for c in whole.message.tool_calls] == [
        ("weather", {"place": "Lyon"})]
    assert whole.prompt_eval_count > 0 and whole.eval_count > 0 and whole.done_reason == "stop"
    chunks = list(client.chat("demo", ASK, tools=TOOLS, stream=True))
    assert "".join(c.message.content or "" for c in chunks) == "I look."
    assert "".join(c.message.thinking or "" for c in chunks) == "hm"
    assert [c.done for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert sum(len(c.message.tool_calls or ()) for c in chunks) == 1 and chunks[-1].eval_count == whole.eval_count


def test_generate_options_and_formats(client: ollama.Client) -> None:
    got = client.generate("demo", "Hi", system="Be brief.", options={"num_predict": 2, "num_ctx": 9, "seed": 1})
    assert (got.eval_count, got.done_reason) == (2, "length")
    raw = list(client.generate("demo", "Hi", raw=True, stream=True, options={"stop": ["hm"], "temperature": 0}))
    assert "".join(c.response for c in raw) == "<think>\n"
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    assert json.loads(client.generate("demo", "Hi", format=schema, think=False).response) == {"a": 1}


def test_calls_and_results_go_back(client: ollama.Client, engine: ScriptedEngine) -> None:
    seen: list[str] = []

    def script(ids: Any) -> list[int]:
        seen.append(engine.tokenizer.decode(ids))
        return spelled(engine.tokenizer, "Rain.")

    engine.script = script
    client.chat("demo", [*ASK, {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [
        {"function": {"name": "weather", "arguments": {"place": "Lyon"}}}]},
        {"role": "tool", "content": "rain", "tool_name": "weather"}], tools=TOOLS)
    assert '"place": "Lyon"' in seen[0] and "rain" in seen[0]


@pytest.mark.parametrize(("body", "status", "words"), [
    ({"model": "other"}, 404, "other"), ({"wibble": 1}, 400, "wibble"), ({"options": {"wibble": 1}}, 400, "wibble"),
    ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "images"),
])
def test_what_is_wrong_is_named(running: Running, body: dict[str, Any], status: int, words: str) -> None:
    got = httpx.post(running.url + "/api/chat", json={"model": "demo", "messages": ASK, **body})
    assert got.status_code == status and words in got.json()["error"]


def test_who_leaves_stops_the_computing_and_a_stream_that_is_cut_says_so(running: Running,
                                                                         engine: ScriptedEngine) -> None:
    engine.may_go.clear()
    body = {"model": "demo", "messages": ASK}
    with httpx.stream("POST", running.url + "/api/chat", json=body):
        running.until(lambda: engine.passes == 1)
    running.idle()
    with httpx.stream("POST", running.url + "/api/chat", json=body) as got:
        running.until(lambda: engine.passes == 2)
        running.server.stop()
        running.server.stop()
        assert "error" in json.loads(list(got.iter_lines())[-1])
