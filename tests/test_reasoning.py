"""A model's reasoning: found in the stream, shown apart, counted, kept with the conversation and dropped from the next
prompt. On the fake engine, whose tokens are bytes, so that every tag arrives in pieces; and on Qwen3's tokenizer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_fakes import ASSISTANT, BOS, NOTHINK, USER, FakeEngine, FakeTokenizer, Talk, Terminal
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_qwen3 import HYBRID, THINKING, qwen3

from qmix.chat.answer import respond
from qmix.chat.conversation import Conversation, Exchange
from qmix.commands import oneshot
from qmix.config import Cancel, SamplingParams
from qmix.errors import UsageError
from qmix.generate import Timings, common_prefix
from qmix.render import DIM, PLAIN
from qmix.tokenizer import Prompt, ReasoningSplitter, Request, Tokenizer, divide, load

TOKENIZER = FakeTokenizer()


def parts(pieces: Sequence[str], in_reasoning: bool = False) -> tuple[str, str, bool]:
    """(reasoning, answer, whether there is reasoning) of an answer in pieces."""
    splitter = ReasoningSplitter(in_reasoning)
    found = [part for piece in pieces for part in splitter.push(piece)] + splitter.finish()
    inside, outside = ("".join(p.text for p in found if p.kind == kind) for kind in ("reasoning", "answer"))
    return inside, outside, splitter.found


# ---- finding it

@pytest.mark.parametrize(("text", "opened", "reasoning", "answer", "found"), [
    ("<think>a</think>b", False, "a", "b", True),
    (" \n<think>\na\n</think>\n\nb", False, "\na\n", "\n\nb", True),
    ("a\n</think>\n\nb", True, "a\n", "\n\nb", True),
    ("<think>a", False, "a", "", True),
    ("a </thin", True, "a </thin", "", True),
    ("<think></think>b", False, "", "b", True),
    ("<think>a</think>b<think>c</think>d", False, "a", "b<think>c</think>d", True),
    ("b <think>a</think>", False, "", "b <think>a</think>", False),
    ("<thinking>b</thinking>", False, "", "<thinking>b</thinking>", False),
    ("a</think>b", False, "", "a</think>b", False),
    ("<thin", False, "", "<thin", False),
    (" \n", False, "", " \n", False),
    ("", False, "", "", False),
    ("", True, "", "", True),
    ("<think>a</think</think>b", False, "a</think", "b", True),
    ("<<think>b", False, "", "<<think>b", False),
])
def test_reasoning_comes_once_before_the_answer(text: str, opened: bool, reasoning: str, answer: str,
                                                found: bool) -> None:
    assert parts([text], opened) == parts(list(text), opened) == (reasoning, answer, found)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", " ", "\n", "a", "</th"]), max_size=9),
       st.lists(st.integers(1, 7), max_size=30), st.booleans())
def test_however_the_text_is_cut_the_parts_are_the_same(words: list[str], cuts: list[int], opened: bool) -> None:
    text, pieces, at = "".join(words), [], 0
    for cut in cuts:
        pieces.append(text[at:at + cut])
        at += cut
    assert parts([*pieces, text[at:]], opened) == parts([text], opened)


@given(st.lists(st.sampled_from(["<think>", "</think>", " ", "\n", "a\u00e9", "</th"]), max_size=7), st.booleans())
def test_the_ids_of_both_parts_are_those_of_the_whole(words: list[str], opened: bool) -> None:
    """With tokens of a byte no token holds the end of both: the ids of the answer say the answer, and the thinking
    tokens are those up to the end of the closing tag."""
    text = "".join(words)
    ids = TOKENIZER.encode(text, bos=False)
    found = divide(text, ids, TOKENIZER, Prompt([], opened))
    assert found.ids is not None and TOKENIZER.decode(found.ids) == found.answer
    if found.reasoning is None:
        assert (found.answer, found.thinking_tokens) == (text, 0)
    elif found.answer:
        assert TOKENIZER.decode(ids[:found.thinking_tokens]).endswith("</think>")
        assert "</think>" not in TOKENIZER.decode(ids[:found.thinking_tokens - 1])


def test_a_token_across_the_border_is_encoded_again() -> None:
    class Coarse(FakeTokenizer):
        @staticmethod
        def _piece(token: int) -> Any:
            return FakeTokenizer._piece(token) if token != 9 else FakeTokenizer._piece(10)._replace(
                data=b">\n\nIt", whole=True)

    ids = [*TOKENIZER.encode("<think>a</think", bos=False), 9, *TOKENIZER.encode(" is", bos=False)]
    found = divide("<think>a</think>\n\nIt is", ids, Coarse(), Prompt([]))
    assert found == ("a", "It is", None, len(ids) - 3, ())


# ---- the chat

def test_reasoning_is_dim_and_counted_apart(tmp_path: Path) -> None:
    talk = Talk(tmp_path, term="xterm", detailed=True)
    out, err = talk.say("think")
    dim = "".join(piece.split(PLAIN)[0] for piece in out.split(DIM)[1:])
    assert dim == "hm, a\u241b[2J\n"  # no tags, and no escape sequence of the model's
    assert out.replace(DIM, "").replace(PLAIN, "") == "hm, a\u241b[2J\n\nIt is so.\n"
    thinking = len("<think>\nhm, a\x1b[2J\n</think>")
    assert f"{len('..It is so.') + 1} tok + {thinking} thinking" in err  # two line breaks, and the end
    assert f"thinking  {thinking} of these tokens" in err
    assert talk.chat.conversation.exchanges == (Exchange(
        "think", "It is so.", tuple(TOKENIZER.encode("It is so.", bos=False)), "hm, a\x1b[2J"),)


@pytest.mark.parametrize(("question", "shown", "said", "thought"), [
    ("opened", "<think>\nhm\n</think>\n\nYes </think>.\n", "Yes </think>.", "hm"),
    ("no thoughts", "At once.\n", "At once.", ""),
    ("only thoughts", "<think>\nhm\n</think>\n", "", "hm"),
    ("mention", "Write <think> and </think>.\n", "Write <think> and </think>.", None),
    ("tag", "<thin\n", "<thin", None),
])
def test_without_colour_the_tags_are_shown(tmp_path: Path, question: str, shown: str, said: str,
                                           thought: str | None) -> None:
    talk = Talk(tmp_path)
    out, err = talk.say(question)
    assert (out, talk.said) == (shown, [(question, said)])
    assert talk.chat.conversation.exchanges[0].reasoning == thought
    assert ("thinking" in err) == (thought is not None)
    assert ("(thoughts, and no answer)" in err) == (not said)
    assert talk.say("turns?")[0] == "turn 2\n"


def test_the_next_turn_reads_what_changed_and_no_more(tmp_path: Path) -> None:
    """The reasoning leaves the prompt: all before it stays in the KV cache, the answer is read again."""
    talk = Talk(tmp_path)
    first = [BOS, USER, *TOKENIZER.encode("think", bos=False), ASSISTANT]
    talk.say("think")
    talk.say("turns?")
    prompt = TOKENIZER.encode_chat(talk.chat.conversation.undone().messages("turns?"))
    assert TOKENIZER.decode(prompt) == "thinkIt is so.turns?"
    assert prompt[:len(first)] == first and talk.session.ids[:len(prompt)] == prompt
    assert talk.session.computed == [len(first), len(prompt) - len(first)]
    talk.say("/regen")
    assert talk.session.computed[2] == 1  # the prompt is the same


def test_reasoning_that_is_cut_short(tmp_path: Path) -> None:
    talk = Talk(tmp_path, SamplingParams(max_tokens=12))
    out, err = talk.say("think forever")
    assert out == "<think>\n1 2 3\n</think>\n"  # seven of the twelve are the tag
    assert "length: max-tokens 12 · 0 tok + 12 thinking" in err
    assert talk.said == [("think forever", "")]
    show = talk.chat.screen.show
    talk.chat.params = SamplingParams()
    talk.chat.screen.show = lambda part: (show(part), talk.chat.cancel.set())[0]  # type: ignore[method-assign]
    _, err = talk.say("think forever")
    assert "stopped by Ctrl-C before the answer began" in err and len(talk.said) == 1
    talk.chat.screen.show = show  # type: ignore[method-assign]
    assert talk.say("turns?")[0] == "turn 2\n"


def test_saved_continued_and_loaded_with_its_reasoning(tmp_path: Path) -> None:
    talk = Talk(tmp_path / "state")
    talk.say("think")
    talk.say(f"/save {tmp_path / 'x.json'}")
    written = json.loads((tmp_path / "x.json").read_text())["messages"]
    assert written[1]["content"] == "It is so." and written[1]["reasoning"] == "hm, a\x1b[2J"
    before = talk.chat.conversation
    assert Talk(tmp_path / "state", resume="").chat.conversation == before
    other = Talk(tmp_path / "other")
    assert "loaded 1 exchange" in other.say(f"/load {tmp_path / 'x.json'}")[1]
    assert other.chat.conversation == before and other.say("turns?")[0] == "turn 2\n"
    written[1]["reasoning"] = 3
    document = json.loads((tmp_path / "x.json").read_text()) | {"messages": written}
    (tmp_path / "x.json").write_text(json.dumps(document))
    assert "messages[1].reasoning: want a text" in other.say(f"/load {tmp_path / 'x.json'}")[1]


# ---- the switch

def test_set_think_and_nothink(tmp_path: Path) -> None:
    talk = Talk(tmp_path, switch=True)
    assert "thinking    as the model does it" in talk.say("/show")[1]
    assert talk.say("/set nothink")[1] == "thinking off\n"
    assert talk.say("think")[0] == "It is so.\n" and NOTHINK in talk.session.ids
    assert "thinking off (/set think, /set nothink)" in talk.say("/set")[1]
    assert talk.say("/set think")[1] == "thinking on\n"
    assert "hm" in talk.say("think")[0]
    assert "takes no value, got 'on'" in talk.say("/set think on")[1]
    assert "thinking    on" in talk.say("/show")[1]


def test_a_switch_that_the_template_does_not_know(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    assert talk.say("/set nothink")[1].startswith("error: no switch for thinking")
    assert "thinking" not in talk.say("/show")[1] + talk.say("/set")[1]
    for way in (True, False):
        with pytest.raises(UsageError, match="no switch for thinking") as caught:
            Talk(tmp_path, thinking=way)
        assert caught.value.exit_code == 2
    assert Talk(tmp_path, thinking=False, switch=True).say("think")[0] == "It is so.\n"


# ---- generate

class Pipe(io.StringIO):
    """A stream that is no terminal."""


def once(question: str, out: io.StringIO, switch: bool = False, **how: Any) -> tuple[str, str]:
    engine = FakeEngine()
    engine.tokenizer.thinking_switch = switch
    engine.tokenizer.has_template = True  # type: ignore[attr-defined]
    stats = {"experts": {"ram": 100.0}, "memory": {}, "offload": {}}
    engine.stats = lambda: stats  # type: ignore[method-assign, assignment]
    assert oneshot.run(engine, question, SamplingParams(), stdout=out, **how) == 0  # type: ignore[arg-type]
    return out.getvalue(), question


def test_in_a_pipe_the_answer_is_the_models_own_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert once("think", Pipe())[0] == "<think>\nhm, a\x1b[2J\n</think>\n\nIt is so.\n"
    assert "12 tok + 26 thinking" in capsys.readouterr().err
    assert once("opened", Pipe())[0] == "<think>\n\nhm\n</think>\n\nYes </think>.\n"  # the tags are a pair
    assert once("mention", Pipe())[0] == "Write <think> and </think>.\n"


def test_on_a_terminal_generate_shows_reasoning_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, _ = once("think", Terminal())
    assert "".join(piece.split(PLAIN)[0] for piece in out.split(DIM)[1:]) == "hm, a\u241b[2J\n"
    assert out.replace(DIM, "").replace(PLAIN, "") == "hm, a\u241b[2J\n\nIt is so.\n"
    assert once("tag", Terminal())[0] == "<thin\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert once("think", Terminal())[0] == "<think>\nhm, a\u241b[2J\n</think>\n\nIt is so.\n"


def test_json_has_reasoning_apart() -> None:
    found = json.loads(once("think", Pipe(), as_json=True)[0])
    assert (found["text"], found["thinking"]) == ("It is so.", "hm, a\x1b[2J")
    assert found["timings"]["thinking_tokens"] == 26 and len(found["token_ids"]) == 38
    found = json.loads(once("lines", Pipe(), as_json=True)[0])
    assert (found["text"], found["thinking"], found["timings"]["thinking_tokens"]) == ("  \n one\ntwo\n", None, 0)


def test_generates_switch() -> None:
    assert once("think", Pipe(), switch=True, thinking=False)[0] == "It is so.\n"
    for how in ({"thinking": False}, {"thinking": True, "raw": True, "switch": True}):
        with pytest.raises(UsageError):
            once("think", Pipe(), **how)


# ---- on Qwen3's tokenizer

class Scripted:
    """A session that says the given ids, whatever it is asked."""

    warm, context = True, 4096

    def __init__(self, rows: int):
        self.ids: list[int] = []
        self.read: list[int] = []
        self._rows = rows
        self.script: Iterator[int] = iter(())

    @property
    def length(self) -> int:
        return len(self.ids)

    def reachable(self, length: int) -> int:
        return length

    def trim(self, length: int) -> None:
        del self.ids[length:]

    def prefill(self, ids: Sequence[int], cancel: Cancel | None = None) -> torch.Tensor:
        self.read.append(len(ids))
        self.ids += ids
        return torch.nn.functional.one_hot(torch.tensor(next(self.script)), self._rows).float() * 1e4

    def decode(self, token: int, cancel: Cancel | None = None) -> torch.Tensor:
        return self.prefill([token])


@pytest.mark.parametrize("template", [HYBRID, THINKING], ids=["hybrid", "thinking"])
def test_two_turns_with_qwen3(template: str, tmp_path: Path) -> None:
    tokenizer = load(qwen3(tmp_path, template))
    rows = tokenizer.vocab_size
    session = Scripted(rows)
    end = tokenizer.eos_ids[0]

    def tokens(text: str) -> list[int]:
        """As a model writes them: tags are tokens."""
        encoder = tokenizer._vocabulary._tokenizer  # type: ignore[attr-defined]
        return encoder.encode(text, add_special_tokens=False).ids

    conversation = Conversation("qwen3")
    opening = "" if template is THINKING else "<think>\n"
    for question, thought, answer in (("Why?", "the fox \U0001f98a", "So it is."), ("And now?", "hm", "The rain.")):
        prompt = tokenizer.prompt(conversation.messages(question))
        assert prompt.in_reasoning == (template is THINKING)
        own = tokens(answer)
        session.script = iter([*tokens(f"{opening}{thought}\n</think>\n\n"), *own, end])
        shared = common_prefix(prompt.ids, session.ids)
        session.read.clear()
        got = respond(session, tokenizer, prompt, SamplingParams(), Cancel(),  # type: ignore[arg-type]
                      lambda *part: None, lambda: 0.0)
        assert (got.text, got.reasoning, got.ids, got.finish) == (answer, thought, tuple(own), "stop")
        assert got.timings.thinking_tokens == len(tokens(f"{opening}{thought}\n</think>"))
        assert session.read[0] == len(prompt.ids) - shared
        conversation = conversation.plus(Exchange(question, got.text, got.ids, got.reasoning))
    last = tokenizer.decode(prompt.ids)
    assert "fox" not in last and "So it is." in last
    start = tokenizer.encode_chat(conversation.messages()[:1])
    start = start[:-2] if template is THINKING else start  # <think>, which earlier answers do not have
    assert shared == len(start)  # up to the first answer; what follows was read again


def test_thinking_switched_off_with_qwen3(tmp_path: Path) -> None:
    tokenizer: Tokenizer = load(qwen3(tmp_path))
    prompt = tokenizer.prompt(Conversation("m").messages("Why?"), request=Request(thinking=False))
    assert not prompt.in_reasoning and tokenizer.decode(prompt.ids[-4:]) == "<think>\n\n</think>\n\n"
    assert divide("So.", tokenizer.encode("So."), tokenizer, prompt).reasoning is None


def test_how_tokens_are_counted() -> None:
    assert Timings(1, 0, 312, 1.0, 1.0, 1.0).counted == "312 tok"
    assert Timings(1, 0, 312, 1.0, 1.0, 1.0, thinking_tokens=208).counted == "104 tok + 208 thinking"
