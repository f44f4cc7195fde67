"""Memory within cgroup limits, version 1 and 2, from a fake root folder."""

from __future__ import annotations

from pathlib import Path

from qmix import hardware


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


def test_no_cgroup_is_the_machine(tmp_path: Path) -> None:
    found = hardware.memory(tmp_path)
    assert 0 < found.available <= found.total
    assert hardware.physical_cores() >= 1
