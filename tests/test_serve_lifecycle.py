"""A server while its model is loaded, at a fault of the engine, and as it stops."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import ASK, CHAT, Running, ScriptedEngine, raw, says, serving
from tokenizer_files import demo_folder

from qmix.errors import DoesNotFit
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
