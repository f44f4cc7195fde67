"""benchmarks/gpu.py from start to end, in a process of its own, with the CPU in a GPU's place."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from warm_python import WarmPython

ROOT = Path(__file__).parents[1]


def test_without_a_card_nothing_is_tried(tmp_path: Path, warm_python: WarmPython) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    ordered = [word for word in command(tmp_path) if word != "--stand-in"]
    done = warm_python.run(*ordered, env=ENV)
    assert done.returncode == 2, done.stderr
    (file,) = tmp_path.glob("*-gpu-unknown.json")
    found = json.loads(file.read_text())["sections"]
    assert found["machine"]["state"] == "failed" and "torch sees no NVIDIA GPU" in found["machine"]["reason"]
    assert {result["state"] for name, result in found.items() if name != "machine"} == {"skipped", "unavailable"}


def command(out: Path, *options: str) -> list[str]:
    return [str(ROOT / "benchmarks" / "gpu.py"), "--stand-in", "--out", str(out), "--threads", "1",
            "--layers", "2", *options]


ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_run_from_start_to_end(tmp_path: Path, warm_python: WarmPython) -> None:
    (work := tmp_path / "work").mkdir()
    names = "check;bandwidth;24 GB;12 GB, split off;mixed, whole in 24 GB;kernels;peer: llama.cpp"
    done = warm_python.run(*command(tmp_path, "--only", names, "--work", str(work)), env=ENV)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*-gpu-stand-in.json")
    found = json.loads(file.read_text())
    states = {name: result["state"] for name, result in found["sections"].items()}
    assert states.pop("peer: llama.cpp") == "unavailable"
    assert set(states.values()) == {"done"} and len(states) == 9, states
    rows = [row for result in found["sections"].values() for row in result.get("found", {}).get("rows", ())]
    assert {row["what"] for row in rows} == {"check", "decode", "prefill", "kernel"}
    for row in rows:
        if row["what"] == "decode":
            assert row["tokens"] > 0 and 0 <= row["hit_rate"] <= row["found_rate"] <= 1 and row["waits"] > 0
    paged = found["sections"]["12 GB, split off"]["found"]["rows"][0]
    assert paged["missing"] > 0 and paged["bytes_up"] > 0 and paged["computed"] == 0
    assert found["processes"] == 1  # served all of them
    assert found["sections"]["mixed, whole in 24 GB"]["found"]["rows"][0]["missing"] == 0
    report = file.with_suffix(".md").read_text()
    assert report in done.stdout and "## Decoding" in report and "| 24 GB | local | 16 |" in report
    assert not list(work.iterdir())


def test_what_is_there_at_sigterm_is_kept(tmp_path: Path, warm_python: WarmPython) -> None:
    (work := tmp_path / "work").mkdir()
    with warm_python.start(*command(tmp_path, "--only", "check;store", "--work", str(work)), env=ENV) as process:
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until and not any(
                "tolerance" in file.read_text() for file in tmp_path.glob("*.json")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert found["ended"] == "by SIGTERM" and found["sections"]["check"]["found"]["tolerance"]
    assert not list(work.iterdir())
