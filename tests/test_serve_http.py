"""What keeps the server well: keys, hosts, origins, bodies, queues, clients that leave, and how it stops."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx
import pytest
from serving import ASK, CHAT, Running, ScriptedEngine, raw, says, serving
from tokenizer_files import demo_folder

from qmix.serve.engine_thread import Options
from qmix.tokenizer import Tokenizer, load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(demo_folder(tmp_path_factory.mktemp("demo")))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer, says(tokenizer, "one two three four five"))


@pytest.fixture
def running(engine: ScriptedEngine) -> Iterator[Running]:
    with serving(lambda: engine, Options(waiting=2), largest=100_000, ping=0.05) as running:
        yield running


def text_of(stream: str) -> str:
    """What the chunks of a stream say."""
    found = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in found if c.get("choices"))


# ---- bodies

@pytest.mark.parametrize(("body", "status", "code"), [
    (b"", 400, "invalid_json"), (b"{", 400, "invalid_json"), (b"[]", 400, "invalid_type"), (b"3", 400, "invalid_type"),
    (b"\xff", 400, "invalid_json"), (b'{"messages": ' + b"[" * 50_000, 400, "invalid_json"),
    (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", 400, "invalid_json"),
    (b'{"temperature": NaN}', 400, "invalid_json"),
    (b'{"metadata": {"a": 1e999}}', 400, "invalid_json"), (b'{"a": "\\ud800"}', 400, "invalid_json"),
    (b'{"messages": "x"}', 400, "invalid_value"), (b'{"messages": [3]}', 400, "invalid_value"),
    (b'{"messages": [{"role": "user", "content": {}}]}', 400, "invalid_value"),
    (b" " * 100_001, 413, "request_too_large"),
])
def test_a_bad_body_is_told(running: Running, body: bytes, status: int, code: str) -> None:
    got = httpx.post(running.url + CHAT, content=body)
    assert (got.status_code, got.json()["error"]["code"]) == (status, code)


def test_a_body_without_a_length_is_bounded_too(running: Running) -> None:
    got = httpx.post(running.url + CHAT, content=iter([b" " * 60_000] * 2))
    assert (got.status_code, got.json()["error"]["code"]) == (413, "request_too_large")


def test_other_paths_and_methods(running: Running) -> None:
    assert httpx.get(running.url + "/nothing").status_code == 404
    got = httpx.get(running.url + CHAT)
    assert got.status_code == 405 and "error" in got.json()
    assert CHAT in httpx.get(running.url + "/openapi.json").json()["paths"]


# ---- keys, hosts, origins

def test_a_key_is_asked_for(engine: ScriptedEngine) -> None:
    with serving(lambda: engine, keys=("secret", "other")) as running:
        def status(**headers: str) -> int:
            return httpx.post(running.url + CHAT, json=ASK, headers={
                name.replace("_", "-"): value for name, value in headers.items()}).status_code

        assert status() == status(authorization="Bearer wrong") == status(x_api_key="") == 401
        assert status(authorization="secret") == status(authorization="Bearer secret2") == 401
        assert status(authorization="Bearer secret") == status(x_api_key="other") == 200
        assert status(authorization="Bearer wrong", x_api_key="secret") == 200
        assert httpx.get(running.url + "/v1/models").status_code == 401
        assert httpx.get(running.url + "/metrics").status_code == 401
        assert httpx.get(running.url + "/health").status_code == 200


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1:1", 200), ("localhost", 200), ("LocalHost:80", 200), ("[::1]:8080", 200),
    ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403)])
def test_the_host_is_checked(running: Running, host: str, status: int) -> None:
    assert httpx.get(running.url + "/v1/models", headers={"Host": host}).status_code == status


def test_pages_of_other_origins_may_not_ask_unless_named(engine: ScriptedEngine) -> None:
    with serving(lambda: engine, origins=("https://mine.example",)) as running:
        def got(origin: str) -> httpx.Response:
            return httpx.get(running.url + "/v1/models", headers={"Origin": origin})

        assert got("https://evil.example").status_code == 403
        assert got(running.url).status_code == 200
        assert got("https://mine.example").headers["access-control-allow-origin"] == "https://mine.example"
        asked = httpx.options(running.url + CHAT, headers={
            "Origin": "https://mine.example", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type"})
        assert asked.status_code == 200 and "authorization" in asked.headers["access-control-allow-headers"]


def test_without_cors_no_origin_is_named(running: Running) -> None:
    assert "access-control-allow-origin" not in httpx.get(running.url + "/v1/models", headers={
        "Origin": running.url}).headers


# ---- the queue, and clients that leave

def test_more_than_may_wait_are_told_to_come_again(running: Running, engine: ScriptedEngine) -> None:
    engine.may_go.clear()
    open_ones = [raw(running.url, ASK)]
    running.until(lambda: engine.passes == 1)
    open_ones += [raw(running.url, ASK) for _ in range(2)]
    running.until(lambda: running.engine.waiting == 2)
    got = httpx.post(running.url + CHAT, json={**ASK, "stream": True})
    assert got.status_code == 429 and int(got.headers["retry-after"]) > 0
    assert got.json()["error"]["code"] == "queue_full"
    open_ones.pop().close()
    running.until(lambda: running.engine.waiting == 1)  # who leaves makes room
    engine.may_go.set()
    for one in open_ones:
        found = b""
        while b"total_tokens" not in found:
            found += one.recv(65536)
        assert b"one two three four five" in found
    running.idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_who_leaves_stops_the_computing(running: Running, engine: ScriptedEngine, stream: bool, passes: int) -> None:
    """In the prompt (the first pass) and behind it."""
    engine.may_go.clear()
    connection = raw(running.url, {**ASK, "stream": stream})
    for count in range(1, passes + 1):
        running.until(lambda count=count: engine.passes == count)  # type: ignore[misc]
        if count < passes:
            engine.may_go.set()
            running.until(lambda count=count: engine.passes > count)  # type: ignore[misc]
            engine.may_go.clear()
            break
    connection.close()
    running.until(lambda: running.engine.running is None)
    engine.may_go.set()
    assert httpx.post(running.url + CHAT, json=ASK).json()["choices"][0]["message"]["content"].startswith("one")


def test_a_long_prompt_is_pinged(running: Running, engine: ScriptedEngine) -> None:
    engine.may_go.clear()
    with httpx.stream("POST", running.url + CHAT, json={**ASK, "stream": True}) as got:
        lines = got.iter_lines()
        assert next(line for line in lines if line) == ": ping"
        assert next(line for line in lines if line) == ": ping"
        engine.may_go.set()
        assert text_of("\n".join(lines)) == "one two three four five"


def test_clients_are_served_in_turns() -> None:
    from qmix.serve.fair_queue import FairQueue, Full

    queue: FairQueue[str] = FairQueue(5)
    for client, item in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1")):
        queue.put(client, item)
    with pytest.raises(Full):
        queue.put("d", "d1")
    assert queue.drop("a2") and not queue.drop("a2")
    assert [queue.get() for _ in range(4)] == ["a1", "b1", "c1", "a3"]
    queue.put("a", "a4")
    assert queue.close() == ["a4"] and queue.get() is None
    with pytest.raises(Full):
        queue.put("a", "a5")


def test_many_at_once_are_all_answered(engine: ScriptedEngine) -> None:
    with serving(lambda: engine, Options(waiting=64)) as running:
        found: list[str] = []

        def ask(stream: bool) -> None:
            got = httpx.post(running.url + CHAT, json={**ASK, "stream": stream}, timeout=60)
            found.append(text_of(got.text) if stream else got.json()["choices"][0]["message"]["content"])

        threads = [threading.Thread(target=ask, args=(n % 2 == 0,)) for n in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == ["one two three four five"] * 24
        assert 'qmix_request_success_total{finished_reason="stop",model_name="demo"} 24.0' in httpx.get(
            running.url + "/metrics").text


def test_metrics_are_named_as_vllms(running: Running) -> None:
    for stream in (False, True):
        httpx.post(running.url + CHAT, json={**ASK, "stream": stream})
    httpx.post(running.url + CHAT, json={**ASK, "max_tokens": 1})
    running.idle()
    lines = httpx.get(running.url + "/metrics").text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")
    model = '{model_name="demo"}'
    for name, value in (("num_requests_running", 0), ("num_requests_waiting", 0),
                        ("time_to_first_token_seconds_count", 3), ("e2e_request_latency_seconds_count", 3)):
        assert float(found[f"qmix_{name}{model}"]) == value
    prompt, generated = (float(found[f"qmix_{name}_total{model}"]) for name in ("prompt_tokens", "generation_tokens"))
    cached = float(found[f"qmix_prompt_tokens_cached_total{model}"])
    assert cached == 2 * (prompt / 3 - 1) and generated == 2 * found_tokens(running) + 1
    assert float(found['qmix_request_success_total{finished_reason="length",model_name="demo"}']) == 1
    assert 'qmix_expert_requests_total{model_name="demo",phase="decode",tier="disk"}' in found
    running.idle()
    stats = httpx.get(running.url + "/v1/stats").json()
    assert (stats["model"], stats["state"], stats["running"], stats["waiting"]) == ("demo", "ready", 0, 0)


def found_tokens(running: Running) -> int:
    return httpx.post(running.url + CHAT, json=ASK).json()["usage"]["completion_tokens"]


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 0.001])
def test_a_penalty_that_makes_logits_infinite_is_refused(running: Running, penalty: float) -> None:
    body = {**ASK, "repeat_penalty": penalty, "temperature": 1}
    assert httpx.post(running.url + CHAT, json=body).status_code == 400
    body = {"model": "demo", "prompt": "x", "options": {"repeat_penalty": penalty}}
    assert httpx.post(running.url + "/api/generate", json=body).status_code == 400
