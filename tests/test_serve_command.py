"""`qmix serve`: the process, its signals, and what the command refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from serving import CHAT

from qmix.demo import demo_store


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
