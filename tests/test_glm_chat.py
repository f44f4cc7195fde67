"""GLM-4.5 in `qmix chat` and `qmix generate`: reasoning dim and counted, calls shown and said, thinking switched off. A
scripted session stands for the model; tokenizer and template are of GLM's kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_fakes import Terminal
from test_harmony import tokens
from test_harmony_chat import Engine, Talking, once
from test_reasoning import Pipe
from tokenizer_glm import glm

from qmix.render import DIM, PLAIN
from qmix.tokenizer import Call, Tokenizer, load

THOUGHT = "\n<think>The fox.</think>\nIt is <so>.<|user|>"
CALLED = ("\n<think>hm</think>\nI look.\n<tool_call>weather\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
          "</tool_call><|observation|>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(glm(tmp_path_factory.mktemp("glm")))


def test_two_turns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Thoughts are dim and counted, and the template drops them; the answer's own ids stand in the next prompt."""
    talk = Talking(tmp_path, Engine(tokenizer, THOUGHT, "\n<think></think>\nAgain.<|endoftext|>"), "xterm")
    out, err = talk.say("Why?")
    assert "".join(piece.split(PLAIN)[0] for piece in out.split(DIM)[1:]) == "The fox."
    assert out.replace(DIM, "").replace(PLAIN, "").split("\n") == ["The fox.", "", "It is <so>.", ""]
    thinking = len(tokens(tokenizer, "\n<think>The fox.</think>"))
    assert f"{len(tokens(tokenizer, THOUGHT)) - thinking} tok + {thinking} thinking" in err
    (exchange,) = talk.chat.conversation.exchanges
    assert (exchange.answer, exchange.reasoning) == ("It is <so>.", "The fox.")
    assert talk.say("And?")[0].strip() == "Again."
    said = [tokenizer.token(i) for i in talk.engine.sessions[0].ids]
    assert said.count("<|user|>") == 2 and said[:2] == ["[gMASK]", "<sop>"]
    assert "fox" not in talk.prompt() and "It is <so>." in talk.prompt()


def test_a_call_is_shown_and_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = Talking(tmp_path, Engine(tokenizer, CALLED, "\n<think></think>\nSorry.<|user|>"))
    out, err = talk.say("Weather?")
    assert out == '<think>\nhm\n</think>\n\nI look.\n\ntool call: weather {"days": 3}\n'
    assert "the model calls a tool, weather, and waits for its result: this chat runs no tools" in err
    exchange = talk.chat.conversation.exchanges[0]
    assert (exchange.answer, exchange.calls) == ("I look.", (Call("weather", '{"days": 3}'),))
    assert talk.say("Go on without.")[0].strip().endswith("Sorry.")
    assert "<tool_call>weather\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>" in talk.prompt()


def test_thinking_switched_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = Talking(tmp_path, Engine(tokenizer, "\nSo.<|user|>"), thinking=False)
    out, err = talk.say("Why?")
    assert out.strip() == "So." and "thinking" not in err
    said = [tokenizer.token(i) for i in talk.engine.sessions[0].ids]
    assert said.count("/nothink") == 1 and talk.chat.conversation.exchanges[0].reasoning is None


def test_generate(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(once(tokenizer, CALLED, Pipe(), as_json=True))
    assert (found["text"], found["thinking"], found["finish_reason"]) == ("I look.", "hm", "stop")
    assert found["tool_calls"] == [{"name": "weather", "arguments": '{"days": 3}'}]
    assert found["timings"]["thinking_tokens"] == len(tokens(tokenizer, "\n<think>hm</think>"))
    assert once(tokenizer, THOUGHT, Pipe()) == "\n<think>The fox.</think>\nIt is <so>.\n"  # the model's own text
    capsys.readouterr()
    out = once(tokenizer, CALLED, Terminal())
    assert out.endswith('I look.\n\ntool call: weather {"days": 3}\n')
    assert "calls the tool weather" in capsys.readouterr().err
