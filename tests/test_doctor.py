"""The report of `qmix doctor`, on machines that the test makes up around the real one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections import namedtuple
from datetime import date
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qmix import hardware, render
from qmix.commands.doctor import report as doctor
from qmix.errors import DoesNotFit, UsageError
from qmix.hardware.bandwidth import Bandwidths, load, save
from qmix.hardware.disk import DiskEffort, direct_refusal
from qmix.kernels import cpu, native, reference
from qmix.kernels.layer import TORCH
from qmix.sizes import GIB, MIB

QUICK = DiskEffort(nbytes=2 * MIB, seconds=60, rounds=1, depths=(1, 2), chunks=(256 * 1024, MIB))
TODAY = date(2026, 1, 31)
HEALTHY = {
    "proc/cpuinfo": "model name\t: Fast One\nflags\t\t: avx2 avx512f avx512_vnni avx512_bf16\n",
    "proc/sys/kernel/osrelease": "6.1.0\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
}


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without problems, whatever the tests run on; each test breaks one thing."""
    monkeypatch.setattr("qmix.hardware.memory", lambda: hardware.Memory(32 * GIB, 24 * GIB))
    monkeypatch.setattr("qmix.hardware.physical_cores", lambda root: 4)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "version", lambda name: "1.2.3")
    monkeypatch.setattr(doctor, "filesystem", lambda folder: "ext4")
    pick_kernel(monkeypatch, cpu.int4_linear, "the fast one")


def pick_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Any, name: str, line: str = "") -> None:
    def select(formats: list[str], blocks: list[int], say: Any, activations: str) -> Any:
        if line:
            say(line)
        return SimpleNamespace(kernels={(formats[0], blocks[0]): kernel}, names={formats[0]: name},
                               layer=TORCH)

    monkeypatch.setattr(doctor, "select", select)


def machine(tmp_path: Path, **files: str) -> Path:
    root = tmp_path / "root"
    for name, text in (HEALTHY | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def run(tmp_path: Path, folder: Path | None = None, bandwidth: bool = False, root: Path | None = None,
        said: list[str] | None = None) -> dict[str, Any]:
    return doctor.run(folder, bandwidth=bandwidth, cache_file=tmp_path / "cache" / "hardware.json",
                      say=(said if said is not None else []).append, effort=QUICK, scratch_bytes=4 * MIB,
                      ram_bytes=4 * MIB, today=TODAY, root=root or machine(tmp_path), speeds=None)


def problems(report: dict[str, Any]) -> list[str]:
    assert all(row["problem"] and row["cure"] for row in report["problems"])
    return [row["problem"] for row in report["problems"]]


@pytest.fixture
def disk_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    if direct_refusal(folder):
        pytest.skip("no O_DIRECT in the folder for temporary files")
    return folder


def test_a_healthy_machine_has_no_problems(tmp_path: Path, disk_folder: Path) -> None:
    said: list[str] = []
    report = run(tmp_path, disk_folder, said=said)
    assert report["problems"] == [] and said == []
    assert list(report) == ["machine", "libraries", "kernels", "gpu", "disk", "bandwidths", "problems"]
    about = report["machine"]
    assert about["cpu"] == "Fast One" and about["physical_cores"] == 4 and about["system"] == "Linux 6.1.0"
    assert about["instructions"] == {"avx2": True, "avx512": True, "vnni": True, "bf16": True, "dotprod": False,
                                     "i8mm": False}
    assert about["memory"]["usable_bytes"] == 32 * GIB and about["memory"]["available_bytes"] == 24 * GIB
    assert report["disk"] == {"folder": str(disk_folder), "filesystem": "ext4", "direct_reads": "accepted",
                              "free_bytes": report["disk"]["free_bytes"]}
    assert report["bandwidths"] == {"source": "not measured: run qmix doctor --bandwidth"}
    assert [(row["format"], row["block"]) for row in report["kernels"]["table"]] == [
        *((name, block) for name in ("int4", "int3", "int2") for block in (64, 32)), ("mxfp4", 64),
        ("int8", "-")]
    assert not (tmp_path / "cache").exists() and list(disk_folder.iterdir()) == [], "looking leaves nothing behind"
    assert json.loads(render.document(report, as_json=True)) == report
    assert "  cpu: Fast One" in render.document(report, as_json=False).splitlines()


@pytest.mark.parametrize(("files", "want", "cure"), [
    ({"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"}, "huge pages are off", "madvise"),
    ({"proc/self/cgroup": "0::/x\n", "sys/fs/cgroup/x/cpu.max": "250000 100000\n"},
     "cores: 4, but a cgroup grants the time of 2.5", "raise the container's CPU limit"),
    ({"proc/driver/nvidia/version": "NVRM\n"}, "torch sees no GPU", "CUDA")])
def test_settings_in_the_way(files: dict[str, str], want: str, cure: str, tmp_path: Path) -> None:
    report = run(tmp_path, root=machine(tmp_path, **files))
    (problem,) = problems(report)
    assert want in problem and cure in report["problems"][0]["cure"]


@pytest.mark.parametrize(("memory", "want"), [
    ((4 * GIB, 3 * GIB), ["memory: 4.0 GiB may be used"]),
    ((32 * GIB, 2 * GIB), ["memory: 2.0 GiB of 32.0 GiB available"]), ((8 * GIB, 4 * GIB), [])])
def test_little_memory(memory: tuple[int, int], want: list[str], tmp_path: Path,
                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.hardware.memory", lambda: hardware.Memory(*memory))
    assert problems(run(tmp_path)) == want


def test_other_systems_are_untested_and_wsl_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wsl = machine(tmp_path, **{"proc/sys/kernel/osrelease": "5.15.0-microsoft-standard-WSL2\n"})
    report = run(tmp_path, root=wsl)
    assert "WSL" in report["machine"]["system"] and ".wslconfig" in report["machine"]["system"]
    assert report["problems"] == []
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    report = run(tmp_path)
    assert report["machine"]["system"].endswith(", untested")
    assert len(problems(report)) == 1 and "tested on Linux" in problems(report)[0]


def test_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("bitsandbytes", "triton"):
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(doctor, "version", version)
    report = run(tmp_path)
    assert report["libraries"]["triton"] == report["libraries"]["bitsandbytes"] == "not installed"
    assert report["libraries"]["torch"] == "1.2.3"
    assert problems(report) == ["bitsandbytes is not installed"], "triton is optional without a GPU"


def test_slow_kernels_are_a_problem_and_what_they_say_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pick_kernel(monkeypatch, reference.packed_linear, "reference", "the self-test failed")
    report = run(tmp_path)
    assert problems(report) == [
        f"{name} runs on the slow reference kernel" for name in ("int4", "int3", "int2", "mxfp4", "int8")]
    assert report["kernels"]["notes"] == [{"note": "the self-test failed"}]


def test_bandwidth_is_measured_kept_and_found_again(tmp_path: Path, disk_folder: Path) -> None:
    said: list[str] = []
    report = run(tmp_path, disk_folder, bandwidth=True, said=said)
    assert report["problems"] == [] and list(disk_folder.iterdir()) == []
    assert any(line.startswith("measuring the disk with a test file of 4.0 MiB") for line in said)
    assert [(row["threads"], row["chunk"]) for row in report["disk"]["reads"]] == [
        (1, "256 KiB"), (1, "1.0 MiB"), (2, "256 KiB"), (2, "1.0 MiB")]
    figures = dict(report["bandwidths"])
    assert figures.pop("source") == "measured now" and figures["disk_direct"] and figures["measured"] == "2026-01-31"
    assert figures["disk_gbps"] == max(row["gbps"] for row in report["disk"]["reads"])
    assert figures["h2d_gbps"] is figures["vram_gbps"] is None and figures["ram_gbps"] > 0
    cache = tmp_path / "cache" / "hardware.json"
    assert load(cache, said.append) == Bandwidths(**figures)
    again = run(tmp_path, disk_folder)
    assert again["bandwidths"] == {"source": str(cache), **figures} and "reads" not in again["disk"]


def test_a_store_is_measured_by_its_own_files(tmp_path: Path, disk_folder: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WORTH_READING", 2 * MIB)
    monkeypatch.setattr(doctor, "scratch_file", None)  # calling it would fail
    for i in range(2):
        (disk_folder / f"experts-{i:02}.safetensors").write_bytes(bytes(MIB))
    (disk_folder / "experts-99.safetensors").symlink_to("nowhere")
    report = run(tmp_path, disk_folder, bandwidth=True)
    assert len(report["disk"]["reads"]) == 4 and report["problems"] == []


def test_without_a_folder_no_disk_is_measured_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    report = run(tmp_path, bandwidth=True, said=said)
    assert report["bandwidths"]["disk_gbps"] is None and report["bandwidths"]["ram_gbps"] > 0
    assert any("no disk was measured" in line for line in said)
    assert report["disk"] == {"folder": "none named: the disk was not examined"}


@pytest.mark.parametrize("at", ["open", "read"])
def test_refused_direct_reads_are_a_problem(at: str, tmp_path: Path, disk_folder: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    real_open, real_read = os.open, os.preadv

    def opening(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if at == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest, **named)

    def reading(fd: int, buffers: list[Any], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(fd, buffers, offset)

    monkeypatch.setattr("qmix.hardware.disk.os.open", opening)
    monkeypatch.setattr("qmix.hardware.disk.os.preadv", reading)
    for bandwidth in (False, True):
        report = run(tmp_path, disk_folder, bandwidth=bandwidth)
        assert report["disk"]["direct_reads"] == "refused: Invalid argument"
        assert problems(report) == ["ext4 refuses O_DIRECT: reads are buffered, take page cache, and are mostly slower"]
    assert report["bandwidths"]["disk_direct"] is False and report["bandwidths"]["disk_gbps"] > 0


def test_a_full_disk_does_not_cut_the_report_short(tmp_path: Path, disk_folder: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("qmix.hardware.disk.shutil.disk_usage", lambda folder: usage(GIB, GIB, 1000))
    report = run(tmp_path, disk_folder, bandwidth=True)
    (problem,) = problems(report)
    assert "the disk was not measured" in problem and "1000 B free" in problem
    assert report["bandwidths"]["disk_gbps"] is None and report["bandwidths"]["ram_gbps"] > 0


@pytest.mark.parametrize(("kind", "want"), [("tmpfs", "in memory"), ("9p", "out of Windows"), ("nfs4", "network")])
def test_folders_that_are_on_no_disk_of_this_machine(kind: str, want: str, tmp_path: Path, disk_folder: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "filesystem", lambda folder: kind)
    report = run(tmp_path, disk_folder, bandwidth=True)
    (problem,) = problems(report)
    assert want in problem and ("reads" in report["disk"]) == (kind != "tmpfs")


def test_memory_too_short_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise DoesNotFit("512 MiB cannot be allocated to measure RAM: Cannot allocate memory", "free some memory")

    monkeypatch.setattr("qmix.hardware.bandwidth.measure_ram", short)
    report = run(tmp_path, bandwidth=True)
    assert report["bandwidths"] == {"source": "not measured"} and "Cannot allocate" in problems(report)[0]


def test_a_damaged_cache_is_said_and_replaced(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "hardware.json"
    cache.parent.mkdir()
    cache.write_text("[" * 50000)
    said: list[str] = []
    assert run(tmp_path, said=said)["bandwidths"]["source"].startswith("not measured")
    assert len(said) == 1 and "ignored" in said[0]
    measured = run(tmp_path, bandwidth=True)
    assert run(tmp_path)["bandwidths"] == measured["bandwidths"] | {"source": str(cache)}


def test_figures_that_cannot_be_kept_are_still_shown(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    report = run(tmp_path, bandwidth=True)
    assert report["bandwidths"]["source"] == "measured now" and report["bandwidths"]["ram_gbps"] > 0
    assert len(problems(report)) == 1 and "not kept" in problems(report)[0]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("missing", "file"):
        with pytest.raises(UsageError, match=f"{name}: not a folder"):
            run(tmp_path, tmp_path / name)


def test_old_figures_serve_with_their_date(tmp_path: Path) -> None:
    old = Bandwidths(40.0, None, 0, 0, False, 25.0, 6.0, "2020-02-29")
    save(old, tmp_path / "cache" / "hardware.json")
    assert run(tmp_path)["bandwidths"]["measured"] == "2020-02-29"


def test_the_real_machine_without_bitsandbytes_being_imported(tmp_path: Path) -> None:
    """The one run with nothing made up: kernels are really selected, and libraries only looked up."""
    script = ("import json, sys\nfrom pathlib import Path\nfrom qmix.commands.doctor import report\n"
              f"report = report.run(Path({str(tmp_path)!r}), bandwidth=False, cache_file=Path({str(tmp_path)!r}) / 'x',"
              " say=print)\nassert 'bitsandbytes' not in sys.modules\nprint(json.dumps(report))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["libraries"]["torch"] == torch.__version__ and report["libraries"]["bitsandbytes"][0].isdigit()
    assert len(report["kernels"]["table"]) == 8 and all(row["kernel"] for row in report["kernels"]["table"])
    assert report["kernels"]["norm_router_rotary"] == " ".join(["native", *native.wanted_levels()[:1]]
                                                               if native.wanted_levels() else ["torch"])
    assert report["machine"]["memory"]["usable_bytes"] > 0 and report["disk"]["filesystem"] != "unknown"
