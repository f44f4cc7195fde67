"""Decoding on a device: the next layer is given to it before the host accounts for the last one, and what is still to
be read by it stays in its slot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import device_engines
import pytest
import torch
from device_engines import ALL, IDS, bring_up, delays, run

from qmix.device import StandIn
from qmix.offload.copies import Copies
from qmix.offload.device_experts import DeviceExperts
from qmix.offload.device_setup import DeviceOptions, measured
from qmix.offload.split import UNASKED, Split
from qmix.offload.tiers import Tier

stores = pytest.fixture(scope="module")(device_engines.stores)


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Any]]:
    """What DeviceExperts is asked, in turn: (method, layer, result)."""
    seen: list[tuple[str, int, Any]] = []
    for name in ("launched", "lacking", "finish"):
        real = getattr(DeviceExperts, name)

        def call(self: DeviceExperts, layer: int, *rest: Any, name: str = name, real: Any = real) -> Any:
            result = real(self, layer, *rest)
            seen.append((name, layer, result))
            return result

        monkeypatch.setattr(DeviceExperts, name, call)
    return seen


@pytest.mark.parametrize("exact", [True, False])
def test_accounts_wait_for_the_next_layer_unless_something_is_missing(
        stores: dict[str, Path], exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = noted(monkeypatch)
    with bring_up(monkeypatch, stores["int4"], ALL - 3, ALL, exact=exact, prefetch="ahead") as engine:
        session, layers = engine.session(), engine.model.num_layers
        session.prefill(IDS[:20])
        both = set()
        for token in IDS[:16]:
            seen.clear()
            session.decode(token)
            at = {(name, layer): i for i, (name, layer, _) in enumerate(seen)}
            assert [layer for name, layer, _ in seen if name == "finish"] == list(range(layers))
            for name, layer, missing in seen:
                if name == "lacking" and layer + 1 < layers:
                    both.add(missing)
                    assert (at["finish", layer] < at["launched", layer + 1]) == missing
        assert both == {True, False}


def test_a_slot_is_filled_only_behind_the_work_that_was_given_before_its_record_left(
        stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that work's layer has not spoken yet: what the host evicts while it accounts for the layer before."""
    device, numbers, last = StandIn(delays(5)), dict[int, int](), dict[int, int]()
    record, read, submit, kept = device.compute.record, Tier.read, Copies.submit, list[object]()

    def recorded() -> Any:
        event = record()
        numbers[id(event)] = len(numbers)
        kept.append(event)  # or another one may get its address
        return event

    def reads(self: Tier, slots: Any, event: Any) -> None:
        slots = list(slots)
        read(self, slots, event)
        last.update({self.slots[slot].data_ptr(): numbers[id(event)] for slot in slots})

    fenced = 0

    def submitted(self: Copies, key: Any, slot: torch.Tensor, urgency: int = 0, after: Any = None,
                  fence: Any = None) -> Any:
        nonlocal fenced
        if slot.data_ptr() in last:
            assert fence is not None and numbers[id(fence)] >= last[slot.data_ptr()]
            fenced += 1
        return submit(self, key, slot, urgency, after, fence)

    monkeypatch.setattr(device.compute, "record", recorded)
    monkeypatch.setattr(Tier, "read", reads)
    monkeypatch.setattr(Copies, "submit", submitted)
    with bring_up(monkeypatch, stores["int4"], 10, ALL, device, prefetch="ahead") as engine:
        run(engine)
    assert fenced > 20


class TestSpeedsKnownAtTheStart:
    def machine(self, seconds: float) -> dict[str, Any]:
        """A tier below with three records of 1000 bytes; copies that moved 8000 bytes in 2 s; products that take so
        long, by a clock that they advance."""
        self.clock = 0.0

        def product(x: torch.Tensor, w13: object, w2: object) -> None:
            self.clock += seconds

        class Low(list[int]):
            def ready(self, key: int) -> bool:
                return key != 1

            def slot(self, key: int) -> int:
                return key

            def bytes_of(self, key: int) -> bytes:
                return bytes(1000)

        return {"low": Low(range(4)),
                "copies": SimpleNamespace(bytes_up=[8000, 0], busy_seconds=2.0),
                "views": [(None, None)] * 4, "host": SimpleNamespace(expert=product)}

    def test_measured_by_what_was_copied_and_by_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.machine(0.5)
        monkeypatch.setattr("qmix.offload.device_setup.time.perf_counter", lambda: self.clock)
        found = measured(DeviceOptions(0), *made.values(), 8)
        assert found.copy_gbps == pytest.approx(4000 / 1e9) and found.host_gbps == pytest.approx(2000 / 1e9)
        assert self.clock == 1.5, "the one that is not there is no measure"

    def test_what_is_known_is_not_measured(self) -> None:
        made = self.machine(0.5)
        found = measured(DeviceOptions(0, copy_gbps=7.0, host_gbps=9.0), *made.values(), 8)
        assert (found.copy_gbps, found.host_gbps) == (pytest.approx(7.0), pytest.approx(9.0)) and self.clock == 0.0

    def test_the_cpu_is_asked_again_after_a_while(self) -> None:
        """Another program slowed it down once; without this no layer would ever try it again."""
        split = Split(10.0, 12.0)
        for _ in range(60):
            split.computed(10**8, 1.0)
        two = [(10**8, 10**8), (10**8, 10**8)]
        found = [split.on_host(two) for _ in range(UNASKED + 1)]
        assert found == [0] * UNASKED + [1]
        assert [split.on_host([]) for _ in range(2 * UNASKED)][-1] == 0


@pytest.mark.parametrize(("rate", "prefetch", "guesses"), [
    (100.0, "auto", False), (1e-4, "auto", True), (100.0, "ahead", True), (None, "auto", True)])
def test_guesses_are_made_where_they_save_more_than_the_hosts_work(
        stores: dict[str, Path], rate: float | None, prefetch: str, guesses: bool,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """All records are in RAM. Where one comes up or is computed sooner than the host has begun a copy, nothing is read
    ahead, unless that is asked for by name or the CPU may compute none. rate: of bus and CPU, GB/s; None: exact."""
    monkeypatch.setattr("qmix.offload.setup.SMALL", 0)
    monkeypatch.setattr("qmix.offload.device_setup.measured", lambda *machine: Split(rate or 1, rate or 1))
    for told in ("copied", "computed"):
        monkeypatch.setattr(Split, told, lambda *how: None)
    with bring_up(monkeypatch, stores["int4"], 10, ALL, exact=rate is None, prefetch=prefetch) as engine:
        run(engine)
        figures = engine.stats()["offload"]
    assert (figures["prefetcher"]["issued"] > 0) == guesses
    assert figures["decode"]["misses"] > 0 and (figures["decode"]["computed"] > 0) == (rate is not None)
