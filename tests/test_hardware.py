"""Memory and cores from a fake root folder; bandwidths with clocks and failures of the test's own."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import mmap
import os
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from qmix import hardware
from qmix.errors import ConfigError, DoesNotFit, QmixError, UsageError
from qmix.hardware import bandwidth, cores, disk
from qmix.hardware.bandwidth import Bandwidths, load, measure, measure_h2d, measure_ram, measure_vram, save
from qmix.hardware.disk import (
    DiskEffort,
    DiskReport,
    DiskSpeed,
    direct_refusal,
    filesystem,
    measure_disk,
    scratch_file,
)
from qmix.hardware.memory import anonymous_memory, hugepages
from qmix.sizes import GIB, MIB

QUICK = DiskEffort(nbytes=4 * MIB, seconds=60, rounds=2, depths=(1, 2), chunks=(256 * 1024, MIB))
GOOD = Bandwidths(43.5, 2.4, 4 * MIB, 4, True, None, None, "2026-01-31")


def fake_root(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def nothing(line: str) -> None:
    raise AssertionError(f"said: {line}")


# memory and cores

def test_version_2_takes_every_level_above(tmp_path: Path) -> None:
    root = fake_root(tmp_path, {
        "proc/self/cgroup": "0::/user/app\n",
        "sys/fs/cgroup/user/app/memory.max": "max\n",
        "sys/fs/cgroup/user/app/memory.current": "5\n",
        "sys/fs/cgroup/user/memory.max": "1000000\n",
        "sys/fs/cgroup/user/memory.current": "400000\n",
        "sys/fs/cgroup/user/memory.stat": "anon 1\ninactive_file 100000\n",
    })
    assert hardware.cgroup_limits(root) == [(1000000, 300000)]
    assert hardware.memory(root) == hardware.Memory(1000000, 700000)


def test_version_1(tmp_path: Path) -> None:
    root = fake_root(tmp_path, {
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n3:memory:/x\n",
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2000\n",
        "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "2500\n",
        "sys/fs/cgroup/memory/x/memory.stat": "total_inactive_file 0\n",
    })
    assert hardware.memory(root) == hardware.Memory(2000, 0)


G = 2**30


def in_cgroup(tmp_path: Path, **files: int | str) -> hardware.Memory:
    """Memory within a cgroup of version 2 whose folder has these files, memory_max being memory.max."""
    found = {f"sys/fs/cgroup/a/b/{name.replace('_', '.', 1)}": f"{text}\n" for name, text in files.items()}
    return hardware.memory(fake_root(tmp_path, {"proc/self/cgroup": "0::/a/b\n", **found}))


def test_page_cache_of_a_cgroup_is_free(tmp_path: Path) -> None:
    """A model that was copied or verified fills the cgroup with cache; what was read twice is on the active list."""
    stat = [f"anon {G // 2}", f"file {7 * G}", f"inactive_file {G}", f"active_file {6 * G}", "odd", "x y z", "a -"]
    found = in_cgroup(tmp_path, memory_max=8 * G, memory_current=8 * G, memory_stat="\n".join(stat))
    assert found == hardware.Memory(8 * G, 7 * G)


def test_page_cache_of_a_cgroup_of_version_1(tmp_path: Path) -> None:
    """total_ counts the groups below too, which usage_in_bytes does as well."""
    group = "sys/fs/cgroup/memory/x/"
    root = fake_root(tmp_path, {
        "proc/self/cgroup": "3:memory:/x\n", group + "memory.limit_in_bytes": f"{4 * G}\n",
        group + "memory.usage_in_bytes": f"{4 * G}\n",
        group + "memory.stat": f"inactive_file 1\nactive_file 2\ntotal_inactive_file {G}\ntotal_active_file {2 * G}\n"})
    assert hardware.memory(root) == hardware.Memory(4 * G, 3 * G)


@pytest.mark.parametrize(("most", "high", "want"), [
    ("max", 2 * G, 2 * G), (4 * G, 2 * G, 2 * G), (2 * G, 4 * G, 2 * G), (2 * G, "max", 2 * G), (3 * G, 0, 0)])
def test_the_lower_of_max_and_high_counts(tmp_path: Path, most: int | str, high: int | str, want: int) -> None:
    found = in_cgroup(tmp_path, memory_max=most, memory_high=high, memory_current=G // 4, memory_stat="inactive_file 0")
    assert found == hardware.Memory(want, max(0, want - G // 4))


def test_the_least_along_the_path_counts(tmp_path: Path) -> None:
    """The tightest limit may be one level's memory.high and the fullest group another's."""
    root = fake_root(tmp_path, {
        "proc/self/cgroup": "0::/user.slice/app.scope\n",
        "sys/fs/cgroup/user.slice/app.scope/memory.max": f"{6 * G}\n",
        "sys/fs/cgroup/user.slice/app.scope/memory.current": f"{G}\n",
        "sys/fs/cgroup/user.slice/memory.high": f"{5 * G}\n",
        "sys/fs/cgroup/user.slice/memory.current": f"{4 * G}\n",
        "sys/fs/cgroup/user.slice/memory.stat": f"inactive_file 0\nactive_file {2 * G}\n"})
    assert hardware.cgroup_limits(root) == [(6 * G, G), (5 * G, 2 * G)]
    assert hardware.memory(root) == hardware.Memory(5 * G, 3 * G)


def test_a_list_of_cgroups_that_is_not_one_is_no_limit(tmp_path: Path) -> None:
    root = fake_root(tmp_path, {"proc/self/cgroup": "\nodd\n1:name\n0::/\n"})
    assert hardware.cgroup_limits(root) == []


def test_no_cgroup_is_the_machine(tmp_path: Path) -> None:
    found = hardware.memory(tmp_path)
    assert 0 < found.available <= found.total
    assert hardware.physical_cores() >= 1


def test_the_package_keeps_its_function_after_its_module_is_imported() -> None:
    import qmix.hardware.memory  # noqa: F401 - would rebind the name, were it not imported already

    assert callable(hardware.memory)


def test_what_the_process_holds(tmp_path: Path) -> None:
    root = fake_root(tmp_path, {"proc/self/status": "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"})
    assert (hardware.resident_bytes(root), hardware.peak_bytes(root)) == (MIB, 2 * MIB)
    before = hardware.resident_bytes()
    held = anonymous_memory(64 * MIB)  # not from the heap, which may have kept as much from an earlier test
    held.write(b"x" * (64 * MIB))
    after = hardware.resident_bytes()
    assert after - before > 48 * MIB and hardware.peak_bytes() >= after - 4 * MIB and len(held)
    elsewhere = hardware.resident_bytes(tmp_path / "no such root")
    assert 0.5 < elsewhere / after < 2, "psutil counts the same thing"


def test_memory_for_reads_is_private() -> None:
    """Shared memory, Python's default, gets no huge pages, and direct reads into small ones are half as fast."""
    buffer = anonymous_memory(8 * MIB)
    address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    assert len(buffer) == 8 * MIB and address % mmap.PAGESIZE == 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        (start, end), rights = (int(part, 16) for part in line.split()[0].split("-")), line.split()[1]
        if start <= address < end:
            assert rights == "rw-p"
            return
    raise AssertionError("not mapped")


@pytest.mark.parametrize(("files", "want"), [
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
      "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
    ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000\n",
      "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
    ({}, None),
])
def test_cpu_quota(tmp_path: Path, files: dict[str, str], want: float | None) -> None:
    assert cores.cpu_quota(fake_root(tmp_path, files)) == want


def processors(*siblings: str, **more: str) -> dict[str, str]:
    """Files of /sys: the processors that share each one's core, and for each name more of it, by processor."""
    cpu = "sys/devices/system/cpu/cpu"
    found = {f"{cpu}{i}/topology/core_cpus_list": f"{text}\n" for i, text in enumerate(siblings)}
    return found | {f"{cpu}{i}/{name.replace('__', '/')}": f"{text}\n"
                    for name, texts in more.items() for i, text in enumerate(texts.split())}


TWO_KINDS = processors("0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7")  # two cores of two threads, four of one
INTEL = {**TWO_KINDS, "sys/devices/cpu_core/cpus": "0-3\n", "sys/devices/cpu_atom/cpus": "4-7\n"}
ARM = processors("0", "1", "2", "3", "4", "5", cpu_capacity="462 462 871 871 871 1024")
CLOCKS = processors("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7",
                    cpufreq__cpuinfo_max_freq="5000000 5200000 3500000 3500000 5000000 5200000 3500000 3500000")
QUOTA = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}


@pytest.mark.parametrize(("files", "allowed", "physical", "compute"), [
    (processors("0,2", "1,3", "0,2", "1,3"), range(4), 2, 2),
    (processors("0,2", "1,3", "0,2", "1,3"), [0, 2], 1, 1),  # both threads of one core
    (processors("0,2", "1,3", "0,2", "1,3"), [2, 3], 2, 2),
    (INTEL, range(8), 6, 2), (INTEL, [0, 2, 4, 5], 4, 2), (INTEL, [4, 5, 6], 3, 3),  # alone, slow cores compute
    ({**TWO_KINDS, "sys/devices/cpu_core/cpus": "0-7\n"}, range(8), 6, 6),
    (ARM, range(6), 6, 4), (ARM, [0, 1], 2, 2), (ARM, [0, 1, 2], 3, 1),
    (CLOCKS, range(8), 4, 2), (CLOCKS, [2, 3, 7], 2, 2),
    (processors("0", "1", "2", cpufreq__cpuinfo_max_freq="5700000 5500000"), range(3), 3, 3),  # one has no clock
    (processors(*map(str, range(8))) | QUOTA, range(8), 8, 2), (INTEL | QUOTA, range(4), 2, 2),
    (processors("0", "1") | {**QUOTA, "sys/fs/cgroup/cpu.max": "50000 100000\n"}, range(2), 2, 1),
    ({path.replace("core_cpus_list", "thread_siblings_list"): text for path, text in CLOCKS.items()}, range(8), 4, 2),
])
def test_threads_for_the_fast_cores(tmp_path: Path, files: dict[str, str], allowed: Iterable[int], physical: int,
                                    compute: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed))
    root = fake_root(tmp_path, files)
    assert (hardware.physical_cores(root), hardware.compute_cores(root)) == (physical, compute)


def test_cores_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: 2)
    for allowed, count in ((range(4), 2), ([3], 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, allowed=allowed: set(allowed))
        assert hardware.physical_cores(tmp_path) == hardware.compute_cores(tmp_path) == count


def test_last_level_cache_counts_each_part_once(tmp_path: Path) -> None:
    parts = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}
    files = {}
    for cpu, shared in parts.items():
        for index, (level, size, where) in enumerate([("1", "32K", str(cpu)), ("3", "32768K", shared)]):
            base = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            files |= {f"{base}/level": level, f"{base}/size": size, f"{base}/shared_cpu_list": where + "\n"}
    assert cores.last_level_cache(fake_root(tmp_path, files)) == 64 * MIB
    assert cores.last_level_cache(tmp_path / "elsewhere") == 0


def test_what_the_processor_can(tmp_path: Path) -> None:
    root = fake_root(tmp_path, {"proc/cpuinfo": "model name\t: Fast One\nflags\t\t: sse avx2 avx_vnni\n",
                                "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n"})
    assert cores.cpu_model(root) == "Fast One"
    assert cores.cpu_instructions(root) == {"avx2": True, "avx512": False, "vnni": True, "bf16": False,
                                            "dotprod": False, "i8mm": False}
    (root / "proc/cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\n")
    assert {name for name, here in cores.cpu_instructions(root).items() if here} == {"dotprod", "i8mm", "bf16"}
    assert hugepages(root) == "madvise" and hugepages(tmp_path / "elsewhere") == "unknown"


# disk

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


# RAM and GPU

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
