"""When a multi-token-prediction head drafts: by the clock, and it is off by itself where it loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_speculation import EOS, PROMPT, VOCAB, ToySession
from tokenizer_files import demo_folder

from qmix.config import Cancel, SamplingParams
from qmix.generate import Summary, generate
from qmix.speculation import MtpPace, Pace
from qmix.speculation import passes as passes_module
from qmix.speculation.mtp import ANSWERS, OPENING, REST, SINGLES, SPACING
from qmix.tokenizer import Tokenizer, load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(demo_folder(tmp_path_factory.mktemp("demo")))


class Headed(ToySession):
    """A clock on which a pass takes 1 and `check` for each further token, and a head `cost` for each id, of which every
    `wrong`-th is wrong."""

    def __init__(self, check: float, cost: float, wrong: int = 0):
        super().__init__(context=4000)
        self.now, self.check, self.cost, self.wrong = 0.0, check, cost, wrong
        self.asked: list[int] = []
        self.unread, self.reading = 0.0, 0.0  # what the head takes to catch up, and for a prompt
        self.reads: MtpPace | None = None
        self._guessed = 0

    def _logits(self, length: int) -> torch.Tensor:
        logits = torch.zeros(VOCAB)
        logits[300 + (7 * length * length + length // 3) % 101] = 9.0
        return logits

    def _run(self, ids: Sequence[int], cancel: Cancel) -> torch.Tensor:
        self.now += 1 + self.check * (len(ids) - 1)
        return super()._run(ids, cancel)

    def catch_up(self, cancel: Cancel) -> None:
        self.now += self.unread

    def prefill(self, ids: Sequence[int], cancel: Cancel) -> torch.Tensor:
        found = super().prefill(ids, cancel)
        if self.reads is not None and self.reads.on:
            self.now += self.reading
            self.reads.spend(self.reading)
        return found

    def draft(self, token_id: int, count: int, cancel: Cancel) -> list[int]:
        self.asked.append(count)
        self.now += self.cost * count
        found = []
        for n in range(count):
            self._guessed += 1
            right = not self.wrong or self._guessed % self.wrong
            found.append(int(self._logits(self.length + 2 + n - 1).argmax()) if right else 299)
        return found


def answer(tokenizer: Tokenizer, session: Headed, pace: Pace | None, tokens: int = 300) -> Summary:
    params = SamplingParams(0.0, max_tokens=tokens)
    *_, last = generate(session, PROMPT, params, tokenizer, pace=pace, clock=lambda: session.now)
    assert last.summary is not None
    return last.summary


def paced(say: list[str]) -> Pace:
    pace = Pace(share=0.25)
    pace.mtp = MtpPace(pace, say.append)
    return pace


@pytest.fixture(autouse=True)
def no_other_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module.Lookup, "draft", lambda self, longest: None)


def test_a_head_that_is_right_and_cheap_drafts_as_far_as_it_pays(tokenizer: Tokenizer) -> None:
    said: list[str] = []
    pace, session = paced(said), Headed(0.1, 0.05)
    alone, summary = answer(tokenizer, Headed(0.1, 0.05), None), answer(tokenizer, session, pace)
    assert summary.ids == alone.ids and said == [] and max(session.asked) == 7
    assert summary.timings.decode_seconds < 0.4 * alone.timings.decode_seconds
    assert pace.mtp is not None and pace.mtp.drafted == summary.timings.drafted
    assert pace.mtp.accepted == summary.timings.accepted > 0.9 * summary.timings.drafted


@pytest.mark.parametrize(("check", "cost", "wrong"), [(0.9, 0.3, 0), (0.1, 0.1, 1), (0.6, 0.25, 2)],
                         ids=["dear", "wrong", "wrong at times"])
def test_one_that_loses_is_off_and_says_so_once(tokenizer: Tokenizer, check: float, cost: float, wrong: int) -> None:
    said: list[str] = []
    pace, session = paced(said), Headed(check, cost, wrong)
    alone, summary = answer(tokenizer, Headed(check, cost), None), answer(tokenizer, session, pace)
    assert summary.ids == alone.ids and len(session.asked) == OPENING
    assert said == [], "not while the answer is shown"
    for _ in range(2):
        pace.report()
    assert len(said) == 1 and said[0].startswith("the multi-token-prediction head does not pay here and is off: its ")
    assert summary.timings.decode_seconds < 1.1 * alone.timings.decode_seconds
    assert pace.mtp is not None and not pace.mtp.on
    answer(tokenizer, Headed(check, cost, wrong), pace)
    pace.report()
    assert len(said) == 1


def test_after_a_rest_it_is_measured_once_more(tokenizer: Tokenizer) -> None:
    said: list[str] = []
    pace = paced(said)
    answer(tokenizer, Headed(0.9, 0.3), pace)
    done = 300
    while pace.mtp is not None and not pace.mtp.on and done < 3 * REST[0]:
        session = Headed(0.1, 0.05)
        answer(tokenizer, session, pace)
        done += 300
    assert REST[0] <= done <= REST[0] + 900 and session.asked and max(session.asked) > 2


def test_at_the_end_of_a_context_nothing_is_decided(tokenizer: Tokenizer) -> None:
    pace = paced([])
    for _ in range(40):
        answer(tokenizer, Headed(0.1, 0.05), pace, tokens=4)
    assert pace.mtp is not None and pace.mtp.on


def test_the_better_of_two_kinds_of_drafts_is_tried(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that goes round in a circle: what is found in it costs nothing."""
    monkeypatch.undo()

    class Circle(Headed):
        def _logits(self, length: int) -> torch.Tensor:
            logits = torch.zeros(VOCAB)
            logits[300 + length % 11] = 9.0
            return logits

    session: Any = Circle(0.1, 0.4)
    summary = answer(tokenizer, session, paced([]), 400)
    assert summary.timings.passes_saved > 250 and EOS not in summary.ids
    assert OPENING / 2 <= len(session.asked) <= 2 * OPENING


class Clock:
    """A head of which every second id is right, and passes by a pair of functions of how many were run: of one token,
    and of more."""

    def __init__(self, single: Callable[[int], float], check: Callable[[int], float], head: float):
        self.pace = paced([])
        assert self.pace.mtp is not None
        self.mtp, self.single, self.check, self.head = self.pace.mtp, single, check, head
        self.passes = self.singles = self._ids = 0
        self.seconds, self.tokens = 0.0, 0

    def run(self, tokens: int) -> None:
        end = self.tokens + tokens
        while self.tokens < end:
            count = self.mtp.length(4)
            if count:
                self.mtp.took(count, self.head * count)
            seconds = self.check(self.passes) if count else self.single(self.passes)
            self.pace.took(1 + count, seconds)
            self.seconds += seconds + self.head * count
            self.passes, self.singles, self.tokens = self.passes + 1, self.singles + (not count), self.tokens + 1
            for ahead in range(count):
                self._ids += 1
                self.mtp.judge(ahead, bool(self._ids % 2))
                if not self._ids % 2:
                    break
                self.tokens += 1


@pytest.mark.parametrize("first", [0.3, 3.0])
def test_a_slow_first_pass_does_not_keep_a_head_that_loses(first: float) -> None:
    clock = Clock(lambda n: 0.1 if n else first, lambda n: 0.2, 0.03)
    clock.run(1000)
    assert not clock.mtp.on and clock.mtp.drafted <= 2 * OPENING
    assert clock.seconds - first < 1.03 * 0.1 * 1000  # opening included


def test_passes_that_become_fast_while_every_one_has_drafts_are_seen() -> None:
    """As when the experts come to lie in the page cache: checks stay where they were, and drafts lose."""
    clock = Clock(lambda n: 0.1 if n < 200 else 0.04, lambda n: 0.1, 0.002)
    clock.run(200)
    assert clock.mtp.on and clock.singles < 12
    clock.run(3 * SPACING * SINGLES)
    assert not clock.mtp.on


def test_a_growing_context_does_not_switch_a_head_off_that_wins() -> None:
    """Passes with drafts and without take longer and longer, by the same share."""
    clock = Clock(lambda n: 0.1 * (1 + n / 1000), lambda n: 0.11 * (1 + n / 1000), 0.002)
    clock.run(6000)
    assert clock.mtp.on and clock.singles < clock.passes / 20


@pytest.mark.parametrize(("check", "on"), [(0.9, False), (0.1, True)])
def test_drafts_of_one_id_at_most_are_switched_off_too(tokenizer: Tokenizer, check: float, on: bool) -> None:
    pace, session = Pace(1, share=0.25), Headed(check, 0.3)
    pace.mtp = MtpPace(pace)
    answer(tokenizer, session, pace)
    assert pace.mtp.on == on and max(session.asked) == 1


def test_what_is_read_late_is_no_price_of_guesses(tokenizer: Tokenizer) -> None:
    pace, session = paced([]), Headed(0.1, 0.05)
    session.unread = 0.4
    summary = answer(tokenizer, session, pace)
    assert pace.mtp is not None and pace.mtp.on and pace.mtp.cost(1) == pytest.approx(0.05)
    checked = sum(1 + 0.1 * count + 0.05 * count for count in session.asked)
    singles = summary.timings.decode_passes - len(session.asked)
    assert summary.timings.decode_seconds == pytest.approx(checked + singles + 0.4 * len(session.asked))


def test_prompts_whose_answers_have_no_drafts_switch_it_off(tokenizer: Tokenizer) -> None:
    """Answers of one token, as of a classifier: nothing is drafted, so nothing is ever saved."""
    pace = paced([])
    assert pace.mtp is not None
    for _ in range(ANSWERS + 1):
        assert pace.mtp.on
        session = Headed(0.1, 0.05)
        session.reads, session.reading = pace.mtp, 5.0
        answer(tokenizer, session, pace, tokens=1)
    assert not pace.mtp.on and pace.mtp.drafted == 0


@pytest.mark.parametrize(("reading", "on"), [(2000.0, False), (1.0, True)])
def test_prompts_that_take_more_than_drafts_save(tokenizer: Tokenizer, reading: float, on: bool) -> None:
    said: list[str] = []
    pace = paced(said)
    for _ in range(ANSWERS + 1):
        assert pace.mtp is not None and pace.mtp.on
        session = Headed(0.1, 0.05)
        session.reads, session.reading = pace.mtp, reading
        answer(tokenizer, session, pace)
    assert pace.mtp is not None
    asked = len(session.asked)
    pace.report()
    assert pace.mtp.on == on and (asked > 0) == on
    assert [line.split(": ")[1].split(" it took")[0] for line in said] == ([] if on else ["over the last answers"])
