"""How a chat starts, and what its streams show."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from chat_fakes import FakeEngine, Talk, Terminal

from qmix.chat import run, statline
from qmix.chat.prompt import repaired
from qmix.chat.screen import Screen
from qmix.config import SamplingParams
from qmix.errors import UsageError
from qmix.generate import Timings
from qmix.render import clean
from qmix.tokenizer import Part


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
