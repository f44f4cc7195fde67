"""benchmarks/gpu.py: what bounds decoding, how time is shared out, what a section's process leaves behind, and the
report."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_configs import TINY
from oracles import decode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_check  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_report  # noqa: E402
import gpu_run  # noqa: E402
import gpu_side  # noqa: E402
import gpu_worker  # noqa: E402
import synthetic  # noqa: E402
from gpu_device import budget_for  # noqa: E402
from gpu_roofline import GB, Bandwidths, Token, bound  # noqa: E402
from gpu_sections import Section, allot  # noqa: E402
from synthetic_recipe import Recipe  # noqa: E402

from qmix.config import QuantConfig  # noqa: E402
from qmix.demo import CHECKPOINT  # noqa: E402
from qmix.engine import load  # noqa: E402
from qmix.formats.packed import Packed  # noqa: E402
from qmix.models import read_model  # noqa: E402
from qmix.offload.needs import Needs  # noqa: E402
from qmix.offload.plan import UNMEASURED, plan  # noqa: E402
from qmix.sizes import MatrixSpec  # noqa: E402
from qmix.store import Store  # noqa: E402

GBPS = st.floats(1.0, 4000.0)


def test_a_bound_by_hand() -> None:
    machine = Bandwidths(vram=1000, pcie=25, cpu=25, ram=100)
    assert bound(Token(9e9, 1e9, 1e9, True), machine).rate == pytest.approx(50)
    found = bound(Token(9e9, 1e9, 1e9, False), machine)
    assert (found.rate, found.limit) == (pytest.approx(25), "PCIe")
    found = bound(Token(9e9, 1e9, 0, True), machine)
    assert found.limit == "VRAM"
    assert bound(Token(1e9, 1e9, 1e9, False), Bandwidths(1000, 50, 25, 10)).limit == "RAM"
    with pytest.raises(ValueError, match="pcie"):
        Bandwidths(1, 0, 1, 1)
    with pytest.raises(ValueError, match="missing"):
        Token(1, 1, 2, True)


@given(GBPS, GBPS, GBPS, GBPS, st.floats(0, 20), st.floats(0.01, 10), st.floats(0, 1))
def test_no_way_of_dividing_the_work_beats_the_bound(vram: float, pcie: float, cpu: float, ram: float, fixed: float,
                                                     chosen: float, share: float) -> None:
    """Against every twentieth of the missing bytes computed by the CPU; and one of them comes close."""
    missing = share * chosen
    seconds = []
    for twentieth in range(21):
        on_cpu = missing * twentieth / 20
        seconds.append(max((fixed + chosen - on_cpu) / vram, (missing - on_cpu) / pcie, on_cpu / cpu, missing / ram))
    least = 1 / bound(Token(fixed * GB, chosen * GB, missing * GB, True), Bandwidths(vram, pcie, cpu, ram)).rate
    assert least <= min(seconds) * (1 + 1e-9)
    assert min(seconds) <= least * (1 + 1e-9) + missing / 20 * max(1 / pcie, 1 / cpu, 1 / vram)
    whole = 1 / bound(Token(fixed * GB, chosen * GB, missing * GB, False), Bandwidths(vram, pcie, cpu, ram)).rate
    assert whole == pytest.approx(seconds[0])


def test_time_is_promised_by_importance() -> None:
    waiting = [Section("a", "", 30, 200), Section("b", "", 40, 50), Section("c", "", 50, 90)]
    assert allot(waiting, 100) == (60, [waiting[2]])
    assert allot(waiting, 500) == (200, [])
    assert allot(waiting, 20) == (0, waiting)
    assert allot(waiting, 35) == (35, waiting[1:])
    assert allot([], 100) == (0, [])


@given(st.lists(st.tuples(st.floats(1, 50), st.floats(1, 3)), min_size=1, max_size=8), st.floats(0, 200))
def test_no_more_time_is_given_than_there_is(sizes: list[tuple[float, float]], left: float) -> None:
    waiting = [Section(str(i), "", least, least * factor) for i, (least, factor) in enumerate(sizes)]
    seconds, dropped = allot(waiting, left)
    kept = [section for section in waiting if section not in dropped]
    others = sum(section.least for section in kept if section is not waiting[0])
    if waiting[0] in dropped:
        assert seconds == 0 and waiting[0].least > left
    else:
        assert waiting[0].least <= seconds + 1e-9 and seconds <= waiting[0].most and seconds + others <= left + 1e-6


SIDE = """
import os, subprocess, sys, time
sys.path.insert(0, os.environ["BENCHMARKS"])
import gpu_side
from gpu_sections import emit, emit_failure

def printing(task):
    os.write(1, b"noise {no json")
    print("noise"); print("{no json"); print("a warning", file=sys.stderr)
    emit(row={"what": "decode", "limit": task["seconds"]})
    emit(figure=3, process=os.getpid())

def but(then):
    return lambda task: (printing(task), then())

def crash():
    raise RuntimeError("out of memory")

def one_case():
    try:
        crash()
    except RuntimeError as e:
        emit_failure("the second case", e)

def stall():
    time.sleep(60)

def orphan():
    subprocess.Popen(["sleep", "30"], start_new_session=True, stdout=sys.stdout.fileno())
    os._exit(3)

gpu_side.RUN |= {"well": printing, "wrong": but(lambda: emit(wrong="twice two is five")),
                 "absent": but(lambda: emit(unavailable="no such card")), "slow": but(stall), "crash": but(crash),
                 "exit": but(lambda: sys.exit("enough")), "abort": but(os.abort), "case": but(one_case),
                 "leak": but(lambda: gpu_side.LEFT.update(RAM=-1)), "orphan": but(orphan),
                 "check": lambda task: emit(wrong="all of it")}
gpu_side.serve()
"""


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """gpu_side.py with sections that end in every way."""
    monkeypatch.setenv("BENCHMARKS", str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (file := tmp_path / "side.py").write_text(SIDE)
    return file


ENDS = [("well", "done", None), ("wrong", "wrong", "twice two is five"), ("absent", "unavailable", "no such card"),
        ("slow", "late", "ended after 2 s"), ("well", "done", None), ("crash", "failed", "RuntimeError: out of memory"),
        ("exit", "failed", "enough"), ("abort", "failed", "killed by SIGABRT: Fatal Python error: Aborted"),
        ("case", "failed", "the second case: RuntimeError: out of memory"), ("well", "done", None)]


def test_what_a_section_printed_is_kept_however_it_ends(side: Path) -> None:
    """One process serves, until a section ends it; and what is known of that section is there."""
    workers, found, seen = gpu_worker.Workers([sys.executable, str(side)]), [], []
    for do, state, reason in ENDS:
        result = workers.run(Section("s", do, 1, 1), 2.0 if do == "slow" else 60.0,
                             lambda result: seen.append(len(result["found"]["rows"])))
        assert (result["state"], result.get("reason")) == (state, reason), result
        assert result["found"]["figure"] == 3 and len(result["found"]["rows"]) == 1 and "a warning" in result["stderr"]
        found.append(result)
    workers.close()
    assert [result["fresh"] for result in found] == [True, *[False] * 3, True, False, True, True, True, False]
    assert len(seen) >= 2 * len(ENDS) and workers.started == 5
    ends = dict(zip((do for do, _, _ in ENDS), found, strict=True))
    assert "in stall" in ends["slow"]["stderr"] and "Timeout (" in ends["slow"]["stderr"]
    for do in ("crash", "exit"):
        assert "line" in ends[do]["traceback"] and ends[do]["traceback"] in ends[do]["stderr"] + "\n"
    assert "in crash" in ends["crash"]["traceback"] and "in printing" not in ends["abort"]["stderr"]
    assert "in crash" in ends["case"]["found"]["failures"][0]["traceback"]


def test_nobody_waits_for_what_cannot_be_ended(side: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a hung driver's process cannot, whose pipe stays open."""
    monkeypatch.setattr(gpu_worker, "GRACE", 0.5)
    workers = gpu_worker.Workers([sys.executable, str(side)])
    found = workers.run(Section("s", "orphan", 1, 1), 2.0, lambda result: None)
    assert found["state"] == "late" and found["found"]["figure"] == 3 and found["seconds"] < 25
    assert workers.run(Section("s", "well", 1, 1), 60.0, lambda result: None)["state"] == "done"
    workers.close()


def test_a_process_that_keeps_memory_serves_no_more(side: Path) -> None:
    workers = gpu_worker.Workers([sys.executable, str(side)])
    found = [workers.run(Section("s", do, 1, 1, alone=alone), 60.0, lambda result: None)
             for do, alone in (("well", False), ("leak", False), ("well", True), ("well", False))]
    workers.close()
    assert [result["fresh"] for result in found] == [True, False, True, True]
    assert {result["state"] for result in found} == {"done"} and "MiB of RAM" in found[1]["left"]
    with pytest.raises(ProcessLookupError):
        os.kill(found[3]["found"]["process"], 0)


def test_a_tokens_time_adds_up() -> None:
    figures = {"chosen": 40, "hits": 30, "prefetched": 6, "misses": 10, "computed": 4, "stalled_seconds": 0.2,
               "host_seconds": 0.1}
    counted = {"waited": 0.3, "bytes_up": 100, "bytes_down": 50, "launches": 70, "waits": 33}
    row = gpu_run.decode_row(figures, counted, tokens=10, seconds=1.0)
    assert sum(row["ms_parts"].values()) == pytest.approx(row["ms"]) == pytest.approx(100)
    assert row["ms_parts"] == pytest.approx({"device": 30, "copies": 20, "cpu": 10, "rest": 40})
    assert (row["hit_rate"], row["found_rate"], row["missing"], row["bytes_up"]) == (0.6, 0.75, 1.6, 10)


def test_what_lies_on_the_card_of_fewer_layers() -> None:
    assert gpu_peers.on_card(24, 2.9, 3.4, 4) == (7, 1)
    assert gpu_peers.on_card(2, 2.9, 3.4, 4) == (0, 0)
    assert gpu_peers.on_card(500, 2.9, 3.4, 4) == (32, 4)


@pytest.mark.parametrize("peer", ["transformers", "bitsandbytes"])
@pytest.mark.parametrize("absent", ["transformers", "accelerate"])
def test_a_peer_whose_packages_are_missing_is_unavailable(peer: str, absent: str, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_peers.importlib.util, "find_spec", lambda name: None if name == absent else "a spec")
    gpu_peers.RUN[peer]({"stand_in": True})
    assert json.loads(capsys.readouterr().out) == {"unavailable": f"{absent} is not installed"}


def test_errors_are_judged_by_their_middle_and_their_tail() -> None:
    fine = torch.full((20,), 0.01)
    assert gpu_check.judge(fine) is None
    assert gpu_check.judge(torch.cat([fine, torch.ones(2)])) is None  # a near tie that went the other way
    assert "tokens have an error" in str(gpu_check.judge(torch.cat([fine, torch.ones(5)])))
    assert "median" in str(gpu_check.judge(torch.full((20,), 0.03)))
    assert "no numbers" in str(gpu_check.judge(torch.full((3,), float("nan"))))


def archive(rate: float = 31.0, **sections: Any) -> dict[str, Any]:
    """Of a run whose bound is 50 tokens a second."""
    row = {"what": "decode", "tokens_kind": "local", "depth": 128, "rate": rate, "kv_bytes": 0, "chosen": 2.0,
           "missing": 2.0, "hit_rate": 0.5, "found_rate": 0.5, "bytes_up": 1e9, "bytes_down": 0.0, "computed": 1.0,
           "waits": 33.0, "launches": 90.0, "prefetcher": {"recall": None}, "ms": 1000 / rate,
           "ms_parts": {"device": 1, "copies": 2, "cpu": 3, "rest": 4}}
    found = {
        "bandwidth": {"vram": {"copy": 1000, "read": 900}, "pcie": {"up": 25, "down": 20}, "cpu": 25, "ram": 100},
        "24 GB": {"record_bytes": 5e8, "dense_bytes": 9e9, "split": True, "slots": 10, "records": 20, "rows": [row]},
        "kernels": {"rows": [
            {"what": "kernel", "kernel": "large", "bytes": 2e7, "gbps": 800, "us": 25, "error": 0.0, "heavy": True},
            {"what": "kernel", "kernel": "small", "bytes": 2e3, "gbps": 1, "us": 2, "error": 0.0, "heavy": False}]},
        "peer": {"rows": [{"what": "peer", "peer": gpu_report.PEER_NAME, "layers": 4, "on_card": 7,
                           "rate_measured": 16.0, "rate": 2.0}]}, **sections}
    return {"started": "2026-11-25T00:00:00", "stand_in": False, "command": "python gpu.py", "shape": "",
            "sections": {name: {"state": "done", "seconds": 1.0, "found": value} for name, value in found.items()}}


def test_targets_are_met_missed_or_not_measured() -> None:
    met = {v["target"][:20]: (v["met"], v["got"]) for v in gpu_report.verdicts(archive())}
    assert met == {"slowest decode kerne": (True, pytest.approx(0.8)),
                   "decode with 24 GB at": (True, pytest.approx(0.62)),
                   "decode with 24 GB, t": (True, pytest.approx(15.5))}
    assert [v["met"] for v in gpu_report.verdicts(archive(rate=15.0))] == [True, False, False]
    assert [v["met"] for v in gpu_report.verdicts(archive(bandwidth={}))] == [None, None, True]
    fast = archive(bandwidth={"vram": {"copy": 4000}, "pcie": {"up": 25}, "cpu": 25, "ram": 100})
    aim = gpu_report.verdicts(fast)[0]
    assert (aim["want"], aim["met"], "an aim" in aim["target"]) == (gpu_report.AIM, False, True)


def test_the_report_shows_what_there_is() -> None:
    text = gpu_report.markdown(archive())
    assert "| 24 GB | local | 128 | 10 of 20 | 31.00 | 50 % |" in text and "| 50.00 | PCIe and CPU | 62 % |" in text
    assert "WRONG" not in text and "stood in" not in text
    empty = {**archive(), "sections": {"check": {"state": "wrong", "reason": "a|b", "seconds": 1, "found": {}}},
             "stand_in": True}
    text = gpu_report.markdown(empty)
    assert "WRONG RESULTS in check" in text and "| check | wrong | 1.0 |  | a/b |" in text and "stood in" in text
    columns = {line.count("|") for line in gpu_report.markdown(archive()).split("## Decoding")[1].split("## ")[0]
               .splitlines() if line.startswith("|")}
    assert len(columns) == 1


def test_the_report_has_whole_tracebacks() -> None:
    found = {**archive(), "sections": {
        "check": {"state": "failed", "reason": "x", "seconds": 1, "found": {"failures": [
            {"case": "few there", "reason": "x", "traceback": "Traceback of a case"}]}},
        "kernels": {"state": "failed", "reason": "y", "seconds": 1, "found": {}, "traceback": "Traceback of all",
                    "stderr": "warnings"},
        "store": {"state": "late", "reason": "z", "seconds": 1, "found": {}, "stderr": "Thread 0x1: stacks"}}}
    text = gpu_report.markdown(found).split("## What failed")[1]
    assert "check, few there:\n\n```\nTraceback of a case\n```" in text and "Traceback of all" in text
    assert "Thread 0x1: stacks" in text and "warnings" not in text


def test_a_card_names_its_files() -> None:
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_parts_of_a_store_are_the_whole(tmp_path: Path) -> None:
    """Written by two, one after the other, it has the bytes of a store written by one, and opens."""
    recipe, tokenizer = Recipe(2, hidden=512, inner=256), CHECKPOINT / "tokenizer.model"
    synthetic.write_store(recipe, tmp_path / "one", tokenizer=tokenizer)
    (tmp_path / "two").mkdir()
    dense, records = {}, {}
    for part in (1, 0):
        some_dense, some_records = synthetic.write_part(recipe, tmp_path / "two", "int8", part, 2)
        dense |= some_dense
        records |= some_records
    with Store.open(tmp_path / "one") as store:
        assert dict(store.manifest.records) == records and dict(store.manifest.dense) == dense
    for file in (tmp_path / "two").iterdir():
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()


def test_a_wrong_check_ends_with_1_and_nothing_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        side: Path) -> None:
    monkeypatch.setattr(gpu, "SIDE", side)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--stand-in", "--out", str(tmp_path / "out"), "--name", "x", "--layers",
                                      "2", "--only", "check;24 GB;kernels", "--work", str(tmp_path)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            gpu.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 1
    (file,) = (tmp_path / "out").glob("*-gpu-x.json")
    states = {name: result["state"] for name, result in json.loads(file.read_text())["sections"].items()}
    assert states == {"machine": "done", "check": "wrong", "store": "done", "24 GB": "skipped", "kernels": "done"}


def test_a_mixed_store_has_the_size_that_is_asked_for(tmp_path: Path) -> None:
    recipe = Recipe(2, hidden=512, inner=256)
    _, _, plain = synthetic.layout_of(recipe)
    size = plain.nbytes - sum(region.nbytes for region in plain.records.values()) // 7
    synthetic.write_store(recipe, tmp_path / "store", tokenizer=CHECKPOINT / "tokenizer.model", size=size)
    with Store.open(tmp_path / "store") as store:
        assert 0.98 * size < store.layout.nbytes <= size and len(store.quant.kinds) > 2
    with load(tmp_path / "store", threads=1, context=32) as engine:
        assert engine.session().prefill([600, 700, 800]).isfinite().all()


def test_random_codes_of_every_width_have_the_spread_that_is_asked_for() -> None:
    for name in ("int4", "int3", "int2"):
        spec = MatrixSpec(name, 256, 512, 1, 64, 64)
        weights = decode(Packed.of(spec, synthetic.grouped_matrix(Recipe(1).stream("w", 0), spec, 0.02)))
        # The scale is rounded to 8 bits; the mean of 131,072 of deviation 0.02 has a deviation of 6e-5.
        assert weights.std() == pytest.approx(0.02, rel=2**-8 + 0.01) and abs(weights.mean()) < 4e-4


def test_stores_lie_in_shared_memory_only_where_there_is_room(tmp_path: Path) -> None:
    folders = [tmp_path / "shared", tmp_path / "disk"]
    for folder in folders:
        folder.mkdir()
    assert gpu_side.roomy(folders, 1)[0] == folders[0]
    assert gpu_side.roomy(folders, 2**50)[0] == folders[1]
    assert gpu_side.roomy(folders[1:], 2**50)[0] == folders[1]


def test_a_cards_budget_holds_the_share_with_what_its_plan_counts_of_the_card() -> None:
    """A plan of a card keeps room for code, graphs and libraries until they have been measured: StandIn has none."""
    class Card:
        torch_device = torch.device("cuda", 0)

        def taken(self) -> int:
            return 123 * 2**20

    model = read_model(TINY["mixtral"])
    needs = Needs.of(model, QuantConfig(), 256)
    for share in (0.5, 1.0):
        budget = budget_for(needs, Card(), share)  # type: ignore[arg-type]
        found = plan(needs, 2**50, 0, budget, 123 * 2**20, vram_beside=UNMEASURED).tiers[0]
        assert found.slots == max(needs.least_slots, round(share * needs.records))
