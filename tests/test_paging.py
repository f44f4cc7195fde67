"""Paging changes speed and nothing else: the same bits for every budget, policy and fault, and no thread left."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import UNQUANTIZED, write_tiny_stores
from torch import Tensor

from qmix import hardware
from qmix.checkpoint import Checkpoint
from qmix.config import Cancel, ExpertKey, QuantConfig
from qmix.engine import Engine, load
from qmix.errors import DoesNotFit, Interrupted, StoreError, UsageError
from qmix.offload.needs import Needs
from qmix.offload.plan import RESERVE
from qmix.quantize import quantize_checkpoint
from qmix.store import RecordFiles, Store

CONTEXT = 120
LAYERS, EXPERTS, TOP_K = 4, 8, 2
IDS = [(7 * i * i + 3) % 500 + 3 for i in range(60)]

pytestmark = pytest.mark.usefixtures("no_thread_stays")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tiny_stores(tmp_path_factory.mktemp("paging"), {"int4": QuantConfig(), "keep": UNQUANTIZED,
                                                                "mxfp4": QuantConfig("mxfp4", "int8", "", 0, 0)},
                             num_hidden_layers=LAYERS, num_local_experts=EXPERTS)


def page(monkeypatch: pytest.MonkeyPatch, folder: Path, slots: int, **how: Any) -> Engine:
    """The store at `folder` with `slots` slots, whatever this process weighs."""
    monkeypatch.setattr(hardware, "resident_bytes", lambda: 0)
    with Store.open(folder) as store:
        needs = Needs.of(store.model, store.quant, how.setdefault("context", CONTEXT))
    ram = RESERVE + needs.dense + needs.kv + needs.workspace + slots * needs.record
    engine = load(folder, threads=1, ram=ram, **how)
    assert engine.plan.slots == slots
    return engine


def run(engine: Engine) -> Tensor:
    """Logits of a conversation of two turns: prompt, answer, another prompt, answer."""
    session = engine.session()
    found = [session.prefill(IDS[:40])]
    for turn in range(2):
        for _ in range(12):
            found.append(session.decode(int(found[-1].argmax())))
        if turn == 0:
            found.append(session.prefill(IDS[40:]))
    return torch.stack(found)


@pytest.fixture(scope="module")
def resident(stores: dict[str, Path]) -> dict[str, Tensor]:
    found = {}
    for name, folder in stores.items():
        with load(folder, threads=1, context=CONTEXT) as engine:
            assert engine.plan.resident
            found[name] = run(engine)
    return found


# Every two of the three: each number of slots with each way to prefetch, and both with each format.
@pytest.mark.parametrize(("name", "slots", "prefetch"), [
    (("int4", "keep", "mxfp4")[(i + j) % 3], slots, prefetch)
    for i, slots in enumerate([LAYERS * EXPERTS, 31, 16, 8, 2 * TOP_K])
    for j, prefetch in enumerate(["off", "ahead", "transitions", "both"])])
def test_same_bits_for_every_budget(stores: dict[str, Path], resident: dict[str, Tensor], name: str, slots: int,
                                    prefetch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with page(monkeypatch, stores[name], slots, prefetch=prefetch) as engine:
        assert torch.equal(run(engine), resident[name])
        figures = engine.stats()["offload"]["decode"]
        assert figures["chosen"] == figures["hits"] + figures["misses"] == 24 * LAYERS * TOP_K
        assert (figures["misses"] > 0) == (slots < LAYERS * EXPERTS)


@pytest.mark.parametrize("policy", ["lru", "lfu", "static"])
def test_same_bits_for_every_policy_cold_and_warm(stores: dict[str, Path], resident: dict[str, Tensor], policy: str,
                                                  tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in ("cold", "warm"):
        with page(monkeypatch, stores["int4"], 12, policy=policy, state=tmp_path) as engine:
            assert torch.equal(run(engine), resident["int4"])
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_same_bits_however_it_is_read(stores: dict[str, Path], resident: dict[str, Tensor], verify: str,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.store.records.O_DIRECT", 0)
    said: list[str] = []
    with page(monkeypatch, stores["int4"], 10, verify=verify, say=said.append) as engine:
        assert torch.equal(run(engine), resident["int4"])
    assert any("refuses O_DIRECT" in line for line in said)


def test_several_looks_ahead_change_nothing(stores: dict[str, Path], resident: dict[str, Tensor],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    for depth in (2, 3, 9):
        monkeypatch.setattr("qmix.offload.setup.reach", lambda *_, depth=depth: (depth, 2))
        with page(monkeypatch, stores["int4"], 16, prefetch="ahead") as engine:
            assert torch.equal(run(engine), resident["int4"])
            assert engine.stats()["offload"]["prefetcher"]["issued"] > 0


def test_small_records_are_not_guessed_unless_asked(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with page(monkeypatch, stores["int4"], 16, say=said.append) as engine:
        assert engine.stats()["offload"]["prefetch"] == "off"
    assert any(line.startswith("prefetch off: records of 16") for line in said)
    monkeypatch.setattr("qmix.offload.setup.SMALL", 1)
    with page(monkeypatch, stores["int4"], 16) as engine:
        assert engine.stats()["offload"]["prefetch"] == "ahead"


@pytest.mark.parametrize("prefetch", ["off", "ahead"])
def test_same_bits_of_large_records_each_computed_alone(stores: dict[str, Path], resident: dict[str, Tensor],
                                                        prefetch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.offload.experts.CHUNK", 1)
    with page(monkeypatch, stores["int4"], 16, prefetch=prefetch) as engine:
        assert torch.equal(run(engine), resident["int4"])


def test_sessions_together_as_alone(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with page(monkeypatch, stores["int4"], 12, context=30) as paged, load(stores["int4"], threads=1,
                                                                         context=30) as whole:
        paged._caches.clear()
        found = []
        for engine in (whole, paged):
            monkeypatch.setattr(engine, "plan", whole.plan)
            sessions = [engine.session() for _ in range(3)]
            for i, session in enumerate(sessions):
                session.prefill(IDS[i:i + 5])
            found.append(torch.stack([engine.step(sessions, [[t], [t + 1], [t + 2]], "decode") for t in range(9, 15)]))
        assert torch.equal(found[0], found[1])


def test_prefill_loads_each_expert_at_most_once_a_pass(stores: dict[str, Path],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[ExpertKey] = []
    real = RecordFiles.read

    def note(self: RecordFiles, key: ExpertKey, target: memoryview, start: int) -> None:
        if start == 0:
            read.append(key)
        real(self, key, target, start)

    for slots in (4, 9, 20):
        with page(monkeypatch, stores["int4"], slots) as engine:
            session = engine.session()
            session.prefill(IDS[:30])
            monkeypatch.setattr(RecordFiles, "read", note)
            read.clear()
            session.prefill(IDS[30:])
            monkeypatch.setattr(RecordFiles, "read", real)
            assert read
            assert len(read) == len(set(read)), slots


def fail_once(monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int) -> None:
    """The at-th read of the process raises."""
    counter, real = itertools.count(), RecordFiles.read

    def read(self: RecordFiles, key: ExpertKey, target: memoryview, start: int) -> None:
        if next(counter) == at:
            raise error
        real(self, key, target, start)

    monkeypatch.setattr(RecordFiles, "read", read)


@pytest.mark.parametrize("at", [0, 3, 20, 60, 100])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("none"), SystemExit(1)])
def test_an_error_while_reading_is_told_and_the_next_try_is_right(
        stores: dict[str, Path], resident: dict[str, Tensor], at: int, error: BaseException,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever read fails, wanted or guessed: either nobody noticed, or the pass fails, names the record, and
    the same session goes on to the right tokens."""
    fail_once(monkeypatch, error, at)
    with page(monkeypatch, stores["int4"], 9) as engine:
        session = engine.session()
        found: list[Tensor] = []
        steps: list[Any] = [("prefill", IDS[:40]), *[("decode", None)] * 12]
        while len(found) < len(steps):
            phase, ids = steps[len(found)]
            try:
                found.append(session.prefill(ids) if phase == "prefill" else session.decode(int(found[-1].argmax())))
            except StoreError as e:
                assert "experts-0" in str(e) and "layers." in str(e)
    assert torch.equal(torch.stack(found), resident["int4"][:13])


def test_damage_that_comes_while_running_is_never_a_wrong_token(stores: dict[str, Path], tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(stores["int4"], tmp_path / "store"))
    with page(monkeypatch, folder, 4) as engine:
        session = engine.session()
        session.prefill(IDS[:5])
        for path in folder.glob("experts-*"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2:] = bytes(len(data) - len(data) // 2)
            path.write_bytes(data)
        with pytest.raises(StoreError, match=r"its bytes are not those|short"):
            for token in IDS:
                session.decode(token)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_store_that_goes_away_serves_on(stores: dict[str, Path], resident: dict[str, Tensor], tmp_path: Path,
                                          how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(stores["int4"], tmp_path / "store"))
    with page(monkeypatch, folder, 6) as engine:
        if how == "deleted":
            shutil.rmtree(folder)
        else:
            folder.rename(tmp_path / "old")
            shutil.copytree(stores["keep"], folder)
        assert torch.equal(run(engine), resident["int4"])


def test_cancel_while_waiting_for_a_record(stores: dict[str, Path], resident: dict[str, Tensor],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), RecordFiles.read

    def held(self: RecordFiles, key: ExpertKey, target: memoryview, start: int) -> None:
        assert gate.wait(30)
        real(self, key, target, start)

    with page(monkeypatch, stores["int4"], 8) as engine:
        session, cancel = engine.session(), Cancel()
        monkeypatch.setattr(RecordFiles, "read", held)
        time.sleep(0.05)
        threading.Timer(0.05, cancel.set).start()
        with pytest.raises(Interrupted):
            session.prefill(IDS[:40], cancel)
        assert session.length == 0
        del session
        gate.set()
        assert torch.equal(run(engine), resident["int4"])


def test_close_while_reading(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = RecordFiles.read

    def slow(self: RecordFiles, key: ExpertKey, target: memoryview, start: int) -> None:
        time.sleep(0.005)
        real(self, key, target, start)

    monkeypatch.setattr(RecordFiles, "read", slow)
    engine = page(monkeypatch, stores["int4"], 16)  # warming in the background
    engine.close()


def test_random_delays_change_nothing(stores: dict[str, Path], resident: dict[str, Tensor],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    dice, real = random.Random(5), RecordFiles.read

    def slow(self: RecordFiles, key: ExpertKey, target: memoryview, start: int) -> None:
        time.sleep(dice.random() ** 3 * 0.004)
        real(self, key, target, start)

    monkeypatch.setattr(RecordFiles, "read", slow)
    for slots in (5, 11, 19):
        with page(monkeypatch, stores["int4"], slots) as engine:
            assert torch.equal(run(engine), resident["int4"])


@pytest.mark.models  # the small ones above are held to the same, by more placements
def test_the_trained_model_pages_to_the_same_bits(wiki_moe: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoint.open(wiki_moe) as checkpoint:
        quantize_checkpoint(checkpoint, tmp_path / "wiki", QuantConfig(method="rtn"), threads=1)
    found = {}
    for slots in (64, 32, 16):
        for prefetch in ("off", "both"):
            with page(monkeypatch, tmp_path / "wiki", slots, prefetch=prefetch, context=512) as engine:
                session = engine.session()
                logits = [session.prefill([(37 * i) % 4000 + 5 for i in range(150)])]
                for _ in range(40):
                    logits.append(session.decode(int(logits[-1].argmax())))
                found[slots, prefetch] = torch.stack(logits)
    assert all(torch.equal(one, found[64, "off"]) for one in found.values())


def test_too_small_a_budget_is_refused_with_the_shortfall(stores: dict[str, Path],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "resident_bytes", lambda: 0)
    with pytest.raises(DoesNotFit, match=r"short of .*\(program .*dense .*KV cache .*4 expert slots") as error:
        load(stores["int4"], threads=1, context=CONTEXT, ram=RESERVE)
    assert error.value.exit_code == 3
    with pytest.raises(DoesNotFit, match=r"only .* is available"):
        load(stores["int4"], threads=1, ram=2**50)


def test_options_that_make_no_sense_are_named(stores: dict[str, Path]) -> None:
    for how, flag in (({"policy": "fifo"}, "--cache-policy fifo"), ({"prefetch": "magic"}, "--prefetch magic"),
                      ({"verify": "maybe"}, "--verify maybe"), ({"ram": 2**30, "margin": 1}, "--margin")):
        with pytest.raises(UsageError, match=flag):
            load(stores["int4"], **how)  # type: ignore[arg-type]


def test_a_second_session_beyond_the_budget_is_refused(stores: dict[str, Path],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    with page(monkeypatch, stores["int4"], 8) as engine:
        first = engine.session()
        with pytest.raises(DoesNotFit, match="KV cache"):
            engine.session()
        del first
        engine.session()


def test_trace_file_descriptors_and_slots_are_given_back(stores: dict[str, Path],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with page(monkeypatch, stores["int4"], 8) as engine:
        run(engine)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("above", "below"), [(4, 4), (9, 6), (20, 12)])
def test_a_faster_tier_above_gives_the_same_bits(stores: dict[str, Path], above: int, below: int) -> None:
    """The CPU stands in for the device: records go disk -> below -> above, those that leave come back down."""
    from helpers import resident_experts

    from qmix.config import Step
    from qmix.device import StandIn
    from qmix.engine import select_kernels
    from qmix.offload.cache import Cache, make_policy
    from qmix.offload.copies import Copies
    from qmix.offload.experts import PagedExperts
    from qmix.offload.pool import slot_pool
    from qmix.offload.prefetch import Prefetcher
    from qmix.offload.reads import Readers
    from qmix.offload.router_stats import RouterStats
    from qmix.offload.setup import half
    from qmix.offload.tiers import Tier
    from qmix.offload.watch import RoutingWatch

    with Store.open(stores["int4"]) as store:
        config, kernels = store.model, select_kernels(store.model, store.quant, lambda line: None)
        whole = resident_experts(store, kernels)
        files = store.records()
        readers = Readers(files)
        low = Tier(slot_pool(below, store.layout.record_bytes), Cache(below, LAYERS, make_policy("lfu", {})), readers)
        device = StandIn()
        copies = Copies(low, device, chunk=4096)
        pool = slot_pool(above, store.layout.record_bytes)
        high = Tier(pool, Cache(above, LAYERS, make_policy("lfu", {})), copies, copies.take_back)
        stacked = PagedExperts(config, kernels, high, [store.expert(ExpertKey(0, 0), slot) for slot in pool],
                               [half(store.layout.kinds[0])] * above, Prefetcher("ahead", LAYERS, TOP_K),
                               RoutingWatch(LAYERS, EXPERTS, RouterStats(LAYERS, EXPERTS)))
        random = torch.Generator().manual_seed(7)
        for number in range(25):
            tokens = 30 if number % 8 == 0 else 1
            step = Step("prefill" if tokens > 1 else "decode", (0,) * tokens)
            for layer in range(LAYERS):
                x = torch.randn(tokens, config.hidden, generator=random).bfloat16()
                ids = torch.stack([torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(tokens)])
                topk_weights = torch.rand(tokens, TOP_K, generator=random)
                ahead = torch.randint(0, EXPERTS, (tokens, 1, TOP_K), generator=random)
                ahead = ahead if tokens == 1 and layer + 1 < LAYERS else None
                assert torch.equal(stacked(layer, x, ids, topk_weights, step, ahead),
                                   whole(layer, x, ids, topk_weights, step))
        copies.close()
        readers.close()
        files.close()
        device.close()
        there = {k for k in list(high) if high.ready(k)}
        assert set(low.cache.spares) == there & {k for k in list(low) if low.ready(k)}
