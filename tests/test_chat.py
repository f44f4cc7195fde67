"""The chat without a terminal: turns, commands, parameters, streams; on the fake engine."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch
from chat_fakes import ASSISTANT, BOS, USER, FakeTokenizer, Talk

from qmix.config import Cancel, SamplingParams

TOKENIZER = FakeTokenizer()


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    return Talk(tmp_path)



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
