"""Bandwidths of RAM and of a GPU, with clocks and failures of the test's own, and the file that keeps the figures."""

from __future__ import annotations

import errno
import itertools
import json
import os
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from qmix import hardware
from qmix.errors import ConfigError, QmixError
from qmix.hardware import bandwidth
from qmix.hardware.bandwidth import Bandwidths, load, measure, measure_h2d, measure_ram, measure_vram, save
from qmix.hardware.disk import DiskReport, DiskSpeed
from qmix.sizes import GIB, MIB

GOOD = Bandwidths(43.5, 2.4, 4 * MIB, 4, True, None, None, "2026-01-31")


def nothing(line: str) -> None:
    raise AssertionError(f"said: {line}")


def test_ram_is_read_by_all_threads_and_the_setting_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda: 0)
    real, asked = torch.set_num_threads, []
    monkeypatch.setattr("torch.set_num_threads", lambda n: (asked.append(n), real(n)))
    seconds = itertools.count(0.0, 0.5)
    found = measure_ram(2, nbytes=4 * MIB, repeats=3, seconds=1000, say=nothing, clock=lambda: next(seconds))
    assert found == 4 * MIB / 0.5 / 1e9 and asked == [2, 1] and torch.get_num_threads() == 1


def test_ram_that_is_short_is_measured_small_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda: 32 * MIB)
    monkeypatch.setattr(bandwidth, "memory", lambda: hardware.Memory(GIB, 40 * MIB))
    seconds = itertools.count()
    assert measure_ram(1, say=said.append, clock=lambda: float(next(seconds))) == 10 * MIB / 1e9
    assert len(said) == 1 and "10.0 MiB" in said[0] and "32.0 MiB of cache" in said[0]


def test_ram_is_written_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory never written is one page of zeros, which the cache holds: its sum would be 0."""
    sums: list[float] = []
    monkeypatch.setattr(bandwidth, "_median_seconds", lambda work, *_: sums.append(float(work())) or 1.0)
    measure_ram(1, nbytes=MIB, say=lambda line: None)
    assert sums == [MIB / 8]


def test_median_of_repeats_within_the_time() -> None:
    for durations, seconds, want in (([9, 5, 1, 2], 100, 2), ([9, 5, 1, 2], 5, 5), ([9, 5], 0, 5)):
        now, left = [0.0], list(durations)

        def work(now: list[float] = now, left: list[int] = left) -> None:
            now[0] += left.pop(0)

        assert bandwidth._median_seconds(work, 3, seconds, lambda now=now: now[0]) == want


def test_no_gpu_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert measure_h2d(say=nothing) is None


def test_copies_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic and the order, with tensors of the CPU in the place of the GPU's."""
    real, made = torch.empty, []

    def empty(nbytes: int, dtype: torch.dtype, device: str = "cpu", pin_memory: bool = False) -> torch.Tensor:
        made.append((nbytes, device, pin_memory))
        return real(nbytes, dtype=dtype)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.empty", empty)
    seconds = itertools.count()
    found = measure_h2d(nbytes=1000, repeats=1, say=nothing, clock=lambda: float(next(seconds)))
    assert found == (1e-6, 1e-6)
    assert made == [(1000, "cuda", False), (1000, "cpu", True), (1000, "cpu", False)]

    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    said: list[str] = []
    monkeypatch.setattr("torch.empty", full)
    assert measure_h2d(say=said.append) is None
    assert said == ["copies to the GPU were not measured: CUDA out of memory."]


def test_memory_of_the_gpu_by_copies_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight copies of 1000 bytes in a second: 16,000 bytes read and written; and what has no room is said."""
    assert not torch.cuda.is_available() and measure_vram(say=nothing) is None
    real, synchronized = torch.empty, []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: synchronized.append(True))
    monkeypatch.setattr("torch.empty", lambda nbytes, dtype, device: real(nbytes, dtype=dtype))
    seconds = itertools.count()
    assert measure_vram(nbytes=1000, repeats=1, say=nothing, clock=lambda: float(next(seconds))) == 1.6e-5
    assert len(synchronized) == 2, "once for the call that does not count"

    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    said: list[str] = []
    monkeypatch.setattr("torch.empty", full)
    assert measure_vram(say=said.append) is None
    assert said == ["the GPU's memory was not measured: CUDA out of memory."]


def test_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "measure_ram", lambda **_: 43.4567)
    monkeypatch.setattr(bandwidth, "measure_h2d", lambda **_: (25.123, 7.0))
    monkeypatch.setattr(bandwidth, "measure_vram", lambda **_: 912.34)
    report = DiskReport((DiskSpeed(4, 4 * MIB, 2.3456), DiskSpeed(1, MIB, 1.0)), True)
    assert measure(report, today=date(2026, 1, 31), say=nothing) == Bandwidths(
        43.5, 2.35, 4 * MIB, 4, True, 25.1, 7.0, "2026-01-31", 912.0)
    monkeypatch.setattr(bandwidth, "measure_h2d", lambda **_: None)
    monkeypatch.setattr(bandwidth, "measure_vram", lambda **_: None)
    assert measure(None, today=date(2026, 1, 31), say=nothing) == Bandwidths(
        43.5, None, 0, 0, False, None, None, "2026-01-31")


# the file of figures

def test_figures_come_back(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "hardware.json"
    assert load(path, nothing) is None
    for figures in (GOOD, replace(GOOD, h2d_gbps=25, h2d_pageable_gbps=6.5, vram_gbps=912.0),
                    Bandwidths(1e-3, None, 0, 0, False, None, None, "2026-12-01")):
        save(figures, path)
        assert load(path, nothing) == figures
    assert list(path.parent.iterdir()) == [path]
    for half in ({"disk_gbps": None}, {"disk_gbps": None, "disk_chunk": 0, "disk_depth": 0}):
        with pytest.raises(ConfigError, match="disk_"):
            replace(GOOD, **half)


def test_files_from_before_a_figure_still_load(tmp_path: Path) -> None:
    old = asdict(GOOD)
    del old["vram_gbps"]
    (tmp_path / "hardware.json").write_text(json.dumps({"qmix_bandwidths": 1, **old}))
    assert load(tmp_path / "hardware.json", nothing) == GOOD and GOOD.vram_gbps is None


@pytest.mark.parametrize("field", [
    {"vram_gbps": 0}, {"vram_gbps": "900"},
    {"ram_gbps": None}, {"ram_gbps": 0}, {"ram_gbps": -1.0}, {"ram_gbps": float("nan")}, {"ram_gbps": float("inf")},
    {"ram_gbps": 10**400}, {"ram_gbps": True}, {"ram_gbps": "43"}, {"disk_gbps": 0.0}, {"disk_gbps": 1e-300},
    {"disk_chunk": 0}, {"disk_chunk": 5000}, {"disk_chunk": 4096.0}, {"disk_chunk": 2**40}, {"disk_depth": 0},
    {"disk_depth": 10**9}, {"disk_depth": True}, {"disk_direct": 1}, {"h2d_gbps": []}, {"h2d_pageable_gbps": {}},
    {"measured": "yesterday"}, {"measured": "20260131"}, {"measured": "2026-02-30"}, {"measured": 20260131},
    {"measured": "\x1b[2J"}])
def test_figures_that_make_no_sense(field: dict[str, Any], tmp_path: Path) -> None:
    (name,) = field
    with pytest.raises(ConfigError, match=rf"^{name}: got "):
        replace(GOOD, **field)
    said: list[str] = []
    path = tmp_path / "hardware.json"
    path.write_text(json.dumps({"qmix_bandwidths": 1, **asdict(GOOD), **field}))
    assert load(path, said.append) is None
    assert len(said) == 1 and f"ignored ({name}: got" in said[0] and said[0].isprintable() and len(said[0]) < 400


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"[" * 60000, b"\xff\xfe", b"\0" * 100, b"x" * 70000, b'{"qmix_bandwidths": 1}',
    b'{"qmix_bandwidths": 2}', b'{"ram_gbps": 40.0}', b"1" * 5000,
    json.dumps({"qmix_bandwidths": 1, **asdict(GOOD), "__class__": "x"}).encode()])
def test_a_foreign_file_is_ignored_in_one_line(content: bytes, tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "hardware.json"
    path.write_bytes(content)
    assert load(path, said.append) is None
    assert len(said) == 1 and said[0].startswith(f"{path}: ignored (") and said[0].isprintable()


def test_something_else_in_the_files_place(tmp_path: Path) -> None:
    said: list[str] = []
    pipe, folder, loop = tmp_path / "pipe", tmp_path / "folder", tmp_path / "loop"
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    for path in (pipe, folder, loop):
        assert load(path, said.append) is None
    assert len(said) == 3 and "not a regular file" in said[0]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hardware.json"
    save(GOOD, path)

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", full)
        with pytest.raises(QmixError, match="No space left"):
            save(replace(GOOD, ram_gbps=1.0), path)
    assert load(path, nothing) == GOOD and list(tmp_path.iterdir()) == [path]
    with pytest.raises(QmixError, match="cannot be written"):
        save(GOOD, path / "below a file")
