"""`qmix bench` on a device, the CPU standing in for one: what a repetition took agrees with what the engine counted and
with the sizes of its tensors, each bound can be what limits, and a run repeats its first plan on its first device.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from device_engines import ALL, EXPERTS, IDS, LAYERS, TOP_K, bring_up
from helpers import UNQUANTIZED, write_tiny_checkpoint
from test_cli import qmix
from tokenizer_files import DEMO_TEMPLATE, spm_model
from torch.utils.flop_counter import FlopCounterMode

from qmix import hardware
from qmix.bench import device as bench_device
from qmix.bench import roofline
from qmix.bench.cases import Case
from qmix.bench.device import Moved, with_device
from qmix.bench.measure import Repetition, repeat
from qmix.bench.report import cells, figures
from qmix.bench.roofline import Peaks, Work, judge
from qmix.bench.work import Workload
from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.device import StandIn
from qmix.engine import Engine
from qmix.offload import device_setup
from qmix.offload.device_experts import DeviceExperts
from qmix.offload.needs import Needs
from qmix.offload.plan import RESERVE
from qmix.offload.split import Split
from qmix.quantize import quantize_checkpoint
from qmix.sizes import MIB
from qmix.store import Store

CPU = torch.device("cpu")
HOST = Peaks(ram_gbps=10.0, gflops=100.0, products="bfloat16", disk_gbps=2.0)
PEAKS = replace(HOST, vram_gbps=100.0, bus_gbps=20.0)
OF_THE_CPU = ["test", "state", "tok/s", "min to max", "RAM a token", "RAM GB/s", "disk a token", "disk GB/s", "hits",
              "recall", "wasted a token", "stalled", "roofline", "limited by"]
OF_DEVICES = ["VRAM a token", "VRAM GB/s", "bus a token", "bus GB/s", "in RAM", "by CPU a token", "launches a token",
              "waits a token"]
FIELDS = {"vram_bytes_per_token", "vram_gbps", "bus_bytes_per_token", "bus_gbps", "ram_hit_rate", "computed_per_token",
          "launches_per_token", "waits_per_token", "gpu_memory_share", "bus_share", "peak_vram_gbps", "peak_bus_gbps",
          "device", "exact", "vram_slots", "vram_budget_bytes", "vram_taken_bytes"}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bench-device")
    source = write_tiny_checkpoint(folder / "tiny", dtype=torch.float32, vocab_size=512, num_hidden_layers=LAYERS,
                                   num_local_experts=EXPERTS)
    (source / "tokenizer.model").write_bytes(spm_model())
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": DEMO_TEMPLATE}))
    with Checkpoint.open(source) as checkpoint:
        for name, quant in (("int4", QuantConfig()), ("keep", UNQUANTIZED)):
            quantize_checkpoint(checkpoint, folder / name, quant)
    return {name: folder / name for name in ("int4", "keep")}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine is measured."""
    monkeypatch.setattr(roofline, "measure", lambda dtype, budget, say: replace(HOST, disk_gbps=None))
    monkeypatch.setattr(roofline, "with_disk", lambda peaks, folder, say: replace(peaks, disk_gbps=HOST.disk_gbps))
    monkeypatch.setattr("qmix.kernels.native.NativeProducts.peak", lambda self, threads: 1e11)
    monkeypatch.setattr("qmix.bench.suite.with_device", lambda peaks, device, dtype, **how: replace(
        peaks, vram_gbps=PEAKS.vram_gbps, bus_gbps=PEAKS.bus_gbps))


def model_of(engine: Engine) -> Workload:
    return Workload.of(engine.model, engine.store.quant, engine.plan.needs)


def budgets(folder: Path, above: int, below: int, context: int) -> tuple[str, str, str, str]:
    """Flags for so many slots on the device and in RAM, in a process that holds nothing yet."""
    with Store.open(folder) as store:
        needs = Needs.of(store.model, store.quant, context)
    vram = RESERVE + needs.dense + needs.kv + needs.workspace + needs.scratch + needs.tiles + above * needs.record
    return "--vram", str(vram), "--ram", str(RESERVE + below * needs.record)


@pytest.mark.parametrize(("work", "share", "limit"), [
    (Work(10**9, 10**9, 10**10, 2.0, 0.0, 10**11, 10**10), 0.5, "gpu memory"),
    (Work(10**9, 10**9, 10**10, 2.0, 0.0, 10**11, 3 * 10**10), 0.75, "bus"),
    (Work(10**10, 10**9, 10**10, 2.0, 0.0, 10**10, 10**9), 0.5, "memory"),
    (Work(10**9, 3 * 10**9, 10**10, 2.0, 0.0, 10**10, 10**9), 0.75, "disk"),
    (Work(10**9, 10**9, 10**11, 2.0, 0.0, 10**10, 10**9), 0.5, "compute"),
    (Work(10**9, 10**8, 10**9, 2.0, 0.0, 5 * 10**10, 10**9), 0.25, "overhead"),
    (Work(10**9, 10**8, 10**9, 2.0, 1.0, 5 * 10**10, 10**9, "bus"), 0.25, "bus"),
    (Work(10**9, 10**8, 10**9, 2.0, 1.0, 5 * 10**10, 10**9, "disk"), 0.25, "disk"),
    (Work(10**9, 10**8, 10**9, 2.0, 0.9, 10**11, 10**9, "bus"), 0.5, "gpu memory"),
])
def test_each_bound_can_be_the_longest(work: Work, share: float, limit: str) -> None:
    found = judge(work, PEAKS)
    assert (found.share, found.limit) == (pytest.approx(share), limit)
    assert found.bounds["gpu memory"] == pytest.approx(work.vram_bytes / 1e11)
    assert found.bounds["bus"] == pytest.approx(work.bus_bytes / 2e10)
    assert set(judge(work, HOST).bounds) == {"memory", "compute", "disk"}


def test_a_row_of_a_device_by_hand() -> None:
    def one(seconds: float, moved: Moved | None) -> Repetition:
        return Repetition(10, seconds, 0.0, 10**9, 10**9, 10**8, 0, 40, 20, None, 0, moved)

    moved = Moved(10**10, 2 * 10**9, 10, 5, 300, 20, disk_seconds=0.5, bus_seconds=0.4)
    parts = [one(1.0, moved), one(2.0, replace(moved, below=14, computed=6, launches=320)), one(2.5, moved)]
    row = figures(Case("tg", 10), "warm", parts, PEAKS)
    assert (row["tokens_per_second"], row["vram_bytes_per_token"], row["vram_gbps"]) == (5.0, 10**9, 5.0)
    assert (row["bus_bytes_per_token"], row["bus_gbps"], row["ram_bytes_per_token"]) == (2 * 10**8, 1.0, 10**8)
    assert (row["hit_rate"], row["ram_hit_rate"]) == (0.5, pytest.approx(34 / 120, rel=1e-3))
    assert row["computed_per_token"] == pytest.approx(16 / 30, rel=1e-3)
    assert (row["launches_per_token"], row["waits_per_token"]) == (pytest.approx(920 / 30, rel=1e-3), 2.0)
    assert (row["gpu_memory_share"], row["bus_share"], row["memory_share"], row["disk_share"]) == (.05, .05, .05, .025)
    shown = cells(row)
    assert (shown["VRAM a token"], shown["VRAM GB/s"], shown["bus a token"], shown["bus GB/s"]) == (
        "1 GB", "5", "200 MB", "1")
    assert (shown["hits"], shown["in RAM"], shown["by CPU a token"]) == ("50 %", "28 %", "0.533")
    assert (shown["launches a token"], shown["waits a token"]) == ("30.7", "2")
    assert set(shown) == {*OF_THE_CPU, *OF_DEVICES} and list(shown)[-1] == "limited by"

    prompt = figures(Case("pp", 10), "cold", parts[:1], PEAKS)
    assert prompt["launches_per_token"] is None and cells(prompt)["waits a token"] == "-"
    cpu = figures(Case("tg", 10), "cold", [one(1.0, None)], HOST)
    assert list(cells(cpu)) == OF_THE_CPU and not FIELDS & {*cpu, *HOST.columns()}


@pytest.mark.parametrize(("disk", "bus", "limit"), [(0.5, 0.4, "disk"), (0.4, 0.5, "bus"), (0.0, 0.1, "bus")])
def test_what_was_waited_for_is_what_was_busier(disk: float, bus: float, limit: str) -> None:
    moved = Moved(10**9, 10**8, 1, 1, 1, 1, disk, bus)
    row = figures(Case("tg", 1), "warm", [Repetition(1, 1.0, 0.6, 10**8, 1, 0, 0, 4, 2, None, 0, moved)], PEAKS)
    assert row["limited_by"] == limit


@pytest.mark.parametrize(("above", "below"), [(ALL, 2), (12, 4), (9, ALL)])
def test_bytes_are_what_the_engine_counted(stores: dict[str, Path], above: int, below: int,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    with bring_up(monkeypatch, stores["int4"], above, below, prefetch="off") as engine:
        config, record, session = engine.model, engine.store.layout.record_bytes, engine.session()
        weights = engine._model._weights.dense
        matrices = [*weights.matrices.values(), *weights.stacks.values()]
        dense = sum(t.nbytes for m in matrices for t in m.tensors.values())
        dense += sum(tensor.nbytes for name, tensor in weights.tensors.items() if name != "embedding")
        attention = config.layers[0].mixer
        position = 2 * LAYERS * attention.kv_heads * attention.head_dim * 2  # keys and values, bf16
        for case, passes, positions in ((Case("tg", 5, 3), 5, 4 + 5 + 6 + 7 + 8), (Case("pp", 9, 2), 1, 11)):
            found = repeat(engine, session, model_of(engine), case, IDS[:case.positions])
            report = engine.stats()["offload"]["decode" if case.kind == "tg" else "prefill"]
            moved = found.moved
            assert moved is not None and found.chosen == report["chosen"] == report["hits"] + report["misses"]
            assert moved.vram_bytes == passes * dense + report["chosen"] * record + positions * position
            assert found.ram_bytes == moved.bus_bytes == report["bytes_up"]
            assert (moved.below, moved.computed, moved.launches) == (report["below"], 0, report["launches"])
            assert (found.hits == found.chosen) == (moved.bus_bytes == 0) == (above == ALL)
            assert moved.below <= found.chosen - found.hits
            if case.kind == "tg":
                assert found.chosen == 5 * LAYERS * TOP_K
                assert moved.bus_bytes == report["misses"] * record and moved.launches and moved.waits
            assert found.operations == model_of(engine).operations(case)


def test_what_was_found_in_ram_is_counted_in_prompts_too(stores: dict[str, Path],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """With all records in some memory, whatever misses is found there, once the load's warming is over."""
    with bring_up(monkeypatch, stores["int4"], 9, ALL, prefetch="off") as engine:
        session = engine.session()
        for kind in ("pp", "pp", "tg"):
            found = repeat(engine, session, model_of(engine), Case(kind, 12), IDS[:12])
        for kind in ("pp", "tg"):
            found = repeat(engine, session, model_of(engine), Case(kind, 12), IDS[:12])
            assert found.moved is not None and not found.disk_bytes
            assert found.hits + found.moved.below == found.chosen > found.hits


def test_what_the_cpu_computed_is_its_own(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's work runs in other threads, so torch's counter sees what this one, the host, computes."""
    monkeypatch.setenv("QMIX_NATIVE", "off")
    monkeypatch.setattr(device_setup, "measured", lambda *machine: Split(1e-3, Split.HOST))
    monkeypatch.setattr(Split, "computed", lambda *measured: None)  # a busy processor would seem slower than the bus
    case = Case("tg", 6, 2)
    with bring_up(monkeypatch, stores["keep"], 9, 12, exact=False, prefetch="off") as engine:
        session, model, record = engine.session(), model_of(engine), engine.store.layout.record_bytes
        session.prefill(IDS[:2])
        engine.reset_stats()
        with FlopCounterMode(display=False) as counter:
            for token in IDS[2:8]:
                session.decode(token)
        computed = engine.stats()["offload"]["decode"]["computed"]
        products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        assert computed > 0 and products == computed * 2 * model.expert
        session.trim(0)
        found = repeat(engine, session, model, case, IDS[:8])
        report = engine.stats()["offload"]["decode"]
        assert found.moved is not None and found.moved.computed == report["computed"] > 0
        assert found.ram_bytes == report["computed"] * record + report["bytes_up"]
        assert found.moved.vram_bytes == model.bytes_read(case, report["chosen"] - report["computed"])
        assert found.operations == model.operations(case) - report["computed"] * products // computed


def test_the_devices_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []

    def copies(source: torch.Tensor, target: torch.Tensor, **how: Any) -> float:
        sizes.append((source.nbytes, target.nbytes))
        return 5.0

    monkeypatch.setattr(bench_device, "measure_copies", copies)
    monkeypatch.setattr(bench_device, "measure_products", lambda dtype, **how: 7.0)

    def peaks(**how: Any) -> Peaks:
        return with_device(HOST, CPU, torch.bfloat16, **{"vram": 2**40, "ram": None, "pin": None, "say": print, **how})

    found = peaks(vram=12 * MIB + 5)
    assert (found.vram_gbps, found.bus_gbps, found.gflops, found.disk_gbps) == (10.0, 5.0, 7.0, 2.0)
    assert found.ram_gbps == HOST.ram_gbps and "bfloat16" in found.products
    peaks(vram=12 * MIB, pin=2 * MIB + 1)
    peaks(ram=hardware.resident_bytes() + 2 * MIB)
    assert sizes == [(3 * MIB, 3 * MIB)] * 3 + [(2 * MIB, 2 * MIB)] + [(MIB, MIB)] * 2
    assert found.columns() == {"peak_ram_gbps": 10.0, "peak_gflops": 7.0, "peak_disk_gbps": 2.0, "peak_vram_gbps": 10.0,
                               "peak_bus_gbps": 5.0}
    assert "GPU memory 10.0 GB/s, bus 5.0 GB/s" in found.line() and "GPU" not in HOST.line()
    assert set(HOST.columns()) == {"peak_ram_gbps", "peak_gflops", "peak_disk_gbps"}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> WeakSet[DeviceExperts]:
    """`--device cuda` is the stand-in, of which, as on a card, something stays taken after each load; and the process
    grows. -> The models that are on it."""
    held, taken = itertools.count(0, 32 * 1024), itertools.count(0, MIB)
    there = WeakSet[DeviceExperts]()
    init = DeviceExperts.__init__

    def counted(self: DeviceExperts, *args: Any, **options: Any) -> None:
        there.add(self)
        init(self, *args, **options)

    monkeypatch.setattr(DeviceExperts, "__init__", counted)
    monkeypatch.setattr("qmix.hardware.resident_bytes", lambda: next(held))
    monkeypatch.setattr(StandIn, "taken", lambda self: next(taken))
    monkeypatch.setattr("qmix.engine.machine.open_cuda", lambda index: StandIn())
    return there


def test_the_command_on_a_device(stores: dict[str, Path], stand_in: WeakSet[DeviceExperts],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """With the machine really measured, once the model is gone; the cases share a plan, though what is taken grows."""
    monkeypatch.setattr(bench_device, "SIDE", 128)  # where torch has no fast bf16, a product takes seconds
    left: list[int] = []

    def spy(*args: Any, **how: Any) -> Peaks:
        left.append(len(stand_in))
        return with_device(*args, **how)

    monkeypatch.setattr("qmix.bench.suite.with_device", spy)
    done = qmix("bench", stores["int4"], *budgets(stores["int4"], 12, 9, 8), "--device", "cuda", "--exact", "-p", "4",
                "-n", "8", "-r", "2", "--prefetch", "off", "-o", "json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = document["rows"]
    assert document["machine"]["device"] == StandIn().name and left == [0, 0]
    assert {(row["vram_slots"], row["slots"], row["exact"], row["device"]) for row in rows} == {
        (12, 12 + 9 - 2, True, StandIn().name)}
    assert len({row["vram_budget_bytes"] for row in rows}) == 1
    for row in rows:
        assert 0 < row["hit_rate"] < 1 and row["hit_rate"] + row["ram_hit_rate"] <= 1.0001
        assert row["bus_bytes_per_token"] == row["ram_bytes_per_token"] > 0 and row["computed_per_token"] == 0
        assert row["gpu_memory_share"] == pytest.approx(row["vram_gbps"] / row["peak_vram_gbps"], rel=5e-3)
        assert row["bus_share"] == pytest.approx(row["bus_gbps"] / row["peak_bus_gbps"], rel=5e-3)
        shares = [row[f"{name}_share"] for name in ("memory", "disk", "compute", "gpu_memory", "bus")]
        assert row["roofline_share"] == max(shares)
        assert (row["launches_per_token"] is None) == (row["kind"] == "pp")
    assert done.stderr.count("the CPU in a GPU's place") == 1 and "; GPU memory " in done.stderr


def test_every_output_has_one_set_of_fields(stores: dict[str, Path], quick: None, stand_in: Any,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.hardware.resident_bytes", lambda: 0)  # of each command anew
    monkeypatch.setattr(StandIn, "taken", lambda self: 0)

    def out(style: str, *args: object) -> str:
        done = qmix("bench", stores["int4"], "-p", "4", "-n", "4", "-r", "1", "-o", style, *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = ("--device", "cuda", *budgets(stores["int4"], 12, 9, 4))
    device = [json.loads(line) for line in out("jsonl", *where).splitlines()]
    host = [json.loads(line) for line in out("jsonl", "--device", "cpu").splitlines()]
    assert len({tuple(row) for row in device}) == len({tuple(row) for row in host}) == 1
    assert set(device[0]) - set(host[0]) == FIELDS and not set(host[0]) - set(device[0])
    table = list(csv.DictReader(io.StringIO(out("csv", *where))))
    assert list(table[0]) == list(device[0]) and len(table) == 4
    assert [row["launches_per_token"] == "" for row in table] == [True, True, False, False]
    heads = [[cell.strip() for cell in out("md", *args).splitlines()[0].strip("|").split("|")]
             for args in (where, ("--device", "cpu"))]
    assert heads[1] == OF_THE_CPU and [name for name in heads[0] if name in heads[1]] == heads[1]
    assert [name for name in heads[0] if name not in heads[1]] == OF_DEVICES


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_decided_by_the_first_load(stores: dict[str, Path], quick: None, stand_in: Any, there: bool,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that another program takes or lets go of meanwhile changes nothing."""
    asked = []

    def any_card(say: Callable[[str], None]) -> StandIn | None:
        asked.append(1)
        return StandIn() if there else None

    monkeypatch.setattr("qmix.engine.machine.TINY", 0)
    monkeypatch.setattr("qmix.engine.machine._any", any_card)
    where = budgets(stores["int4"], 12, 9, 4) if there else ()
    done = qmix("bench", stores["int4"], "-p", "4", "-n", "4", "-r", "1", "-o", "jsonl", *where)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 4 and len(asked) == 1
    assert {row.get("vram_slots") for row in rows} == {12 if there else None}


def test_flags_without_a_device_are_refused(stores: dict[str, Path], quick: None) -> None:
    for flags, word in ((("--vram", "1G"), "--vram"), (("--pin", "1G"), "--pin")):
        done = qmix("bench", stores["int4"], "-p", "4", "-n", "0", "--device", "cpu", *flags)
        assert done.returncode == 2 and word in done.stderr
    assert qmix("bench", stores["int4"], "-p", "4", "--device", "rocm").returncode == 2
