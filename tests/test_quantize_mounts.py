"""OUT on disks of its own: real mounts, in a namespace of the test's own, and folders whose parent is not writable.

What cannot work is refused before a weight is read; what can is a whole store afterwards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import UNQUANTIZED, write_tiny_checkpoint
from warm_python import WarmPython

from qmix.checkpoint import Checkpoint
from qmix.errors import DoesNotFit, QmixError, UsageError
from qmix.quantize import pipeline, quantize_checkpoint
from qmix.quantize.job import check_out
from qmix.quantize.target import INSIDE
from qmix.store import Store


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("mounts") / "tiny", seed=2)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight may be read."""
    def refuse(*args: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(pipeline, "_load", refuse)


def quantized(source: Path, out: Path, **options: Any) -> None:
    with Checkpoint.open(source) as checkpoint:
        quantize_checkpoint(checkpoint, out, UNQUANTIZED, threads=1, **options)


NAMESPACE = """
import ctypes, json, os, subprocess, sys
from pathlib import Path
import qmix.cli

ids = {"uid": os.getuid(), "gid": os.getgid()}
if ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x20000):  # of users and of mounts
    sys.exit("unshare: " + os.strerror(ctypes.get_errno()))
Path("/proc/self/setgroups").write_text("deny")
for name, number in ids.items():
    Path(f"/proc/self/{name}_map").write_text(f"0 {number} 1")
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
for step in json.loads(sys.argv[1]):
    if isinstance(step, str):
        subprocess.run(["sh", "-ec", step], check=True)
    elif pid := os.fork():
        print("rc", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        os.dup2(1, 2)
        sys.argv = ["qmix", *step]
        sys.exit(qmix.cli.main())
"""
Namespace = Callable[..., list[str]]
Arguments = Callable[..., list[str]]


@pytest.fixture
def in_namespace(source: Path, tmp_path: Path, warm_python: WarmPython) -> Namespace:
    """in_namespace(*STEPS) -> the lines that they print where mounts are their own. A step is lines of a shell, or the
    arguments of a command, whose exit code is printed."""
    def run(*steps: str | list[str]) -> list[str]:
        done = warm_python.run("-c", NAMESPACE, json.dumps(steps), cwd=tmp_path)
        if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
            pytest.skip(f"no mounts of one's own here: {done.stderr.strip()[:100]}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stdout
        return done.stdout.splitlines()

    return run


@pytest.fixture
def quantize(source: Path) -> Arguments:
    """The command `qmix quantize SOURCE`, followed by OUT and flags."""
    return lambda *args: ["quantize", str(source), "-t", "1", "--format", "keep", "--dense", "keep", *args]


MOUNTS = {"tmpfs": "mount -t tmpfs -o size=8m tmpfs out", "bind": "mkdir disk; mount --bind disk out"}


@pytest.mark.parametrize("kind", MOUNTS)
def test_a_mount_point(kind: str, in_namespace: Namespace, quantize: Arguments) -> None:
    """Empty as a Docker volume, then with --force over the store in it, through a link, and with lost+found."""
    found = in_namespace(f"mkdir out; {MOUNTS[kind]}; mkdir out/lost+found; ln -s out link", quantize("out"),
                         "echo $(ls -A out)", quantize("link", "--force"), ["verify", "--deep", "out"],
                         "ls -A; ls -A out")
    codes = [line for line in found if line.startswith("rc ")]
    assert codes == ["rc 0", "rc 0", "rc 0"], found
    store = ["config.json", "dense.safetensors", *(f"experts-0{i}.safetensors" for i in range(3)), "lost+found",
             "qmix.json"]
    assert " ".join(store) in found and found[-len(store):] == store
    assert [line for line in found if line in ("out.partial", "out.replaced", "store.partial")] == []


def test_the_free_space_is_that_of_the_mounted_disk(in_namespace: Namespace, quantize: Arguments) -> None:
    found = in_namespace("mkdir out; mount -t tmpfs -o size=300k tmpfs out", quantize("out"), "ls -A out")
    assert found[-1] == "rc 3", found  # and nothing stays behind
    assert any("needs" in line and "of disk" in line for line in found)


def test_a_mount_that_cannot_be_written(in_namespace: Namespace, quantize: Arguments, tmp_path: Path) -> None:
    found = in_namespace("mkdir out; mount -t tmpfs tmpfs out; mount -o remount,ro out", quantize("out"),
                         quantize("out/deep/er"))
    assert [line for line in found if line.startswith("rc")] == ["rc 1", "rc 1"], found
    assert sum("Read-only file system" in line for line in found) == 2 and not (tmp_path / "out.partial").exists()


def test_a_mount_with_other_files_is_kept(in_namespace: Namespace, quantize: Arguments) -> None:
    found = in_namespace("mkdir out; mount -t tmpfs tmpfs out; echo x > out/mine", quantize("out", "--force"),
                         "cat out/mine")
    assert found[-2:] == ["rc 2", "x"] and any("'mine'" in line for line in found), found


def test_a_store_of_a_lower_layer_of_an_overlay(source: Path, in_namespace: Namespace, quantize: Arguments,
                                                   tmp_path: Path) -> None:
    """As a store in a container's image: the kernel refuses to rename its folder, and that only at the end."""
    quantized(source, tmp_path / "low" / "out")
    found = in_namespace("""
        mkdir up top; mount -t tmpfs tmpfs up; mkdir up/upper up/work
        mount -t overlay overlay -o lowerdir=low,upperdir=up/upper,workdir=up/work top""",
        quantize("top/out", "--force", "--group-size", "32", "--dense", "int4"), ["verify", "--deep", "top/out"],
        "ls -A top")
    assert [line for line in found if line.startswith("rc")] == ["rc 0", "rc 0"], found
    assert found[-1] == "out"


def test_a_folder_whose_parent_is_not_writable(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /mnt/models, made by root and given to a user."""
    out, access, mkdir = tmp_path / "root" / "out", os.access, Path.mkdir
    out.mkdir(parents=True)

    def make(self: Path, *rest: Any, **options: Any) -> None:
        if self.parent == out.parent and self != out:
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *rest, **options)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != out.parent and access(path, mode))
    monkeypatch.setattr(Path, "mkdir", make)
    quantized(source, out)
    with Store.open(out) as store:
        assert store.verify(deep=True) == []
    assert not (out / INSIDE).exists() and [p.name for p in out.parent.iterdir()] == ["out"]
    quantized(source, out, force=True)


@pytest.mark.usefixtures("unread")
def test_what_cannot_work_is_refused_before_a_weight_is_read(source: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, kind in (("file", UsageError), ("file/below", UsageError), ("full", UsageError), ("loop", QmixError),
                       ("x" * 300, QmixError)):
        for check in (quantized, quantized_later):
            with pytest.raises(kind):
                check(source, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "loop"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10, 9, 1))
    with pytest.raises(DoesNotFit):
        quantized(source, tmp_path / "out")


class Usage:
    def __init__(self, total: int, used: int, free: int):
        self.total, self.used, self.free = total, used, free


def quantized_later(source: Path, out: Path) -> None:
    """What a command does that measures for hours before it quantizes (--fit)."""
    with Checkpoint.open(source) as checkpoint:
        check_out(checkpoint, out, False)


def test_looking_at_out_leaves_no_trace(source: Path, tmp_path: Path) -> None:
    quantized_later(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    quantized_later(source, tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["there"] and list((tmp_path / "there").iterdir()) == []
