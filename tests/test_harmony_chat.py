"""gpt-oss in `qmix chat` and `qmix generate`: reasoning dim, tool calls said, effort by flag and by /set; and what
other models say to --reasoning. A scripted session stands for the model; tokenizer and template are of gpt-oss's
kind."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_fakes import Eager, FakeEngine, Talk, Terminal
from test_harmony import ANALYSIS, CALLING, COMMENTARY, FINAL, NEXT, tokens
from test_reasoning import Pipe, Scripted
from tokenizer_harmony import harmony
from tokenizer_qwen3 import qwen3
from typer.testing import CliRunner

from qmix.chat import savefile
from qmix.chat.conversation import Conversation, adopted
from qmix.chat.repl import Chat
from qmix.chat.screen import Screen
from qmix.cli import app
from qmix.commands import oneshot
from qmix.config import SamplingParams
from qmix.errors import UsageError
from qmix.render import DIM, PLAIN
from qmix.tokenizer import Call, Tokenizer, load

THOUGHT = f"{ANALYSIS}The fox.{NEXT}{FINAL}It is <so>.<|return|>"
CALLED = f"{ANALYSIS}hm{NEXT}{COMMENTARY}I look.{NEXT}{CALLING}{{\"x\": 1}}<|call|>"


class Engine(FakeEngine):
    """Its answers, one after the other, are `says`, in a text whose control tokens are written out."""

    def __init__(self, tokenizer: Tokenizer, *says: str):
        super().__init__()
        self.tokenizer = tokenizer  # type: ignore[assignment]
        self.says = iter(says)

    def session(self) -> Any:
        scripted = Scripted(self.tokenizer.vocab_size)
        prefill = scripted.prefill

        def start(ids: list[int], cancel: Any = None) -> Any:
            if len(ids) > 1:
                scripted.script = iter(tokens(self.tokenizer, next(self.says)))  # type: ignore[arg-type]
            return prefill(ids)

        scripted.prefill = start  # type: ignore[method-assign]
        scripted.decode = lambda token, cancel=None: prefill([token])  # type: ignore[method-assign]
        self.sessions.append(scripted)  # type: ignore[arg-type]
        return scripted

    def pace(self, longest: int, say: Callable[[str], None]) -> Any:
        return None if longest == 0 else Eager(longest)

    def stats(self) -> dict[str, dict[str, float]]:
        return {"experts": {"ram": 100.0}, "memory": {}, "offload": {}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(harmony(tmp_path_factory.mktemp("harmony")))


class Talking:
    """A chat on string streams, as chat_fakes.Talk."""

    def __init__(self, folder: Path, engine: Engine, term: str = "dumb", params: SamplingParams | None = None,
                 **how: Any):
        self.out, self.err = Terminal(), Terminal()
        clock = itertools.count()
        self.chat = Chat(engine, "gpt-oss", params or SamplingParams(), Screen(self.out, self.err, {"TERM": term}),
                         savefile.Autosave(folder, "gpt-oss"), draw=lambda: 1, clock=lambda: next(clock) / 10, **how)
        self.engine = engine
        self.chat.begin(None, None)

    def say(self, line: str) -> tuple[str, str]:
        before = self.out.tell(), self.err.tell()
        self.chat.turn(line)
        return self.out.getvalue()[before[0]:], self.err.getvalue()[before[1]:]

    def prompt(self) -> str:
        return self.engine.tokenizer.decode(self.engine.sessions[0].ids)


# ---- the chat

def test_reasoning_is_dim_and_counted_apart(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = Talking(tmp_path, Engine(tokenizer, THOUGHT, f"{FINAL}Again.<|return|>"), "xterm")
    out, err = talk.say("Why?")
    assert "".join(piece.split(PLAIN)[0] for piece in out.split(DIM)[1:]) == "The fox."
    assert out.replace(DIM, "").replace(PLAIN, "") == "The fox.\n\nIt is <so>.\n"
    thinking = len(tokens(tokenizer, f"{ANALYSIS}The fox.<|end|>"))
    assert f"{len(tokens(tokenizer, THOUGHT)) - thinking} tok + {thinking} thinking" in err
    exchange = talk.chat.conversation.exchanges[0]
    assert (exchange.answer, exchange.reasoning) == ("It is <so>.", "The fox.")
    assert exchange.ids == tuple(tokens(tokenizer, "It is <so>."))
    assert talk.say("And?")[0] == "Again.\n"
    assert "fox" not in talk.prompt() and f"{FINAL}It is <so>.<|end|><|start|>user<|message|>And?" in talk.prompt()


def test_without_colour_the_reasoning_stands_between_tags(tokenizer: Tokenizer, tmp_path: Path) -> None:
    says = (THOUGHT, f"{FINAL}a{NEXT}{ANALYSIS}b{NEXT}{FINAL}c<|return|>", f"{ANALYSIS}b<|return|>")
    talk = Talking(tmp_path, Engine(tokenizer, *says))
    assert talk.say("Why?")[0] == "<think>\nThe fox.\n</think>\n\nIt is <so>.\n"
    assert talk.say("Why?")[0] == "a\n\n<think>\nb\n</think>\n\nc\n"
    assert talk.chat.conversation.exchanges[1].answer == "a\n\nc"
    out, err = talk.say("Why?")
    assert out == "<think>\nb\n</think>\n" and "(thoughts, and no answer)" in err


def test_a_tool_call_is_shown_and_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = Talking(tmp_path, Engine(tokenizer, CALLED, f"{FINAL}Sorry.<|return|>"))
    out, err = talk.say("Weather?")
    assert out == '<think>\nhm\n</think>\n\nI look.\n\ntool call: weather {"x": 1}\n'
    assert "the model calls a tool, weather, and waits for its result: this chat runs no tools" in err
    assert talk.chat.conversation.exchanges[0].answer == "I look."
    assert talk.say("Go on without.")[0] == "Sorry.\n"


def test_a_call_that_the_template_refuses_is_not_shown_again(tmp_path: Path) -> None:
    """As gpt-oss's own, which takes a text or thoughts beside a call, and not both."""
    folder = harmony(tmp_path / "harmony")
    path = folder / "chat_template.jinja"
    mark = '{%- if "tool_calls" in message %}'
    text = path.read_text()
    assert text.count(mark) == 1
    path.write_text(text.replace(mark, mark + "{%- if message.content and message.thinking %}{{- raise_exception("
                                 "'Cannot pass both content and thinking') }}{%- endif %}"))
    talk = Talking(tmp_path, Engine(load(folder), CALLED, f"{FINAL}Sorry.<|return|>", f"{CALLING}{{}}<|call|>"))
    err = talk.say("Weather?")[1]
    assert "the model calls a tool, weather" in err and "the chat template refuses such a call" in err
    (exchange,) = talk.chat.conversation.exchanges
    assert (exchange.answer, exchange.calls) == ("I look.", ()) and exchange.ids is not None
    assert talk.say("Go on without.")[0] == "Sorry.\n"
    assert "refuses" not in talk.say("Weather?")[1] and talk.chat.conversation.exchanges[2].calls
    saved = Conversation("gpt-oss", None, (replace(exchange, calls=(Call("weather", "{}"),)),))
    assert adopted(saved, "gpt-oss", talk.engine.tokenizer)[0].exchanges == (exchange,)


def test_saved_and_continued(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = Talking(tmp_path, Engine(tokenizer, THOUGHT))
    talk.say("Why?")
    talk.say(f"/save {tmp_path / 'x.json'}")
    written = json.loads((tmp_path / "x.json").read_text())["messages"][1]
    assert (written["content"], written["reasoning"]) == ("It is <so>.", "The fox.")
    other = Talking(tmp_path / "other", Engine(tokenizer, f"{FINAL}x<|return|>"))
    assert "loaded 1 exchange" in other.say(f"/load {tmp_path / 'x.json'}")[1]
    assert other.chat.conversation == talk.chat.conversation and other.say("x")[0] == "x\n"


def test_set_reasoning(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = Talking(tmp_path, Engine(tokenizer, *[f"{FINAL}x<|return|>"] * 3))
    assert "reasoning   as the model does it" in talk.say("/show")[1]
    assert "reasoning as the model does it (/set reasoning low|medium|high)" in talk.say("/set")[1]
    talk.say("a")
    assert "Reasoning: medium\n" in talk.prompt()
    assert talk.say("/set reasoning high")[1] == "reasoning high\n"
    talk.say("b")
    assert "Reasoning: high\n" in talk.prompt()
    assert talk.say("/set reasoning")[1] == "reasoning high\n"
    assert "got 'extreme', want low or medium or high" in talk.say("/set reasoning extreme")[1]
    assert "reasoning   high" in talk.say("/show")[1]
    talk = Talking(tmp_path, Engine(tokenizer, f"{FINAL}x<|return|>"), effort="low")
    talk.say("a")
    assert "Reasoning: low\n" in talk.prompt()
    assert "no switch for thinking" in talk.say("/set nothink")[1]


def test_reasoning_where_the_template_has_no_place_for_it(tmp_path: Path) -> None:
    talk = Talk(tmp_path, switch=True)
    for line in ("/set reasoning low", "/set reasoning"):
        assert talk.say(line)[1].startswith("error: no place for effort")
    assert "reasoning" not in talk.say("/show")[1] + talk.say("/set")[1]
    with pytest.raises(UsageError, match="no place for effort"):
        Talk(tmp_path, effort="low")


# ---- generate

def once(tokenizer: Tokenizer, said: str, out: Any, **how: Any) -> str:
    engine = Engine(tokenizer, said)
    assert oneshot.run(engine, "Why?", SamplingParams(), stdout=out, **how) == 0  # type: ignore[arg-type]
    return out.getvalue()


def test_generate_in_a_pipe(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    assert once(tokenizer, THOUGHT, Pipe()) == "<think>\nThe fox.\n</think>\n\nIt is <so>.\n"
    assert "thinking" in capsys.readouterr().err
    assert once(tokenizer, f"{FINAL}\n a\n<|return|>", Pipe()) == "\n a\n"
    assert once(tokenizer, "<|return|>", Pipe()) == "\n"
    assert once(tokenizer, CALLED, Pipe()) == '<think>\nhm\n</think>\n\nI look.\n\ntool call: weather {"x": 1}\n'
    assert "calls the tool weather" in capsys.readouterr().err


def test_generate_on_a_terminal(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = once(tokenizer, THOUGHT, Terminal())
    assert "".join(piece.split(PLAIN)[0] for piece in out.split(DIM)[1:]) == "The fox."
    assert out.replace(DIM, "").replace(PLAIN, "") == "The fox.\n\nIt is <so>.\n"


def test_generate_raw_shows_the_channels(tokenizer: Tokenizer) -> None:
    assert once(tokenizer, THOUGHT, Pipe(), raw=True) == THOUGHT.removesuffix("<|return|>") + "\n"


def test_generate_json(tokenizer: Tokenizer) -> None:
    found = json.loads(once(tokenizer, THOUGHT, Pipe(), as_json=True))
    assert (found["text"], found["thinking"], found["tool_calls"]) == ("It is <so>.", "The fox.", [])
    assert found["token_ids"] == tokens(tokenizer, THOUGHT) and found["finish_reason"] == "stop"
    assert found["timings"]["thinking_tokens"] == len(tokens(tokenizer, f"{ANALYSIS}The fox.<|end|>"))
    found = json.loads(once(tokenizer, CALLED, Pipe(), as_json=True))
    assert found["text"] == "I look." and found["tool_calls"] == [{"name": "weather", "arguments": '{"x": 1}'}]


def test_generates_effort(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Engine(tokenizer, f"{FINAL}x<|return|>")
    assert oneshot.run(engine, "Why?", SamplingParams(), effort="low", stdout=Pipe()) == 0  # type: ignore[arg-type]
    assert "Reasoning: low\n" in tokenizer.decode(engine.sessions[0].ids)
    for how, match in (({"effort": "low", "raw": True}, "--reasoning: text that is continued"),
                       ({"thinking": False}, "no switch for thinking")):
        with pytest.raises(UsageError, match=match) as caught:
            once(tokenizer, THOUGHT, Pipe(), **how)
        assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="no place for how much it thinks"):
        once(load(qwen3(tmp_path)), "x", Pipe(), effort="low")


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_word_that_is_no_effort_is_refused_before_anything_is_loaded(command: str) -> None:
    ran = CliRunner().invoke(app, [command, "no-such-model", "--reasoning", "extreme"])
    assert isinstance(ran.exception, UsageError) or ran.exit_code == 2
    assert "--reasoning: got 'extreme', want low or medium or high" in str(ran.exception) + ran.output
