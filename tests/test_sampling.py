"""Choosing a token: against naive float64 code written here, and against transformers' own processors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qmix.config import SamplingParams
from qmix.errors import QmixError, UsageError
from qmix.sampling import Sampler, candidates, draw, likeliest, logprob, penalize

PLAIN = SamplingParams(temperature=1.0, top_p=1.0)


def params(**changed) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **changed})


def naive(logits: np.ndarray, p: SamplingParams) -> dict[int, float]:
    """{id: probability} by sorting and looping; ties as the module promises."""
    scaled = logits.astype(np.float64) / p.temperature
    kept = list(range(len(scaled)))
    if 0 < p.top_k < len(scaled):
        kept = sorted(kept, key=lambda i: (-scaled[i], i))[:p.top_k]

    def probabilities(ids: list[int]) -> dict[int, float]:
        top = max(scaled[i] for i in ids)
        weights = {i: math.exp(scaled[i] - top) for i in ids}
        return {i: w / sum(weights.values()) for i, w in weights.items()}

    share = probabilities(kept)
    if p.top_p < 1:
        nucleus, mass = [], 0.0
        for i in sorted(kept, key=lambda i: (-share[i], i)):
            if mass >= p.top_p:
                break
            nucleus.append(i)
            mass += share[i]
        kept = nucleus
    share = probabilities(kept)
    if p.min_p > 0:
        kept = [i for i in kept if share[i] >= p.min_p * max(share.values())]
    return probabilities(kept)


logit_lists = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=60) | \
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 5.0]), min_size=1, max_size=60)
choices = st.builds(
    params, temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]), top_k=st.sampled_from([0, 1, 2, 5, 40]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.95, 1.0]), min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]))


def clear_cut(logits: np.ndarray, p: SamplingParams) -> bool:
    """No cumulated mass or ratio sits so close to a threshold that rounding decides."""
    share = sorted(naive(logits, params(temperature=p.temperature, top_k=p.top_k)).values(), reverse=True)
    near_p = p.top_p < 1 and any(abs(mass - p.top_p) < 1e-9 for mass in np.cumsum(share))
    return not near_p and not any(0 < abs(s / share[0] - p.min_p) < 1e-9 for s in share)


@settings(max_examples=300, deadline=None)
@given(values=logit_lists, p=choices)
def test_candidates_are_those_of_the_naive_code(values: list[float], p: SamplingParams) -> None:
    logits = np.array(values, dtype=np.float32)
    assume(clear_cut(logits, p))
    ids, probs = candidates(torch.from_numpy(logits), p)
    expected = naive(logits, p)
    assert set(ids.tolist()) == set(expected)
    for i, prob in zip(ids.tolist(), probs.tolist(), strict=True):
        assert prob == pytest.approx(expected[i], rel=1e-6)
    assert probs.sum().item() == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), p=choices)
def test_candidates_are_those_of_transformers(seed: int, p: SamplingParams) -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 4
    assume(clear_cut(logits.numpy(), p))
    scores = logits[None].double() / p.temperature
    if p.top_k:
        scores = transformers.TopKLogitsWarper(p.top_k)(None, scores)
    if p.top_p < 1:
        scores = transformers.TopPLogitsWarper(p.top_p)(None, scores)
    if p.min_p:
        scores = transformers.MinPLogitsWarper(p.min_p)(None, scores)
    ids, probs = candidates(logits, p)
    expected = torch.softmax(scores[0], 0)
    assert sorted(ids.tolist()) == torch.nonzero(expected).squeeze(1).tolist()
    torch.testing.assert_close(probs, expected[ids], rtol=1e-6, atol=0)


@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0, 12.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999999])
def test_the_coarse_sort_changes_nothing(spread: float, top_p: float) -> None:
    """Flat distributions need the full sort, peaked ones do not; equal logits abound."""
    logits = (torch.randn(32000, generator=torch.Generator().manual_seed(3)) * spread * 4).round() / 4
    ids, _ = candidates(logits, params(top_p=top_p))
    probs = torch.softmax(logits.double(), 0)
    ordered, order = probs.sort(descending=True, stable=True)
    kept = order[(ordered.cumsum(0) - ordered) < top_p]
    assert abs(len(ids) - len(kept)) <= (spread == 0)  # 32000 equal summands round differently
    assert ids.tolist()[:len(kept)] == kept.tolist()[:len(ids)]


@settings(max_examples=100, deadline=None)
@given(values=logit_lists, seen=st.sets(st.integers(0, 59)), penalty=st.sampled_from([0.5, 1.0, 1.3, 10.0]))
def test_the_penalty_is_that_of_ctrl(values: list[float], seen: set[int], penalty: float) -> None:
    logits = torch.tensor(values)
    ids = sorted(i for i in seen if i < len(values))
    got = penalize(logits, torch.tensor(ids, dtype=torch.int64), penalty)
    expected = [v if i not in ids else v / penalty if v > 0 else v * penalty
                for i, v in enumerate(logits.tolist())]
    torch.testing.assert_close(got, torch.tensor(expected))
    assert logits.tolist() == torch.tensor(values).tolist()  # the argument is left alone


@pytest.mark.parametrize("penalty", [1e-300, 1e-40])
def test_a_penalty_that_makes_a_logit_infinite_is_refused(penalty: float) -> None:
    with pytest.raises(UsageError, match="repeat_penalty"):
        Sampler(params(temperature=1.0, repeat_penalty=penalty), history=[0]).choose(torch.tensor([3.0, 2.0]))


def test_the_penalty_counts_prompt_and_answer_once_each() -> None:
    logits = torch.tensor([3.0, 2.9, 2.8, -1.0])
    sampler = Sampler(params(temperature=0, repeat_penalty=1.1), history=[0, 0, 0])
    assert [sampler.choose(logits) for _ in range(4)] == [1, 2, 0, 0]


def test_greedy_takes_the_first_maximum_and_no_random_number() -> None:
    sampler = Sampler(params(temperature=0, seed=1))
    before = sampler._generator.get_state()
    assert sampler.choose(torch.tensor([1.0, 5.0, 5.0, 0.0])) == 1
    assert torch.equal(sampler._generator.get_state(), before)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63 - 1))
def test_a_seed_gives_the_same_tokens_again(seed: int) -> None:
    logits = torch.randn(30, 200, generator=torch.Generator().manual_seed(0))
    p = params(temperature=0.9, top_k=50, top_p=0.9, repeat_penalty=1.2, seed=seed)
    first, second = (Sampler(p, history=[1, 2]) for _ in range(2))
    assert [first.choose(row) for row in logits] == [second.choose(row) for row in logits]


def test_the_chosen_seed_is_told_and_gives_the_same_answer() -> None:
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    one, other = Sampler(PLAIN), Sampler(PLAIN)
    tokens = [one.choose(row) for row in logits]
    assert tokens != [other.choose(row) for row in logits]
    again = Sampler(params(seed=one.seed))
    assert tokens == [again.choose(row) for row in logits]
    assert 0 <= one.seed < 2**32


def test_a_draw_does_not_depend_on_how_many_candidates_came_before() -> None:
    narrow, wide = torch.zeros(2), torch.zeros(5000)
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    drawn = []
    for first in (narrow, wide):
        sampler = Sampler(params(seed=5))
        sampler.choose(first)
        drawn.append(sampler.choose(logits))
    assert drawn[0] == drawn[1]


def test_the_distribution_is_the_wanted_one() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -30.0])
    p = params(temperature=0.8, top_p=0.97, seed=11)
    expected = naive(logits.numpy(), p)
    sampler, n = Sampler(p), 4000
    counts = np.bincount([sampler.choose(logits) for _ in range(n)], minlength=6)
    assert counts[[i for i in range(6) if i not in expected]].sum() == 0
    chi_square = sum((counts[i] - n * q) ** 2 / (n * q) for i, q in expected.items())
    assert chi_square < 25  # 0.9999 quantile of 4 degrees of freedom is 23.5


@pytest.mark.parametrize(("uniform", "index"), [(0.0, 1), (0.19, 1), (0.21, 3), (0.999999999, 3)])
def test_draw_skips_what_has_no_probability(uniform: float, index: int) -> None:
    assert draw(torch.tensor([0.0, 0.2, 0.0, 0.8, 0.0], dtype=torch.float64), uniform) == index


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(0, 1), min_size=1, max_size=20), uniform=st.floats(0, 1, exclude_max=True))
def test_draw_always_finds_a_possible_index(weights: list[float], uniform: float) -> None:
    assume(sum(weights) > 1e-6)
    assert weights[draw(torch.tensor(weights, dtype=torch.float64), uniform)] > 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.tensor([1e30, -1e30, 9.9e29])
    ids, probs = candidates(logits, params(temperature=temperature))
    assert torch.isfinite(probs).all() and ids[probs.argmax()] == 0
    assert Sampler(params(temperature=temperature, seed=0)).choose(logits) == 0


def test_top_k_of_one_and_tiny_top_p_are_greedy() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(2))
    for p in (params(top_k=1), params(top_p=1e-12), params(min_p=1.0)):
        assert Sampler(p).choose(logits) == int(logits.argmax())


@pytest.mark.parametrize("k", [1, 2, 3, 40])
def test_ties_at_the_end_of_top_k_go_to_the_lower_ids(k: int) -> None:
    """Logits of a 16-bit head are often equal: which of them stay must not depend on the seed."""
    logits = (torch.randn(200, generator=torch.Generator().manual_seed(5)) * 2).round().bfloat16().float()
    ids, _ = candidates(logits, params(top_k=k))
    assert ids.tolist() == sorted(logits.sort(descending=True, stable=True).indices[:k].tolist())
    if k == 1:
        chosen = {Sampler(params(top_k=1, seed=seed)).choose(logits) for seed in range(50)}
        assert chosen == {int(logits.argmax())}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = torch.zeros(8)
    logits[5] = bad
    with pytest.raises(QmixError, match="logit 5 is"):
        Sampler(params(temperature=temperature)).choose(logits)


def test_an_id_beyond_the_logits_is_an_error() -> None:
    with pytest.raises(UsageError, match="got 8, the model's vocabulary has 8"):
        Sampler(params(repeat_penalty=1.1), history=[8]).choose(torch.zeros(8))


def test_half_precision_logits_are_taken() -> None:
    assert Sampler(params(temperature=0)).choose(torch.tensor([0.0, 2.0], dtype=torch.bfloat16)) == 1


def test_logprob_is_the_models_own() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(4))
    expected = math.log(naive(logits.numpy(), PLAIN)[7])
    assert logprob(logits, 7) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.floats(-20, 20), min_size=3, max_size=12), st.floats(-2, 2), st.floats(-2, 2),
       st.dictionaries(st.integers(0, 2), st.floats(-100, 100)))
@settings(max_examples=100, deadline=None)
def test_frequency_presence_and_bias_as_openai_has_them(values: list[float], frequency: float, presence: float,
                                                        bias: dict[int, float]) -> None:
    """Greedy, so that each choice shows which of the naive logits is the highest. Only the answer's ids count."""
    logits = torch.tensor(values)
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=frequency, presence_penalty=presence,
                                     logit_bias=bias), history=[0, 1, 2])
    counts = np.zeros(len(values))
    for _ in range(6):
        naive_logits = np.array(logits.tolist()) + np.array([bias.get(i, 0) for i in range(len(values))])
        naive_logits -= counts * frequency + (counts > 0) * presence
        chosen = sampler.choose(logits)
        assert naive_logits[chosen] >= naive_logits.max() - 1e-4  # fp32 of numbers below 150
        counts[chosen] += 1


class Only:
    """A constraint: these ids, and no more than `most` of them."""

    def __init__(self, ids: list[int], size: int, most: int = 99):
        self.pushed: list[int] = []
        self._allowed = torch.zeros(size, dtype=torch.bool)
        self._allowed[ids] = True
        self._most = most

    @property
    def done(self) -> bool:
        return len(self.pushed) == self._most

    def allowed(self) -> torch.Tensor | None:
        return None if len(self.pushed) == 1 else self._allowed

    def push(self, token_id: int) -> None:
        self.pushed.append(token_id)


@pytest.mark.parametrize("temperature", [0, 2])
@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.3}])
def test_only_what_a_constraint_allows_is_chosen(temperature: float, more: dict[str, float]) -> None:
    logits = torch.arange(10.0)
    only = Only([1, 3], 8)
    sampler = Sampler(params(temperature=temperature, seed=1, **more), constraint=only)
    chosen = [sampler.choose(logits) for _ in range(20)]
    assert chosen == only.pushed and {chosen[0], *chosen[2:]} <= {1, 3} and (temperature or chosen[1] == 9)


def test_a_constraint_that_allows_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match="nothing can follow"):
        Sampler(PLAIN, constraint=Only([], 8)).choose(torch.zeros(8))


def test_the_likeliest_ids() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0, 2.0])
    found = likeliest(logits, 3)
    assert [i for i, _ in found] == [1, 2, 4]
    assert [value for _, value in found] == pytest.approx([logprob(logits, i) for i in (1, 2, 4)], rel=1e-12)
    assert len(likeliest(logits, 20)) == 5


@pytest.mark.parametrize("wrong", [{"logit_bias": {-1: 0}}, {"logit_bias": {1: 101}}, {"logit_bias": "12"},
                                   {"logit_bias": [(1, True)]}, {"frequency_penalty": 3}, {"presence_penalty": "1"}])
def test_wrong_penalties_and_biases_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        params(**wrong)
