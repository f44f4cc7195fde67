"""The engine on a device, the CPU standing in for it: the same bits wherever an expert was and however late anything
comes; the numbers of the CPU's own engine; errors and interruptions that lose nothing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from fast_interpreter import HAVE_TRITON
from helpers import UNQUANTIZED, write_tiny_stores
from torch import Tensor

from qmix import hardware
from qmix.config import Cancel, ExpertKey, QuantConfig
from qmix.device import StandIn
from qmix.engine import Engine, Placement, load, placing
from qmix.errors import DoesNotFit, Interrupted, QmixError, StoreError, UsageError
from qmix.kernels.device_ops import TorchDeviceOps
from qmix.offload import device_setup
from qmix.offload.plan import RESERVE, STAGING, Needs
from qmix.offload.split import Split
from qmix.store import RecordFiles, Store

CONTEXT = 120
LAYERS, EXPERTS, TOP_K = 4, 8, 2
ALL = LAYERS * EXPERTS
IDS = [(7 * i * i + 3) % 500 + 3 for i in range(60)]
FORMATS = {"int4": QuantConfig(), "keep": UNQUANTIZED, "int8": QuantConfig(experts="int8", dense="int4"),
           "nf4": QuantConfig(experts="nf4", dense="int8", method="", group_size=0, block=0)}

pytestmark = pytest.mark.usefixtures("no_thread_stays")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tiny_stores(tmp_path_factory.mktemp("device"), FORMATS, num_hidden_layers=LAYERS,
                             num_local_experts=EXPERTS)


def delays(seed: int, share: float = 0.1, longest: float = 0.002) -> Callable[[], None]:
    """Now and then a stream is late."""
    dice = random.Random(seed)

    def delay() -> None:
        if dice.random() < share:
            time.sleep(dice.random() * longest)

    return delay


def bring_up(monkeypatch: pytest.MonkeyPatch, folder: Path, above: int, below: int, device: StandIn | None = None,
             exact: bool = True, records: int = ALL, **how: Any) -> Engine:
    """The store at `folder`, of `records`, with so many slots on the device and below, whatever this process weighs."""
    monkeypatch.setattr(hardware, "resident_bytes", lambda: 0)
    with Store.open(folder) as store:
        needs = Needs.of(store.model, store.quant, how.setdefault("context", CONTEXT), how.get("kv", "bf16"))
    there = needs.on_device
    vram = RESERVE + there.dense + there.kv + there.workspace + above * needs.record
    placement = Placement(device or StandIn(), vram, exact=exact, tuned=how.pop("tuned", None))
    engine = load(folder, threads=how.pop("threads", 1), ram=RESERVE + below * needs.record, placement=placement,
                  activations=how.pop("activations", "bf16"), **how)
    fast, slow = engine.plan.tiers
    assert fast.slots == above
    assert slow.slots == (records if above < records <= below else min(below, records - above + STAGING))
    return engine


def run(engine: Engine) -> Tensor:
    """Logits of a conversation of two turns: prompt, answer, another prompt, answer."""
    session = engine.session()
    found = [session.prefill(IDS[:40])]
    for turn in range(2):
        for token in IDS[turn * 12:turn * 12 + 12]:
            found.append(session.decode(token).clone())
        if turn == 0:
            found.append(session.prefill(IDS[40:]))
    return torch.stack(found)


@pytest.fixture(scope="module")
def resident(stores: dict[str, Path]) -> dict[str, Tensor]:
    found = {}
    for name, folder in stores.items():
        with load(folder, threads=1, context=CONTEXT, activations="bf16", placement=Placement(StandIn())) as engine:
            assert engine.plan.tiers[0].slots == ALL
            found[name] = run(engine)
            assert engine.stats()["experts"] == {"vram": 100.0}
    return found


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


@pytest.mark.parametrize("prefetch", ["off", "ahead", "both"])
@pytest.mark.parametrize(("above", "below"), [(ALL, 2), (20, 14), (20, 4), (9, 25), (4, 2), (4, 12), (9, ALL)])
@pytest.mark.parametrize("name", ["int4", "keep"])
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


def test_an_interrupted_pass_leaves_the_session_as_it_was(stores: dict[str, Path], resident: dict[str, Tensor],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    with bring_up(monkeypatch, stores["int4"], 6, 4, StandIn(delays(8))) as engine:
        session = engine.session()
        want = [session.prefill(IDS[:40])]
        for turn in range(12):
            cancel = Cancel()
            timer = threading.Timer(0.0004 * turn, cancel.set)
            timer.start()
            try:
                session.decode(IDS[turn], cancel)
                session.trim(session.length - 1)
            except Interrupted:
                pass
            timer.join()
            assert session.length == 40 + turn
            want.append(session.decode(IDS[turn]).clone())
        assert torch.equal(torch.stack(want), resident["int4"][:13])


def test_a_damaged_record_is_named_and_the_next_pass_goes_on(stores: dict[str, Path], resident: dict[str, Tensor],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    read, broken = RecordFiles.read, set[ExpertKey]()

    def failing(self: RecordFiles, key: ExpertKey, *how: Any) -> None:
        if key in broken:
            raise self.failed(key, "unlucky")
        read(self, key, *how)

    monkeypatch.setattr(RecordFiles, "read", failing)
    with bring_up(monkeypatch, stores["int4"], 4, 2) as engine:
        session = engine.session()
        session.prefill(IDS[:40])
        broken.update(ExpertKey(2, e) for e in range(EXPERTS))
        with pytest.raises(StoreError, match=r"layers\.2\.experts"):
            for _ in range(3):
                session.decode(IDS[0])
        broken.clear()
        session.trim(40)
        assert torch.equal(session.decode(IDS[0]), resident["int4"][1])


def test_a_device_that_fails_ends_the_pass_with_an_error(stores: dict[str, Path],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    with bring_up(monkeypatch, stores["int4"], ALL, 2) as engine:
        session = engine.session()
        session.prefill(IDS[:10])

        def fail(*how: object) -> None:
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(TorchDeviceOps, "route", fail)
        with pytest.raises(QmixError, match="the device failed: RuntimeError: an illegal memory access"):
            session.decode(5)
        assert session.length == 10


def test_a_device_that_fails_in_a_prompt_is_told(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with bring_up(monkeypatch, stores["int4"], ALL, 2) as engine:
        session = engine.session()

        def fail(*how: object) -> None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore lines")

        for layer in session.cache.layers:
            monkeypatch.setattr(layer, "_there", fail)
        with pytest.raises(QmixError, match="the GPU failed: CUDA error: an illegal memory access was"):
            session.prefill(IDS[:10])
        assert session.length == 0


def test_too_little_of_either_memory_is_refused_with_the_numbers(stores: dict[str, Path],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DoesNotFit, match=r"of VRAM, has .*short of .*expert slots"):
        bring_up(monkeypatch, stores["int4"], 3, 8)
    with pytest.raises(DoesNotFit, match=r"of RAM, has .*short of"):
        bring_up(monkeypatch, stores["int4"], 8, 1)
    with pytest.raises(DoesNotFit, match=r"--vram 8\.0 GiB: only 1\.0 GiB is available"):
        load(stores["int4"], placement=Placement(StandIn(nbytes=2**30), 8 * 2**30))
    with pytest.raises(UsageError, match=r"--vram 8\.0 GiB: no GPU"):
        load(stores["int4"], placement=Placement("cpu", 8 * 2**30))
    with pytest.raises(UsageError, match="want auto, cpu, cuda or cuda:NUMBER"):
        load(stores["int4"], placement=Placement("rocm"))


def test_what_is_said(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with bring_up(monkeypatch, stores["int4"], 9, 8, StandIn(half=torch.float16), exact=False, say=said.append):
        pass
    text = "\n".join(said)
    assert "VRAM" in text and "RAM" in text and "prompts compute in float16, since it has no bf16 products" in text
    assert "experts that are not on the GPU are computed by the CPU where that is faster" in text


@pytest.mark.parametrize(("asked", "exact", "count", "said"), [
    (None, False, 3, "3 compute threads, one core left for copies to the GPU"), (None, True, 4, "4 compute threads"),
    (4, False, 4, "4 compute threads, as asked: no core left for copies to the GPU"),
    (2, False, 2, "2 compute threads")])
def test_a_core_is_left_to_the_copies(stores: dict[str, Path], asked: int | None, exact: bool, count: int, said: str,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """For every placement alike: threads may decide bits, and a budget may not. Without the GPU all cores compute, also
    where it was to be used and the model does not fit there."""
    monkeypatch.setattr(hardware, "compute_cores", lambda: 4)
    monkeypatch.setattr("qmix.engine.threads.SMALL", 0)
    threads = torch.get_num_threads()
    try:
        for above, below in ((9, 8), (ALL, 2)):
            lines: list[str] = []
            with bring_up(monkeypatch, stores["int4"], above, below, exact=exact, threads=asked,
                          say=lines.append) as engine:
                assert engine.threads == count and said in lines
                native = engine._offload.experts._below.kernels.native  # type: ignore[attr-defined]
                assert native is None or native.threads == count
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("qmix.engine.machine.TINY", 0)
        monkeypatch.setattr("qmix.engine.machine.open_cuda", lambda index: StandIn(nbytes=2**20))
        for placement in (None, Placement("auto", exact=exact)):
            with load(stores["int4"], threads=asked, placement=placement) as engine:
                assert engine.device is None and engine.threads == (asked or 4)
                assert engine.native is None or engine.native.threads == (asked or 4)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
def test_measured_configurations_are_used_and_named_but_for_exact(stores: dict[str, Path], tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    from qmix.kernels.configs import INTERPRETED, Configs, Gemv
    from qmix.kernels.tuned import Card, Tuned, save

    file = tmp_path / "kernels.json"
    used: list[Configs | None] = []
    real = placing.choose_device_kernels

    def choosing(*args: Any) -> Any:
        used.append(args[6] if len(args) > 6 else None)
        if used[-1] == broken:
            raise QmixError("the GPU kernel for int4 gives wrong numbers here")
        return real(*args)

    monkeypatch.setattr(placing, "choose_device_kernels", choosing)

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


def test_auto_says_why_it_does_not_use_a_gpu(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names the GPU gets the error instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("qmix.engine.machine.TINY", 0)
    real = placing.choose_device_kernels
    for reason, wrong in (("wrong numbers here", lambda *how: broken()), ("of VRAM, has", real)):
        monkeypatch.setattr(placing, "choose_device_kernels", wrong)
        monkeypatch.setattr("qmix.engine.machine.open_cuda", lambda index: StandIn(nbytes=2**20))
        said: list[str] = []
        with load(stores["int4"], threads=1, placement=Placement("auto"), say=said.append) as engine:
            assert engine.device is None and len(engine.plan.tiers) == 1
        (line,) = [line for line in said if line.startswith("not on ")]
        assert reason in line and line.endswith("the CPU computes")
        with pytest.raises(QmixError, match=reason):
            load(stores["int4"], threads=1, placement=Placement("cuda"))


def broken() -> None:
    raise QmixError("the GPU kernel for int4 gives wrong numbers here")
