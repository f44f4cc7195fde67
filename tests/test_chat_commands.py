"""The chat's commands and parameters, without a terminal; on the fake engine."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from chat_fakes import Talk

from qmix.chat import commands, parameters
from qmix.chat.prompt import is_open
from qmix.config import SamplingParams


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    return Talk(tmp_path)



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
