"""Reading a disk, with clocks and failures of the test's own; the file that it is measured on, and its filesystem."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
from collections import Counter, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qmix.errors import DoesNotFit, QmixError, UsageError
from qmix.hardware import disk
from qmix.hardware.disk import (
    DiskEffort,
    DiskReport,
    DiskSpeed,
    direct_refusal,
    filesystem,
    measure_disk,
    scratch_file,
)
from qmix.sizes import GIB, MIB

QUICK = DiskEffort(nbytes=4 * MIB, seconds=60, rounds=2, depths=(1, 2), chunks=(256 * 1024, MIB))


def nothing(line: str) -> None:
    raise AssertionError(f"said: {line}")


class Disk:
    """os.preadv as a disk of one chunk a second: counts reads, drives a clock, refuses what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[int], int] = lambda fd: 0):
        self.now, self.reads, self.refuse = 0.0, [], refuse
        self.real = os.preadv
        monkeypatch.setattr("qmix.hardware.disk.os.preadv", self.preadv)

    def preadv(self, fd: int, buffers: list[Any], offset: int) -> int:
        if code := self.refuse(fd):
            raise OSError(code, os.strerror(code))
        view = torch.frombuffer(buffers[0], dtype=torch.uint8)
        self.reads.append((is_direct(fd), offset, len(view), view.data_ptr() % mmap.PAGESIZE))
        self.now += 1
        return self.real(fd, buffers, offset)

    def clock(self) -> float:
        return self.now


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "experts-00.safetensors"
    path.write_bytes(os.urandom(3 * MIB + 123))
    return path


def test_direct_reads_are_aligned_and_bounded_by_bytes(big_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if direct_refusal(big_file):
        pytest.skip("no O_DIRECT in the folder for temporary files")
    fake = Disk(monkeypatch)
    progress: list[tuple[int, int]] = []
    report = measure_disk([big_file], QUICK, say=nothing,
                          progress=lambda done, total, label: progress.append((done, total)))
    assert report.direct and [(row.depth, row.chunk) for row in report.rows] == list(QUICK.pairs)
    assert all(direct and address == 0 and offset % size == 0 and offset + size <= 3 * MIB
               for direct, offset, size, address in fake.reads)
    assert Counter(size for _, _, size, _ in fake.reads) == {256 * 1024: 2 * 16, MIB: 2 * 4}  # 4 MiB a pair
    assert {offset for _, offset, size, _ in fake.reads if size == MIB} == {0, MIB, 2 * MIB}
    assert progress[-1] == (16 * MIB, 16 * MIB) and progress == sorted(progress) and len(progress) == 8


def test_speeds_are_bytes_by_seconds(big_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Disk(monkeypatch)
    effort = DiskEffort(nbytes=GIB, seconds=6, rounds=2, depths=(1,), chunks=(4096, MIB))
    report = measure_disk([big_file], effort, say=lambda line: None, clock=fake.clock)
    assert [row.gbps for row in report.rows] == [4096 / 1e9, MIB / 1e9]
    assert Counter(size for _, _, size, _ in fake.reads) == {4096: 6, MIB: 6}, "the time bounds it"


def test_best_is_the_fastest_and_the_gentler_of_equals() -> None:
    rows = (DiskSpeed(8, 4, 2.0), DiskSpeed(2, 16, 2.0), DiskSpeed(2, 4, 2.0), DiskSpeed(1, 1, 1.9))
    assert DiskReport(rows, True).best == DiskSpeed(2, 4, 2.0)


@pytest.mark.parametrize("at", ["open", "read"])
def test_refused_direct_reads_are_said_and_measured_buffered(
        at: str, big_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[int] = []
    if at == "open":
        fake, real = Disk(monkeypatch), os.open

        def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(path, flags, *rest, **named)

        monkeypatch.setattr("qmix.hardware.disk.os.open", refusing)
    else:
        fake = Disk(monkeypatch, lambda fd: errno.EINVAL if is_direct(fd) else 0)
    monkeypatch.setattr("qmix.hardware.disk.os.posix_fadvise",
                        lambda fd, start, size, advice: forgotten.append((len(fake.reads), start, size, advice)))
    said: list[str] = []
    report = measure_disk([big_file], QUICK, say=said.append)
    assert not report.direct and len(report.rows) == 4
    assert len(said) == 1 and "O_DIRECT refused (Invalid argument)" in said[0] and "buffered" in said[0]
    assert direct_refusal(big_file) == "Invalid argument"
    # Each of the 8 turns starts with pages dropped, and reads no chunk twice: 12 of 256 KiB or 3 of 1 MiB are
    # in the file, 2 MiB are the turn's share.
    assert [count for count, *_ in forgotten] == [0, 8, 10, 18, 20, 28, 30, 38, 40]
    assert {tuple(rest) for _, *rest in forgotten} == {(0, 0, os.POSIX_FADV_DONTNEED)}
    for turn in itertools.pairwise(count for count, *_ in forgotten):
        offsets = [offset for _, offset, _, _ in fake.reads[slice(*turn)]]
        assert len(set(offsets)) == len(offsets)


def test_a_buffered_turn_is_at_most_the_file(big_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Disk(monkeypatch, lambda fd: errno.EINVAL if is_direct(fd) else 0)
    measure_disk([big_file], DiskEffort(GIB, 60, 1, (2,), (MIB,)), say=lambda line: None)
    assert sorted(offset for _, offset, _, _ in fake.reads) == [0, MIB, 2 * MIB]


def test_a_system_without_direct_reads(big_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "DIRECT", 0)
    assert not measure_disk([big_file], QUICK, say=nothing).direct
    assert "no O_DIRECT" in str(direct_refusal(big_file))


@pytest.mark.parametrize("code", [errno.EIO, 0])
def test_a_file_that_cannot_be_read(code: int, big_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Disk(monkeypatch, lambda fd: code)
    monkeypatch.setattr(fake, "real", lambda *_: 0)  # the file has become shorter
    with pytest.raises(QmixError, match="cannot read its files"):
        measure_disk([big_file], QUICK, say=nothing)


def test_files_too_small_or_missing(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(1000))
    for files in ([tmp_path / "small"], []):
        with pytest.raises(UsageError, match="no file to measure"):
            measure_disk(files, QUICK, say=nothing)
    with pytest.raises(QmixError, match="No such file"):
        measure_disk([tmp_path / "missing"], QUICK, say=nothing)
    with pytest.raises(QmixError, match="No such file"):
        direct_refusal(tmp_path / "missing")


def test_no_descriptor_stays_open(big_file: Path) -> None:
    def interrupt(done: int, total: int, label: str) -> None:
        raise KeyboardInterrupt

    before = len(list(Path("/proc/self/fd").iterdir()))
    measure_disk([big_file], QUICK, say=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        measure_disk([big_file], QUICK, say=lambda line: None, progress=interrupt)
    direct_refusal(big_file.parent)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert list(big_file.parent.iterdir()) == [big_file]


@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt])
def test_a_scratch_file_is_removed_whatever_the_end(
        end: type[BaseException] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("qmix.hardware.disk.os.fsync", lambda fd: synced.append(os.fstat(fd).st_size))

    def use() -> None:
        with scratch_file(tmp_path, 17 * MIB) as path:
            assert path.stat().st_size == 17 * MIB and path.parent == tmp_path
            assert synced == [17 * MIB], "it is on the disk, or reading it would wait for its writing"
            assert len(set(path.read_bytes()[-4096:])) > 100, "no holes, nothing a file system could compress"
            if end:
                raise end

    if end:
        with pytest.raises(end):
            use()
    else:
        use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "want"), [
    (OSError(errno.ENOSPC, "No space left on device"), DoesNotFit),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), DoesNotFit),
    (OSError(errno.EIO, "Input/output error"), QmixError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_scratch_file_that_cannot_be_written(
        error: BaseException, want: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(fd: int, data: bytes, offset: int) -> None:
        os.pwrite(fd, data[:10], offset)
        raise error

    monkeypatch.setattr(disk, "write_exact", write)
    with pytest.raises(want) as caught, scratch_file(tmp_path, MIB):
        raise AssertionError("unreachable")
    assert caught.type is want and (isinstance(error, KeyboardInterrupt) or error.strerror in str(caught.value))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("qmix.hardware.disk.shutil.disk_usage", lambda folder: usage(GIB, 0, 300 * MIB))
    with pytest.raises(DoesNotFit, match=r"300 MiB free, a test file takes 100 MiB"), scratch_file(tmp_path, 100 * MIB):
        raise AssertionError("unreachable")
    with pytest.raises(QmixError, match="cannot write a test file"), scratch_file(tmp_path / "missing", MIB):
        raise AssertionError("unreachable")


def test_filesystem_is_that_of_the_nearest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = namedtuple("part", "mountpoint fstype")
    mounts = [part("/", "ext4"), part(str(tmp_path / "a"), "xfs"), part(str(tmp_path / "a"), "tmpfs"),
              part(str(tmp_path / "abc"), "nfs")]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts if all else [])
    assert filesystem(tmp_path) == "ext4"
    assert filesystem(tmp_path / "a" / "b") == "tmpfs", "the later mount hides the earlier one"
    assert filesystem(tmp_path / "ab") == "ext4"
