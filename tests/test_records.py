"""Records straight from the disk: O_DIRECT and its fallbacks, checksums, files that change or go away."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import write_tiny_checkpoint

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey, QuantConfig
from qmix.errors import StoreError
from qmix.formats import memory
from qmix.offload.pool import slot_pool
from qmix.quantize import quantize_checkpoint
from qmix.store import RecordFiles, Store
from qmix.store import records as records_module

KEY = ExpertKey(1, 2)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    with Checkpoint.open(write_tiny_checkpoint(folder / "tiny")) as checkpoint:
        quantize_checkpoint(checkpoint, folder / "store", QuantConfig())
    return folder / "store"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


@pytest.fixture
def buffer(original: Path) -> torch.Tensor:
    with Store.open(original) as store:
        return slot_pool(1, store.layout.record_bytes)[0]


def opened(folder: Path, verify: str = "first", say: Callable[[str], None] = lambda line: None) -> RecordFiles:
    with Store.open(folder) as store:
        return store.records(verify, say)  # type: ignore[arg-type]


def fetch(files: RecordFiles, buffer: torch.Tensor, key: ExpertKey = KEY) -> bytes:
    must = files.must_check(key)
    files.read(key, memory(buffer), 0)
    if must:
        files.check(key, buffer)
    return bytes(memory(buffer))


def by_store(folder: Path, buffer: torch.Tensor) -> bytes:
    with Store.open(folder) as store:
        store.read_record(KEY, buffer)
    return bytes(memory(buffer))


def refuse(monkeypatch: pytest.MonkeyPatch, where: str, number: int = errno.EINVAL) -> list[int]:
    """Let the system refuse O_DIRECT, as some file systems do when a file is opened and some only at a read."""
    refused: list[int] = []
    real_open, real_read = os.open, records_module.read_exact

    def open_(path: object, flags: int, *rest: int) -> int:
        if where == "open" and flags & os.O_DIRECT:
            refused.append(flags)
            raise OSError(number, os.strerror(number), str(path))
        return real_open(path, flags, *rest)  # type: ignore[arg-type]

    def read(fd: int, target: memoryview, offset: int) -> None:
        if where == "read" and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(fd)
            raise OSError(number, os.strerror(number))
        real_read(fd, target, offset)

    monkeypatch.setattr(records_module.os, "open", open_)
    monkeypatch.setattr(records_module, "read_exact", read)
    return refused


def test_reads_past_the_page_cache_where_the_system_allows(folder: Path, buffer: torch.Tensor) -> None:
    files = opened(folder)
    assert fetch(files, buffer) == by_store(folder, buffer)
    files.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("where", ["open", "read"])
def test_falls_back_to_buffered_reads_and_says_so_once(folder: Path, buffer: torch.Tensor, where: str, number: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    want, said = by_store(folder, buffer), []
    refused = refuse(monkeypatch, where, number)
    files = opened(folder, say=said.append)
    buffer.zero_()
    assert fetch(files, buffer) == want
    fetch(files, buffer, ExpertKey(0, 0))
    fetch(files, buffer, ExpertKey(1, 3))
    assert not files.direct
    assert len(said) == 1 and "refuses O_DIRECT" in said[0] and where in said[0]
    assert refused
    files.close()


def test_two_threads_that_are_refused_at_once_both_go_on(folder: Path, buffer: torch.Tensor,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    want, both = by_store(folder, buffer), threading.Barrier(2)
    real = records_module.read_exact

    def read(fd: int, target: memoryview, offset: int) -> None:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            if both.wait(10):
                time.sleep(0.05)  # the other has fallen back by now
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd, target, offset)

    monkeypatch.setattr(records_module, "read_exact", read)
    files, buffers = opened(folder), slot_pool(2, len(buffer))
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda one: fetch(files, one), buffers)) == [want, want]
    files.close()


def test_other_errors_are_not_taken_for_a_refusal(folder: Path, buffer: torch.Tensor,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "read", errno.EIO)
    files = opened(folder)
    with pytest.raises(StoreError, match=r"experts-01\.safetensors: layers\.1\.experts\.2: Input/output error"):
        fetch(files, buffer)
    files.close()


def test_a_short_file_names_record_and_file(folder: Path, buffer: torch.Tensor) -> None:
    files = opened(folder)
    path = folder / "experts-01.safetensors"
    os.truncate(path, path.stat().st_size - 2 * buffer.numel())
    with pytest.raises(StoreError, match=r"experts-01\.safetensors: layers\.1\.experts\.2: .*short"):
        fetch(files, buffer)
    files.close()


def damage(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-5000 - path.stat().st_size // 4, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


@pytest.mark.parametrize(("verify", "refused"), [("first", True), ("always", True), ("never", False)])
def test_damage_is_found_as_often_as_was_asked(folder: Path, buffer: torch.Tensor, verify: str,
                                               refused: bool) -> None:
    damage(folder / "experts-01.safetensors")
    files = opened(folder, verify)
    if refused:
        with pytest.raises(StoreError, match=r"layers\.1\.experts\.2: its bytes are not those"):
            fetch(files, buffer)
        assert files.must_check(KEY)
    else:
        fetch(files, buffer)
    files.close()


def test_a_file_that_is_written_to_is_checked_from_then_on(folder: Path, buffer: torch.Tensor) -> None:
    said: list[str] = []
    files = opened(folder, say=said.append)
    fetch(files, buffer)
    assert not files.must_check(KEY)
    damage(folder / "experts-01.safetensors")
    for _ in range(2):
        with pytest.raises(StoreError, match="its bytes are not those"):
            fetch(files, buffer)
    assert len(said) == 1 and "written to, renamed or deleted while it is in use" in said[0]
    fetch(files, buffer, ExpertKey(0, 0))
    assert not files.must_check(ExpertKey(0, 0))
    files.close()


def test_a_change_that_puts_the_times_back_is_noticed_too(folder: Path, buffer: torch.Tensor) -> None:
    files = opened(folder)
    fetch(files, buffer)
    path = folder / "experts-01.safetensors"
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(StoreError, match="its bytes are not those"):
        fetch(files, buffer)
    files.close()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_store_that_goes_away_is_read_as_it_was(folder: Path, original: Path, buffer: torch.Tensor, how: str) -> None:
    want = by_store(folder, buffer)
    files = opened(folder)
    if how == "deleted":
        shutil.rmtree(folder)
    else:
        (folder / "new").write_bytes(bytes((folder / "experts-01.safetensors").stat().st_size))
        (folder / "new").rename(folder / "experts-01.safetensors")
    buffer.zero_()
    assert fetch(files, buffer) == want
    files.close()
