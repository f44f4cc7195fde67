"""What keeps the server well: keys, hosts, origins, bodies, queues, clients that leave, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Running, ScriptedEngine, says, serving
from tokenizer_files import demo_folder

from qmix.demo import demo_store
from qmix.errors import DoesNotFit
from qmix.serve.engine_thread import Options
from qmix.tokenizer import Tokenizer, load

ASK = {"messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"


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


def raw(url: str, body: Any, path: str = CHAT) -> socket.socket:
    """A connection on which a request was sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                       + data)
    return connection


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


# ---- loading and ending

def test_until_the_model_is_there_all_is_503(engine: ScriptedEngine) -> None:
    loaded = threading.Event()

    def slowly() -> ScriptedEngine:
        loaded.wait()
        return engine

    with serving(slowly, ready=False) as running:
        try:
            health = httpx.get(running.url + "/health")
            assert (health.status_code, health.json()) == (503, {"status": "loading model"})
            got = httpx.post(running.url + CHAT, json=ASK)
            assert got.status_code == 503 and "retry-after" in got.headers
            assert "loaded" in got.json()["error"]["message"]
            assert httpx.get(running.url + "/v1/models").status_code == 200
            assert "qmix_num_requests_running" in httpx.get(running.url + "/metrics").text
        finally:
            loaded.set()
        running.until(lambda: httpx.get(running.url + "/health").status_code == 200)
        assert httpx.post(running.url + CHAT, json=ASK).status_code == 200


def test_a_stop_while_the_model_is_loaded_does_not_wait_for_it(engine: ScriptedEngine) -> None:
    loaded = threading.Event()

    def slowly() -> ScriptedEngine:
        loaded.wait()
        return engine

    with serving(slowly, ready=False) as running:
        try:
            running.stop()
            assert not running.errors and not loaded.is_set()
        finally:
            loaded.set()


def test_a_model_that_does_not_load_ends_the_server() -> None:
    def broken() -> ScriptedEngine:
        raise DoesNotFit("too large")

    with serving(broken, ready=False) as running:
        running.until(lambda: bool(running.errors))
        assert isinstance(running.errors[0], DoesNotFit)


def test_a_fault_in_the_engine_fails_one_request_and_several_end_the_server(
        engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    good, left = engine.script, [True, True, False, True, True, True]

    def script(ids: Any) -> Any:
        if left.pop(0):
            raise ZeroDivisionError("/an/inner/path")
        return good(ids)

    engine.script = script
    with serving(lambda: engine) as running:
        for status in (500, 500, 200, 500, 500, 500):
            got = httpx.post(running.url + CHAT, json=ASK)
            assert got.status_code == status and "/an/inner/path" not in got.text
        running.until(lambda: bool(running.errors))
        assert "ZeroDivisionError: /an/inner/path" in capsys.readouterr().err
        assert isinstance(running.errors[0], ZeroDivisionError)


def test_a_fault_forgets_the_session_taken_and_no_other(engine: ScriptedEngine) -> None:
    """Another client's conversation is found again after a fault before or while a session is taken."""
    with serving(lambda: engine) as running:
        assert httpx.post(running.url + CHAT, json=ASK).status_code == 200
        running.idle()
        (session,) = engine.sessions
        held = list(session.ids)
        assert held
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "pace", lambda longest: 1 // 0)
            assert httpx.post(running.url + CHAT, json=ASK).status_code == 500
            running.idle()
        assert session.ids == held
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "session", lambda: 1 // 0)
            other = {"messages": [{"role": "user", "content": "\u00e9" * 50}]}
            assert httpx.post(running.url + CHAT, json=other).status_code == 500
            running.idle()
        assert session.ids == held
        assert httpx.post(running.url + CHAT, json=ASK).status_code == 200
        running.idle()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "script", lambda ids: 1 // 0)
            assert httpx.post(running.url + CHAT, json=ASK).status_code == 500
            running.idle()
        assert session.ids == []


def test_stopping_lets_the_answer_in_hand_end_and_the_others_fail(running: Running, engine: ScriptedEngine) -> None:
    engine.may_go.clear()
    one = raw(running.url, {**ASK, "stream": True})
    running.until(lambda: engine.passes == 1)
    two = raw(running.url, ASK)
    running.until(lambda: running.engine.waiting == 1)
    running.server.stop()
    running.until(lambda: running.engine.state == "stopping")
    assert b"503" in two.recv(65536).splitlines()[0]
    engine.may_go.set()
    assert all_of(one).endswith("data: [DONE]\n\n\r\n0\r\n\r\n")
    running.thread.join(30)
    assert not running.thread.is_alive() and running.engine.state == "stopped" and not running.errors


def test_stopping_twice_cancels_and_the_stream_ends_in_its_form(running: Running, engine: ScriptedEngine) -> None:
    engine.may_go.clear()
    one = raw(running.url, {**ASK, "stream": True})
    running.until(lambda: engine.passes == 1)
    running.server.stop()
    running.server.stop()
    text = all_of(one)
    assert '"code":"not_ready"' in text and "data: [DONE]" in text
    assert text.endswith("0\r\n\r\n"), "the last chunk of HTTP is there"
    running.thread.join(30)
    assert not running.thread.is_alive() and not running.errors


def all_of(connection: socket.socket) -> str:
    found = b""
    while data := connection.recv(65536):
        found += data
        if found.endswith(b"0\r\n\r\n"):
            break
    return found.decode()


# ---- the command

@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_store(tmp_path_factory.mktemp("demo") / "demo", lambda line: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_a_signal_ends_it(store: Path, number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-m", "qmix", "serve", str(store), "--port", "0", "-t", "1"],
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "is served at" in line)
        url = next(word.rstrip(";") for word in line.split() if word.startswith("http"))
        body = {"messages": [{"role": "user", "content": "Tell me a story about a fox."}], "stream": True, "n": 40}
        with httpx.stream("POST", url + CHAT, json=body, timeout=60) as got:
            lines = got.iter_lines()
            next(lines)
            process.send_signal(number)
            time.sleep(0.2)
            process.send_signal(number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("args", "words"), [
    (("--host", "0.0.0.0"), ("--api-key", "0.0.0.0")), (("--host", "::"), ("--api-key",)),
    (("--api-key", ""), ("--api-key", "empty")), (("--host", "no.such.invalid"), ("--host no.such.invalid",)),
    (("--port", "70000"), ("--port",)),
])
def test_what_the_command_refuses(store: Path, args: tuple[str, ...], words: tuple[str, ...],
                                  capsys: pytest.CaptureFixture[str]) -> None:
    from qmix.cli import main

    with pytest.raises(SystemExit) as left:
        main(["serve", str(store), *args])
    said = capsys.readouterr().err
    assert left.value.code == 2 and all(word in said for word in words)


def test_a_port_that_is_taken(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qmix.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as left:
        main(["serve", str(store), "--port", str(taken.getsockname()[1])])
    assert left.value.code == 2 and "--port" in capsys.readouterr().err


def test_without_the_extra_the_cure_is_one_line(store: Path, capsys: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    from qmix.cli import main
    from qmix.commands import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "llguidance" else object())
    with pytest.raises(SystemExit) as left:
        main(["serve", str(store)])
    assert left.value.code == 2 and "qmix serve needs llguidance" in (said := capsys.readouterr().err)
    assert "pip install 'qmix[serve]'" in said
