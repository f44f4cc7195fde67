"""Anthropic's messages, driven by Anthropic's own client: the bundled model, and scripted ones that think and call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from serving import Running, ScriptedEngine, says, serving, spelled
from tokenizer_qwen3 import qwen3

from qmix.config import SamplingParams
from qmix.demo import demo_store
from qmix.engine import Engine, Placement, load
from qmix.tokenizer import Message, Tokenizer
from qmix.tokenizer import load as load_tokenizer

STORY = "Tell me a story about an owl and a drum."
ASK: list[Any] = [{"role": "user", "content": STORY}]
TOOLS: list[Any] = [
    {"name": "weather", "description": "The weather.", "cache_control": {"type": "ephemeral"}, "input_schema": {
        "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}},
    {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}]
ANSWER = ('<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Lyon"}}\n'
          '</tool_call>')


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = demo_store(tmp_path_factory.mktemp("demo") / "demo", lambda line: None)
    with serving(lambda: load(store, threads=1, placement=Placement("cpu", exact=True))) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def engine(served: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with load(demo_store(tmp_path_factory.mktemp("again") / "demo", lambda line: None), threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(qwen3(tmp_path_factory.mktemp("qwen3")))


def alone(engine: Engine, *messages: Message, **params: Any) -> str:
    return "".join(token.text for token in engine.generate(
        messages, SamplingParams(**{"temperature": 0, "max_tokens": 200, **params}), draft=0))


def test_a_message_whole_and_streamed(client: anthropic.Anthropic, engine: Engine) -> None:
    want = alone(engine, Message("user", STORY))
    whole = client.messages.create(model="demo", messages=ASK, max_tokens=200)
    assert [b.text for b in whole.content] == [want] and whole.stop_reason == "end_turn"
    with client.messages.stream(model="demo", messages=ASK, max_tokens=200) as stream:
        kinds = [event.type for event in stream if event.type not in ("text",)]
        final = stream.get_final_message()
    assert final.content[0].text == want and final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_limits_stops_and_sampling(client: anthropic.Anthropic, engine: Engine) -> None:
    got = client.messages.create(model="demo", messages=ASK, max_tokens=5)
    assert got.stop_reason == "max_tokens" and got.usage.output_tokens == 5
    got = client.messages.create(model="demo", messages=ASK, max_tokens=200, stop_sequences=["drum"])
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", "drum") and "drum" not in got.content[0].text
    few = client.messages.create(model="demo", messages=ASK, max_tokens=20, extra_body={
        "top_k": 1, "top_p": 0.5, "temperature": 1})
    assert few.content[0].text == alone(engine, Message("user", STORY), max_tokens=20)


def test_a_system_prompt_less_what_changes_at_every_request(client: anthropic.Anthropic) -> None:
    billing = [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=1a2b"},
               {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    counts = [client.messages.count_tokens(model="demo", messages=ASK, system=system).input_tokens
              for system in (billing, "Be brief.")]
    assert counts[0] == counts[1]
    got = client.messages.create(model="demo", messages=ASK, system="Be brief.", max_tokens=1)
    assert got.usage.input_tokens + got.usage.cache_read_input_tokens == counts[0]
    assert client.messages.count_tokens(model="demo", messages=[
        {"role": "user", "content": "word " * 4000}]).input_tokens > 2048, "counted although it does not fit"


def test_thinking_text_and_calls_are_blocks(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, says(tokenizer, ANSWER))
    with serving(lambda: engine, keys=("k",)) as running, anthropic.Anthropic(base_url=running.url,
                                                                              api_key="k") as client:
        more: Any = {"model": "demo", "messages": ASK, "max_tokens": 200, "tools": TOOLS,
                     "thinking": {"type": "enabled", "budget_tokens": 1024}}
        raw = client.messages.with_raw_response.create(**more)
        assert raw.headers["x-qmix-left-out"] == "web_search"
        whole = raw.parse()
        assert [b.type for b in whole.content] == ["thinking", "text", "tool_use"]
        thinking, text, call = whole.content
        assert (thinking.thinking, text.text, call.name, call.input) == ("hm", "I look.", "weather", {"place": "Lyon"})
        assert thinking.signature and call.id.startswith("toolu_") and whole.stop_reason == "tool_use"
        with client.messages.stream(**more) as stream:
            events = [(event.type, getattr(event, "index", None)) for event in stream]
            final = stream.get_final_message()
        assert [b.model_dump(exclude={"id"}) for b in final.content] == [
            b.model_dump(exclude={"id"}) for b in whole.content]
        starts = [n for n, event in enumerate(events) if event[0] == "content_block_start"]
        stops = [n for n, event in enumerate(events) if event[0] == "content_block_stop"]
        assert [events[n][1] for n in starts] == [events[n][1] for n in stops] == [0, 1, 2]
        assert all(a < b for a, b in zip(starts, stops, strict=True)), "blocks do not overlap"


def test_calls_and_results_go_back_to_the_model(tokenizer: Tokenizer) -> None:
    seen: list[str] = []

    def script(ids: Any) -> list[int]:
        seen.append(tokenizer.decode(ids))
        return spelled(tokenizer, "Rain.")

    with serving(lambda: ScriptedEngine(tokenizer, script)) as running, anthropic.Anthropic(
            base_url=running.url, api_key="k") as client:
        client.messages.create(model="demo", max_tokens=9, tools=TOOLS[:1], messages=[
            *ASK, {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"place": "Lyon"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}],
                 "is_error": True},
                {"type": "text", "text": "And Nice?", "cache_control": {"type": "ephemeral"}}]}])
    for text in ('"place": "Lyon"', "Error: rain", "And Nice?", "I look.", "The weather."):
        assert text in seen[0]
    assert seen[0].index("Error: rain") < seen[0].index("And Nice?")


def test_tool_choice(tokenizer: Tokenizer) -> None:
    few = [{"name": n, "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
           for n in ("now", "later")]
    with serving(lambda: ScriptedEngine(tokenizer, says(tokenizer, "No."))) as running, anthropic.Anthropic(
            base_url=running.url, api_key="k") as client:
        got = client.messages.create(model="demo", messages=ASK, max_tokens=200, tools=few, tool_choice={
            "type": "tool", "name": "later", "disable_parallel_tool_use": True})
        assert [(b.name, b.input) for b in got.content] == [("later", {})]
        with pytest.raises(anthropic.BadRequestError, match="no tool has the name"):
            client.messages.create(model="demo", messages=ASK, max_tokens=9, tools=few,
                                   tool_choice={"type": "tool", "name": "never"})


@pytest.mark.parametrize(("body", "status", "kind", "words"), [
    ({"model": "claude-x"}, 404, "not_found_error", "claude-x"),
    ({"wibble": 1}, 400, "invalid_request_error", "wibble"),
    ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
    ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "invalid_request_error",
     "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "wibble": 1}]}]}, 400,
     "invalid_request_error", "messages.0.content.0.wibble"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "invalid_request_error", "text"),
    ({"messages": [{"role": "user", "content": "x " * 3000}]}, 400, "invalid_request_error", "context"),
    ({"tools": [{"name": "x"}]}, 400, "invalid_request_error", "tools.0.input_schema"),
    ({"mcp_servers": [{}]}, 400, "invalid_request_error", "mcp_servers"),
])
def test_what_is_wrong_is_named(served: Running, body: dict[str, Any], status: int, kind: str, words: str) -> None:
    full = {"model": "demo", "max_tokens": 5, "messages": ASK, **body}
    got = httpx.post(served.url + "/v1/messages", json={k: v for k, v in full.items() if v is not None})
    assert (got.status_code, got.json()["type"], got.json()["error"]["type"]) == (status, "error", kind)
    assert words in got.json()["error"]["message"]


def test_a_wrong_key_and_a_stream_that_is_cut(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, says(tokenizer, ANSWER))
    engine.may_go.clear()
    with serving(lambda: engine, keys=("k",), ping=0.05) as running:
        url = running.url + "/v1/messages"
        body = {"model": "demo", "max_tokens": 5, "messages": ASK, "stream": True}
        got = httpx.post(url, json=body, headers={"x-api-key": "no"})
        assert got.status_code == 401 and got.json()["error"]["type"] == "authentication_error"
        with httpx.stream("POST", url, json=body, headers={"x-api-key": "k"}) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: ping"
            running.server.stop()
            running.server.stop()
            rest = [line for line in lines if line]
        assert rest[-2] == "event: error"
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "overloaded_error"


def test_what_claude_code_sends(served: Running, tmp_path: Path) -> None:
    """The keys of an agent's requests, as the API documents them; not recorded from Claude Code itself."""
    body = {"model": "demo", "max_tokens": 32000, "stream": True, "temperature": 1,
            "system": [{"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}}],
            "messages": [{"role": "user", "content": [
                {"type": "text", "text": "<system-reminder>x</system-reminder>"},
                {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}],
            "metadata": {"user_id": "user_x"}, "tools": [], "thinking": {"type": "disabled"},
            "context_management": {"edits": []}, "output_config": {"effort": "high"}}
    with httpx.stream("POST", served.url + "/v1/messages?beta=true", json=body, timeout=60, headers={
            "anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219", "x-api-key": "any"}) as got:
        lines = list(got.iter_lines())
    assert got.status_code == 200 and "event: message_stop" in lines
