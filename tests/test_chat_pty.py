"""The chat on a pseudo-terminal: keys, signals, history, what stays on the screen and on the disk."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import UNQUANTIZED, tiny_config, tiny_tensors, write_checkpoint
from pseudo_terminal import CTRL_C, CTRL_D, ENTER, UP, PseudoTerminal
from tokenizer_files import spm_model
from warm_python import WarmPython

from qmix.checkpoint import Checkpoint
from qmix.models import read_model
from qmix.quantize import quantize_checkpoint

HERE = Path(__file__).parent
Start = Callable[..., PseudoTerminal]
Open = Callable[[list[str], dict[str, str]], PseudoTerminal]


@pytest.fixture
def on_terminal(warm_python: WarmPython) -> Iterator[Open]:
    """on_terminal(program, environ) -> the program at its first prompt, ended with the test."""
    running: list[PseudoTerminal] = []

    def begin(program: list[str], environ: dict[str, str]) -> PseudoTerminal:
        inherited = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        settings = {"PYTHONPATH": str(HERE.parent), "TERM": "xterm-256color", **environ}
        running.append(PseudoTerminal(warm_python, program, inherited | settings, HERE))
        running[-1].expect(">>>")
        return running[-1]

    yield begin
    for terminal in running:
        terminal.close()


@pytest.fixture
def start(on_terminal: Open, tmp_path: Path) -> Start:
    """start(environ, **options of chat.run) -> a chat with the fake engine."""

    def begin(environ: dict[str, str] | None = None, **options: object) -> PseudoTerminal:
        return on_terminal(["chat_fakes.py", str(tmp_path / "state"), json.dumps(options)], environ or {})

    return begin


def saved(tmp_path: Path) -> list[tuple[str, str]]:
    (path,) = (p for p in (tmp_path / "state" / "chats").iterdir() if "previous" not in p.name)
    messages = json.loads(path.read_text())["messages"]
    return [(q["content"], a["content"]) for q, a in zip(messages[::2], messages[1::2], strict=True)]


def test_a_turn_commands_and_ctrl_d(start: Start, tmp_path: Path) -> None:
    chat = start()
    assert "fake format" in chat.raw and "context 4096" in chat.raw
    came = chat.ask("Hello", "You said: Hello")
    assert "experts ram 100 %" in came and "\x1b[2m" in chat.raw  # the figures are dim
    came = chat.ask("/nope", "/nope: no such command")
    assert "You said" not in came
    chat.ask("turns?", "turn 2")
    chat.ask("/undo", "undone: “turns?” (1 exchange left)")
    chat.ask("turns?", "turn 2")
    chat.ask("escape", "a␛[2Jb␇c\ufffdd")
    assert "\x1b[2Jb" not in chat.raw
    chat.ask("/set temp hot", "temp: got 'hot', want a number")
    chat.ask(f"/save {tmp_path}/talk.json", "saved 3 exchanges")
    chat.ask("/clear", "cleared 3 exchanges")
    chat.ask("turns?", "turn 1")
    chat.ask(f"/load {tmp_path}/talk.json", "loaded 3 exchanges")
    chat.ask("turns?", "turn 4")
    chat.send(CTRL_D)
    assert chat.end() == 0 and chat.modes_are_restored


def test_ctrl_c_stops_the_answer_and_keeps_it(start: Start, tmp_path: Path) -> None:
    chat = start()
    chat.send("count" + ENTER)
    chat.expect("5 6 7 8")
    chat.send(CTRL_C)
    chat.expect("stopped by Ctrl-C")
    chat.expect(">>>")
    question, answer = saved(tmp_path)[0]
    assert question == "count" and answer.startswith("1 2 3 4 5 6 7 8")
    chat.ask("turns?", "turn 2")

    chat.send("count" + ENTER)
    chat.expect("5 6 7 8")
    chat.send(CTRL_C + CTRL_C)  # twice in a row is not worse than once
    chat.expect("stopped by Ctrl-C")
    chat.expect(">>>")
    chat.ask("turns?", "turn 4")

    # While the prompt is read (the fake engine never ends this one by itself).
    chat.send("hang" + 200 * "x" + ENTER)
    chat.expect("reading ")
    chat.send(CTRL_C)
    chat.expect("before the answer began")
    chat.expect(">>>")
    assert len(saved(tmp_path)) == 4
    chat.ask("turns?", "turn 5")

    # What is typed while an answer streams is not echoed into it, and is there at the next prompt.
    chat.ask("/set max-tokens 600", "max-tokens 600")
    chat.send("count" + ENTER)
    chat.expect("5 6 7 8")
    chat.send("turns?" + ENTER)
    assert "turns?" not in chat.expect("length: max-tokens 600")
    chat.expect("turn 7")
    chat.expect(">>>")
    chat.send("/exit" + ENTER)
    assert chat.end() == 0 and chat.modes_are_restored


def test_ctrl_c_at_the_prompt_clears_or_hints(start: Start) -> None:
    chat = start()
    for _ in range(3):
        chat.send(CTRL_C)
        chat.expect("Ctrl-D or /exit leaves")
        chat.expect(">>>")
    chat.send("something half-typed")
    chat.expect("something half-typed")
    chat.send(CTRL_C)
    assert "leaves" not in chat.ask("Hello", "You said: Hello")
    os.kill(chat.process.pid, signal.SIGINT)  # from outside it is the same key
    chat.expect("Ctrl-D or /exit leaves")
    chat.expect(">>>")
    chat.send(CTRL_D)
    assert chat.end() == 0


def test_many_lines(start: Start, tmp_path: Path) -> None:
    chat = start()
    chat.send('"""' + ENTER)
    chat.expect("...")
    chat.send("/one" + ENTER)
    chat.send("" + ENTER)
    chat.send("  two" + ENTER)
    chat.ask('"""', "You said: /one")
    assert saved(tmp_path)[0][0] == "/one\n\n  two"
    chat.ask("\x1b[200~pasted\rlines\x1b[201~", "You said: pasted")  # a paste is one message without quotes
    assert saved(tmp_path)[1][0] == "pasted\nlines"
    chat.send('/system """be' + ENTER)
    chat.send('kind"""' + ENTER)
    chat.expect("system prompt set")
    chat.expect(">>>")
    chat.ask("system?", r"it is 'be\nkind'")
    chat.send('"""never mind' + ENTER + "this")
    chat.expect("this")
    chat.send(CTRL_C)  # forgets all of the open text
    chat.ask("turns?", "turn 4")
    chat.send(CTRL_D)
    assert chat.end() == 0


def test_continue_and_history(start: Start, tmp_path: Path) -> None:
    chat = start(system="be kind")
    chat.ask("first", "You said: first")
    chat.send(CTRL_D)
    assert chat.end() == 0
    again = start(resume="", stats=True)
    assert "continuing 1 exchange, the last question was “first”" in again.raw
    assert "more were in the KV cache" in again.ask("turns?", "turn 2")
    again.ask("system?", "it is 'be kind'")
    again.send(UP + UP + UP + ENTER)  # over the last two to one of the chat before
    again.expect("You said: first")
    again.expect(">>>")
    assert [question for question, _ in saved(tmp_path)] == ["first", "turns?", "system?", "first"]
    history = tmp_path / "state" / "chat_history"
    assert "+turns?" in history.read_text() and history.stat().st_mode & 0o777 == 0o600
    again.send(CTRL_D)
    assert again.end() == 0


def test_termination_and_hangup_save_and_restore(start: Start, tmp_path: Path) -> None:
    chat = start()
    chat.send("count" + ENTER)
    chat.expect("5 6 7 8")
    os.kill(chat.process.pid, signal.SIGTERM)
    chat.expect("stopped by SIGTERM")
    assert chat.end() == 128 + signal.SIGTERM and chat.modes_are_restored
    assert saved(tmp_path)[0][1].startswith("1 2 3 4 5 6 7 8")

    chat = start(resume="")
    os.kill(chat.process.pid, signal.SIGTERM)
    assert chat.end() == 128 + signal.SIGTERM and chat.modes_are_restored

    chat = start(resume="")
    chat.send("count" + ENTER)
    chat.expect("5 6 7 8")
    chat.hang_up()
    assert chat.process.wait(60) == 128 + signal.SIGHUP
    assert len(saved(tmp_path)) == 2 and saved(tmp_path)[1][1].startswith("1 2 3 4 5 6 7 8")


def test_a_terminal_closed_at_the_prompt_ends_the_chat_with_and_without_sighup(start: Start) -> None:
    for options in ({"ignore_hangup": True}, {}):
        chat = start(**options)
        chat.hang_up()
        assert chat.process.wait(60) == 128 + signal.SIGHUP


def test_dumb_terminal_and_no_color(start: Start, tmp_path: Path) -> None:
    chat = start({"TERM": "dumb"}, context=20000)
    chat.ask("Hello", "You said: Hello")
    chat.send('"""' + ENTER)
    chat.expect("...")
    chat.send("one" + ENTER)
    chat.ask('two"""', "You said: one")
    assert saved(tmp_path)[1][0] == "one\ntwo"
    pasted = "begin " + "x" * 6000 + " END"  # more than a terminal's own line holds
    chat.ask(pasted, "You said: begin")
    assert saved(tmp_path)[2][0] == pasted
    chat.send(CTRL_C)
    chat.expect("Ctrl-D or /exit leaves")
    chat.expect(">>>")
    chat.send("count" + ENTER)
    chat.expect("5 6 7 8")
    chat.send(CTRL_C)
    chat.expect("stopped by Ctrl-C")
    chat.expect(">>>")
    assert "\x1b" not in chat.raw
    os.kill(chat.process.pid, signal.SIGTERM)
    assert chat.end() == 128 + signal.SIGTERM and chat.modes_are_restored

    (tmp_path / "state" / "chat_history").mkdir()
    chat = start({"NO_COLOR": "1"})
    assert "no history of inputs" in chat.raw
    assert "experts ram" in chat.ask("Hello", "You said: Hello")
    assert "\x1b[2m" not in chat.raw
    chat.send(CTRL_D)
    assert chat.end() == 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real store of a random model without a chat template, which never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("real")
    raw = tiny_config(torch_dtype="bfloat16", vocab_size=512, max_position_embeddings=32768)
    tensors = tiny_tensors(read_model(raw))
    tensors["lm_head.weight"][raw["eos_token_id"]] = 0
    write_checkpoint(folder / "checkpoint", raw, tensors)
    (folder / "checkpoint" / "tokenizer.model").write_bytes(spm_model())
    with Checkpoint.open(folder / "checkpoint") as checkpoint:
        quantize_checkpoint(checkpoint, folder / "store", UNQUANTIZED, threads=1)
    return folder / "store"


def test_the_real_thing(on_terminal: Open, store: Path) -> None:
    qmix = ["-m", "qmix", "chat", str(store), "--temp", "0", "-c", "30000", "-t", "1"]
    chat = on_terminal([*qmix, "-n", "6", "--stats"], {})
    assert "plain transcript (the model has no chat template)" in chat.raw
    assert "context 30000 tokens" in chat.raw
    assert " 0 more were in the KV cache" in chat.ask("the fox", "length: max-tokens 6 · 6 tok")
    came = chat.ask("the owl", "more were in the KV cache")
    assert " 0 more were" not in came
    chat.ask("/set max-tokens -1", "max-tokens -1")
    chat.send("the forest" + ENTER)
    chat.expect("the forest")
    chat.expect_more(200)
    chat.send(CTRL_C)
    chat.expect("stopped by Ctrl-C")
    chat.expect(">>>")
    chat.ask("/set max-tokens 6", "max-tokens 6")
    chat.ask("the lantern", "length: max-tokens 6 · 6 tok")
    chat.ask("/undo", "undone: “the lantern” (3 exchanges left)")
    chat.send(CTRL_D)
    assert chat.end() == 0 and chat.modes_are_restored

    again = on_terminal([*qmix, "-n", "6", "--continue"], {})
    assert "continuing 3 exchanges, the last question was “the forest”" in again.raw
    assert "answers tokenized" not in again.raw
    again.ask("the rain", "length: max-tokens 6 · 6 tok")
    again.send("/exit" + ENTER)
    assert again.end() == 0 and again.modes_are_restored


def test_without_a_terminal_the_real_thing_points_to_generate(store: Path, warm_python: WarmPython) -> None:
    done = warm_python.run("-m", "qmix", "chat", store, input="Hi\n", cwd=HERE.parent)
    assert done.returncode == 2 and done.stdout == ""
    assert "needs a terminal" in done.stderr and "qmix generate" in done.stderr
    assert "Traceback" not in done.stderr
