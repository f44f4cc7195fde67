"""The method gptq as a job: what the store says, who falls back, threads, breaks and killed processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_tensors, write_checkpoint, write_tiny_checkpoint
from warm_python import WarmPython

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey, QuantConfig
from qmix.errors import CheckpointError, DoesNotFit, Interrupted, UsageError
from qmix.formats import unpack
from qmix.models import read_model
from qmix.quantize import Calibration, Report, calibrated, job, quantize_checkpoint
from qmix.quantize.forward_pass import ForwardPass
from qmix.store import Store, describe, expert_rows

GPTQ = QuantConfig(method="gptq", group_size=32)
DENSE = QuantConfig(dense="int4", method="gptq", group_size=32)
HQQ = QuantConfig(dense="int4", group_size=32)
TEXT = Calibration(torch.randint(3, 128, (6, 40), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("calibrated") / "tiny", seed=1)


def run(source: Path, out: Path, quant: QuantConfig = GPTQ, text: Calibration | None = TEXT, **options: Any) -> Report:
    with Checkpoint.open(source) as checkpoint:
        return quantize_checkpoint(checkpoint, out, quant, calibration=text, **{"threads": 1, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(regions: int) -> Callable[[int, int, str], None]:
    left = [regions]

    def progress(done: int, total: int, label: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an undisturbed run, dense matrices calibrated too."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(source, out, DENSE)
    return out


def test_outputs_on_the_text_are_nearer_than_hqqs(source: Path, whole: Path, tmp_path: Path) -> None:
    """For an expert of the last layer, whose inputs are at hand; and what the manifest says of it is so."""
    run(source, tmp_path / "hqq", HQQ, None)
    with Checkpoint.open(source) as checkpoint:
        forward = ForwardPass(checkpoint, TEXT)
        for layer in range(3):
            forward.enter(layer)
            for expert in range(4):
                w1, w2, w3 = checkpoint.expert(ExpertKey(layer, expert))
                forward.expert(ExpertKey(layer, expert), torch.cat((w1, w3)), w2, False)
        key = ExpertKey(2, max(range(4), key=forward.count))
        w1, _, w3 = checkpoint.expert(key)
        head, last = checkpoint.dense("head").float(), forward.final(slice(None))
    x, w13 = forward.normed[(forward.ids == key.expert).any(1)].float(), torch.cat((w1, w3)).float()

    def off(folder: Path) -> tuple[float, float]:
        with Store.open(folder) as store:
            record = torch.empty(store.layout.record_bytes, dtype=torch.uint8)
            store.read_record(key, record)
            expert, dense = unpack(store.expert(key, record)[0]), unpack(store.dense("head"))
        return tuple(float((x @ (got - want).T).norm() / (x @ want.T).norm())
                     for x, got, want in ((x, expert, w13), (last, dense, head)))

    ours, theirs = off(whole), off(tmp_path / "hqq")
    assert ours[0] < 0.9 * theirs[0] and ours[1] < 0.9 * theirs[1]
    with Store.open(whole) as store:
        record, dense = store.manifest.records[key], store.manifest.dense["head"]
        assert record.calibrated.output_error["w13"] == pytest.approx(ours[0], rel=0.01)
        assert dense.calibrated.output_error == {"all": pytest.approx(ours[1], rel=0.01)}
        assert record.calibrated.tokens == len(x) and dense.calibrated.tokens == TEXT.tokens
        assert store.manifest.calibration == TEXT.entry
        assert store.verify(deep=True) == []


def test_every_dense_matrix_is_calibrated_where_it_is_int4(whole: Path) -> None:
    with Store.open(whole) as store:
        entries = store.manifest.dense.values()
        assert {d.format for d in entries if d.calibrated} == {"int4"}
        assert all(d.calibrated.method == "gptq" for d in entries if d.format == "int4")
        assert sum(d.format == "int4" for d in entries) == 4 * 3 + 1


@pytest.mark.parametrize("quant", [
    QuantConfig("int3", method="gptq"), QuantConfig("int2", "int4", "gptq", 32, 32),
    QuantConfig("nf4", "int4", "gptq", 128)], ids=lambda q: f"{q.experts}-{q.dense}")
def test_other_formats(source: Path, tmp_path: Path, quant: QuantConfig) -> None:
    run(source, tmp_path / "out", quant)
    with Store.open(tmp_path / "out") as store:
        assert store.verify(deep=True) == []
        calibrated = [r.calibrated for r in store.manifest.records.values()]
        assert all((c is None) == (quant.experts == "nf4") for c in calibrated)


def test_threads_change_no_byte(source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(source, tmp_path / "out", DENSE, threads=2)
    assert files(tmp_path / "out") == files(whole)


def test_experts_with_too_few_tokens_fall_back_and_are_named(source: Path, tmp_path: Path) -> None:
    """On three tokens, of which many experts see none: hqq's bytes, and told by whom."""
    text = Calibration(torch.tensor([[1, 5, 9]]))
    report = run(source, tmp_path / "out", text=text)
    run(source, tmp_path / "hqq", QuantConfig(group_size=32), None)
    with Store.open(tmp_path / "out") as store, Store.open(tmp_path / "hqq") as hqq:
        for key, record in store.manifest.records.items():
            assert record.calibrated.method == "hqq" and record.calibrated.output_error == {}
            assert record.xxh3 == hqq.manifest.records[key].xxh3
        rows = expert_rows(store.manifest)
        assert sum(row["tokens"] for row in rows) == 3 * 2 * 3
        unseen = next(row for row in rows if row["tokens"] == 0)
        told = f"layer {unseen['layer']} expert {unseen['expert']}: 0 tokens, so hqq"
        assert told in describe(store)["fell_back"] and len(describe(store)["fell_back"]) == 12
    text_lines = "\n".join(report.lines())
    assert told in text_lines and "12 saw too few tokens" in text_lines


def test_an_expert_whose_gate_is_shut_falls_back_for_w2(tmp_path: Path) -> None:
    """Its tokens are many, but what w2 reads is zero."""
    raw = tiny_config(torch_dtype="bfloat16")
    tensors = tiny_tensors(read_model(raw))
    for expert in range(4):
        tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"].zero_()
    run(write_checkpoint(tmp_path / "shut", raw, tensors), tmp_path / "out")
    with Store.open(tmp_path / "out") as store:
        shut = store.manifest.records[ExpertKey(1, 0)].calibrated
    assert shut.method == "hqq" and set(shut.output_error) == {"w13"} and shut.tokens >= calibrated.LEAST


@pytest.mark.parametrize("regions", [1, 9, 14, 24, 33])
def test_a_broken_run_resumes_to_the_same_bytes(source: Path, whole: Path, tmp_path: Path, regions: int) -> None:
    with pytest.raises(Interrupted):
        run(source, tmp_path / "out", DENSE, progress=stop_after(regions))
    report = run(source, tmp_path / "out", DENSE)
    assert files(tmp_path / "out") == files(whole)
    assert 0 < report.resumed <= regions


def test_another_text_does_not_resume(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(source, tmp_path / "out", progress=stop_after(12))
    with pytest.raises(UsageError, match="another calibration"):
        run(source, tmp_path / "out", text=Calibration(TEXT.ids.flip(0)))
    with pytest.raises(UsageError, match="method"):
        run(source, tmp_path / "out", QuantConfig(group_size=32), None)


def test_a_run_killed_after_its_last_write_is_taken_over(source: Path, whole: Path, tmp_path: Path) -> None:
    """The journal is gone and the manifest tells what it knew."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for name, data in files(whole).items():
        (partial / name).write_bytes(data)
    assert run(source, tmp_path / "out", DENSE).resumed == 3 * 11 + 3
    assert files(tmp_path / "out") == files(whole)


def test_killed_at_random_moments(source: Path, whole: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    out, seconds = tmp_path / "out", None
    for share in (None, 0.35, 0.6, 0.8):
        target = out if share else tmp_path / "timed"
        process = warm_python.start(__file__, source, target, stdout=PIPE)
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        if share is None:
            assert process.wait(120) == 0
            seconds = time.monotonic() - start
            assert files(target) == files(whole)
            continue
        time.sleep(share * seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    if not out.exists():
        run(source, out, DENSE)
    assert files(out) == files(whole)


@pytest.mark.parametrize("name", ["model.layers.1.block_sparse_moe.experts.2.w1.weight",
                                  "model.layers.0.self_attn.o_proj.weight", "model.layers.2.input_layernorm.weight"])
@pytest.mark.parametrize("quant", [GPTQ, DENSE], ids=["int8", "int4"])
def test_damaged_weights_are_named_before_the_text_carries_them_on(tmp_path: Path, name: str,
                                                                  quant: QuantConfig) -> None:
    raw = tiny_config(torch_dtype="bfloat16")
    tensors = tiny_tensors(read_model(raw))
    tensors[name].view(-1)[5] = float("nan")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        run(write_checkpoint(tmp_path / "bad", raw, tensors), tmp_path / "out", quant)


def test_method_and_text_go_together(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a calibration"):
        run(source, tmp_path / "out", text=None)
    with pytest.raises(UsageError, match="takes no calibration"):
        run(source, tmp_path / "out", QuantConfig())
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_told_before_the_start(source: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "peak_bytes", lambda *_: 2**60)
    with pytest.raises(DoesNotFit, match="240 tokens needs"):
        run(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    run(Path(sys.argv[1]), Path(sys.argv[2]), DENSE)
