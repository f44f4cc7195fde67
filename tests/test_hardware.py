"""Memory and cores from a fake root folder."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from qmix import hardware
from qmix.hardware import cores
from qmix.hardware.memory import anonymous_memory, hugepages
from qmix.sizes import MIB


def fake_root(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


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
