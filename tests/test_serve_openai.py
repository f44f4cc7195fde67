"""OpenAI's chat completions and completions, driven by OpenAI's own client against the bundled model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Running, serving

from qmix.config import SamplingParams
from qmix.demo import demo_store
from qmix.engine import Engine, Placement, load
from qmix.tokenizer import Message

STORY = "Tell me a story about a fox and a lantern."
ASK = [{"role": "user", "content": STORY}]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_store(tmp_path_factory.mktemp("demo") / "demo", lambda line: None)


@pytest.fixture(scope="module")
def engine(store: Path) -> Iterator[Engine]:
    """What the same model says without a server."""
    with load(store, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def served(store: Path) -> Iterator[Running]:
    """Exact, so that an answer depends on its request alone."""
    with serving(lambda: load(store, threads=1, placement=Placement("cpu", exact=True))) as running:
        yield running


@pytest.fixture(scope="module")
def reusing(store: Path) -> Iterator[openai.OpenAI]:
    """A client of a server that keeps KV caches."""
    with serving(lambda: load(store, threads=1)) as running, openai.OpenAI(
            base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(engine: Engine, text: str | list[Message], **params: Any) -> str:
    return "".join(token.text for token in engine.generate(
        text, SamplingParams(**{"temperature": 0, **params}), draft=0))


def test_a_chat_whole_and_streamed_says_what_the_engine_says(client: openai.OpenAI, engine: Engine) -> None:
    want = alone(engine, [Message("user", STORY)])
    whole = client.chat.completions.create(model="demo", messages=ASK)
    assert whole.choices[0].message.content == want and whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(model="demo", messages=ASK, stream=True,
                                                 stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1


def test_without_include_usage_no_chunk_has_a_usage(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="demo", messages=ASK, stream=True, max_tokens=3))
    assert all("usage" not in c.model_dump(exclude_unset=True) for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_sampling_is_the_engines(client: openai.OpenAI, engine: Engine) -> None:
    own = {"temperature": 1.3, "top_p": 0.9, "seed": 7}
    extra = {"top_k": 20, "min_p": 0.02, "repeat_penalty": 1.1}
    got = client.chat.completions.create(model="demo", messages=ASK, max_tokens=30, extra_body=extra, **own)
    assert got.choices[0].message.content == alone(engine, [Message("user", STORY)], max_tokens=30, **own, **extra)


def test_choices_have_seeds_that_count_up(client: openai.OpenAI, engine: Engine) -> None:
    got = client.chat.completions.create(model="demo", messages=ASK, n=3, temperature=1.5, seed=11, max_tokens=12)
    assert [c.message.content for c in got.choices] == [
        alone(engine, [Message("user", STORY)], temperature=1.5, seed=11 + n, max_tokens=12) for n in range(3)]
    assert [c.index for c in got.choices] == [0, 1, 2] and got.usage.completion_tokens == 36
    parts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(model="demo", messages=ASK, n=3, temperature=1.5, seed=11,
                                                max_tokens=12, stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(parts.values()) == [c.message.content for c in got.choices]


def test_stop_strings_end_an_answer_and_are_not_in_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=ASK).choices[0].message.content
    got = client.chat.completions.create(model="demo", messages=ASK, stop=["lantern", "zebra"]).choices[0]
    assert got.message.content == whole[:whole.index("lantern")] and got.finish_reason == "stop"


def test_logit_bias_and_penalties(client: openai.OpenAI, engine: Engine) -> None:
    fox, = {i for i in range(2048) if engine.tokenizer.token(i) == "\u2581fox"}
    told = client.chat.completions.create(model="demo", messages=ASK, logit_bias={str(fox): -100})
    assert " fox" not in told.choices[0].message.content
    only = client.chat.completions.create(model="demo", messages=ASK, logit_bias={str(fox): 100}, max_tokens=4)
    assert only.choices[0].message.content == "fox fox fox fox"
    varied = client.chat.completions.create(model="demo", messages=ASK, logit_bias={str(fox): 30}, max_tokens=8,
                                            frequency_penalty=2, presence_penalty=2)
    assert varied.choices[0].message.content.count("fox") == 8, "a bias of 30 outweighs 2 x 8 + 2"


def test_log_probabilities_are_the_models(client: openai.OpenAI, engine: Engine) -> None:
    got = client.chat.completions.create(model="demo", messages=ASK, max_tokens=5, logprobs=True, top_logprobs=3)
    logs = got.choices[0].logprobs.content
    assert len(logs) == 5 and b"".join(bytes(log.bytes) for log in logs).decode().strip() == \
        got.choices[0].message.content
    session = engine.session()
    logits = session.prefill(engine.tokenizer.encode_chat([Message("user", STORY)]))
    best = logits.double().log_softmax(0).topk(3)
    assert [t.logprob for t in logs[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-12)
    assert logs[0].token == logs[0].top_logprobs[0].token and logs[0].logprob == logs[0].top_logprobs[0].logprob
    chunks = client.chat.completions.create(model="demo", messages=ASK, max_tokens=5, logprobs=True, stream=True)
    streamed = [log for c in chunks if c.choices[0].logprobs for log in c.choices[0].logprobs.content]
    assert [(log.token, log.logprob) for log in streamed] == [(log.token, log.logprob) for log in logs]


SCHEMA = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 1, "maximum": 99},
    "kind": {"enum": ["fox", "owl"]}}, "required": ["name", "age", "kind"], "additionalProperties": False}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_keeps_to_a_schema(client: openai.OpenAI, temperature: float) -> None:
    got = client.chat.completions.create(model="demo", messages=ASK, temperature=temperature, seed=3, response_format={
        "type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}})
    found = json.loads(got.choices[0].message.content)
    assert got.choices[0].finish_reason == "stop"
    assert set(found) == {"name", "age", "kind"} and 1 <= found["age"] <= 99 and found["kind"] in ("fox", "owl")
    assert len(found["name"]) <= 12


def test_an_answer_is_a_json_object_or_of_a_grammar(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="demo", messages=ASK, max_tokens=40,
                                         response_format={"type": "json_object"})
    assert got.choices[0].message.content.startswith("{")
    for grammar in ('root ::= "yes" | "no"', 'start: "yes" | "no"'):
        got = client.chat.completions.create(model="demo", messages=ASK, extra_body={"grammar": grammar})
        assert got.choices[0].message.content in ("yes", "no") and got.choices[0].finish_reason == "stop"


def test_an_answer_is_read_again_as_it_was_generated(reusing: openai.OpenAI) -> None:
    """Its ids are spliced in, so that all of it but its end is in the KV cache."""
    first = reusing.chat.completions.create(model="demo", messages=ASK, temperature=1, seed=5)
    said = first.choices[0].message.content
    second = reusing.chat.completions.create(model="demo", max_tokens=1, messages=[
        *ASK, {"role": "assistant", "content": said}, {"role": "user", "content": "Another one, please."}])
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached == first.usage.total_tokens - 1, "the end token was sampled, but not run"


def test_an_exact_server_reuses_nothing(client: openai.OpenAI) -> None:
    for _ in range(2):
        got = client.chat.completions.create(model="demo", messages=ASK, max_tokens=2)
        assert got.usage.prompt_tokens_details.cached_tokens == 0


def test_a_small_question_between_leaves_the_long_conversations_cache(reusing: openai.OpenAI) -> None:
    long = [{"role": "user", "content": STORY + " The fox is red." * 60}]
    small = [{"role": "user", "content": "What is a router?"}]
    counts = [reusing.chat.completions.create(model="demo", messages=messages, max_tokens=1).usage
              for messages in (long, small, long, small)]
    assert [usage.prompt_tokens_details.cached_tokens for usage in counts[2:]] == [
        usage.prompt_tokens - 1 for usage in counts[2:]]


def test_text_is_continued_as_it_is(client: openai.OpenAI, engine: Engine) -> None:
    got = client.completions.create(model="demo", prompt="Once upon a", max_tokens=6, logprobs=2)
    assert got.choices[0].text == alone(engine, "Once upon a", max_tokens=6)
    logs = got.choices[0].logprobs
    assert "".join(logs.tokens) == got.choices[0].text and logs.text_offset[1] == len(logs.tokens[0])
    assert all(math.isclose(max(top.values()), own) for top, own in zip(logs.top_logprobs, logs.token_logprobs,
                                                                       strict=True))
    ids = engine.tokenizer.encode("Once upon a")
    both = client.completions.create(model="demo", prompt=[ids, engine.tokenizer.encode("The owl")], max_tokens=6)
    assert [c.text for c in both.choices] == [got.choices[0].text, alone(engine, "The owl", max_tokens=6)]
    streamed = list(client.completions.create(model="demo", prompt=ids, max_tokens=6, stream=True,
                                              stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in streamed if c.choices) == got.choices[0].text
    assert streamed[-1].usage.completion_tokens == 6


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "qmix"
    with pytest.raises(openai.NotFoundError, match="demo"):
        client.models.retrieve("other")


def test_system_messages_and_parts(client: openai.OpenAI) -> None:
    parts = [{"role": "developer", "content": "Be brief."}, {"role": "system", "content": [
        {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, *ASK]
    plain = [{"role": "system", "content": "Be brief.\n\na\nb"}, *ASK]
    texts = [client.chat.completions.create(model="demo", messages=m, max_tokens=8).usage.prompt_tokens
             for m in (parts, plain)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("body", "error", "code", "param"), [
    ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
    ({"wibble": 1}, openai.BadRequestError, "unknown_parameter", "wibble"),
    ({"messages": [{"role": "user", "content": "x", "wibble": 1}]}, openai.BadRequestError, "unknown_parameter",
     "messages.0.wibble"),
    ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
     openai.BadRequestError, "unsupported_content", "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": "a word " * 3000}]}, openai.BadRequestError, "context_length_exceeded",
     "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, openai.BadRequestError, "invalid_request", None),
    ({"temperature": "hot"}, openai.BadRequestError, "invalid_value", "temperature"),
    ({"temperature": -1}, openai.BadRequestError, "invalid_value", "temperature"),
    ({"max_tokens": 0}, openai.BadRequestError, None, "max_tokens"),
    ({"n": 0}, openai.BadRequestError, "invalid_value", "n"),
    ({"top_logprobs": 2}, openai.BadRequestError, None, "top_logprobs"),
    ({"logit_bias": {"fox": 1}}, openai.BadRequestError, None, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "invalid_request", None),
    ({"functions": []}, openai.BadRequestError, "unknown_parameter", "functions"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "invalid_request", None),
    ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "invalid_value", "tools.0.type"),
    ({"tool_choice": "required"}, openai.BadRequestError, None, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, None, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wibble"}}}},
     openai.BadRequestError, "invalid_request", None),
    ({"grammar": "start: ("}, openai.BadRequestError, "invalid_request", None),
])
def test_what_is_wrong_is_named(client: openai.OpenAI, body: dict[str, Any], error: type[openai.APIStatusError],
                                code: str | None, param: str | None) -> None:
    for stream in (False, True):
        with pytest.raises(error) as raised:
            client.post("/chat/completions", body={"model": "demo", "messages": ASK, "stream": stream, **body},
                        cast_to=object)
        assert (raised.value.code, raised.value.param) == (code, param)
        assert raised.value.body["type"] == "invalid_request_error"


def test_what_has_no_effect_is_taken(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="demo", messages=[{**ASK[0], "name": "ann"}], max_tokens=2, user="u", store=True, metadata={"a": "b"},
        service_tier="auto", verbosity="low", parallel_tool_calls=True, reasoning_effort="high",
        extra_body={"prompt_cache_key": "k", "safety_identifier": "s", "stop": None, "seed": None, "tools": []})
    assert got.usage.completion_tokens == 2
