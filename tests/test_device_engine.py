"""The engine on a device, the CPU standing in for it: the same bits wherever an expert was and however late anything
comes, and the numbers of the CPU's own engine; test_device_faults.py has errors and interruptions."""

from __future__ import annotations

import random
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import bounds
import device_engines
import pytest
import torch
from device_engines import ALL, CONTEXT, EXPERTS, FORMATS, IDS, LAYERS, TOP_K, bring_up, delays, run
from fast_interpreter import HAVE_TRITON
from helpers import write_tiny_stores
from torch import Tensor

from qmix.device import StandIn
from qmix.engine import Engine, Placement, device_choice, load
from qmix.errors import QmixError
from qmix.kernels.device_ops import TorchDeviceOps
from qmix.offload import device_setup
from qmix.offload.needs import Needs
from qmix.offload.split import Split
from qmix.store import RecordFiles, Store

stores = pytest.fixture(scope="module")(device_engines.stores)
resident = pytest.fixture(scope="module")(device_engines.resident)
pytestmark = pytest.mark.usefixtures("no_thread_stays")


def assert_near(errors: Tensor, engine: Engine, name: str) -> None:
    """errors: relative, of each token's logits."""
    apart = bounds.model_apart(engine.model.num_layers)
    assert errors.max() < bounds.fp32_model(engine.model) if name == "keep" else errors.median() < apart


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_numbers_of_the_cpus_engine(stores: dict[str, Path], resident: dict[str, Tensor], name: str) -> None:
    """A store that is not quantized computes in fp32 on both sides; in the others activations are rounded elsewhere,
    and of a random model now and then a choice falls differently."""
    with load(stores[name], threads=1, context=CONTEXT, activations="bf16") as engine:
        want = run(engine)
    errors = (resident[name] - want).norm(dim=1) / want.norm(dim=1)
    assert_near(errors, engine, name)


SLOTS = [(ALL, 2), (20, 14), (20, 4), (9, 25), (4, 2), (4, 12), (9, ALL)]
# Tiers move records as bytes, whatever their format: of each number of slots with each prefetch one format, in turn, so
# that each meets each of both. `make test-models` has the product.
PLACEMENTS = [pytest.param(name, *slots, prefetch, marks=() if (i + j + k) % 2 == 0 else pytest.mark.models)
              for i, slots in enumerate(SLOTS) for j, prefetch in enumerate(("off", "ahead", "both"))
              for k, name in enumerate(("int4", "keep"))]


@pytest.mark.parametrize(("name", "above", "below", "prefetch"), PLACEMENTS)
def test_same_bits_for_every_placement(stores: dict[str, Path], resident: dict[str, Tensor], name: str, above: int,
                                       below: int, prefetch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = StandIn(delays(above * 100 + below))
    with bring_up(monkeypatch, stores[name], above, below, device, prefetch=prefetch) as engine:
        assert torch.equal(run(engine), resident[name])
        figures = engine.stats()["offload"]["decode"]
        assert figures["chosen"] == figures["hits"] + figures["misses"] == 24 * LAYERS * TOP_K
        assert (figures["misses"] > 0) == (above < ALL) and not figures["computed"]


@pytest.mark.parametrize("seed", range(6))
def test_same_bits_however_late_anything_comes(stores: dict[str, Path], resident: dict[str, Tensor], seed: int,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stream and every read late by its own dice."""
    dice, read = random.Random(seed), RecordFiles.read

    def late(self: RecordFiles, *how: Any) -> None:
        time.sleep(dice.random() * 0.001)
        read(self, *how)

    monkeypatch.setattr(RecordFiles, "read", late)
    above, below = dice.choice([(6, 3), (12, 6), (16, 18)])
    device = StandIn(delays(seed, 0.3, 0.003))
    with bring_up(monkeypatch, stores["int4"], above, below, device, prefetch="ahead") as engine:
        assert torch.equal(run(engine), resident["int4"])


def test_once_all_is_in_memory_nothing_is_read(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with bring_up(monkeypatch, stores["int4"], 12, ALL) as engine:
        assert engine.plan.resident
        run(engine)
        engine.reset_stats()
        run(engine)
        stats = engine.stats()
        assert not stats["offload"]["decode"]["bytes_read"] and not stats["offload"]["prefill"]["bytes_read"]
        assert set(stats["experts"]) == {"vram", "ram"} and stats["offload"]["decode"]["bytes_up"] > 0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("below", [ALL - 1, ALL])
def test_where_ram_holds_all_nothing_is_copied_down(stores: dict[str, Path], resident: dict[str, Tensor], below: int,
                                                    exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is in RAM stays there; with a slot less both tiers hold different records, and some come down."""
    device = StandIn(delays(9))
    with bring_up(monkeypatch, stores["keep"], 6, below, device, exact=exact, prefetch="ahead") as engine:
        assert engine.plan.inclusive == (below == ALL) and engine.plan.resident
        found = run(engine)
        report = engine.stats()["offload"]
        down = sum(report[phase]["bytes_down"] for phase in ("prefill", "decode"))
        low = engine._offload.experts._below.tier  # type: ignore[attr-defined]
        assert (down == 0) == (below == ALL) and report["decode"]["bytes_up"] > 0
        assert (len(set(low)) == ALL) == (below == ALL), "RAM has let go of a record"
    if exact:
        assert torch.equal(found, resident["keep"])
    torch.testing.assert_close(found, resident["keep"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(FORMATS))
def test_other_formats_page_too(stores: dict[str, Path], resident: dict[str, Tensor], name: str,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    with bring_up(monkeypatch, stores[name], 10, 8, StandIn(delays(3))) as engine:
        assert torch.equal(run(engine), resident[name])


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats_that_the_device_cannot_pick_by_slot(stores: dict[str, Path], resident: dict[str, Tensor], name: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the host names each expert, also where all are there."""
    monkeypatch.setattr(TorchDeviceOps, "handles", lambda self, slots: False)
    for above in (10, ALL):
        with bring_up(monkeypatch, stores[name], above, 8, StandIn(delays(4))) as engine:
            assert torch.equal(run(engine), resident[name])


@pytest.mark.parametrize(("copy", "host"), [(1e-3, 10.0), (1.0, 1.0)], ids=["all by the CPU", "some"])
@pytest.mark.parametrize("name", ["keep", "int4"], ids=["one by one", "together"])
def test_experts_that_the_cpu_computes(stores: dict[str, Path], resident: dict[str, Tensor], name: str, copy: float,
                                       host: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_setup, "measured", lambda *machine: Split(copy, host))
    with bring_up(monkeypatch, stores[name], 9, 12, StandIn(delays(5)), exact=False) as engine:
        got = run(engine)
        figures = engine.stats()["offload"]["decode"]
        assert 0 < figures["computed"] <= figures["misses"]
    want = resident[name]
    assert_near((got - want).norm(dim=1) / want.norm(dim=1), engine, name)


def test_the_cpu_computes_what_is_on_its_way_up_but_would_come_too_late(
        stores: dict[str, Path], resident: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bus stands still, and the split knows it for slow: guesses that come true are not waited for, and can be
    used when it goes on. Their records below stay while they are going up."""
    monkeypatch.setattr(device_setup, "measured", lambda *machine: Split(1e-6, 1e6))
    monkeypatch.setattr(Split, "copied", lambda *how: None)
    bus, stuck = threading.Event(), list[str]()
    bus.set()

    def delay() -> None:
        if threading.current_thread().name == "qmix-stream-1" and not bus.wait(3):
            stuck.append("a copy was waited for")

    with bring_up(monkeypatch, stores["keep"], 12, ALL, StandIn(delay), exact=False, prefetch="ahead") as engine:
        below, above = engine._offload.experts._below.tier, engine._offload.tier  # type: ignore[attr-defined]
        session = engine.session()
        found = [session.prefill(IDS[:40])]
        bus.clear()
        engine.reset_stats()
        for token in IDS[:12]:
            found.append(session.decode(token).clone())
            going = [key for key in above if not above.ready(key)]
            assert all(key in below._pinned and below.ready(key) for key in going)
        stats = engine.stats()["offload"]
        assert not stuck and going and stats["prefetcher"]["late"] > 0, "no guess on its way came true"
        assert stats["decode"]["computed"] == stats["decode"]["misses"] > 0 == stats["decode"]["bytes_up"]
        bus.set()
        for key in going:
            above.wait(key, len(above.bytes_of(key)))
        assert all(map(above.ready, going)) and not below._pinned
        found += [session.prefill(IDS[40:]), *(session.decode(token).clone() for token in IDS[12:24])]
    torch.testing.assert_close(torch.stack(found), resident["keep"], rtol=1e-5, atol=1e-5)


def test_drafts_have_the_bits_of_single_tokens(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with bring_up(monkeypatch, stores["int4"], 9, 8, StandIn(delays(6))) as engine:
        one, other = engine.session(), None
        one.prefill(IDS[:20])
        alone = torch.stack([one.decode(token).clone() for token in IDS[20:28]])
        one.trim(20)
        for count in (2, 8, 3, 8):
            together = one.verify(IDS[20:20 + count])
            assert torch.equal(together, alone[:count])
            one.trim(20)
        assert other is None and engine.pace(4) is not None


def test_sessions_that_decode_together(stores: dict[str, Path]) -> None:
    with Store.open(stores["int4"]) as store:
        kv = Needs.of(store.model, store.quant, CONTEXT).kv
    with load(stores["int4"], threads=1, context=CONTEXT, activations="bf16",
              placement=Placement(StandIn(delays(7)))) as engine:
        assert kv * 2 < engine.plan.tiers[0].budget - engine.plan.tiers[0].total
        a, b = engine.session(), engine.session()
        a.prefill(IDS[:20])
        b.prefill(IDS[5:33])
        alone = [a.decode(7).clone(), b.decode(9).clone()]
        a.trim(20)
        b.trim(28)
        together = engine.step([a, b], [[7], [9]], "decode")
        assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])


def test_a_new_session_in_an_old_ones_place(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with bring_up(monkeypatch, stores["int4"], 12, 8) as engine:
        first = run(engine)
        for _ in range(3):
            assert torch.equal(run(engine), first)


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
def test_measured_configurations_are_used_and_named_but_for_exact(stores: dict[str, Path], tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    from qmix.kernels.configs import INTERPRETED, Configs, Gemv
    from qmix.kernels.tuned import Card, Tuned, save

    file = tmp_path / "kernels.json"
    used: list[Configs | None] = []
    real = device_choice.choose_device_kernels

    def choosing(*args: Any, **named: Any) -> Any:
        used.append(named.get("configs"))
        if used[-1] == broken:
            raise QmixError("the GPU kernel for int4 gives wrong numbers here")
        return real(*args, **named)

    monkeypatch.setattr(device_choice, "choose_device_kernels", choosing)

    def loaded(exact: bool) -> list[str]:
        said: list[str] = []
        with bring_up(monkeypatch, stores["int4"], 9, 8, StandIn(half=torch.float16, triton=True), exact=exact,
                      tuned=file, say=said.append):
            pass
        return [line for line in said if str(file) in line or "built-in" in line]

    mine, broken = replace(INTERPRETED, gemv=Gemv(32, 2)), replace(INTERPRETED, gemv=Gemv(64, 2))
    card = Card.of(StandIn.__name__, torch.device("cpu"))
    assert loaded(False) == [] and used == [None], "no file"
    save(Tuned(card, "x", "2026-01-31", mine), file)
    (line,) = loaded(False)
    assert "ignored (it was measured with StandIn" in line and used[1:] == [None], "another card's"
    with closing(StandIn()) as device:
        card = Card.of(device.name, device.torch_device)
    save(Tuned(card, "x", "2026-01-31", mine), file)
    assert loaded(False) == [f"the GPU's kernels use the configurations measured on 2026-01-31 for x: {file}"]
    assert loaded(True) == [] and used[2:] == [mine, None], "--exact takes the built-in ones"
    save(Tuned(card, "x", "2026-01-31", broken), file)
    assert "wrong numbers here): the built-in ones are used" in loaded(False)[1]
    assert used[4:] == [broken, None]


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("name", ["keep", "int4"])
def test_tritons_kernels_in_the_engine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, or on a GPU: the numbers of the CPU's kernels, for a prompt, tokens and drafts, with
    experts coming and going; and the same bits with drafts as without. Two layers, so that one is guessed for: the
    interpreter takes seconds for each."""
    folder = write_tiny_stores(tmp_path, {name: FORMATS[name]}, num_hidden_layers=2, num_local_experts=EXPERTS)[name]
    records = 2 * EXPERTS
    half = torch.float16 if name == "int4" else torch.bfloat16  # the interpreter gets bf16 products wrong
    found = []
    for triton, above in ((False, records), (True, 6)):
        device = StandIn(half=half if triton else torch.bfloat16, triton=triton)
        with bring_up(monkeypatch, folder, above, 6, device, records=records, context=32) as engine:
            session = engine.session()
            logits = [session.prefill(IDS[:3]), session.decode(IDS[3]).clone()]
            session.trim(3)
            logits += list(session.verify(IDS[3:5]).clone())
            found.append(torch.stack(logits))
            figures = engine.stats()["offload"]["decode"]
            assert (figures["misses"] > 0) == triton
    errors = (found[1] - found[0]).norm(dim=1) / found[0].norm(dim=1)
    assert_near(errors, engine, name)
    assert torch.equal(found[1][1], found[1][2])
