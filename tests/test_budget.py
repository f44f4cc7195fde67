"""--ram is a promise about the whole process: at the start, in a long prefill, while decoding. On real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import write_tiny_checkpoint
from tokenizer_files import spm_model

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.quantize import quantize_checkpoint

MIB = 2**20
CGROUP = Path("/sys/fs/cgroup/memory")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MiB of experts in records of 3.4 MiB: a budget that is broken by a few of them shows."""
    folder = tmp_path_factory.mktemp("budget")
    source = write_tiny_checkpoint(folder / "source", alike=True, vocab_size=512, hidden_size=1024,
                                   intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
                                   num_key_value_heads=2, num_local_experts=16, max_position_embeddings=4096)
    (source / "tokenizer.model").write_bytes(spm_model())
    with Checkpoint.open(source) as checkpoint:
        quantize_checkpoint(checkpoint, folder / "store", QuantConfig(method="rtn"), threads=1)
    shutil.rmtree(source)
    return folder / "store"


def command(store: Path, ram: int) -> list[str]:
    return [sys.executable, "-m", "qmix", "generate", str(store), "--raw", "-p", "the fox " * 900, "-c", "4096", "-n",
            "12", "--temp", "0", "--ram", str(ram), "--json"]


def run(args: list[str], **how: Any) -> tuple[dict[str, Any], int]:
    """(the JSON document, VmHWM of the process in bytes, as it saw it itself: wait4 would count the fork of ours)."""
    done = subprocess.run(args, capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found, found["memory"]["peak"]


@pytest.fixture(scope="module")
def least(store: Path) -> int:
    """Bytes that the command refuses to go below here: the libraries alone take 245 to 260 MiB, by machine."""
    done = subprocess.run(command(store, 400 * MIB), capture_output=True, text=True, check=False)
    found = re.search(r"needs (\d+) MiB", done.stderr)
    assert done.returncode == 3 and found is not None, done.stderr
    return int(found[1]) * MIB


@pytest.mark.parametrize("extra", [4, 64])
def test_the_whole_process_stays_within_its_budget(store: Path, least: int, extra: int) -> None:
    """A few MiB above the least, and with slots for half of the experts."""
    ram = least + extra * MIB
    found, peak = run(command(store, ram))
    assert found["offload"]["slots"] < 64
    assert peak <= ram
    assert peak > 0.5 * ram, "the slots are not there"


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup of our own (version 1), where the system lets us make one."""
    folder = CGROUP / f"qmix-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").read_text()
    except OSError:
        pytest.skip("no memory cgroup of version 1 can be made here")
    yield folder
    folder.rmdir()


def test_it_lives_in_a_cgroup_of_its_budget(store: Path, least: int, group: Path) -> None:
    ram = least + 4 * MIB
    (group / "memory.limit_in_bytes").write_text(str(ram))
    found, peak = run(command(store, ram), preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    assert peak <= ram
    assert "oom_kill 0" in (group / "memory.oom_control").read_text()
    assert found["offload"]["slots"] < 64


def test_auto_respects_the_cgroup(store: Path, group: Path) -> None:
    limit = 720 * MIB
    (group / "memory.limit_in_bytes").write_text(str(limit))
    args = [part if part != str(limit) else "auto" for part in command(store, limit)]
    found, peak = run(args, preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    assert peak <= limit
    assert found["offload"]["slots"] < 64
