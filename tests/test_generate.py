"""One answer, token by token, from a session that plays a script; sampling is greedy unless said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import demo_folder, spm_model, write_folder

from qmix.config import Cancel, SamplingParams
from qmix.errors import Interrupted, QmixError, StoreError, UsageError
from qmix.generate import StopFinder, Token, common_prefix, generate
from qmix.tokenizer import Message, Tokenizer, load

EOS = 2
GREEDY = SamplingParams(temperature=0.0)


class ScriptedSession:
    """Its logits want the ids of `script` in turn, and EOS after them. cancel_at, fail_at: the pass (0 is
    the prefill) in which the cancel token is set, or an error raised, with half the work done."""

    warm = True

    def __init__(self, script: Sequence[int], context: int = 1000, vocab: int = 420, cancel_at: int = -1,
                 fail_at: int = -1, error: BaseException | None = None):
        self.script, self.context, self.vocab = list(script), context, vocab
        self.cancel_at, self.fail_at = cancel_at, fail_at
        self.error = error or StoreError("record 3 is damaged")
        self.ids: list[int] = []
        self.passes: list[list[int]] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    def prefill(self, ids: Sequence[int], cancel: Cancel) -> torch.Tensor:
        return self._run(list(ids), cancel)

    def decode(self, token_id: int, cancel: Cancel) -> torch.Tensor:
        return self._run([token_id], cancel)

    def trim(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.ids[length:]

    def _run(self, ids: list[int], cancel: Cancel) -> torch.Tensor:
        assert ids and self.length + len(ids) <= self.context
        step = len(self.passes)
        self.passes.append(ids)
        self.ids += ids
        if step == self.cancel_at:
            cancel.set()
            raise Interrupted("cancelled")
        if step == self.fail_at:
            raise self.error
        logits = torch.zeros(self.vocab)
        logits[(*self.script, EOS)[min(step, len(self.script))]] = 5.0
        return logits


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(demo_folder(tmp_path_factory.mktemp("demo")))


PROMPT = [1, 4, 300, 301, EOS, 5]


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


def test_an_answer_to_its_end(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("the fox said: 🦊 is é", bos=False)
    session = ScriptedSession(script)
    tokens = list(generate(session, PROMPT, GREEDY, tokenizer))
    assert text_of(tokens) == "the fox said: 🦊 is é"
    assert [t.id for t in tokens] == [*script, EOS]
    assert [t.finish_reason for t in tokens] == [None] * len(script) + ["stop"]
    assert all("\ufffd" not in t.text for t in tokens)
    assert session.ids == PROMPT + script and session.passes[0] == PROMPT
    summary = tokens[-1].summary
    assert summary is not None and all(t.summary is None for t in tokens[:-1])
    assert summary.ids == summary.answer_ids == (*script, EOS) and summary.ended
    assert (summary.stop, summary.context_full) == (None, False)


def test_the_ids_serve_the_next_turn(tokenizer: Tokenizer) -> None:
    talk = [Message("user", "Where is the fox?")]
    prompt = tokenizer.encode_chat(talk)
    session = ScriptedSession(tokenizer.encode("home", bos=False))
    tokens = list(generate(session, prompt, GREEDY, tokenizer))
    assert tokens[-1].summary is not None
    talk += [Message("assistant", text_of(tokens), tokens[-1].summary.answer_ids), Message("user", "Why?")]
    following = tokenizer.encode_chat(talk)
    assert common_prefix(following, session.ids) == session.length
    session.passes.clear()
    session.script = []
    last = list(generate(session, following, GREEDY, tokenizer))[-1]
    assert session.passes[0] == following[len(prompt) + len(tokens) - 1:]
    assert last.summary is not None and last.summary.timings.cached_tokens == len(prompt) + len(tokens) - 1


def test_a_prompt_that_is_cached_whole_runs_its_last_id_again(tokenizer: Tokenizer) -> None:
    session = ScriptedSession([300])
    session.ids = list(PROMPT)
    tokens = list(generate(session, PROMPT, GREEDY, tokenizer))
    assert session.passes[0] == PROMPT[-1:] and tokens[0].id == 300


@pytest.mark.parametrize("n", [1, 2, 5])
def test_max_tokens(tokenizer: Tokenizer, n: int) -> None:
    session = ScriptedSession(range(300, 320))
    tokens = list(generate(session, PROMPT, SamplingParams(temperature=0.0, max_tokens=n), tokenizer))
    assert len(tokens) == n and tokens[-1].finish_reason == "length"
    summary = tokens[-1].summary
    assert summary is not None and not summary.context_full and not summary.ended
    assert session.ids == PROMPT + list(range(300, 300 + n - 1))


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_full_context_ends_the_answer_and_is_said(tokenizer: Tokenizer, room: int) -> None:
    session = ScriptedSession(range(300, 320), context=len(PROMPT) + room)
    tokens = list(generate(session, PROMPT, GREEDY, tokenizer))
    assert [t.id for t in tokens] == list(range(300, 301 + room))
    assert tokens[-1].finish_reason == "length"
    assert tokens[-1].summary is not None and tokens[-1].summary.context_full
    assert text_of(tokens) == tokenizer.decode(range(300, 301 + room))


def test_a_prompt_that_does_not_fit_is_an_error_with_the_numbers(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"prompt has 6 tokens, the context holds 5") as caught:
        next(generate(ScriptedSession([], context=5), PROMPT, GREEDY, tokenizer))
    assert "--ctx-size 7" in (caught.value.cure or "")
    with pytest.raises(UsageError, match="prompt is empty"):
        next(generate(ScriptedSession([]), [], GREEDY, tokenizer))


# ---- stop strings

def first_complete(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Character by character: what stands before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[:end - len(stop)], stop
    return text, None


few = st.text(alphabet="ab\n", min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text(alphabet="ab\n", max_size=4), max_size=8), stops=st.lists(few, max_size=3))
def test_stop_strings_are_found_wherever_the_borders_fall(pieces: list[str], stops: list[str]) -> None:
    finder, out, stop = StopFinder(stops), "", None
    for piece in pieces:
        text, stop = finder.push(piece)
        out += text
        if stop is not None:
            break
    out += finder.finish() if stop is None else ""
    assert (out, stop) == first_complete("".join(pieces), stops)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(["the", " fox", "é", "🦊", "\nUser", ":", " ", "rain", "\n", "U"]),
                      max_size=8),
       stops=st.lists(st.sampled_from(["\nUser:", "fox", "é🦊", "n\n", "🦊"]), max_size=2))
def test_answers_end_before_a_stop_string(tokenizer: Tokenizer, parts: list[str], stops: list[str]) -> None:
    script = [i for part in parts for i in tokenizer.encode(part, bos=False)]
    session = ScriptedSession(script)
    params = SamplingParams(temperature=0.0, stop=tuple(stops[:1]))
    tokens = list(generate(session, PROMPT, params, tokenizer, stops=stops[1:]))
    text, stop = first_complete(tokenizer.decode(script), stops)
    assert text_of(tokens) == text
    summary = tokens[-1].summary
    assert tokens[-1].finish_reason == "stop" and summary is not None and summary.stop == stop
    assert summary.ended == (stop is None)
    assert session.ids == PROMPT + [t.id for t in tokens][:-1]
    if summary.answer_ids is not None:
        assert tokenizer.decode(summary.answer_ids) == text
    elif stop is not None:  # the stop string begins inside a token
        decoder = tokenizer.decoder()
        assert len(text) not in accumulate(len(decoder.push(i)) for i in script)


def test_the_start_of_a_stop_string_is_held_back_until_it_is_clear(tokenizer: Tokenizer) -> None:
    letters = {tokenizer.token(i): i for i in range(tokenizer.vocab_size)}
    script = [letters[c] for c in "aosot"]
    params = SamplingParams(temperature=0.0, stop=("ost", "ott"))
    tokens = list(generate(ScriptedSession(script), PROMPT, params, tokenizer))
    assert [t.text for t in tokens] == ["a", "", "", "os", "", "ot"]


def test_the_transcript_of_a_base_model_ends_at_the_next_user(tmp_path: Path) -> None:
    base = load(write_folder(tmp_path, spm_model()))
    talk = [Message("user", "Where?")]
    script = base.encode("home\nUser: and", bos=False)
    session = ScriptedSession(script)
    tokens = list(generate(session, base.encode_chat(talk), GREEDY, base, stops=base.turn_stops))
    assert text_of(tokens) == "home" and tokens[-1].summary is not None
    assert tokens[-1].summary.answer_ids == tuple(base.encode("home", bos=False))
    again = [*talk, Message("assistant", "home", tokens[-1].summary.answer_ids), Message("user", "Why?")]
    shared = common_prefix(base.encode_chat(again), session.ids)
    assert shared >= len(base.encode_chat(talk)) + len(base.encode("home", bos=False))


# ---- cancellation and errors

def test_cancelled_before_it_began(tokenizer: Tokenizer) -> None:
    cancel, session = Cancel(), ScriptedSession([300])
    cancel.set()
    (only,) = generate(session, PROMPT, GREEDY, tokenizer, cancel)
    assert (only.id, only.text, only.finish_reason) == (None, "", "cancelled")
    assert session.ids == [] and session.passes == []
    assert only.summary is not None and only.summary.timings.first_token_seconds is None


def test_cancelled_between_records_keeps_what_was_said(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("the fox 🦊🦊 home", bos=False)
    cancel, session, seen = Cancel(), ScriptedSession(script), []
    for token in generate(session, PROMPT, GREEDY, tokenizer, cancel):
        seen.append(token)
        if len(seen) == 6:
            cancel.set()
    assert [t.id for t in seen] == [*script[:6], None] and seen[-1].finish_reason == "cancelled"
    assert text_of(seen) == tokenizer.decode(script[:6])
    assert session.ids == PROMPT + script[:5]
    assert seen[-1].summary is not None and seen[-1].summary.answer_ids == tuple(script[:6])


@pytest.mark.parametrize("at", [0, 1, 3])
def test_cancelled_inside_a_pass(tokenizer: Tokenizer, at: int) -> None:
    session = ScriptedSession(range(300, 320), cancel_at=at)
    tokens = list(generate(session, PROMPT, GREEDY, tokenizer, Cancel()))
    assert [t.id for t in tokens] == [*range(300, 300 + at), None]
    assert tokens[-1].finish_reason == "cancelled"
    assert session.ids == (PROMPT + list(range(300, 300 + at - 1)) if at else [])


@pytest.mark.parametrize("error", [StoreError("damaged"), Interrupted("by another"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 2])
def test_a_failing_pass_leaves_the_session_as_it_was(tokenizer: Tokenizer, at: int,
                                                     error: BaseException) -> None:
    session = ScriptedSession(range(300, 320), fail_at=at, error=error)
    seen = []
    with pytest.raises(type(error)):
        for token in generate(session, PROMPT, GREEDY, tokenizer):
            seen.append(token.id)
    assert seen == list(range(300, 300 + at))
    assert session.ids == (PROMPT + seen[:-1] if at else [])


def test_a_generator_closed_early_leaves_the_session_consistent(tokenizer: Tokenizer) -> None:
    session = ScriptedSession(range(300, 320))
    answer = generate(session, PROMPT, GREEDY, tokenizer)
    seen = [next(answer).id for _ in range(3)]
    answer.close()  # type: ignore[attr-defined]
    assert session.ids == PROMPT + seen[:-1]


def test_logits_that_are_no_numbers(tokenizer: Tokenizer) -> None:
    class Broken(ScriptedSession):
        def _run(self, ids: list[int], cancel: Cancel) -> torch.Tensor:
            logits = super()._run(ids, cancel)
            if len(self.passes) == 3:
                logits[7] = float("nan")
            return logits

    session = Broken(range(300, 320))
    answer = generate(session, PROMPT, GREEDY, tokenizer)
    assert [next(answer).id, next(answer).id] == [300, 301]
    with pytest.raises(QmixError, match="logit 7 is nan"):
        next(answer)
    assert session.ids == [*PROMPT, 300, 301]


# ---- sampling, log probabilities, timings

def test_the_reported_seed_gives_the_answer_again(tokenizer: Tokenizer) -> None:
    class Even(ScriptedSession):
        def _run(self, ids: list[int], cancel: Cancel) -> torch.Tensor:
            super()._run(ids, cancel)
            return torch.linspace(0, 1, self.vocab)

    def ids(seed: int | None) -> tuple[tuple[int, ...], int]:
        params = SamplingParams(seed=seed, max_tokens=12, repeat_penalty=1.1)
        summary = list(generate(Even([]), PROMPT, params, tokenizer))[-1].summary
        assert summary is not None
        return summary.ids, summary.seed

    first, seed = ids(None)
    assert ids(seed) == (first, seed)
    assert ids(seed + 1)[0] != first


def test_log_probabilities_are_given_where_asked_for(tokenizer: Tokenizer) -> None:
    plain = list(generate(ScriptedSession([300]), PROMPT, GREEDY, tokenizer))
    assert [t.logprob for t in plain] == [None, None]
    logits = torch.zeros(420)
    logits[0] = 5.0
    expected = torch.log_softmax(logits, 0)[0].item()
    for token in generate(ScriptedSession([300]), PROMPT, GREEDY, tokenizer, logprobs=True):
        assert token.logprob == pytest.approx(expected, rel=1e-6)


def test_the_clock_is_an_argument(tokenizer: Tokenizer) -> None:
    ticks: Iterator[int] = count()
    tokens = list(generate(ScriptedSession([300, 301]), PROMPT, GREEDY, tokenizer, clock=lambda: next(ticks)))
    assert tokens[-1].summary is not None
    timings = tokens[-1].summary.timings
    # Ticks: 0 start, 1-2 the prefill, 3 the first token, 4-5 and 6-7 a pass each.
    assert (timings.prefill_seconds, timings.first_token_seconds, timings.decode_seconds) == (1, 3, 2)
    assert (timings.prompt_tokens, timings.cached_tokens, timings.generated_tokens) == (6, 0, 3)
    assert timings.prefill_rate == 6 and timings.decode_rate == 1


def test_rates_of_nothing_are_none(tokenizer: Tokenizer) -> None:
    session = ScriptedSession([])
    (only,) = generate(session, PROMPT, GREEDY, tokenizer, clock=lambda: 0.0)
    assert only.summary is not None
    assert only.summary.timings.prefill_rate is None and only.summary.timings.decode_rate is None


def test_a_continuation_keeps_its_space(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("the fox", bos=False)
    for continuing, text in ((True, " the fox"), (False, "the fox")):
        tokens = list(generate(ScriptedSession(script), PROMPT, GREEDY, tokenizer, continuing=continuing))
        assert text_of(tokens) == text


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0
