"""In which order a decoding layer asks for records and computes them: what it lacks first, then guesses, and the next
guess as soon as one has arrived."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import write_tiny_stores

from qmix.config import Cancel, ExpertKey, QuantConfig, Step
from qmix.engine import select_kernels
from qmix.errors import Interrupted
from qmix.kernels import native
from qmix.offload.cache import Cache, make_policy
from qmix.offload.experts import PagedExperts
from qmix.offload.one_token import OneToken
from qmix.offload.pool import slot_pool
from qmix.offload.prefetch import Prefetcher
from qmix.offload.reads import DEMAND, Load
from qmix.offload.resident import ResidentExperts
from qmix.offload.router_stats import RouterStats
from qmix.offload.setup import half
from qmix.offload.tiers import Tier
from qmix.offload.watch import RoutingWatch
from qmix.store import Store

LAYERS, EXPERTS, TOP_K = 4, 8, 2
HERE, ALSO_HERE, ABSENT = 3, 5, 6  # experts of layer 0
AHEAD = [[0, 1], [2, 4]]  # guessed for the layers 1 and 2
GUESSES = ["1.0", "1.1", "2.2", "2.4"]

pytestmark = pytest.mark.skipif(not [level for level in native.levels() if level != "portable"],
                                reason="no native kernels, or torch attends: experts are not joined")


class Disk:
    """A source whose records arrive while something is computed, all that are on their way at once."""

    def __init__(self, log: list[str]):
        self._log = log
        self._loads: list[Load] = []

    def submit(self, key: ExpertKey, slot: torch.Tensor, urgency: int = DEMAND, after: Load | None = None,
               fence: object = None) -> Load:
        load = Load(key, slot, urgency, after)
        self._loads.append(load)
        self._log.append(f"{'read' if urgency == DEMAND else 'guess'} {key.layer}.{key.expert}")
        return load

    def promote(self, load: Load, urgency: int = DEMAND) -> None:
        load.urgency = urgency

    def cancel(self, load: Load) -> None:
        load.cancelled = True

    def wait(self, load: Load, nbytes: int, cancel: Cancel | None = None) -> None:
        if cancel is not None and cancel:
            raise Interrupted("cancelled")
        load.done = True

    def arrive(self) -> None:
        for load in self._loads:
            load.done = not load.cancelled


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked for and computed, in order."""
    monkeypatch.delenv("QMIX_NATIVE", raising=False)
    yield []


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_stores(tmp_path_factory.mktemp("order"), {"int4": QuantConfig()}, num_hidden_layers=LAYERS,
                             num_local_experts=EXPERTS)["int4"]


def decode(folder: Path, log: list[str], monkeypatch: pytest.MonkeyPatch, chosen: list[int], window: int,
           prefetch: str = "ahead", cancel: Cancel | None = None, slots: int = 16) -> Tier:
    """One layer of one token, two records of which are in memory."""
    disk = Disk(log)
    alone, together = OneToken.gate_up, ResidentExperts.__call__

    def gate_up(self, x, some):  # type: ignore[no-untyped-def]
        log.append(f"compute {len(some)}")
        alone(self, x, some)
        disk.arrive()

    def call(self, layer, x, ids, topk_weights):  # type: ignore[no-untyped-def]
        log.append(f"compute {ids.numel()} at once")
        assert all(tier.ready(ExpertKey(layer, expert)) for expert in ids.flatten().tolist())
        assert tier._pinned >= {ExpertKey(layer, expert) for expert in ids.flatten().tolist()}
        disk.arrive()
        return together(self, layer, x, ids, topk_weights)

    monkeypatch.setattr(OneToken, "gate_up", gate_up)
    monkeypatch.setattr(ResidentExperts, "__call__", call)
    with Store.open(folder) as opened:
        kernels = select_kernels(opened.model, opened.quant, lambda line: None)
        pool = slot_pool(slots, opened.layout.record_bytes)
        tier = Tier(pool, Cache(slots, LAYERS, make_policy("lfu", {}), probation=8), disk)
        experts = PagedExperts(opened.model, kernels, tier, [opened.expert(ExpertKey(0, 0), slot) for slot in pool],
                               [half(opened.layout.kinds[0])] * slots, Prefetcher(prefetch, LAYERS, TOP_K),
                               RoutingWatch(LAYERS, EXPERTS, RouterStats(LAYERS, EXPERTS)), depth=2, window=window)
        for expert in (HERE, ALSO_HERE):
            key = ExpertKey(0, expert)
            assert tier.want(key, "demand")
            tier.wait(key, opened.layout.record_bytes)
        del log[:]
        experts(0, torch.ones(1, opened.model.hidden), torch.tensor([chosen]), torch.ones(1, TOP_K),
                Step("decode", (0,), cancel=cancel), torch.tensor([AHEAD]) if prefetch != "off" else None)
        assert not tier._pinned
        return tier


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that take several reads."""
    monkeypatch.setattr("qmix.offload.experts.CHUNK", 1)


def guess(*which: int) -> list[str]:
    return [f"guess {GUESSES[i]}" for i in which]


@pytest.mark.usefixtures("large")
def test_between_two_large_records_the_next_guesses_begin(store: Path, log: list[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    decode(store, log, monkeypatch, [HERE, ALSO_HERE], window=2)
    assert log == [*guess(0, 1), "compute 1", *guess(2, 3), "compute 1"]


@pytest.mark.usefixtures("large")
def test_the_same_where_one_is_missing_behind_what_is_demanded(store: Path, log: list[str],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    decode(store, log, monkeypatch, [ABSENT, HERE], window=1)
    assert log == [f"read 0.{ABSENT}", *guess(0), "compute 1", *guess(1), "compute 1"]


def test_small_records_are_computed_at_once_behind_all_guesses_that_may_be_read(
        store: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decode(store, log, monkeypatch, [HERE, ALSO_HERE], window=4)
    assert log == [*guess(0, 1, 2, 3), "compute 2 at once"]


def test_small_records_of_which_one_is_missing(store: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decode(store, log, monkeypatch, [ABSENT, HERE], window=4)
    assert log == [f"read 0.{ABSENT}", *guess(0, 1, 2, 3), "compute 1", "compute 1"]


def test_what_is_missing_is_asked_for_before_anything_is_computed(store: Path, log: list[str],
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    decode(store, log, monkeypatch, [ABSENT, 7], window=2, prefetch="off")
    assert log[:3] == [f"read 0.{ABSENT}", "read 0.7", "compute 1"]


def test_a_cancelled_token_leaves_nothing_pinned(store: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = Cancel()
    cancel.set()
    with pytest.raises(Interrupted):
        decode(store, log, monkeypatch, [HERE, ALSO_HERE], window=2, cancel=cancel)
    assert not [line for line in log if line.startswith("compute")]
