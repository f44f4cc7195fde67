"""Gemma 4 in `qmix chat` and `qmix generate`: reasoning dim and counted, calls shown and said, thinking switched on and
off. A scripted session stands for the model; tokenizer and template are of Gemma's kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_fakes import Terminal
from test_harmony import tokens
from test_harmony_chat import Engine, Talking, once
from test_reasoning import Pipe
from tokenizer_gemma import gemma

from qmix.render import DIM, PLAIN
from qmix.tokenizer import Tokenizer, load

THOUGHT = "<|channel>thought\nThe fox.\n<channel|>It is <so>.<turn|>"
CALLED = "<|channel>thought\nhm\n<channel|>I look.<|tool_call>call:weather{days:3}<tool_call|><|tool_response>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(gemma(tmp_path_factory.mktemp("gemma")))


def test_two_turns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Thoughts are dim and counted, and the template drops them; the answer's own ids stand in the next prompt."""
    talk = Talking(tmp_path, Engine(tokenizer, THOUGHT, "Again.<turn|>"), "xterm", thinking=True)
    out, err = talk.say("Why?")
    assert "".join(piece.split(PLAIN)[0] for piece in out.split(DIM)[1:]).strip() == "The fox."
    assert out.replace(DIM, "").replace(PLAIN, "").split("\n") == ["The fox.", "", "It is <so>.", ""]
    thinking = len(tokens(tokenizer, "<|channel>thought\nThe fox.\n<channel|>"))
    assert f"{len(tokens(tokenizer, THOUGHT)) - thinking} tok + {thinking} thinking" in err
    (exchange,) = talk.chat.conversation.exchanges
    assert (exchange.answer, exchange.reasoning) == ("It is <so>.", "The fox.")
    assert talk.say("And?")[0].strip() == "Again."
    said = [tokenizer.token(i) for i in talk.engine.sessions[0].ids]
    assert said.count("<|turn>") == 5 and said[:2] == ["<bos>", "<|turn>"] and said.count("<|think|>") == 1
    assert "fox" not in talk.prompt() and "It is <so>." in talk.prompt()


def test_a_call_is_shown_and_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = Talking(tmp_path, Engine(tokenizer, CALLED, "Sorry.<turn|>"))
    out, err = talk.say("Weather?")
    assert out == '<think>\nhm\n</think>\n\nI look.\n\ntool call: weather {"days": 3}\n'
    assert "the model calls a tool, weather, and waits for its result: this chat runs no tools" in err
    assert talk.chat.conversation.exchanges[0].answer == "I look."
    assert talk.say("Go on without.")[0].strip().endswith("Sorry.")


def test_thinking_switched_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The prompt writes an empty channel, which is not the answer's."""
    talk = Talking(tmp_path, Engine(tokenizer, "So.<turn|>"), thinking=False)
    out, err = talk.say("Why?")
    assert out.strip() == "So." and "thinking" not in err
    assert talk.chat.conversation.exchanges[0].reasoning is None


def test_generate(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe too, control tokens are no text to be read."""
    found = json.loads(once(tokenizer, CALLED, Pipe(), as_json=True))
    assert (found["text"], found["thinking"], found["finish_reason"]) == ("I look.", "hm", "stop")
    assert found["tool_calls"] == [{"name": "weather", "arguments": '{"days": 3}'}]
    assert found["timings"]["thinking_tokens"] == len(tokens(tokenizer, "<|channel>thought\nhm\n<channel|>"))
    assert once(tokenizer, THOUGHT, Pipe()) == "<think>\nThe fox.\n</think>\n\nIt is <so>.\n"
    capsys.readouterr()
    assert once(tokenizer, CALLED, Terminal()).endswith('I look.\n\ntool call: weather {"days": 3}\n')
    assert "calls the tool weather" in capsys.readouterr().err
