"""`qmix bench`: what is timed, what that must move and compute, what is said to limit it, and how it is printed.

The work is held to independent counts: torch's own counter of products, and the sizes of the tensors of a real
store. Runs are real, resident and paged; no test looks at how long anything took.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import signal
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from helpers import write_tiny_checkpoint
from test_cli import Done, qmix
from tokenizer_files import DEMO_TEMPLATE, spm_model
from warm_python import WarmPython

from qmix import hardware
from qmix.bench import roofline
from qmix.bench.cases import Case, context_of, make_cases, numbers
from qmix.bench.measure import Repetition, repeat
from qmix.bench.roofline import Peaks
from qmix.bench.text import encode, piece, recorded_text
from qmix.bench.work import Workload
from qmix.engine import load
from qmix.errors import UsageError
from qmix.hardware.disk import DiskEffort
from qmix.kernels import native

PEAKS = Peaks(ram_gbps=10.0, gflops=100.0, products="bfloat16", disk_gbps=2.0)
PAGED = ("--ram", "262640K", "--prefetch", "ahead")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    source = write_tiny_checkpoint(folder / "tiny", vocab_size=512, num_local_experts=8)
    (source / "tokenizer.model").write_bytes(spm_model())
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>",
                                                              "chat_template": DEMO_TEMPLATE}))
    done = qmix("quantize", source, folder / "store", "--threads", 1, "--block", 64)
    assert done.returncode == 0, done.stderr
    return folder / "store"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine is measured."""
    monkeypatch.setattr(roofline, "measure", lambda dtype, budget, say: replace(PEAKS, disk_gbps=None))
    monkeypatch.setattr(roofline, "with_disk", lambda peaks, folder, say: PEAKS)
    monkeypatch.setattr(native.NativeProducts, "peak", lambda self, threads: 1e11)


@pytest.fixture
def measured_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured, but for tenths of a second. Where torch has no fast bf16, a product of SIDE takes
    seconds."""
    products = partial(roofline.measure_products, side=128, seconds=0.1)
    monkeypatch.setattr(roofline, "measure_products", products)
    monkeypatch.setattr(roofline, "measure_ram", partial(roofline.measure_ram, repeats=2))
    monkeypatch.setattr(roofline, "DiskEffort", lambda **how: DiskEffort(**{**how, "seconds": 0.1}))
    monkeypatch.setattr(native.NativeProducts, "peak", partialmethod(native.NativeProducts.peak, seconds=0.1))


@pytest.fixture
def small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that holds nothing yet, so that a budget leaves a few slots."""
    monkeypatch.setattr("qmix.hardware.resident_bytes", lambda: 0)


def rows(*args: object) -> list[dict[str, Any]]:
    done = qmix("bench", *args, "-o", "json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return found


@pytest.mark.skipif(not native.levels(), reason="the native kernels were not built: no C compiler")
@pytest.mark.parametrize("level", ["", "off"])
def test_products_are_held_against_what_computes_them(store: Path, quick: None, level: str,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.NativeProducts, "peak", lambda self, threads: 77e9)
    monkeypatch.setenv("QMIX_NATIVE", level)
    done = qmix("bench", store, "-p", "8", "-n", "0", "-r", "1", "-o", "json")
    assert done.returncode == 0, done.stderr
    (peak,) = {row["peak_gflops"] for row in json.loads(done.stdout)["rows"]}
    assert peak == (PEAKS.gflops if level else 77)
    assert ("bare int8 dots" in done.stderr) == (not level)


def test_cases_are_named_and_ordered_as_llama_bench_does() -> None:
    found = make_cases([512, 128, 512], [64, 0], [0, 2048])
    assert [case.name for case in found] == ["pp512", "pp128", "tg64", "pp512 @ d2048", "pp128 @ d2048", "tg64 @ d2048"]
    assert context_of(found, 4096) == 2560
    with pytest.raises(UsageError, match=r"pp512 @ d2048: 2560 positions, .* 2559"):
        context_of(found, 2559)
    assert numbers("-p", "0, 7") == [0, 7]


def test_pieces_go_through_the_text_and_round_again() -> None:
    assert [piece([1], [5, 6, 7], number, 3) for number in range(3)] == [[1, 5, 6], [1, 7, 5], [1, 6, 7]]
    assert piece([], [5, 6, 7], 1, 2) == [7, 5]
    assert piece([1], [5], 4, 1) == [1]


def test_the_recorded_text_is_there_and_varied(store: Path) -> None:
    text = recorded_text()
    assert 6000 < len(text) < 10_000
    with load(store, threads=1, context=64) as engine:
        head, ids = encode(text, engine.tokenizer)
        assert head == [engine.tokenizer.bos_id]
        assert head + ids == engine.tokenizer.encode(text)
        with pytest.raises(UsageError, match="no tokens"):
            encode("", engine.tokenizer)


def test_a_generation_is_teacher_forced_and_only_its_tokens_are_timed(store: Path) -> None:
    with load(store, threads=1, context=64) as engine:
        session, seen = engine.session(), []
        step = engine.step

        def spy(sessions: Any, tokens: Any, phase: str, cancel: Any = None) -> Any:
            seen.append((phase, list(tokens[0]), now[0]))
            now[0] += 1.0
            return step(sessions, tokens, phase, cancel)

        now = [0.0]
        engine.step = spy  # type: ignore[method-assign]
        model = Workload.of(engine.model, engine.store.quant, engine.plan.needs)
        found = repeat(engine, session, model, Case("tg", 3, 2), [1, 9, 8, 7, 6], clock=lambda: now[0])
    assert seen == [("prefill", [1, 9], 0.0), ("decode", [8], 1.0), ("decode", [7], 2.0), ("decode", [6], 3.0)]
    assert found.seconds == 3.0 and found.rate == 1.0


def test_a_resident_store_is_read_from_memory_alone(store: Path, measured_briefly: None) -> None:
    """With the machine really measured, for which memory is used that the model does not need."""
    before = torch.ones(600 * 2**20, dtype=torch.uint8).nbytes
    high = hardware.peak_bytes()
    found = rows(store, "-p", 20, "-n", 6, "-r", 2)
    assert [(row["test"], row["state"], row["repetitions"]) for row in found] == [
        ("pp20", "cold", 1), ("pp20", "warm", 2), ("tg6", "cold", 1), ("tg6", "warm", 2)]
    for row in found:
        assert (row["hit_rate"], row["disk_bytes_per_token"], row["stalled_share"]) == (1.0, 0, 0.0)
        assert row["prefetch_recall"] is None and row["peak_disk_gbps"] is None
        assert row["slots"] == row["records"] == 24 and row["peak_bytes"] < high - before // 2
        assert row["ram_gbps"] == pytest.approx(row["ram_bytes_per_token"] * row["tokens_per_second"] / 1e9, rel=1e-3)
        assert row["memory_share"] == pytest.approx(row["ram_gbps"] / row["peak_ram_gbps"], rel=2e-3)
        assert row["compute_share"] == pytest.approx(row["gflops"] / row["peak_gflops"], rel=2e-3)
        rates = sorted(row["tokens"] / seconds for seconds in row["seconds"])
        assert len(rates) == row["repetitions"]
        assert [row["slowest"], row["fastest"]] == pytest.approx([rates[0], rates[-1]], rel=1e-3)


def test_a_paged_store_tells_what_came_from_the_disk(store: Path, measured_briefly: None,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """With the disk really measured, too; all cases share one plan, though the process grows."""
    held = itertools.count(0, 32 * 1024)
    monkeypatch.setattr("qmix.hardware.resident_bytes", lambda: next(held))
    found = rows(store, *PAGED, "-p", 4, "-n", 8, "-d", "0,5", "-r", 2, "--cache-policy", "lru")
    assert {row["slots"] for row in found} == {found[0]["slots"]} and 0 < found[0]["slots"] < 24
    assert {(row["cache_policy"], row["prefetch"]) for row in found} == {("lru", "ahead")}
    warm = [row for row in found if row["state"] == "warm"]
    assert [row["test"] for row in warm] == ["pp4", "tg8", "pp4 @ d5", "tg8 @ d5"]
    for row in warm:
        assert row["hit_rate"] < 1 and row["disk_bytes_per_token"] > 0 and row["peak_disk_gbps"] > 0
        assert row["disk_share"] == pytest.approx(row["disk_gbps"] / row["peak_disk_gbps"], rel=0.01)
        assert (row["prefetch_recall"] is None) == (row["kind"] == "pp")


def test_disk_bytes_are_the_offload_reports(store: Path, small_process: None) -> None:
    with load(store, threads=1, context=64, ram=262640 * 1024, prefetch="ahead") as engine:
        session, model = engine.session(), Workload.of(engine.model, engine.store.quant, engine.plan.needs)
        ids = encode(recorded_text(), engine.tokenizer)[1]
        before = engine.stats()["offload"]["warmed_bytes"]
        warmed = 0
        for number in range(3):
            found = repeat(engine, session, model, Case("tg", 12), piece([], ids, number, 12))
            report, warmed = engine.stats()["offload"], warmed + found.warmed_bytes
            assert found.disk_bytes == report["decode"]["bytes_read"] > 0
            assert (found.hits, found.stalled) == (report["decode"]["hits"], report["decode"]["stalled_seconds"])
            assert found.recall == report["prefetcher"]["recall"] is not None
            assert found.wasted_bytes == report["prefetcher"]["wasted_bytes"]
        assert warmed <= engine.stats()["offload"]["warmed_bytes"] - before


def test_each_repetition_gets_another_piece_and_each_case_a_load(store: Path, quick: None,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(engine: Any, session: Any, model: Any, case: Case, ids: list[int]) -> Repetition:
        seen.append((case.name, engine, ids))
        return repeat(engine, session, model, case, ids)

    monkeypatch.setattr("qmix.bench.suite.repeat", spy)
    rows(store, "-p", 16, "-n", 16, "-r", 2)
    assert [ids for name, _, ids in seen if name == "pp16"] == [ids for name, _, ids in seen if name == "tg16"]
    assert len({id(engine) for _, engine, _ in seen}) == 2
    assert len({tuple(ids) for _, _, ids in seen}) == 3 and all(ids[0] == 1 for _, _, ids in seen)


def test_statistics_of_chats_are_neither_used_nor_touched(store: Path, quick: None) -> None:
    rows(store, "-p", 0, "-n", 4, "-r", 1)
    found = json.loads(qmix("stats", store, "--json").stdout)
    assert found["decode"]["tokens"] == found["prefill"]["tokens"] == 0


def test_every_output_has_the_same_rows(store: Path, quick: None, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("the quick brown fox jumps over the lazy dog. ")

    def out(style: str) -> Done:
        done = qmix("bench", store, "-p", "8,12", "-n", 0, "-r", 1, "-f", tmp_path / "own.txt", "-o", style)
        assert done.returncode == 0, done.stderr
        return done

    names = [("pp8", "cold"), ("pp8", "warm"), ("pp12", "cold"), ("pp12", "warm")]
    document = json.loads(out("json").stdout)
    assert document["text"] == str(tmp_path / "own.txt") and document["context"] == 12
    assert document["model"]["formats"]["experts"].startswith("int4 g64 hqq")
    assert {"int4", "int8"} <= set(document["machine"]["kernels"])
    assert [(row["test"], row["state"]) for row in document["rows"]] == names
    lines = [json.loads(line) for line in out("jsonl").stdout.splitlines()]
    assert [(row["test"], row["state"]) for row in lines] == names
    table = list(csv.DictReader(io.StringIO(out("csv").stdout)))
    assert [(row["test"], row["state"]) for row in table] == names
    assert set(table[0]) == set(lines[0]) == set(document["rows"][0]) - {"seconds"}
    done = out("md")
    head, line, *body = done.stdout.splitlines()
    assert head.startswith("| test | state | tok/s |") and set(line) <= set("| -")
    assert [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in body] == names
    assert {row.count("|") for row in (head, line, *body)} == {head.count("|")}
    assert "experts: all 24 resident" in done.stderr and done.stderr.count("resident") == 1


@pytest.mark.parametrize(("args", "code", "words"), [
    (("-p", "many"), 2, ("-p many",)),
    (("-n", "-5"), 2, ("-n -5",)),
    (("-d", "1,,2"), 2, ("-d 1,,2",)),
    (("-p", "0", "-n", "0"), 2, ("-p 0 -n 0",)),
    (("-p", "16", "-d", "500"), 2, ("tg128 @ d500: 628 positions", "512")),
    (("-p", "99999999999"), 2, ("-p 99999999999",)),
    (("-r", "0"), 2, ("repetitions",)),
    (("-o", "xml"), 2, ("-o xml", "jsonl")),
    (("-f", "/nowhere"), 2, ("-f /nowhere",)),
    (("--ram", "8X"), 2, ("--ram '8X'",)),
    (("--ram", "1M", "-p", "8"), 3, ("short of",)),
    (("--cache-policy", "fifo", "-p", "8"), 2, ("--cache-policy fifo",)),
    (("--prefetch", "ahead", "--no-prefetch", "-p", "8"), 2, ("--no-prefetch",)),
    (("--ram", "8G", "--margin", "1G", "-p", "8"), 2, ("--margin",)),
])
def test_flags_that_make_no_sense(store: Path, quick: None, args: tuple[str, ...], code: int,
                                  words: tuple[str, ...]) -> None:
    done = qmix("bench", store, *args)
    assert done.returncode == code, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not done.stdout and "Traceback" not in done.stderr


def test_no_store_is_an_error(tmp_path: Path) -> None:
    assert qmix("bench", tmp_path).returncode == 4
    assert qmix("bench", tmp_path / "none").returncode == 2


@pytest.mark.parametrize("style", ["md", "json"])
def test_interrupted_it_keeps_the_cases_that_are_complete(store: Path, quick: None, style: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(engine: Any, session: Any, model: Any, case: Case, ids: list[int]) -> Repetition:
        if case.kind == "tg" and ids[1:3] != first:
            raise KeyboardInterrupt
        first[:] = first or ids[1:3]
        return repeat(engine, session, model, case, ids)

    first: list[int] = []
    monkeypatch.setattr("qmix.bench.suite.repeat", interrupted)
    done = qmix("bench", store, "-p", 8, "-n", 8, "-r", 2, "-o", style)
    assert done.returncode == 130 and "interrupted: 1 of 2" in done.stderr
    if style == "json":
        document = json.loads(done.stdout)
        assert document["interrupted"] and [row["test"] for row in document["rows"]] == ["pp8", "pp8"]
    else:
        assert len(done.stdout.splitlines()) == 4


def test_ctrl_c_in_a_process_of_its_own(store: Path, warm_python: WarmPython) -> None:
    program = ("import sys; from functools import partial; from qmix.bench import roofline; from qmix.cli import main\n"
               "roofline.measure_products = partial(roofline.measure_products, side=128)\n"  # as measured_briefly
               "roofline.measure_ram = partial(roofline.measure_ram, repeats=2)\n"
               "main(sys.argv[1:])")
    args = ["bench", store, "-p", 8, "-n", 400, "-r", 100, "-t", 1]
    with warm_python.start("-c", program, *args, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout is not None
        head = [process.stdout.readline() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert head[3].startswith("| pp8 | warm") and not rest
    assert "Traceback" not in errors and "interrupted: 1 of 2" in errors
