"""Guesses: what they are worth, when they stop, and how they are accounted for."""

from __future__ import annotations

import random

import pytest
import torch

from qmix.config import Cancel, ExpertKey, Step
from qmix.errors import QmixError, UsageError
from qmix.offload.cache import Cache, make_policy, warm_order
from qmix.offload.lookahead import Lookahead
from qmix.offload.prefetch import Prefetcher
from qmix.offload.reads import AHEAD, DEMAND, Load
from qmix.offload.router_stats import RouterStats
from qmix.offload.setup import reach
from qmix.offload.tiers import Tier
from qmix.offload.watch import RoutingWatch
from qmix.sizes import MIB


def keys(*pairs: tuple[int, int]) -> list[ExpertKey]:
    return [ExpertKey(*pair) for pair in pairs]


def trained(right: float, tokens: int = 400) -> Prefetcher:
    """After guesses for layer 1 that were right this often."""
    dice, prefetcher = random.Random(1), Prefetcher("ahead", 3, 2)
    for _ in range(tokens):
        prefetcher.guess(0, (0, 1), [[4, 5]])
        prefetcher.score_guesses(1, [4 if dice.random() < right else 6, 5 if dice.random() < right else 7], [0.7, 0.3])
    return prefetcher


def test_guesses_that_pay_are_made_and_others_are_not() -> None:
    good, bad = trained(0.8), trained(0.3)
    assert [g.key for g in good.guess(0, (0, 1), [[4, 5]])] == [ExpertKey(1, 4), ExpertKey(1, 5)]
    assert good.guess(0, (0, 1), [[4, 5]])[0].probability == pytest.approx(0.8, abs=0.12)
    assert bad.guess(0, (0, 1), [[4, 5]]) == []
    assert good.pays(1) and bad.pays(1) is False and good.pays(2) is None
    states = [row["state"] for row in bad.report()["layers"]]
    assert states[1].startswith("off: its guesses are wrong")


def test_a_layer_comes_back_when_its_guesses_get_better() -> None:
    prefetcher = trained(0.2)
    assert not prefetcher.pays(1)
    for _ in range(300):
        prefetcher.guess(0, (0, 1), [[4, 5]])
        prefetcher.score_guesses(1, [4, 5], [0.7, 0.3])
    assert prefetcher.pays(1)


def test_recall_counts_slots_and_weight() -> None:
    prefetcher = Prefetcher("ahead", 2, 2)
    prefetcher.guess(0, (0, 1), [[4, 5]])
    prefetcher.score_guesses(1, [4, 7], [0.9, 0.1])
    report = prefetcher.report()
    assert report["recall"] == 0.5
    assert report["recall_weight"] == pytest.approx(0.9)
    assert report["layers"][0]["recall"] is None
    prefetcher.score_guesses(1, [4, 7], [0.9, 0.1])  # nothing was guessed for this one
    assert prefetcher.report()["recall"] == 0.5


def test_each_distance_has_its_own_estimate() -> None:
    prefetcher = Prefetcher("ahead", 3, 1)
    for _ in range(200):
        prefetcher.guess(0, (0,), [[1], [2]])
        prefetcher.score_guesses(1, [1], [1.0])
        prefetcher.guess(1, (1,), [[3]])
        prefetcher.score_guesses(2, [3], [1.0])
    guesses = prefetcher.guess(0, (0,), [[1], [2]])
    assert [g.key for g in guesses] == [ExpertKey(1, 1)], "the far guess is always wrong"


def test_transitions_alone_and_both() -> None:
    def after(layer: int, chosen: object) -> list[float]:
        return [0.1, 0.9, 0.2, 0.7]

    alone = Prefetcher("transitions", 2, 2, after).guess(0, (0, 1), [[0, 2]])
    assert [(g.key.expert, g.probability) for g in alone] == [(1, 0.6), (3, 0.6)], "no more than the estimate"
    both = Prefetcher("both", 2, 2, after).guess(0, (0, 1), [[3, 2]])
    assert sorted(g.key.expert for g in both) == [1, 2, 3]
    assert Prefetcher("off", 2, 2, after).guess(0, (0, 1), [[3, 2]]) == []
    with pytest.raises(UsageError, match="--prefetch magic"):
        Prefetcher("magic", 2, 2)


def test_transitions_that_do_not_hold_are_given_up() -> None:
    prefetcher = Prefetcher("transitions", 2, 1, lambda layer, chosen: [0.95, 0.05])
    for _ in range(100):
        prefetcher.guess(0, (0,), [])
        prefetcher.score_guesses(1, [1], [1.0])
    assert prefetcher.guess(0, (0,), []) == []
    assert prefetcher.report()["layers"][1]["state"].startswith("off: its guesses are wrong")


def test_guesses_beyond_the_last_layer_are_left_out() -> None:
    assert {g.key.layer for g in Prefetcher("ahead", 3, 2).guess(1, (0,), [[1], [2], [3]])} == {2}


class Frozen:
    """A source in which nothing arrives by itself."""

    def __init__(self) -> None:
        self.cancelled: list[ExpertKey] = []

    def submit(self, key: ExpertKey, slot: torch.Tensor, urgency: int = DEMAND, after: Load | None = None,
               fence: object = None) -> Load:
        return Load(key, slot, urgency, after, fence)

    def promote(self, load: Load, urgency: int = DEMAND) -> None:
        load.urgency = min(load.urgency, urgency)

    def cancel(self, load: Load) -> None:
        load.cancelled = True
        self.cancelled.append(load.key)

    def wait(self, load: Load, nbytes: int, cancel: Cancel | None = None) -> None:
        load.done = True


def ahead(slots: int = 6, window: int = 2) -> tuple[Lookahead, Tier, Prefetcher, Frozen]:
    source, prefetcher = Frozen(), Prefetcher("ahead", 4, 2)
    tier = Tier(torch.zeros(slots, 64, dtype=torch.uint8), Cache(slots, 4, make_policy("lfu", {}), probation=4),
                source)
    return Lookahead(tier, prefetcher, window), tier, prefetcher, source


def arrive(tier: Tier, key: ExpertKey) -> None:
    load = tier.load_of(key)
    assert load is not None
    load.done = True


def test_only_a_window_of_guesses_is_read_at_a_time() -> None:
    look, tier, prefetcher, _ = ahead()
    look.expect(keys((1, 0), (1, 1), (2, 0)))
    assert list(tier) == keys((1, 0), (1, 1))
    assert all(tier.load_of(k).urgency == AHEAD for k in tier)  # type: ignore[union-attr]
    look.pursue()
    assert len(list(tier)) == 2
    arrive(tier, ExpertKey(1, 0))
    look.pursue()
    assert list(tier) == keys((1, 0), (1, 1), (2, 0))
    assert [f.issued for f in prefetcher.figures] == [0, 2, 1, 0]


def test_right_late_and_wrong_guesses_are_told_apart() -> None:
    look, tier, prefetcher, source = ahead(window=4)
    look.expect(keys((1, 0), (1, 1), (1, 2), (1, 3)))
    for expert in (0, 2):
        arrive(tier, ExpertKey(1, expert))
    tier.load_of(ExpertKey(1, 3)).taken = 40  # type: ignore[union-attr]
    look.score_guesses(1, {0, 1})
    figures = prefetcher.figures[1]
    assert (figures.issued, figures.used, figures.late, figures.cancelled) == (4, 2, 1, 1)
    assert figures.wasted_bytes == 64 + 40  # one came for nothing, of one 40 bytes were asked for
    assert source.cancelled == keys((1, 3))
    assert ExpertKey(1, 2) in tier and ExpertKey(1, 3) not in tier


def test_a_nearer_look_withdraws() -> None:
    look, tier, _, source = ahead(window=3)
    look.expect(keys((1, 0), (2, 0), (2, 1)))
    look.expect(keys((2, 1), (2, 2)))
    assert source.cancelled == keys((1, 0), (2, 0))
    assert list(tier) == keys((2, 1), (2, 2))


def test_prefill_is_no_guess() -> None:
    look, _, prefetcher, _ = ahead()
    look.expect(keys((1, 0), (1, 1)), account=False)
    look.score_guesses(1, {0})
    assert all(f.issued == f.used == f.cancelled == 0 for f in prefetcher.figures)


@pytest.mark.parametrize("guess", keys((0, 0), (1, 0), (2, 0)))
def test_a_guess_leaves_last_until_its_router_has_spoken(guess: ExpertKey) -> None:
    """Whichever it is, so that it is not its score that keeps it."""
    def filled() -> Cache:
        cache = Cache(3, 4, make_policy("lfu", {}), guard=0)
        for k in keys((0, 0), (1, 0), (2, 0)):
            cache.begin_token()
            cache.admit(k, "speculative" if k == guess else "demand")
            if k != guess:
                cache.use(k)
        return cache

    cache = filled()
    assert cache.admit(ExpertKey(3, 3), "speculative", set(cache) - {guess}) is False
    gone = {cache.admit(ExpertKey(3, 0), "demand"), cache.admit(ExpertKey(3, 1), "demand", {ExpertKey(3, 0)})}
    assert gone == set(keys((0, 0), (1, 0), (2, 0))) - {guess}
    assert cache.admit(ExpertKey(3, 2), "demand", keys((3, 0), (3, 1))) == guess, "last, but not never"
    cache = filled()
    cache.end_layer(guess.layer)
    assert cache.admit(ExpertKey(3, 3), "demand") == guess, "never used, so it is the first to go now"


@pytest.mark.parametrize(("slots", "layers", "want"), [(70, 12, (3, 2)), (48, 12, (2, 2)), (27, 12, (1, 1)),
                                                       (130, 32, (2, 2)), (4, 32, (1, 1)), (10**4, 32, (3, 2))])
def test_how_far_to_look(slots: int, layers: int, want: tuple[int, int]) -> None:
    assert reach(slots, layers, 2, 99 * MIB) == want


@pytest.mark.parametrize(("record", "top_k", "want"), [(99 * MIB, 2, 2), (40 * MIB, 8, 2), (5 * MIB // 2, 8, 7),
                                                       (MIB, 8, 8), (MIB, 2, 2)])
def test_of_small_records_as_many_are_read_ahead_as_the_readers_hold(record: int, top_k: int, want: int) -> None:
    assert reach(1000, 32, top_k, record)[1] == want
    assert reach(32 * top_k, 32, top_k, record)[1] == 1  # no room


def test_warm_slots_are_shared_by_the_layers_and_take_the_frequent_first() -> None:
    prior = {ExpertKey(layer, expert): expert / 10 for layer in range(3) for expert in range(4)}
    assert warm_order(3, 4, 7, prior) == keys((0, 3), (0, 2), (0, 1), (1, 3), (1, 2), (2, 3), (2, 2))
    assert len(warm_order(3, 4, 12, {})) == 12


def test_a_trace_that_cannot_be_written_ends_and_the_run_goes_on() -> None:
    class Full:
        def drop_pass(self) -> None: ...
        def add(self, *what: object) -> None: ...

        def end_pass(self, *what: object) -> None:
            raise QmixError("trace: No space left on device")

    said: list[str] = []
    stats = RouterStats(1, 4)
    watch = RoutingWatch(1, 4, stats, Full(), said.append)  # type: ignore[arg-type]
    assert watch.traces
    for _ in range(3):
        watch.layer(0, Step("decode", (0,)), torch.tensor([[0, 1]]), torch.ones(1, 2), None)
    assert said == ["trace: No space left on device: the trace ends here"]
    assert stats.total("decode").tokens == 3


def test_the_watch_counts_what_routers_choose() -> None:
    stats = RouterStats(2, 4)
    watch = RoutingWatch(2, 4, stats)
    ids = [torch.tensor([[0, 1], [1, 2], [1, 3]]), torch.tensor([[2, 3], [2, 0], [3, 2]])]
    step = Step("prefill", (0, 0, 0))
    for layer in range(2):
        watch.layer(layer, step, ids[layer], torch.ones(3, 2) / 2, None)
    watch.layer(0, Step("decode", (0,)), ids[0][:1], torch.ones(1, 2), None)
    watch.layer(0, Step("decode", (0,)), ids[0][1:2], torch.ones(1, 2), None)  # the pass before was interrupted
    watch.layer(1, Step("decode", (0,)), ids[1][1:2], torch.ones(1, 2), None)
    prefill, decode = stats.total("prefill"), stats.total("decode")
    assert (prefill.tokens, decode.tokens) == (3, 1)
    assert prefill.counts == [[1, 3, 1, 1], [1, 0, 3, 2]]
    assert prefill.transitions[0][1] == [1, 0, 3, 2]  # expert 1 is chosen by all three tokens
    assert decode.counts == [[0, 1, 1, 0], [1, 0, 1, 0]]


