"""SIGKILL at any moment: whatever is left, the same command again ends in the same bytes.

The job runs in real processes, forked from a server that has torch loaded. Each change that it makes to the
disk is counted; a process kills itself right before its n-th one, or, where that is a write, in the middle.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import UNQUANTIZED, write_tiny_checkpoint

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.errors import Interrupted, QmixError, StoreError, UsageError
from qmix.quantize import quantize_checkpoint, target
from qmix.store import Store, writer

RTN = QuantConfig(method="rtn")


def run(source: str, out: str, force: bool = False, quant: QuantConfig = RTN) -> None:
    with Checkpoint.open(source) as checkpoint:
        quantize_checkpoint(checkpoint, out, quant, threads=1, force=force)


def mount(out: Path, setattr: Callable[[Any, str, Any], None]) -> None:
    """OUT is a mount point as far as the job can tell: it is named as one, and cannot be renamed or removed."""
    def refuse(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Path, *other: Any, **options: Any) -> Any:
            if out in (self, *other):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
            return change(self, *other, **options)
        return changed

    setattr(target, "is_mount", lambda folder: folder == out)
    for name in ("rename", "replace", "rmdir"):
        setattr(Path, name, refuse(getattr(Path, name)))


def child(source: str, out: str, force: bool, kill_at: int, mounted: bool = False) -> None:
    """Run the job in this process; before its `kill_at`-th change to the disk the process dies. The number
    of changes goes to the file `changes` beside the source."""
    changes = 0
    if mounted:
        mount(Path(out), setattr)

    def step(change: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        nonlocal changes
        changes += 1
        if changes == kill_at:
            if change is write:
                fd, data, offset = arguments
                write(fd, memoryview(data)[:len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*arguments, **options)

    def watch(owner: Any, name: str) -> None:
        change = getattr(owner, name)
        setattr(owner, name, lambda *arguments, **options: step(change, *arguments, **options))

    write = writer.write_exact
    watch(writer, "write_exact")
    for name in ("write", "fsync", "truncate"):
        watch(os, name)
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        watch(Path, name)
    run(source, out, force)
    Path(source).with_name("changes").write_text(str(changes))


def serve() -> None:
    """Fork a child for each job on stdin and answer with its pid; reap it only when asked to, so that the pid
    stays its own until then."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(*json.loads(line))
                os._exit(0)
            finally:
                os._exit(1)
        print("pid", pid, flush=True)
        assert sys.stdin.readline() == "reap\n"
        print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Server:
    """A process that has torch loaded and no threads, and forks one job at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
        self._pid = 0

    def start(self, *arguments: Any) -> None:
        """Start a job."""
        self._tell(json.dumps(arguments))
        self._pid = self._hear("pid")

    def signal(self, number: int) -> None:
        """Send the job a signal; it may have ended, but its pid is not another's yet."""
        assert self._pid > 1
        os.kill(self._pid, number)

    def status(self) -> int:
        """Wait for the job: 0, or minus the signal that ended it."""
        self._pid = 0
        self._tell("reap")
        return self._hear("status")

    def stop(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0

    def _tell(self, line: str) -> None:
        print(line, file=self._process.stdin, flush=True)

    def _hear(self, what: str) -> int:
        word, _, number = self._process.stdout.readline().partition(" ")
        assert word == what, (what, word, number)
        return int(number)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("kill") / "tiny", seed=5, num_local_experts=4,
                                   num_hidden_layers=2)
    (folder / "generation_config.json").write_text("{}")
    return str(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(source, str(out))
    return files(out)


def count(server: Server, source: str, out: Path, force: bool, mounted: bool = False) -> int:
    """How many changes to the disk an uninterrupted run makes."""
    server.start(source, str(out), force, 0, mounted)
    assert server.status() == 0
    return int(Path(source).with_name("changes").read_text())


def killed(server: Server, source: str, out: Path, force: bool, step: int, mounted: bool = False) -> None:
    server.start(source, str(out), force, step, mounted)
    assert server.status() == -signal.SIGKILL, f"step {step} was never reached"


def no_half_store_opens(out: Path) -> None:
    for folder in (out, out.with_name("out.partial")):
        try:
            with Store.open(folder) as store:
                assert store.verify(deep=True) == [], f"{folder} opens, though it is not whole"
        except (StoreError, UsageError):
            pass


def test_killed_at_every_kind_of_step(server: Server, source: str, whole: dict[str, bytes],
                                      tmp_path: Path) -> None:
    """The steps around start and finish, and a sample of those between; each killed run's folder is resumed
    by a run that is killed too, and that one by a run that is not."""
    last = count(server, source, tmp_path / "counted" / "out", False)
    assert files(tmp_path / "counted" / "out") == whole and last > 60
    between = random.Random(0).sample(range(12, last - 14), 6)
    for step in [*range(1, 12, 2), *between, *range(last - 14, last + 1)]:
        out = tmp_path / str(step) / "out"
        killed(server, source, out, False, step)
        no_half_store_opens(out)
        if not out.exists() and step % 3 == 0:
            killed(server, source, out, False, 9)
            no_half_store_opens(out)
        if not out.exists():
            run(source, str(out))
        assert files(out) == whole, f"killed at step {step} of {last}"
        assert [p.name for p in out.parent.iterdir()] == ["out"], f"killed at step {step} of {last}"


def test_killed_while_replacing(server: Server, source: str, whole: dict[str, bytes],
                                tmp_path: Path) -> None:
    """With --force there is a whole store at every moment: the old one, under its own name or beside it,
    or the new one."""
    run(source, str(tmp_path / "another" / "out"), quant=UNQUANTIZED)

    def prepare(name: str) -> Path:
        return shutil.copytree(tmp_path / "another" / "out", tmp_path / name / "out")

    last = count(server, source, prepare("counted"), True)
    old = files(prepare("old"))
    for step in range(last - 18, last + 1):
        out = prepare(str(step))
        killed(server, source, out, True, step)
        replaced = out.with_name("out.replaced")
        standing = [files(folder) for folder in (out, replaced) if folder.exists()]
        assert old in standing or whole in standing, f"killed at step {step} of {last}"
        no_half_store_opens(out)
        if step % 2:
            with pytest.raises(UsageError, match="exists"):
                run(source, str(out))
            assert files(out) in (old, whole)
        run(source, str(out), force=True)
        assert files(out) == whole, f"killed at step {step} of {last}"
        assert [p.name for p in out.parent.iterdir()] == ["out"], f"killed at step {step} of {last}"


@pytest.mark.parametrize("force", [False, True])
def test_killed_in_a_mount_point(server: Server, source: str, whole: dict[str, bytes], tmp_path: Path, force: bool,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT cannot be renamed, so files are moved up one by one; with --force a store stands there. A run that is killed
    is followed by one that is killed too, and that by one that is not. Nothing is ever half of a store, nor beside
    OUT, and what the disk began with stays."""
    def prepare(name: str) -> Path:
        out = tmp_path / name / "out"
        if force:
            run(source, str(out), quant=UNQUANTIZED)
        (out / "lost+found").mkdir(parents=True)
        return out

    def stores(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    last = count(server, source, prepare("counted"), force, True)
    old = stores(prepare("old"))
    assert stores(tmp_path / "counted" / "out") == whole and last > 60
    for step in [2, 9, last - 30, *range(last - 23, last, 2), last]:
        out = prepare(str(step))
        killed(server, source, out, force, step, True)
        for again in (last - 8, 5) if step % 3 == 0 else ():
            if not (out / "qmix.json").exists():
                server.start(source, str(out), force, again, True)
                server.status()
        try:
            with Store.open(out) as store:
                assert store.verify(deep=True) == [] and stores(out) in (old, whole), f"killed at step {step} of {last}"
        except (StoreError, UsageError):
            assert "qmix.json" not in stores(out), f"killed at step {step} of {last}"
        with monkeypatch.context() as patch:
            mount(out, patch.setattr)
            if stores(out) != whole:
                run(source, str(out), force=force)
        assert stores(out) == whole, f"killed at step {step} of {last}"
        assert [p.name for p in out.parent.iterdir()] == ["out"] and (out / "lost+found").is_dir()


def test_killed_while_starting_over(server: Server, source: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    """--force drops an unfinished store made with other arguments; killed at it, the next run goes on."""
    def stop(done: int, total: int, label: str) -> None:
        raise KeyboardInterrupt

    for step in range(2, 9):
        out = tmp_path / str(step) / "out"
        with Checkpoint.open(source) as checkpoint, pytest.raises(Interrupted):
            quantize_checkpoint(checkpoint, out, UNQUANTIZED, progress=stop)
        killed(server, source, out, True, step)
        run(source, str(out), force=True)
        assert files(out) == whole, f"killed at step {step}"


def test_killed_at_random_moments(server: Server, source: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    """By the clock, from outside, again and again on the same folder, until a run gets through."""
    start = time.monotonic()
    count(server, source, tmp_path / "timed" / "out", False)
    seconds, moments, interrupted = time.monotonic() - start, random.Random(1), 0
    for attempt in range(4):
        out = tmp_path / str(attempt) / "out"
        while not out.exists() and interrupted < 20:
            server.start(source, str(out), False, 0)
            time.sleep(moments.uniform(0, 0.8) * seconds)
            server.signal(signal.SIGKILL)
            interrupted += server.status() == -signal.SIGKILL
            no_half_store_opens(out)
        if not out.exists():
            run(source, str(out))
        assert files(out) == whole and [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_second_process_is_refused(server: Server, source: str, tmp_path: Path) -> None:
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal.jsonl"
    server.start(source, str(out), False, 0)
    deadline = time.monotonic() + 60
    while not journal.exists() and not out.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    server.signal(signal.SIGSTOP)
    try:
        if journal.exists():
            with pytest.raises(QmixError, match="another qmix"):
                run(source, str(out))
    finally:
        server.signal(signal.SIGCONT)
    assert server.status() == 0
    with Store.open(out) as store:
        assert store.verify(deep=True) == []


if __name__ == "__main__":
    serve()
