"""Downloads that break off, are refused or must not be made: through the command, against a server of this machine."""

from __future__ import annotations

import fcntl
import hashlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from hub_server import COMMIT, Hub, Served, repository, write_gguf
from warm_python import PIPE, WarmPython

from qmix import modelfiles
from qmix.checkpoint import SINGLE
from qmix.errors import CheckpointError
from qmix.hub import blobs
from qmix.hub.blobs import PARTIAL, free
from qmix.hub.limits import check_sizes
from qmix.hub.preview import headers_of
from qmix.hub.private import refetch

Command = Callable[..., subprocess.CompletedProcess[str]]
KEEP = ("--format", "keep", "-t", "1")
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from qmix.cli import main
main(sys.argv[2:])"""
CHUNK = 10 * 2**20  # bytes that the hub's library writes at a time


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    served = Served(repository(tmp_path / "repo"), tmp_path / "cache")
    yield served
    served.stop()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with weights of more than two chunks."""
    path = repository(tmp_path_factory.mktemp("large") / "repo", alike=True, hidden_size=512, intermediate_size=1024,
                      num_hidden_layers=2, num_local_experts=3)
    assert 2 * CHUNK < (path / SINGLE).stat().st_size < 3 * CHUNK
    return path


@pytest.fixture
def slow(large: Path, tmp_path: Path) -> Iterator[Served]:
    served = Served(large, tmp_path / "cache")
    yield served
    served.stop()


@pytest.fixture
def ggufs(tmp_path: Path) -> Iterator[Served]:
    write_gguf(tmp_path / "repo" / "name-Q8_0.gguf")
    write_gguf(tmp_path / "repo" / "deep" / "name-Q4_0.gguf", "Q4_0", split=12)
    (tmp_path / "repo" / "mmproj-F16.gguf").write_bytes(b"waste")
    served = Served(tmp_path / "repo", tmp_path / "cache")
    yield served
    served.stop()


@pytest.fixture
def qmix(warm_python: WarmPython, tmp_path: Path) -> Command:
    return lambda server, *args, **more: warm_python.run("-m", "qmix", *args, env=server.env | more, cwd=tmp_path)


def partials(tmp_path: Path) -> list[Path]:
    return [*tmp_path.rglob("*.qmix-partial")]


def test_a_lost_connection_is_taken_up_where_it_broke(slow: Served, qmix: Command, tmp_path: Path) -> None:
    """Within one run, and said."""
    slow.handler.cut[SINGLE] = [CHUNK + 1000]
    done = qmix(slow, "quantize", "org/name", "out", *KEEP)
    assert done.returncode == 0, done.stderr
    assert [first for first in slow.handler.ranges if first] == [CHUNK]
    assert "Trying to resume" in done.stderr and not partials(tmp_path)


def test_a_killed_download_goes_on(slow: Served, qmix: Command, tmp_path: Path, warm_python: WarmPython) -> None:
    slow.handler.cut[SINGLE], slow.handler.held = [CHUNK + 1000], threading.Event()
    with warm_python.start("-m", "qmix", "quantize", "org/name", "out", *KEEP, env=slow.env, cwd=tmp_path,
                           stderr=PIPE) as process:
        assert slow.handler.reached.wait(60)
        while not any(path.stat().st_size == CHUNK for path in partials(tmp_path)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    slow.handler.held.set()
    slow.handler.ranges.clear()
    done = qmix(slow, "quantize", "org/name", "out", *KEEP)
    assert done.returncode == 0 and "10.0 MiB of them are here from an earlier try" in done.stderr, done.stderr
    assert [first for first in slow.handler.ranges if first] == [CHUNK] and not partials(tmp_path)


def test_ctrl_c_while_it_downloads(server: Served, qmix: Command, tmp_path: Path, warm_python: WarmPython) -> None:
    server.handler.cut[SINGLE], server.handler.held = [2000], threading.Event()
    with warm_python.start("-m", "qmix", "quantize", "org/name", "out", *KEEP, env=server.env, cwd=tmp_path,
                           stderr=PIPE) as process:
        assert server.handler.reached.wait(60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()  # though the server says nothing more
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "stopped while it was fetched" in errors and not (tmp_path / "out").exists()
    assert qmix(server, "quantize", "org/name", "out", *KEEP).returncode == 0


def test_what_is_being_fetched_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    names = [f"{x * 64}{PARTIAL}" for x in "ab"]
    for name in names:
        (tmp_path / "blobs" / name).write_bytes(b"x" * 10000)
    (tmp_path / ".qmix-downloads").write_text("a" * 64 + "\n" + "b" * 64 + "\n")
    with open(tmp_path / "blobs" / names[0], "r+b") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        assert free(tmp_path) > 0
        assert [path.name for path in partials(tmp_path)] == names[:1]
    assert free(tmp_path) > 0 and not partials(tmp_path)


def test_bytes_that_were_changed_on_the_way(server: Served, qmix: Command, tmp_path: Path) -> None:
    """A half that an earlier try left is another file's: the sum shows that, and the next try begins anew."""
    assert qmix(server, "plan", "org/name").returncode == 0
    data = (server.handler.folder / SINGLE).read_bytes()
    blobs = tmp_path / "cache" / "hub" / "models--org--name" / "blobs"
    (blobs / f"{hashlib.sha256(data).hexdigest()}.qmix-partial").write_bytes(b"x" * 1000)
    done = qmix(server, "quantize", "org/name", "out", *KEEP)
    assert done.returncode == 4 and "not those that the hub promised" in done.stderr, done.stderr
    assert qmix(server, "quantize", "org/name", "out", *KEEP).returncode == 0


def test_a_server_that_is_busy_for_a_moment(server: Served, qmix: Command) -> None:
    server.handler.status[SINGLE] = [503, 500]
    assert qmix(server, "quantize", "org/name", "out", *KEEP).returncode == 0


@pytest.mark.parametrize(("setting", "want"), [
    ({"gated": True}, "on request only (gated)"),
    ({"token": "secret"}, "no such repository, or it is private (401)"),
])
def test_access_that_is_refused_is_one_line(server: Served, qmix: Command, setting: dict[str, object],
                                            want: str) -> None:
    for name, value in setting.items():
        setattr(server.handler, name, value)
    for source in ("org/name", "org/name:Q4_K_M"):
        done = qmix(server, "quantize", source, "out", *KEEP)
        assert done.returncode == 4 and want in done.stderr and "HF_TOKEN" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and done.stderr.count("\n") == 3


def test_the_token_is_sent(server: Served, qmix: Command) -> None:
    server.handler.token = "secret"
    done = qmix(server, "quantize", "org/name", "out", *KEEP, HF_TOKEN="secret")
    assert done.returncode == 0, done.stderr


def test_a_token_with_a_stray_character(server: Served, qmix: Command) -> None:
    done = qmix(server, "plan", "org/name", HF_TOKEN="hf_secret\u200btail")
    assert done.returncode == 4 and "a character that no token has" in done.stderr, done.stderr
    assert "secret" not in done.stderr and "tail" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
def test_a_checksum_that_leads_out_of_the_cache(server: Served, qmix: Command, tmp_path: Path, header: str) -> None:
    good = server.handler._file

    def bad(self: Hub, name: str, path: Path) -> None:
        if name == "tokenizer.model":
            self.answer(path.read_bytes(), **{"ETag": '"aaaaaaaa"', header: '"../../../../pwned"'})
        else:
            good(self, name, path)

    server.handler._file = bad
    done = qmix(server, "quantize", "org/name", "out", *KEEP)
    assert done.returncode == 4 and "no name of a file: '../../../../pwned'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not [*tmp_path.rglob("pwned*")]
    server.handler._file = good
    assert qmix(server, "plan", "org/name").returncode == 0


def test_revisions(server: Served, qmix: Command) -> None:
    done = qmix(server, "quantize", "org/name", "out", "--revision", "none", *KEEP)
    assert done.returncode == 4 and "no such revision" in done.stderr and "org/name@none" in done.stderr, done.stderr
    done = qmix(server, "quantize", "org/name@v1", "out", "--revision", "main", *KEEP)
    assert done.returncode == 2 and "names another" in done.stderr
    done = qmix(server, "quantize", str(server.handler.folder), "out", "--revision", "v1", *KEEP)
    assert done.returncode == 2 and "not on the hub" in done.stderr
    assert qmix(server, "quantize", "org/name", "out", "--revision", "v1", *KEEP).returncode == 0


def test_offline_asks_nobody(server: Served, qmix: Command) -> None:
    done = qmix(server, "quantize", "org/name", "out", "--offline", *KEEP)
    assert done.returncode == 4 and "--offline" in done.stderr and not server.fetched, done.stderr
    assert qmix(server, "plan", "org/name").returncode == 0
    done = qmix(server, "quantize", "org/name", "out", "--offline", *KEEP)
    assert done.returncode == 4 and "--offline" in done.stderr and server.fetched == ["config.json"], done.stderr
    assert qmix(server, "quantize", "org/name", "out", *KEEP).returncode == 0
    server.stop()
    for how in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = qmix(server, "quantize", "org/name", "again", *KEEP, *([] if how else ["--offline"]), "--force", **how)
        assert done.returncode == 0 and "in the hub's cache alone" in done.stderr, done.stderr


def test_a_local_path_asks_nobody(server: Served, qmix: Command) -> None:
    done = qmix(server, "quantize", server.handler.folder, "out", *KEEP, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0 and "hub" not in done.stderr and not server.fetched
    done = qmix(server, "quantize", server.handler.folder, "out2", "--discard-source", *KEEP)
    assert done.returncode == 2 and "did not download it" in done.stderr


ENDLESS = b"x" * 2**16


def test_a_file_without_end_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More comes than was promised: nothing beyond that reaches the disk, and nothing stays of what did."""
    from huggingface_hub import file_download

    def endless(url: str, sink: IO[bytes], **how: object) -> None:
        for written in range(1, 100):
            sink.write(ENDLESS)
            assert written * len(ENDLESS) <= size

    size = 3 * len(ENDLESS) + 1
    monkeypatch.setattr(file_download, "http_get", endless)
    counted: list[int] = []
    with pytest.raises(CheckpointError, match=rf"x/file: more came than the {size} bytes"):
        blobs.fetch_blob(tmp_path, "0" * 40, size, "http://x/file?a=1", counted.append, threading.Event())
    (left,) = (tmp_path / "blobs").iterdir()
    assert left.stat().st_size == 0 and sum(counted) == 0


def test_the_cure_of_a_hub_without_parts_is_the_callers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import file_download

    def whole(url: str, sink: IO[bytes], **how: object) -> None:
        sink.truncate(0)

    monkeypatch.setattr(file_download, "http_get", whole)
    with pytest.raises(CheckpointError) as e:
        headers_of([("a.gguf", "http://x/a.gguf", 2**20)])
    assert "parts of files" in e.value.message and "discard" not in (e.value.cure or "")
    with open(tmp_path / "file", "wb") as file, pytest.raises(CheckpointError) as e:
        refetch("org/name", None, False, "a.gguf", 1, 1, file.fileno())
    assert "parts of files" in e.value.message and "--discard-source" in (e.value.cure or "")


def test_a_disk_that_becomes_full(slow: Served, qmix: Command, tmp_path: Path, warm_python: WarmPython) -> None:
    limit = CHUNK + 5000
    done = warm_python.run("-c", LIMITED, limit, "quantize", "org/name", "out", *KEEP, env=slow.env, cwd=tmp_path)
    assert done.returncode == 3 and "the disk is full" in done.stderr and "HF_HOME" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    (partial,) = partials(tmp_path)
    assert partial.stat().st_size == limit
    done = qmix(slow, "quantize", "org/name", "out", *KEEP)
    assert done.returncode == 0 and limit in slow.handler.ranges, done.stderr


@pytest.mark.parametrize(("source", "want"), [
    ("org/name:Q8_0", ["name-Q8_0.gguf"]),
    ("org/name:name-Q4_0", [f"deep/name-Q4_0-0000{i}-of-00002.gguf" for i in (1, 2)]),
    ("org/name:deep/name-Q4_0-00002-of-00002.gguf", [f"deep/name-Q4_0-0000{i}-of-00002.gguf" for i in (1, 2)]),
])
def test_a_gguf_model_of_the_hub(ggufs: Served, qmix: Command, tmp_path: Path, source: str, want: list[str]) -> None:
    done = qmix(ggufs, "quantize", source, "out", "-t", 1)
    assert done.returncode == 0 and ggufs.weights() == want, done.stderr
    local = qmix(ggufs, "quantize", ggufs.handler.folder / want[-1], "local", "-t", 1)
    assert local.returncode == 0, local.stderr
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert f'"revision": "{COMMIT}"' in (tmp_path / "out" / "qmix.json").read_text()


def test_several_gguf_models_are_listed(ggufs: Served, qmix: Command) -> None:
    done = qmix(ggufs, "quantize", "org/name", "out")
    assert done.returncode == 4 and not ggufs.fetched, done.stderr
    assert "any of 2 GGUF models: deep/name-Q4_0-00001-of-00002.gguf, name-Q8_0.gguf" in done.stderr
    assert qmix(ggufs, "quantize", "org/name:Q4_K_M", "out").returncode == 4
    assert qmix(ggufs, "show", "org/name:Q8_0").returncode == 2


def test_a_gguf_model_is_planned_by_its_header(ggufs: Served, qmix: Command, tmp_path: Path) -> None:
    """Nothing of it stays."""
    done = qmix(ggufs, "plan", "org/name:Q4_0", "--json", TMPDIR=str(tmp_path))
    assert done.returncode == 0 and '"records": 8' in done.stdout and "qmix-headers" not in done.stderr, done.stderr
    assert not [*(tmp_path / "cache").rglob("*.gguf")] and not [*tmp_path.glob("qmix-*")]


@pytest.mark.parametrize("name, size, said", [
    ("tokenizer_config.json", 2**28 + 1, "want at most 256"), ("config.json", 2**40, "want at most 256"),
    ("additional_chat_templates/a.jinja", 2**26 + 1, "want at most 64")])
def test_small_files_that_would_fill_the_disk(server: Served, qmix: Command, name: str, size: int, said: str) -> None:
    path = server.handler.folder / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    server.handler.sizes = {name: size}
    done = qmix(server, "quantize", "org/name", "out", "-t", 1)
    assert done.returncode == 4 and f"org/name: {name!r}: " in done.stderr and said in done.stderr, done.stderr
    assert server.fetched == [] and "Traceback" not in done.stderr


def test_many_small_files_are_bounded_together() -> None:
    many = {f"{modelfiles.TEMPLATES}/{i}.jinja": 2**26 for i in range(8)}
    check_sizes("org/name", many)
    with pytest.raises(CheckpointError, match=r"^org/name: 9 files beside the weights, 'x.json' the largest: "):
        check_sizes("org/name", {**many, "x.json": 2**27})
