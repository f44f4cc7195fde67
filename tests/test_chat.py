"""The chat without a terminal: turns, commands, parameters, streams; on the fake engine."""

from __future__ import annotations

import io
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_fakes import ASSISTANT, BOS, USER, FakeEngine, FakeTokenizer, Talk, Terminal

from qmix.chat import commands, parameters, run, statline
from qmix.chat.prompt import is_open, repaired
from qmix.chat.screen import Screen
from qmix.config import Cancel, SamplingParams
from qmix.errors import UsageError
from qmix.generate import Timings
from qmix.render import clean
from qmix.tokenizer import Part

TOKENIZER = FakeTokenizer()


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    return Talk(tmp_path)


# Turns


def test_a_turn_writes_the_answer_on_stdout_and_the_figures_on_stderr(talk: Talk) -> None:
    out, err = talk.say("Hello there")
    assert out == "You said: Hello there\n"
    assert err == "22 tok · 10.0 tok/s · prefill 140 tok/s · experts ram 100 %\n"
    assert talk.said == [("Hello there", "You said: Hello there")]


def test_what_is_in_the_cache_is_not_computed_again(talk: Talk) -> None:
    talk.say("one")
    talk.say("two")
    first, second = talk.session.computed
    assert first == len(TOKENIZER.encode_chat(talk.chat.conversation.undone().undone().messages("one")))
    assert second == len(["EOS", "USER", *"two", "ASSISTANT"])  # the last token sampled has no KV yet
    assert talk.session.ids[:first] == [BOS, USER, *TOKENIZER.encode("one", False), ASSISTANT]


def test_the_cache_follows_undo_and_a_changed_system_prompt(talk: Talk) -> None:
    for line in ("one", "two", "/undo", "/undo", "/system be kind", "system?"):
        out, _ = talk.say(line)
    assert out == "it is 'be kind'\n"
    assert talk.say("turns?")[0] == "turn 2\n"
    assert talk.say("/clear")[1].startswith("cleared 2 exchanges")
    assert talk.say("turns?")[0] == "turn 1\n"
    assert talk.say("system?")[0] == "it is 'be kind'\n"


def test_a_session_that_cannot_go_back_everywhere_reads_again_and_says_so(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a model with recurrent states does."""
    said: list[str] = []
    monkeypatch.setattr(talk.chat.screen, "transient", said.append)
    talk.say(300 * "x")
    before = talk.session.length
    talk.session.places = (9,)
    for line in ("/undo", 290 * "x" + "yy"):
        talk.say(line)
    assert said == [
        "reading 303 tokens",
        f"reading {294 - 9 + 1} tokens, {292 - 9} of them again: the model's state is kept at few places",
    ]
    assert talk.session.computed == [303, 294 - 9 + 1] and talk.session.length < before
    assert talk.said == [(290 * "x" + "yy", f"You said: {290 * 'x'}yy")]


def test_control_characters_of_the_model_reach_nobody(talk: Talk) -> None:
    out, _ = talk.say("escape")
    assert out == "a␛[2Jb␇c\ufffdd\n"
    assert talk.said[0][1] == "a\x1b[2Jb\x07c\x9bd"
    assert (
        "\x1b"
        not in talk.say("/undo")[1]
        + talk.say("/show")[1]
        + talk.say("/system \x1b[2J")[1]
        + talk.say("/system")[1]
    )


def test_characters_of_many_bytes_arrive_whole(talk: Talk) -> None:
    assert talk.say("unicode")[0] == "né☃\n"


def test_blank_lines_before_an_answer_are_not_shown_but_kept(talk: Talk) -> None:
    assert talk.say("lines")[0] == "one\ntwo\n"
    assert talk.said[0][1] == "  \n one\ntwo\n"
    assert talk.say("turns?")[0] == "turn 2\n"


def test_an_answer_that_ends_at_once_is_an_answer(talk: Talk) -> None:
    out, err = talk.say("nothing")
    assert out == "" and "ended its answer at once" in err
    assert talk.said == [("nothing", "")]
    assert talk.say("turns?")[0] == "turn 2\n"


@pytest.mark.parametrize("line", ["", "   ", "\t", '""""""', '"""\n\n"""'])
def test_empty_input_is_ignored(talk: Talk, line: str) -> None:
    assert talk.say(line) == ("", "")
    assert talk.said == []


def test_max_tokens_and_stop_say_why_an_answer_ended(talk: Talk) -> None:
    talk.say("/set max-tokens 7")
    out, err = talk.say("count")
    assert out == "1 2 3 4\n" and err.startswith("length: max-tokens 7 · 7 tok")
    talk.say("/set max-tokens -1")
    talk.say('/set stop "6 7" nine')
    out, err = talk.say("count")
    assert out.strip() == "1 2 3 4 5" and "length" not in err
    # The ids of the stop string are not part of the conversation.
    assert TOKENIZER.decode(talk.chat.conversation.exchanges[-1].ids) == talk.said[-1][1] == "1 2 3 4 5 "
    assert talk.say("turns?")[0] == "turn 3\n"


def test_an_answer_may_fill_the_context(tmp_path: Path) -> None:
    talk = Talk(tmp_path, context=64)
    out, err = talk.say("count")
    assert "length: context full" in err
    assert out.startswith("1 2 3 4 5 6 7 8 9 10") and len(talk.session.ids) <= 64
    _, err = talk.say("more")
    assert re.search(r"has \d+ tokens, the context holds 64", err) and "/undo" in err and "--ctx-size" in err
    assert len(talk.said) == 1
    talk.say("/undo")
    assert talk.say("more")[0] == "You said: more\n"


def test_an_error_while_answering_keeps_what_was_said(talk: Talk) -> None:
    out, err = talk.say("fail")
    assert out.startswith("before") and "checksum differs" in err and "stopped by an error" in err
    assert talk.said[0][0] == "fail" and talk.said[0][1] and "before the failure".startswith(talk.said[0][1])
    assert talk.say("turns?")[0] == "turn 2\n"


def test_a_cancelled_prefill_leaves_the_conversation_alone(talk: Talk) -> None:
    talk.say("one")
    talk.chat.ending = lambda: (
        signal.SIGTERM
    )  # as if a signal came before the turn began: sets the cancel token
    _, err = talk.say("hang on")
    assert "before the answer began" in err and "not in the conversation" in err
    talk.chat.ending = lambda: None
    assert talk.said == [("one", "You said: one")]
    assert talk.say("turns?")[0] == "turn 2\n"


def test_an_answer_stopped_before_its_first_word_is_none(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = talk.session.decode

    def interrupted(token: int, cancel: Cancel | None = None) -> torch.Tensor:
        talk.chat.cancel.set()
        return decode(token, cancel)

    monkeypatch.setattr(talk.session, "decode", interrupted)
    _, err = talk.say("lines")  # begins with blanks
    assert "stopped by Ctrl-C before the answer began" in err and talk.said == []
    monkeypatch.undo()
    assert talk.say("turns?")[0] == "turn 1\n"


@pytest.mark.parametrize("draft", [0, 7])
def test_no_turn_computes_again_what_the_last_one_left(tmp_path: Path, draft: int) -> None:
    """Drafts or none: the same text, and of the earlier conversation nothing is computed twice."""
    talk = Talk(tmp_path, SamplingParams(max_tokens=90), draft=draft)
    said = [talk.say(line)[0] for line in ("count", "roll", "again again again", "/regen", "/undo", "turns?")]
    assert said[0].startswith("1 2 3 4 5") and said[2] == said[3] == "You said: again again again\n"
    assert said[-1] == "turn 3\n"
    count, roll, again, regen, turns = talk.session.computed
    assert count == len(["BOS", "USER", *"count", "ASSISTANT"])
    assert roll == len(["the last id", "EOS", "USER", *"roll", "ASSISTANT"])
    assert again == len(["EOS", "USER", *"again again again", "ASSISTANT"])
    assert regen == 1  # the whole prompt is there; its last id is run for the logits
    assert turns == len([*"turns?", "ASSISTANT"])  # up to USER it is the prompt that was undone
    timings = talk.chat.figures.timings if talk.chat.figures else None
    assert timings is not None and timings.cached_tokens == timings.prompt_tokens - turns


def test_exactly_means_that_every_turn_is_read_anew(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.chat.engine.exact = True
    said = [talk.say(line)[0] for line in ("roll", "turns?")]
    assert said[1] == "turn 2\n"
    timings = talk.chat.figures.timings if talk.chat.figures else None
    assert timings is not None and timings.cached_tokens == 0
    assert talk.session.computed[1] == timings.prompt_tokens


def test_drafts_are_in_the_longer_statistics(tmp_path: Path) -> None:
    _, err = Talk(tmp_path, detailed=True, draft=7).say("again again again again")
    assert re.search(r"drafts    \d+ drafted, \d+ accepted \(\d+ %\), \d+ of 33 passes saved", err)
    assert "drafted" not in Talk(tmp_path / "none", detailed=True).say("again again again again")[1]


def test_the_longer_statistics(tmp_path: Path) -> None:
    talk = Talk(tmp_path, detailed=True)
    _, err = talk.say("Hi")
    for figure in (
        "answer    13 tokens",
        "0 more were in the KV cache",
        "context   17 of 4096 tokens",
        "ram 100 %",
        "seed      100",
    ):
        assert figure in err
    assert talk.say("/stats")[1] in err


# Commands


def test_an_unknown_command_is_an_error_and_no_prompt(talk: Talk) -> None:
    for line in ("/nope", "/HELP", "/", "/usr/bin/env", "/exit!"):
        out, err = talk.say(line)
        assert out == "" and err.startswith(f"error: {line.split()[0]}: no such command\n  /help lists")
    assert talk.said == [] and not talk.chat.leaving


def test_help_names_every_command(talk: Talk) -> None:
    _, err = talk.say("/help")
    names = {line.split()[0] for line in err.splitlines()}
    assert {
        "/help",
        "/exit",
        "/clear",
        "/regen",
        "/undo",
        "/system",
        "/set",
        "/show",
        "/save",
        "/save!",
        "/load",
        "/stats",
        '"""',
        "Ctrl-C",
    } == names


@pytest.mark.parametrize(
    "line, message",
    [
        ("/undo", "nothing to undo"),
        ("/regen", "no question"),
        ("/stats", "no answer yet"),
        ("/save", "FILE is missing"),
        ("/load", "FILE is missing"),
        ("/exit now", "takes no argument, got 'now'"),
        ("/set tmp 1", "/set tmp: no such"),
        ("/set tmp", "/set tmp: no such"),
        ("/system please refuse", "refuses"),
        ("/load nowhere.json", "nowhere.json"),
        ("/save /nowhere/x.json", "/nowhere/x.json: cannot save"),
        ("/save ~nobody-here/x", "~nobody-here/x"),
    ],
)
def test_wrong_commands_say_one_error_and_change_nothing(talk: Talk, line: str, message: str) -> None:
    before = talk.chat.conversation, talk.chat.params
    out, err = talk.say(line)
    assert out == "" and err.startswith("error: ") and message in err and err.count("error:") == 1
    assert (talk.chat.conversation, talk.chat.params) == before and not talk.chat.leaving


def test_exit_leaves(talk: Talk) -> None:
    talk.say("/exit")
    assert talk.chat.leaving


def test_parse() -> None:
    assert commands.parse("  hello / there ") == (None, "hello / there")
    assert commands.parse("/set temp 0.3 ") == ("set", "temp 0.3")
    assert commands.parse("/set\ttemp") == ("set", "temp")
    assert commands.parse('"""\n/not a command\n\n  indented\n"""') == (None, "/not a command\n\n  indented")
    assert commands.parse('/system """one\ntwo"""') == ("system", "one\ntwo")
    assert commands.parse('say """hi"""') == (None, 'say """hi"""')


def test_many_lines_begin_and_end_with_quotes() -> None:
    for text in ('"""', '"""one', '  """one\n', '/system """one\ntwo', '"""a""" b', '""""'):
        assert is_open(text), text
    for text in (
        "",
        "hello",
        'what does """ mean',
        '""""""',
        '"""one"""',
        '"""one\n"""  ',
        '/system """x"""',
        '/set """',
    ):
        assert not is_open(text), text


# Parameters


@pytest.mark.parametrize(
    "typed, field, value",
    [
        ("temp 0.3", "temperature", 0.3),
        ("temp 0", "temperature", 0.0),
        ("top-p .5", "top_p", 0.5),
        ("top-k 40", "top_k", 40),
        ("min-p 0.05", "min_p", 0.05),
        ("repeat-penalty 1.1", "repeat_penalty", 1.1),
        ("seed 7", "seed", 7),
        ("max-tokens 5", "max_tokens", 5),
        (r'stop "a b" "\n\n" c', "stop", ("a b", "\n\n", "c")),
        ("stop none", "stop", ()),
    ],
)
def test_set(talk: Talk, typed: str, field: str, value: object) -> None:
    _, err = talk.say(f"/set {typed}")
    assert getattr(talk.chat.params, field) == value and err.startswith(typed.split()[0])


@pytest.mark.parametrize(
    "typed, message",
    [
        ("temp hot", "temp: got 'hot', want a number"),
        ("temp nan", "temp: got nan"),
        ("temp -1", "temp: got -1.0, want 0 to 100"),
        ("top-p 0", "top-p: got 0.0, want > 0"),
        ("top-k 1.5", "top-k: got '1.5', want an integer"),
        ("seed x", "seed: got 'x'"),
        ("max-tokens 0", "max-tokens: got 0"),
        ('stop "', "stop: got"),
        ('stop ""', "stop: got"),
        ("min-p 2", "min-p: got 2.0"),
    ],
)
def test_a_bad_value_names_key_and_value_and_the_old_one_stays(talk: Talk, typed: str, message: str) -> None:
    before = talk.chat.params
    _, err = talk.say(f"/set {typed}")
    assert err.startswith(f"error: {message}") and err.rstrip().endswith("is kept") and err.count("\n") == 1
    assert talk.chat.params == before


def test_set_alone_lists_all(talk: Talk) -> None:
    _, err = talk.say("/set")
    assert [line.split()[0] for line in err.splitlines()] == list(parameters.FIELDS)
    assert "seed random (now 100)" in err and "temp 0.7" in err and "stop none" in err
    assert talk.say("/set temp")[1] == "temp 0.7\n"


def test_show(talk: Talk) -> None:
    talk.say("Hello")
    _, err = talk.say("/show")
    used = 1 + 1 + 5 + 1 + len("You said: Hello")
    for text in (
        "fake",
        "fake format",
        "(none)",
        "temp 0.7",
        "100 (random)",
        f"{used} of 4096",
        "1 exchange",
    ):
        assert text in err


def test_the_same_seed_gives_the_same_answer_and_regen_draws_another(tmp_path: Path) -> None:
    one, two = Talk(tmp_path / "1"), Talk(tmp_path / "2", SamplingParams(seed=100))
    first = one.say("roll")[0]
    assert two.say("roll")[0] == first
    out, err = one.say("/regen")
    assert "new seed 101 (was 100)" in err and out != first and len(one.said) == 1
    out, err = two.say("/regen")
    assert "seed 100 was given" in err and out == first
    two.say("/set seed random")
    assert two.chat.seed == 100 and two.chat.params.seed is None  # the first that its own draw gives
    _, err = two.say("/regen")
    assert "new seed 101" in err
    two.say("/set temp 0")
    assert "temp 0: the answer will be the same" in two.say("/regen")[1]


def test_a_failed_regen_keeps_the_earlier_answer(talk: Talk) -> None:
    talk.say("one")
    talk.chat.ending = lambda: signal.SIGTERM
    _, err = talk.say("/regen")
    assert "the earlier answer stays" in err and talk.said == [("one", "You said: one")]


# The start, and the streams


def test_the_start_names_model_format_context_and_seed(tmp_path: Path) -> None:
    err = Talk(tmp_path, model="my\x1bmodel").err.getvalue()
    assert err.splitlines() == [
        "my␛model · context 4096 tokens · seed 100 (random)",
        "chat format: fake format",
        "/help lists the commands, Ctrl-D leaves",
    ]
    assert "seed 3\n" in Talk(tmp_path, SamplingParams(seed=3)).err.getvalue()


def test_a_system_prompt_that_the_format_refuses_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="refuses"):
        Talk(tmp_path, system="please refuse")


@pytest.mark.parametrize("which", ["stdin", "stdout"])
def test_without_a_terminal_it_points_to_generate(tmp_path: Path, which: str) -> None:
    streams = {"stdin": Terminal(), "stdout": Terminal(), "stderr": Terminal(), which: io.StringIO()}
    with pytest.raises(UsageError, match=which) as caught:
        run(FakeEngine(), model_name="m", params=SamplingParams(), state_dir=tmp_path, **streams)
    assert "qmix generate" in caught.value.cure and caught.value.exit_code == 2


def test_clean_keeps_text_and_shows_controls() -> None:
    assert clean("a\tb\n é☃ 😀") == "a\tb\n é☃ 😀"
    assert clean("\r\x00\x7f\x9b") == "␍␀␡\ufffd"
    assert all(ord(c) >= 0x20 for c in clean("".join(map(chr, range(0xA0)))) if c not in "\n\t")
    assert repaired("a\udcffb") == "a\ufffdb"


@pytest.mark.parametrize(
    "environ, color",
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
    ],
)
def test_color_is_for_terminals_that_want_it(environ: dict[str, str], color: bool) -> None:
    err = Terminal()
    screen = Screen(Terminal(), err, environ)
    screen.dim("x")
    screen.transient("wait")
    screen.say("y")
    assert ("\x1b" in err.getvalue()) == color and ("wait" in err.getvalue()) == color
    plain = io.StringIO()
    Screen(Terminal(), plain, environ).dim("x")
    assert plain.getvalue() == "x\n"


def test_a_vanished_terminal_raises_nothing() -> None:
    out = Terminal()
    out.close()
    screen = Screen(out, Terminal(), {})
    screen.show(Part("x", "answer"))
    assert screen.gone


def test_a_stream_that_cannot_encode_the_answer_shows_a_question_mark() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")
    Screen(stream, Terminal(), {}).show(Part("né☃", "answer"))
    assert raw.getvalue() == b"n\xe9?"


def test_figures() -> None:
    timings = Timings(120, 20, 312, 1.04, 42.0, 1.05)
    figures = statline.Figures(timings, 432, 4096, 1)
    assert (
        statline.line(figures, {"ram": 71.2, "disk": 28.8})
        == "312 tok · 7.4 tok/s · prefill 96 tok/s · experts ram 71 % disk 29 %"
    )
    one = replace(figures, timings=replace(timings, generated_tokens=1), ending="length: context full")
    assert statline.line(one, {}) == "length: context full · 1 tok · prefill 96 tok/s"
