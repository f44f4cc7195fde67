"""Memory of a GPU that torch does not count: compared with the plan once the engine is warm, kept, and planned for."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from helpers import write_tiny_stores

from qmix.commands.plan.report import Machine, describe, find_model, known_gpu
from qmix.config import QuantConfig
from qmix.device import StandIn
from qmix.engine import Placement, load, vram
from qmix.engine.budgets import needs_of
from qmix.errors import ConfigError
from qmix.hardware import gpu_memory
from qmix.hardware.gpu_memory import GpuMemory
from qmix.offload.plan import RESERVE, UNMEASURED, plan
from qmix.sizes import GIB, MIB
from qmix.store import Store

TODAY = date(2026, 11, 27)
CARD = StandIn().name


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_stores(tmp_path_factory.mktemp("vram"), {"int4": QuantConfig()})["int4"]


def start(store: Path, beside: int, file: Path | None, budget: int = 2 * GIB) -> list[str]:
    """Lines of a start on a device of which `beside` bytes go elsewhere."""
    lines: list[str] = []
    placement = Placement(StandIn(nbytes=4 * GIB, beside=beside), budget, memory=file)
    with load(store, threads=1, context=32, placement=placement, say=lines.append) as engine:
        assert engine.stats()["memory"]["vram_beside"] == beside
    return [line for line in lines if "beside tensors" in line]


def test_what_the_plan_left_is_enough_and_nothing_is_said(store: Path, tmp_path: Path) -> None:
    assert start(store, RESERVE // 2, tmp_path / "gpu.json") == []
    assert json.loads((tmp_path / "gpu.json").read_text())["beside"] == RESERVE // 2


def test_more_is_said_once_and_planned_for_at_the_next_start(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    (line,) = start(store, 400 * MIB, file)
    assert "400 MiB" in line and "the plan left 128 MiB" in line and "exceeded by 272 MiB" in line
    assert line.endswith("(the next start plans for it)")
    assert start(store, 400 * MIB, file) == []
    (line,) = start(store, 400 * MIB, None)
    assert line.endswith("(choose a smaller --vram)")


def test_what_was_measured_with_another_card_or_torch_does_not_count(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    found = GpuMemory(CARD, torch.__version__, 0, 400 * MIB, "2026-11-27")
    for other in (replace(found, card="another"), replace(found, torch="2.0.0")):
        gpu_memory.save(other, file)
        assert len(start(store, 400 * MIB, file)) == 1
        known = gpu_memory.load(file, print)
        assert known is not None and known.card == CARD and known.torch == torch.__version__


def test_a_file_is_written_where_it_tells_something_new(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    fast = plan(needs_of(Store.open(store), 32), GIB, 0, 2 * GIB, 300 * MIB).tiers[0]
    device = StandIn(beside=100 * MIB)
    placement = Placement(device, memory=file)
    vram.check(placement, device, fast, print, TODAY)
    first = file.read_text()
    assert gpu_memory.load(file, print) == GpuMemory(CARD, torch.__version__, 300 * MIB, 100 * MIB, "2026-11-27")
    near = StandIn(beside=101 * MIB)
    vram.check(placement, near, fast, print, TODAY)
    assert file.read_text() == first
    vram.check(replace(placement, base=5), device, fast, print, TODAY)
    assert file.read_text() == first, "a base that the caller names is not what the context takes"
    lines: list[str] = []
    blocked = tmp_path / "file"
    blocked.write_text("")
    vram.check(replace(placement, memory=blocked / "gpu.json"), device, fast, lines.append, TODAY)
    assert len(lines) == 1 and "not saved" in lines[0]
    for one in (device, near):
        one.close()


def test_the_reserve_grows_by_what_was_measured_and_never_shrinks(store: Path) -> None:
    needs = needs_of(Store.open(store), 32)
    for budget in (2 * GIB, 24 * GIB):
        plain = plan(needs, GIB, 0, budget).tiers[0]
        half = max(RESERVE, budget // 50) // 2
        assert plain.beside == half and plain.reserve == max(RESERVE, budget // 50)
        for measured in (0, half - 1, half, half + MIB, 500 * MIB):
            found, ram = plan(needs, GIB, 0, budget, vram_beside=measured).tiers
            assert found.beside == max(half, measured)
            assert found.reserve - found.beside == plain.reserve - half and found.total <= budget
            assert ram.beside == 0 and ram.reserve == RESERVE


def test_plan_says_what_is_measured_and_what_assumed(store: Path, tmp_path: Path) -> None:
    model, file = find_model(store, None, None, print), tmp_path / "gpu.json"

    def vram_rows(machine: Machine) -> tuple[dict[str, int], str]:
        lines: list[str] = []
        rows = describe(model, 32, machine, None, lines.append)["memory"]
        (line,) = [line for line in lines if "of VRAM" in line]
        return {row["holds"]: row["bytes"] for row in rows if row["memory"] == "VRAM"}, line

    machine = Machine(ram=GIB, vram=4 * GIB, gpu=known_gpu(file, print))
    rows, line = vram_rows(machine)
    assert rows["program"] == 600 * MIB and rows["reserve"] == RESERVE // 2 + UNMEASURED
    assert line == "of VRAM, for the driver, code and graphs: assumed, the first run on a GPU measures it"
    gpu_memory.save(GpuMemory("a card", "2.11.0", 321 * MIB, 200 * MIB, "2026-11-27"), file)
    rows, line = vram_rows(replace(machine, gpu=known_gpu(file, print)))
    assert rows["program"] == 321 * MIB and rows["reserve"] == RESERVE // 2 + 200 * MIB
    assert line == "of VRAM, for the driver, code and graphs: as measured on a card on 2026-11-27"
    rows, line = vram_rows(replace(machine, vram_taken=11 * MIB))
    assert rows["program"] == 11 * MIB and line.startswith("of VRAM, for code and graphs: assumed")
    described: list[str] = []
    describe(model, 32, Machine(ram=GIB), None, described.append)
    assert not any("VRAM" in line for line in described)


@pytest.mark.parametrize(("field", "value"), [("card", ""), ("card", 5), ("torch", "a\nb"), ("context", -1),
                                              ("beside", 2**50), ("beside", True), ("measured", "today")])
def test_a_file_checks_itself(field: str, value: object, tmp_path: Path) -> None:
    good = {"card": "a card", "torch": "2.11.0", "context": 1, "beside": 2, "measured": "2026-11-27"}
    with pytest.raises(ConfigError, match=f"{field}: got"):
        GpuMemory(**good | {field: value})  # type: ignore[arg-type]
    file, lines = tmp_path / "gpu.json", list[str]()
    file.write_text(json.dumps({"qmix_gpu_memory": 1, **good, field: value}))
    assert gpu_memory.load(file, lines.append) is None
    assert len(lines) == 1 and "ignored" in lines[0]
    file.write_text(json.dumps({"qmix_gpu_memory": 1, "card": "a"}))
    assert gpu_memory.load(file, lines.append) is None and "fields" in lines[1]
