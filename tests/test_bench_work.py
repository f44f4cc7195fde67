"""What a pass of `qmix bench` must move and compute, and what is said to limit it.

The work is held to independent counts: torch's own counter of products, and the sizes of the tensors of a real store.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import UNQUANTIZED, decode, prefill, unquantized_model, write_tiny_checkpoint
from test_cli import qmix
from tokenizer_files import DEMO_TEMPLATE, spm_model
from torch.utils.flop_counter import FlopCounterMode

from qmix import hardware
from qmix.bench import roofline
from qmix.bench.cases import Case
from qmix.bench.measure import Repetition, repeat
from qmix.bench.report import cells, figures, short
from qmix.bench.roofline import Peaks, Work, judge
from qmix.bench.work import Workload
from qmix.checkpoint import Checkpoint
from qmix.engine import load
from qmix.hardware.memory import reset_peak
from qmix.offload.needs import Needs
from qmix.store import Store

PEAKS = Peaks(ram_gbps=10.0, gflops=100.0, products="bfloat16", disk_gbps=2.0)


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


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("case", [Case("pp", 7), Case("pp", 9, 5), Case("tg", 4), Case("tg", 4, 3)])
def test_operations_are_what_torch_counts(tmp_path: Path, case: Case, window: int | None,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMIX_NATIVE", "off")  # so that it is torch that computes
    source = write_tiny_checkpoint(tmp_path / "tiny", dtype=torch.float32, sliding_window=window)
    with Checkpoint.open(source) as checkpoint:
        model, config = unquantized_model(checkpoint, guess=False), checkpoint.model  # guesses are not work
        cache = model.new_cache(40)
        if case.depth:
            prefill(model, [9] * case.depth, cache)
        with FlopCounterMode(display=False) as counter:
            if case.kind == "pp":
                prefill(model, [5] * case.tokens, cache)
            for _ in range(case.tokens if case.kind == "tg" else 0):
                decode(model, 5, cache)
    pairs = sum(1 for query in range(case.depth, case.positions) for key in range(query + 1)
                if window is None or query - key < window)
    attention = 4 * pairs * config.num_layers * config.layers[0].mixer.heads * config.layers[0].mixer.head_dim
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert Workload.of(config, UNQUANTIZED, Needs.of(config, UNQUANTIZED, 40)).operations(case) == products + attention


def test_bytes_are_those_of_the_tensors_that_a_pass_reads(store: Path) -> None:
    with load(store, threads=1, context=64) as engine:
        config, record, session = engine.model, engine.store.layout.record_bytes, engine.session()
        weights = engine._model._weights.dense
        dense = sum(t.nbytes for m in weights.matrices.values() for t in m.tensors.values())
        dense += sum(tensor.nbytes for name, tensor in weights.tensors.items() if name != "embedding")
        attention = config.layers[0].mixer
        position = 2 * config.num_layers * attention.kv_heads * attention.head_dim * 2  # keys and values, bf16
        model = Workload.of(config, engine.store.quant, engine.plan.needs)
        ids = list(range(3, 40))
        for case, passes, positions in ((Case("tg", 5, 3), 5, 4 + 5 + 6 + 7 + 8), (Case("pp", 9, 2), 1, 11)):
            found = repeat(engine, session, model, case, ids[:case.positions])
            report = engine.stats()["offload"]["decode" if case.kind == "tg" else "prefill"]
            assert found.chosen == report["chosen"] and report["passes"] == passes
            assert found.ram_bytes == passes * dense + report["chosen"] * record + positions * position
            assert (found.hits, found.disk_bytes, found.tokens) == (found.chosen, 0, case.tokens)
            assert session.length == 0
        assert repeat(engine, session, model, Case("tg", 5), ids[:5]).chosen == 5 * config.num_layers * 2


def test_long_prompts_read_the_weights_once_a_pass(store: Path) -> None:
    with Store.open(store) as opened:
        model, needs = opened.model, Needs.of(opened.model, opened.quant, 100)
        work = Workload.of(model, opened.quant, needs)
    assert work.bytes_read(Case("pp", 8193), 0) - 2 * work.dense == needs.kv // 100 * (8192 + 8193)


@pytest.mark.parametrize(("work", "share", "limit"), [
    (Work(10**10, 10**9, 10**10, 2.0, 0.0), 0.5, "memory"),
    (Work(10**9, 10**9, 10**11, 2.0, 0.0), 0.5, "compute"),
    (Work(10**9, 3 * 10**9, 10**9, 2.0, 0.1), 0.75, "disk"),
    (Work(10**9, 10**9, 10**9, 2.0, 0.0), 0.25, "overhead"),
    (Work(10**9, 10**9, 10**9, 2.0, 1.0), 0.25, "disk"),
    (Work(10**10, 10**9, 10**9, 3.0, 1.4), 1 / 3, "memory"),
])
def test_the_longest_bound_limits_unless_it_explains_too_little(work: Work, share: float, limit: str) -> None:
    found = judge(work, PEAKS)
    assert found.share == pytest.approx(share)
    assert found.limit == limit
    assert judge(replace(work, disk_bytes=0), replace(PEAKS, disk_gbps=None)).bounds["disk"] == 0


def test_a_row_takes_the_median_rate_and_the_sum_of_all_else() -> None:
    def one(seconds: float, **values: Any) -> Repetition:
        return Repetition(10, seconds, 0.1, 4 * 10**9, 10**9, 10**8, 0, 20, 15, 0.5, 10**6, **values)

    parts = [one(1.0), one(4.0), replace(one(2.0), warmed_bytes=3 * 10**8, recall=0.8, hits=20)]
    row = figures(Case("tg", 10), "warm", parts, PEAKS)
    assert (row["tokens_per_second"], row["slowest"], row["fastest"]) == (5.0, 2.5, 10.0)
    assert row["ram_bytes_per_token"] == 4 * 10**8 and row["ram_gbps"] == 2.0
    assert row["disk_bytes_per_token"] == 2 * 10**7 and row["disk_gbps"] == 0.1
    assert row["hit_rate"] == pytest.approx(50 / 60, rel=1e-3)
    assert row["prefetch_recall"] == pytest.approx(0.6) and row["prefetch_wasted_bytes_per_token"] == 10**5
    assert row["stalled_share"] == pytest.approx(0.3 / 7, rel=1e-3)
    assert row["roofline_share"] == row["memory_share"] == 0.2 and row["limited_by"] == "overhead"
    assert (row["disk_share"], row["compute_share"]) == (0.05, 0.005)
    shown = cells(row)
    assert (shown["tok/s"], shown["min to max"], shown["RAM a token"], shown["hits"]) == ("5", "2.5 to 10", "400 MB",
                                                                                          "83 %")
    assert cells(figures(Case("pp", 10), "cold", [replace(one(1.0), recall=None)], PEAKS))["recall"] == "-"
    assert [short(value) for value in (1234.5, 99.97, 45.67, 0.01234, 0.0)] == ["1234", "100", "45.7", "0.0123", "0"]


def test_products_are_counted_at_the_fastest() -> None:
    def clock() -> Iterator[float]:
        yield 0.0  # start
        for begin, end in ((0.0, 0.4), (0.4, 0.5), (0.5, 0.8)):
            yield from (*(begin, end), end)  # before, after, and the look at the time

    ticks, threads = clock(), torch.get_num_threads()
    got = roofline.measure_products(torch.float32, seconds=0.6, clock=lambda: next(ticks))
    assert got == pytest.approx(2 * roofline.SIDE**3 / 0.1 / 1e9)
    assert torch.get_num_threads() == threads


def test_the_peak_can_start_anew(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    reset_peak(tmp_path)
    assert (tmp_path / "proc/self/clear_refs").read_text() == "5"
    reset_peak(tmp_path / "none")
    # Not torch's memory: what it frees the process may keep (hardware/allocator.py).
    with mmap.mmap(-1, 100 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(bytes([1]) * len(held))
        high = hardware.peak_bytes()
    reset_peak()
    assert hardware.peak_bytes() < high - 50 * 2**20
