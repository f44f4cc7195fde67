"""`qmix doctor --tune`, with the CPU as the GPU, Triton's interpreter, and a timer that reads no clock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from helpers import write_tiny_checkpoint
from test_cli import qmix
from test_cuda import needs_triton

from qmix import render
from qmix.checkpoint import Checkpoint
from qmix.commands.doctor.tuning import tune
from qmix.config import QuantConfig
from qmix.device import StandIn
from qmix.errors import DoesNotFit, QmixError, UsageError
from qmix.kernels.configs import INTERPRETED, Attention, Config, Dense, Gemv, Matmul
from qmix.kernels.tuned import Card, load
from qmix.kernels.tuning import Work
from qmix.quantize import quantize_checkpoint

OPTIONS: dict[str, list[Config]] = {"gemv": [Gemv(32, 2)], "dense": [Dense(8, 32, 2)], "matmul": [Matmul(16, 64, 4, 2)],
                                    "attention": [Attention(16, 16, 4, 1)]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    source = write_tiny_checkpoint(folder / "tiny", num_local_experts=3)
    with Checkpoint.open(source) as checkpoint:
        quantize_checkpoint(checkpoint, folder / "tiny-int4", QuantConfig(group_size=32))
    return folder / "tiny-int4"


@pytest.fixture
def device() -> Iterator[StandIn]:
    found = StandIn(half=torch.float16, triton=True, nbytes=2**20)
    yield found
    found.close()


@needs_triton
def test_what_is_faster_is_kept_for_this_card(store: Path, device: StandIn, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer says that the candidates of two kernels are twice as fast, and that of a third takes long."""
    from qmix.kernels import trials

    started: list[str] = []
    real = trials.cases

    def cases(kernel: str, shapes: trials.Shapes, at: trials.TrialDevice) -> list[trials.Case]:
        def noting(case: trials.Case) -> trials.Case:
            def start(configs: object) -> Work:
                changed = getattr(configs, kernel) != getattr(INTERPRETED, kernel)
                started.append(kernel if changed else "default")
                return case.start(configs)  # type: ignore[arg-type]

            return trials.Case(case.name, start)

        return [noting(case) for case in real(kernel, replace(shapes, prompts=((20, 0),)), at)]

    monkeypatch.setattr(trials, "cases", cases)
    said: list[str] = []
    file = tmp_path / "cache" / "kernels.json"
    found = tune(store, file=file, say=said.append, today=date(2026, 1, 31), device=device, options=OPTIONS.__getitem__,
                 timer=lambda work: {"gemv": 0.5, "attention": 0.5, "dense": 3.0}.get(started[-1], 1.0))
    kept = load(file, Card.of(device.name, device.torch_device), said.append)
    assert kept is not None and kept.model == "tiny-int4" and kept.measured == "2026-01-31"
    assert kept.configs == replace(INTERPRETED, gemv=Gemv(32, 2), attention=Attention(16, 16, 4, 1))
    rows = {row["kernel"]: row for row in found["kernels"]}
    assert rows["gemv"]["configuration"] == "threads 32, unroll 2" and rows["gemv"]["gain_percent"] == 100
    assert rows["dense"]["instead_of"] == rows["matmul"]["instead_of"] == "-" and rows["dense"]["gain_percent"] == 0
    assert all(row["tried"] == 1 and row["skipped"] == 0 for row in rows.values()) and found["skipped"] == []
    assert len(said) == 5 and "gemv: threads 32, unroll 2, 100 % faster (1 tried, 0 skipped)" in said
    assert json.loads(render.document(found, as_json=True)) == found and render.document(found, as_json=False)


@needs_triton
def test_nothing_is_written_where_it_fails(store: Path, device: StandIn, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qmix.kernels.trials.cases", short)
    with pytest.raises(DoesNotFit, match="too small for the weights of gemv"):
        tune(store, file=tmp_path / "f", say=lambda line: None, device=device, timer=lambda work: 1.0)
    with pytest.raises(UsageError, match="not a store"):
        tune(tmp_path, file=tmp_path / "f", say=lambda line: None, device=device, timer=lambda work: 1.0)
    assert not (tmp_path / "f").exists()


def test_without_a_gpu_or_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="--tune: torch sees no NVIDIA GPU here") as refused:
        tune(None, file=tmp_path / "f", say=lambda line: None)
    assert refused.value.exit_code == 2 and refused.value.cure
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("qmix.commands.doctor.tuning.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="need Triton, which is not installed"):
        tune(None, file=tmp_path / "f", say=lambda line: None)

    def busy(index: int) -> None:
        raise DoesNotFit("--device cuda:0: out of memory", "close other programs")

    monkeypatch.setattr("qmix.commands.doctor.tuning.find_spec", lambda name: object())
    monkeypatch.setattr("qmix.commands.doctor.tuning.open_cuda", busy)
    with pytest.raises(QmixError, match="--tune: out of memory") as short:
        tune(None, file=tmp_path / "f", say=lambda line: None)
    assert short.value.exit_code == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_without_a_gpu() -> None:
    done = qmix("doctor", "--tune")
    assert done.returncode == 2 and "--tune: torch sees no NVIDIA GPU" in done.stderr and not done.stdout
