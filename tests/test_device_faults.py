"""The engine on a device, the CPU standing in for it: errors and interruptions that lose nothing, what does not fit,
and what is said."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import device_engines
import pytest
import torch
from device_engines import ALL, EXPERTS, IDS, bring_up, delays
from torch import Tensor

from qmix import hardware
from qmix.config import Cancel, ExpertKey
from qmix.device import StandIn
from qmix.engine import Placement, device_choice, load
from qmix.errors import DoesNotFit, Interrupted, QmixError, StoreError, UsageError
from qmix.kernels.device_ops import TorchDeviceOps
from qmix.store import RecordFiles

stores = pytest.fixture(scope="module")(device_engines.stores)
resident = pytest.fixture(scope="module")(device_engines.resident)
pytestmark = pytest.mark.usefixtures("no_thread_stays")


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




def test_auto_says_why_it_does_not_use_a_gpu(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names the GPU gets the error instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("qmix.engine.machine.TINY", 0)
    real = device_choice.choose_device_kernels
    for reason, wrong in (("wrong numbers here", lambda *how, **named: broken()), ("of VRAM, has", real)):
        monkeypatch.setattr(device_choice, "choose_device_kernels", wrong)
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
