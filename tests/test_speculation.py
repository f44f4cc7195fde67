"""Drafts change nothing but the number of passes: the lookup, when drafts are tried, and the same records with and
without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import demo_folder

from qmix.config import Cancel, SamplingParams
from qmix.errors import Interrupted, QmixError, StoreError
from qmix.generate import Summary, generate
from qmix.speculation import LONGEST, Draft, Lookup, Pace
from qmix.speculation.lookup import GRAMS, REACH
from qmix.tokenizer import Tokenizer, load

EOS, VOCAB = 2, 420


# --- lookup ---

def test_the_draft_is_what_followed_last_time() -> None:
    assert Lookup([5, 6, 7, 8, 9, 5, 6]).draft(3) == Draft((7, 8, 9), 2)
    assert Lookup([5, 6, 7, 1, 5, 6, 8, 2, 5, 6]).draft(2) == Draft((8, 2), 2)  # the most recent one
    assert Lookup([3, 5, 6, 7, 1, 5, 6, 8, 2, 3, 5, 6]).draft(1) == Draft((7,), 3)  # three ids go before two
    assert Lookup([5, 6, 7, 8]).draft(3) is None
    assert Lookup([5]).draft(3) is None
    assert Lookup([7, 8, 9, 8, 9]).draft(5) == Draft((8, 9, 8, 9, 8), 2)  # it repeats itself


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 3), max_size=40), longest=st.integers(1, 7))
def test_lookup_against_a_scan(ids: list[int], longest: int) -> None:
    want = None
    for n in GRAMS:
        starts = [s for s in range(n, len(ids)) if ids[s - n:s] == ids[-n:]]
        if len(ids) >= n and starts:
            start, after = starts[-1], list(ids)
            for i in range(longest):
                after.append(after[start + i])
            match = max(m for m in range(n, min(REACH, start) + 1) if ids[start - m:start] == ids[len(ids) - m:])
            want = Draft(tuple(after[len(ids):]), match)
            break
    assert Lookup(ids).draft(longest) == want


# --- pace ---

def feed(pace: Pace, cost: Sequence[float], right: Sequence[bool], match: int = 16, tokens: int = 2000) -> list[int]:
    """Tokens of a text whose every id has a draft that is right as `right` says in turn; cost[t]: seconds of a pass of
    t tokens. Returns the drafted length of each pass."""
    outcome, lengths, done = iter(right * (1 + tokens // len(right))), [], 0
    while done < tokens:
        drafts = pace.length(match, LONGEST)
        pace.took(1 + drafts, cost[1 + drafts])
        lengths.append(drafts)
        done += 1
        for _ in range(max(drafts, 1)):
            came = next(outcome, False)
            pace.judge(match, came)
            if not came:
                break
            done += bool(drafts)
    return lengths


FLAT = [0.0, *(1 + 0.05 * t for t in range(8))]
STEEP = [0.0, *(1.0 + t for t in range(8))]


def test_cheap_passes_and_right_drafts_are_long() -> None:
    lengths = feed(Pace(), FLAT, [True])
    assert lengths[0] == 0 and set(lengths[50:]) == {7}
    assert set(feed(Pace(longest=3), FLAT, [True])[50:]) == {3}


def test_wrong_drafts_end() -> None:
    assert sum(feed(Pace(), FLAT, [False])) == 0


def test_passes_that_are_as_dear_as_single_ones_end_it_at_small_cost() -> None:
    """As when every token reads other experts from the disk: with drafts that are right every second time."""
    lengths = feed(Pace(), STEEP, [True, False, True, True], tokens=4000)
    spent = sum(STEEP[1 + d] - 1 for d in lengths)
    assert 0 < spent < 0.015 * 4000
    assert sum(lengths[len(lengths) // 2:]) <= 4


def test_right_but_dear_drafts_are_given_up_after_a_few() -> None:
    dear = [0.0, *(1.0 + 1.5 * t for t in range(8))]
    lengths = feed(Pace(), dear, [True], tokens=4000)
    assert 0 < sum(d > 0 for d in lengths) <= 25
    assert sum(d > 0 for d in lengths[:200]) <= 5
    assert sum(dear[1 + d] - (1 + d) for d in lengths) < 0.02 * 4000


def test_drafts_come_back_when_they_get_cheaper() -> None:
    pace = Pace()
    assert sum(feed(pace, STEEP, [True, True, False])[-100:]) <= 2
    assert sum(feed(pace, FLAT, [True, True, False], tokens=20000)[-10:]) > 10
    pace = Pace()
    assert sum(feed(pace, [0.0, *(1.0 + 1.5 * t for t in range(8))], [True])[-60:]) <= 9
    assert set(feed(pace, FLAT, [True], tokens=20000)[-20:]) == {7}


def test_chances_are_kept_by_the_length_of_the_match() -> None:
    pace = Pace()
    feed(pace, FLAT, [True], match=16)
    for _ in range(64):
        pace.judge(2, False)
    assert pace.length(16, 7) == 7 and pace.length(2, 7) == 0


@pytest.mark.parametrize("longest", [-1, 8])
def test_the_decode_kernels_take_eight_tokens(longest: int) -> None:
    with pytest.raises(ValueError, match=f"got {longest}, want 0 to 7"):
        Pace(longest)


# --- the same records with and without ---

class Eager(Pace):
    """Tries every draft that there is, as long as `lengths` says in turn."""

    def __init__(self, lengths: Sequence[int] = (LONGEST,)):
        super().__init__()
        self._lengths, self._turn = lengths, 0

    def length(self, match: int, most: int) -> int:
        self._turn += 1
        return min(most, self._lengths[self._turn % len(self._lengths)])


class ToySession:
    """A deterministic model whose next id depends on the last two: it soon repeats itself. fail_at: the pass, prefill
    not counted, that cancels or raises with half the work done; broken: a position whose logits are NaN."""

    warm = True

    def __init__(self, context: int = 300, seed: int = 0, fail_at: int = -1, error: BaseException | None = None,
                 broken: int = -1):
        self.context, self.seed = context, seed
        self.fail_at, self.error, self.broken = fail_at, error, broken
        self.ids: list[int] = []
        self.passes: list[int] = []
        self.trims: list[int] = []
        self.longest = 0  # positions that were ever in it

    @property
    def length(self) -> int:
        return len(self.ids)

    def prefill(self, ids: Sequence[int], cancel: Cancel) -> torch.Tensor:
        self.ids += ids
        return self._logits(self.length)

    def decode(self, token_id: int, cancel: Cancel) -> torch.Tensor:
        return self._run([token_id], cancel)[0]

    def verify(self, ids: Sequence[int], cancel: Cancel) -> torch.Tensor:
        assert 2 <= len(ids) <= 8
        return self._run(ids, cancel)

    def trim(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.trims.append(length)
        del self.ids[length:]

    def _run(self, ids: Sequence[int], cancel: Cancel) -> torch.Tensor:
        assert self.length + len(ids) <= self.context
        step = len(self.passes)
        self.passes.append(len(ids))
        self.ids += ids
        self.longest = max(self.longest, self.length)
        if step == self.fail_at:
            if self.error is None:
                cancel.set()
                raise Interrupted("cancelled")
            raise self.error
        return torch.stack([self._logits(n) for n in range(self.length - len(ids) + 1, self.length + 1)])

    def _logits(self, length: int) -> torch.Tensor:
        a, b = self.ids[:length][-2:]
        random = torch.Generator().manual_seed(self.seed * 1000003 + (a % 3) * 1009 + b)
        logits = torch.randn(VOCAB, generator=random) * 2
        logits[torch.randint(300, 312, (3,), generator=random)] += 6
        logits[EOS] -= 4
        if length == self.broken:
            logits[7] = float("nan")
        return logits


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(demo_folder(tmp_path_factory.mktemp("demo")))


PROMPT = [1, 4, 300, 301, EOS, 5, 302, 303]


def records(tokenizer: Tokenizer, params: SamplingParams, pace: Pace | None, session: ToySession | None = None,
            **how: Any) -> tuple[list[tuple[Any, ...]], Summary, ToySession]:
    """All that a caller sees but for times, the summary, and the session."""
    session = session or ToySession()
    tokens, answer = [], generate(session, PROMPT, params, tokenizer, pace=pace, logprobs=True, **how)
    while not tokens or tokens[-1].finish_reason is None:  # not to its end: what follows holds from the last record on
        tokens.append(next(answer))
    assert session.longest <= len(PROMPT) + params.max_tokens - 1 or params.max_tokens < 2
    summary = tokens[-1].summary
    assert summary is not None
    seen = [(t.id, t.text, t.finish_reason, t.logprob) for t in tokens]
    said = [t.id for t in tokens if t.id is not None]
    assert session.ids == PROMPT + said[:-1]
    return seen, summary, session


sampled = st.builds(SamplingParams, temperature=st.sampled_from([0.0, 0.3, 1.0]), top_p=st.sampled_from([0.8, 1.0]),
                    repeat_penalty=st.sampled_from([1.0, 1.1, 1.6]), seed=st.integers(0, 50),
                    max_tokens=st.sampled_from([1, 2, 3, 9, 60]))


@settings(max_examples=150, deadline=None)
@given(params=sampled, lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4), seed=st.integers(0, 5),
       context=st.sampled_from([8, 9, 11, 40, 300]), stop=st.sampled_from([(), ("a",), ("th",)]))
def test_the_same_records_with_and_without_drafts(tokenizer: Tokenizer, params: SamplingParams, lengths: list[int],
                                                  seed: int, context: int, stop: tuple[str, ...]) -> None:
    want, plain, alone = records(tokenizer, params, None, ToySession(context, seed), stops=stop)
    got, summary, session = records(tokenizer, params, Eager(lengths), ToySession(context, seed), stops=stop)
    assert got == want
    assert (summary.ids, summary.answer_ids, summary.stop, summary.context_full, summary.seed) == \
        (plain.ids, plain.answer_ids, plain.stop, plain.context_full, plain.seed)
    assert session.ids == alone.ids
    timings = summary.timings
    assert timings.decode_passes == len(session.passes) and timings.drafted == sum(n - 1 for n in session.passes)
    assert timings.passes_saved == len(alone.passes) - len(session.passes) >= 0
    assert timings.passes_saved <= timings.accepted <= timings.drafted


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_repetition_saves_passes(tokenizer: Tokenizer, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=200)
    want, _, alone = records(tokenizer, params, None)
    got, summary, session = records(tokenizer, params, Eager())
    assert got == want and len(want) == 200
    assert len(session.passes) < len(alone.passes) - 20
    assert (summary.timings.acceptance or 0) > 0.2


def test_pace_learns_from_the_clock(tokenizer: Tokenizer) -> None:
    """A greedy text that repeats itself, on a clock on which a pass costs as much as its tokens, or little more
    than one."""
    def saved(per_token: float) -> int:
        now = 0.0

        class Timed(ToySession):
            def _run(self, ids: Sequence[int], cancel: Cancel) -> torch.Tensor:
                nonlocal now
                now += 1 + per_token * (len(ids) - 1)
                return super()._run(ids, cancel)

        params = SamplingParams(temperature=0.0, max_tokens=280)
        _, summary, _ = records(tokenizer, params, Pace(), Timed(), clock=lambda: now)
        return summary.timings.passes_saved

    assert saved(0.1) > 150
    assert saved(1.5) < 40


@pytest.mark.parametrize("end", range(34, 42))
def test_an_end_where_the_draft_had_none_leaves_no_draft(tokenizer: Tokenizer, end: int) -> None:
    class Ending(ToySession):
        def _logits(self, length: int) -> torch.Tensor:
            logits = torch.zeros(VOCAB)
            logits[EOS if length == end else 300 + length % 11] = 9.0
            return logits

    seen, summary, _ = records(tokenizer, SamplingParams(temperature=0.0, max_tokens=100), Eager(), Ending())
    assert summary.ended and len(seen) == end - len(PROMPT) + 1 and summary.timings.accepted > 5


def test_what_is_learnt_is_the_same_whether_drafts_are_tried(tokenizer: Tokenizer) -> None:
    """On a text that goes round in a circle, matches grow by one with each id."""
    class Circle(ToySession):
        def _logits(self, length: int) -> torch.Tensor:
            logits = torch.zeros(VOCAB)
            logits[300 + length % 11] = 9.0
            return logits

    class Noting(Eager):
        def judge(self, match: int, right: bool) -> None:
            judged.append((min(match, REACH), right))

    found = []
    for lengths in ((0,), (7,), (3, 0, 5)):
        judged: list[tuple[int, bool]] = []
        records(tokenizer, SamplingParams(temperature=0.0, max_tokens=60), Noting(lengths), Circle())
        found.append(judged)
    assert found[0] == found[1] == found[2] and (9, True) in found[0] and len(found[0]) > 40


def test_penalties_are_those_of_the_ids_that_came(tokenizer: Tokenizer) -> None:
    """With a penalty that rules out what was said, only the first of several equal drafts can come true."""
    class Same(ToySession):
        def _logits(self, length: int) -> torch.Tensor:
            logits = torch.zeros(VOCAB)
            logits[[310, 311, 312]] = torch.tensor([3.0, 2.0, 1.0])
            return logits

    params = SamplingParams(temperature=0.0, repeat_penalty=90.0, max_tokens=6)
    prompt = [1, 310, 5, 7, 9, 310, 311, 312, 6, 310, 5, 7, 9]
    answers = [[t.id for t in generate(Same(), prompt[:4], params, tokenizer, pace=pace)]
               for pace in (None, Eager())]
    assert answers[0] == answers[1] and answers[0][:2] == [311, 312]


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("error", [None, StoreError("damaged"), KeyboardInterrupt()])
def test_a_pass_that_fails_or_is_cancelled_leaves_what_was_said(tokenizer: Tokenizer, at: int,
                                                                error: BaseException | None) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=100)
    whole = [r[0] for r in records(tokenizer, params, None)[0]]
    session, seen = ToySession(fail_at=at, error=error), []
    answer = generate(session, PROMPT, params, tokenizer, pace=Eager())
    if error is None:
        seen = list(answer)
        assert seen[-1].finish_reason == "cancelled" and seen.pop().id is None
    else:
        with pytest.raises(type(error)):
            seen.extend(answer)
    said = [t.id for t in seen]
    assert said == whole[:len(said)] and session.ids == PROMPT + said[:-1]


def test_cancel_and_close_between_records_end_there(tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=100)
    ahead = 0
    for count in range(1, 60):
        session, cancel = ToySession(), Cancel()
        answer = generate(session, PROMPT, params, tokenizer, cancel, pace=Eager())
        said = [next(answer).id for _ in range(count)]
        ahead += session.ids != PROMPT + said[:-1]
        if count % 2:
            answer.close()  # type: ignore[attr-defined]
        else:
            cancel.set()
            (last,) = answer
            assert (last.id, last.finish_reason) == (None, "cancelled")
        assert session.ids == PROMPT + said[:-1]
    assert ahead > 10  # drafts were under way in some of them


def test_logits_that_are_no_numbers_in_the_middle_of_drafts(tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=100)
    whole = [r[0] for r in records(tokenizer, params, None)[0]]
    for broken in range(30, 40):
        session, said = ToySession(broken=broken), []
        with pytest.raises(QmixError, match="logit 7 is nan"):
            for token in generate(session, PROMPT, params, tokenizer, pace=Eager()):
                said.append(token.id)
        assert said == whole[:broken - len(PROMPT)] and session.ids == PROMPT + said


def test_drafts_of_every_verified_pass_are_discarded(tokenizer: Tokenizer) -> None:
    _, _, session = records(tokenizer, SamplingParams(temperature=0.7, seed=1, max_tokens=150), Eager())
    assert len(session.trims) == sum(n > 1 for n in session.passes) > 5


def test_no_draft_goes_on_after_an_end(tokenizer: Tokenizer) -> None:
    class Drafted(ToySession):
        def verify(self, ids: Sequence[int], cancel: Cancel) -> torch.Tensor:
            assert EOS not in ids[:-1]
            return super().verify(ids, cancel)

        def _logits(self, length: int) -> torch.Tensor:
            logits = torch.zeros(VOCAB)
            logits[{6: 301, 7: 302}.get(length, EOS)] = 9.0
            return logits

    session = Drafted()
    said = [t.id for t in generate(session, [1, 300, 301, EOS, 303, 300], SamplingParams(temperature=0.0), tokenizer,
                                   pace=Eager())]
    assert said == [301, 302, EOS]
    assert session.passes == [2, 1]  # after 300 301 came EOS, the 303 that followed it is not drafted
