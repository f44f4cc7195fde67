"""`qmix run`, `list` and `rm`: from a name to an answer, and back to an empty disk."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import Served, repository, write_gguf
from pseudo_terminal import CTRL_C, CTRL_D, ENTER, PseudoTerminal
from warm_python import PIPE, WarmPython

from qmix import hub, paths
from qmix.checkpoint import SINGLE
from qmix.commands.loading import Loading
from qmix.commands.quantization import Flags
from qmix.commands.run import command, library
from qmix.demo import CHECKPOINT
from qmix.errors import QmixError
from qmix.hub.private import drop

Command = Callable[..., subprocess.CompletedProcess[str]]
ASK = ("-p", "hello", "-n", "3", "-t", "1", "--temp", "0")
COMMIT2 = "f" * 40
# Killed at the `n`th call of what the second word names.
KILLED = """
import importlib, os, signal, sys
from qmix.cli import main
module, _, name = sys.argv[1].rpartition(".")
owner = importlib.import_module(module.rpartition(".")[0]) if module.rpartition(".")[2][0].isupper() else \\
    importlib.import_module(module)
if owner.__name__ != module:
    owner = getattr(owner, module.rpartition(".")[2])
def end(*args, **named):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, end)
main(sys.argv[2:])"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    served = Served(repository(tmp_path / "repo"), tmp_path / "cache")
    yield served
    served.stop()


@pytest.fixture
def qmix(warm_python: WarmPython, tmp_path: Path) -> Command:
    def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
        return warm_python.run("-m", "qmix", *args, env={**os.environ, **env}, cwd=tmp_path)

    return run


def store(name: str) -> Path:
    return paths.models_folder() / name


def test_the_bundled_checkpoint_runs_without_a_hub(qmix: Command) -> None:
    done = qmix("run", CHECKPOINT, "-y", *ASK, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    for line in ("quantize   experts to int4", "an assumption", "(an estimate)"):
        assert line in done.stderr
    assert (store("checkpoint-int4") / "qmix.json").is_file()
    again = qmix("run", CHECKPOINT, *ASK)
    assert again.returncode == 0 and again.stdout == done.stdout, again.stderr
    assert "quantize" not in again.stderr, "the next time it answers at once"


def test_without_a_terminal_nothing_is_begun_unasked(server: Served, qmix: Command) -> None:
    done = qmix("run", "org/name", *ASK, **server.env)
    assert done.returncode == 2 and "No terminal to ask on" in done.stderr and "-y" in done.stderr, done.stderr
    assert "download" in done.stderr and not server.weights() and not paths.local_stores()
    done = qmix("run", "org/name", "-y", **server.env)
    assert done.returncode == 2 and "needs a terminal to chat" in done.stderr and not server.weights()


def test_a_model_of_the_hub(server: Served, qmix: Command, tmp_path: Path) -> None:
    done = qmix("run", "org/name", "-y", *ASK, **server.env)
    assert done.returncode == 0 and server.weights() == [SINGLE], done.stderr
    assert "download" in done.stderr and "at 100 Mbit/s" in done.stderr
    server.fetched.clear()
    again = qmix("run", "org/name", *ASK, **server.env)
    assert again.returncode == 0 and again.stdout == done.stdout and not server.fetched, again.stderr
    (row,) = json.loads(qmix("list", "--json").stdout)
    assert row["alias"] == "name-int4" and row["source"] == "org/name@0123456" and row["format"] == "int4"
    assert row["size"] > 0 and row["used"]
    other = qmix("run", "org/name", "-y", "--format", "int8", *ASK, **server.env)
    assert other.returncode == 0 and (store("name-int8") / "qmix.json").is_file() and not server.weights()
    server.stop()
    gone = qmix("run", "org/name", *ASK, **server.env)
    assert gone.returncode == 0 and "not asked whether it has changed" in gone.stderr, gone.stderr
    quiet = qmix("run", "org/name", "--offline", *ASK, **server.env)
    assert quiet.returncode == 0 and "hub" not in quiet.stderr, quiet.stderr
    freed = qmix("rm", "name-int4", "name-int8", "-y", "--source", **server.env)
    assert freed.returncode == 0 and not paths.local_stores(), freed.stderr
    assert not [path for path in (tmp_path / "cache").rglob("*.safetensors*") if "index" not in path.name]
    assert "no stores" in qmix("list").stderr


def test_the_source_is_given_up_while_it_is_quantized(server: Served, qmix: Command, tmp_path: Path) -> None:
    done = qmix("run", "org/name", "-y", "--discard-source", *ASK, **server.env)
    assert done.returncode == 0 and "deleted as it is quantized" in done.stderr, done.stderr
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]
    left = tmp_path / "cache" / "qmix" / "models--org--name"
    (left / "blobs").mkdir(parents=True)  # as of a run that was killed between its store's rename and this
    (left / "blobs" / "whole").write_bytes(b"weights")
    done = qmix("run", "org/name", *ASK, **server.env)
    assert done.returncode == 0 and f"{left} has what" in done.stderr and "qmix rm --source" in done.stderr


def test_a_change_of_the_source_is_said(server: Served, qmix: Command) -> None:
    assert qmix("run", "org/name", "-y", *ASK, **server.env).returncode == 0
    before = (store("name-int4") / "qmix.json").read_bytes()
    server.handler.commit = COMMIT2
    done = qmix("run", "org/name", *ASK, **server.env)
    assert done.returncode == 0 and "has changed" in done.stderr and "--update" in done.stderr, done.stderr
    assert (store("name-int4") / "qmix.json").read_bytes() == before
    done = qmix("run", "org/name", "-y", "--update", *ASK, **server.env)
    assert done.returncode == 0, done.stderr
    assert COMMIT2 in (store("name-int4") / "qmix.json").read_text()
    assert "has changed" not in qmix("run", "org/name", *ASK, **server.env).stderr


def test_a_local_file_that_was_replaced(qmix: Command, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-Q8_0.gguf")
    done = qmix("run", path, "-y", *ASK)
    assert done.returncode == 0 and (store("m-Q8_0") / "qmix.json").is_file(), done.stderr
    assert "as the file has them" in done.stderr and done.stderr.count("experts: kept bit for bit") == 1
    assert "has changed" not in qmix("run", "m-Q8_0.gguf", *ASK).stderr
    os.utime(path, ns=(1, 1))
    assert "has changed" in qmix("run", path, *ASK).stderr
    other = write_gguf(tmp_path / "other" / "m-Q8_0.gguf", "Q4_0")
    assert qmix("run", other, "-y", *ASK).returncode == 0
    assert len(paths.local_stores()) == 2, "a store of another file has a name of its own"


@pytest.mark.parametrize("made", [False, True])
def test_a_name_that_another_model_takes_during_the_question(monkeypatch: pytest.MonkeyPatch, made: bool) -> None:
    """Its store, whole or begun, and its entry stay as they are; this model's store has another name."""
    theirs = library.Entry("checkpoint-int4", "/models/other/checkpoint", "x", "int4", False)
    file = store("checkpoint-int4" if made else "checkpoint-int4.partial") / "qmix.json"

    def answer(question: str) -> None:
        library.save(theirs)
        file.parent.mkdir()
        file.write_text("theirs")

    monkeypatch.setattr(command, "agreed", answer)
    how = Loading(0, 1, "auto", None)
    for _ in range(2):
        mine = command._store(str(CHECKPOINT), Flags(), how, hub.Access(), False, False, False)
    assert mine != store("checkpoint-int4") and (mine / "qmix.json").is_file(), "and is found again"
    assert library.load("checkpoint-int4", print) == theirs and file.read_text() == "theirs"


@pytest.mark.parametrize("where", [
    "qmix.hub.repository.fetch_files", "qmix.commands.run.making.make_store", "qmix.quantize.target.Target.commit",
    "qmix.commands.run.making.save_rate"])
def test_killed_between_any_two_steps(server: Served, qmix: Command, tmp_path: Path, warm_python: WarmPython,
                                      where: str) -> None:
    done = warm_python.run("-c", KILLED, where, "run", "org/name", "-y", *ASK, env=server.env, cwd=tmp_path)
    assert done.returncode == -9, done.stderr
    done = qmix("run", "org/name", "-y", *ASK, **server.env)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert server.weights() == [SINGLE] and [path.name for path in paths.local_stores()] == ["name-int4"]


def test_two_at_once_make_one_store(server: Served, tmp_path: Path, warm_python: WarmPython) -> None:
    server.handler.cut[SINGLE], server.handler.held = [10**9], threading.Event()
    args = ("-m", "qmix", "run", "org/name", "-y", *ASK)
    with warm_python.start(*args, env=server.env, cwd=tmp_path, stderr=PIPE, stdout=PIPE) as first:
        assert server.handler.reached.wait(60)
        with warm_python.start(*args, env=server.env, cwd=tmp_path, stderr=PIPE, stdout=PIPE) as second:
            assert second.stderr is not None
            line = ""
            while "waiting for it" not in line:
                line = second.stderr.readline()
                assert line
            server.handler.held.set()
            out, errors = first.communicate()
            assert first.returncode == 0, errors
            out2, errors = second.communicate()
    assert second.returncode == 0 and out2 == out and "wrote" not in errors, errors
    assert len(server.weights()) == 1


def test_ctrl_c_while_it_downloads(server: Served, tmp_path: Path, warm_python: WarmPython) -> None:
    server.handler.cut[SINGLE], server.handler.held = [2000], threading.Event()
    with warm_python.start("-m", "qmix", "run", "org/name", "-y", *ASK, env=server.env, cwd=tmp_path,
                           stderr=PIPE) as process:
        assert server.handler.reached.wait(60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()  # though the server says nothing more
    assert process.returncode == 130 and "Traceback" not in errors, errors


@pytest.fixture
def terminal(server: Served, warm_python: WarmPython, tmp_path: Path) -> Iterator[Callable[..., PseudoTerminal]]:
    running: list[PseudoTerminal] = []

    def begin(*args: str) -> PseudoTerminal:
        running.append(PseudoTerminal(warm_python, ["-m", "qmix", *args], {**server.env, "TERM": "xterm"}, tmp_path))
        return running[-1]

    yield begin
    for one in running:
        one.close()


def test_it_asks_once_and_then_chats(terminal: Callable[..., PseudoTerminal], server: Served) -> None:
    one = terminal("run", "org/name", "-t", "1")
    one.expect("go on? [Y/n]")
    assert not server.weights()
    one.send(ENTER)
    one.expect(">>>")
    one.send(CTRL_D)
    assert one.process.wait(60) == 0
    two = terminal("run", "org/name", "-t", "1")
    assert "[Y/n]" not in two.expect(">>>")


@pytest.mark.parametrize(("keys", "code"), [("n" + ENTER, 1), (CTRL_C, 130), (CTRL_D, 1)])
def test_who_says_no(terminal: Callable[..., PseudoTerminal], server: Served, keys: str, code: int) -> None:
    one = terminal("run", "org/name", "-t", "1")
    one.expect("[Y/n]")
    one.send(keys)
    assert one.process.wait(60) == code and not server.weights() and not paths.local_stores()


@pytest.mark.parametrize(("args", "code", "want"), [
    (("run", "nothing", "-y"), 2, "no such folder, alias or hub id"), (("run", ".", "-y"), 4, "neither a store nor"),
    (("run", CHECKPOINT, "--discard-source"), 2, "is here, not on the hub"),
    (("run", CHECKPOINT, "--revision", "x"), 2, "is here, not on the hub"),
    (("run", CHECKPOINT, "-y", "--ram", "10M"), 3, "RAM"),
    (("rm", "nothing"), 2, "no such store"), (("rm", "../x"), 2, "not a name"), (("rm", ".."), 2, "not a name"),
])
def test_what_cannot_be(qmix: Command, args: tuple[object, ...], code: int, want: str) -> None:
    done = qmix(*args, *(ASK if args[0] == "run" else ()))
    assert done.returncode == code and want in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_home_of_ones_own(qmix: Command, tmp_path: Path) -> None:
    done = qmix("run", CHECKPOINT, "-y", *ASK, QMIX_HOME=str(tmp_path / "home"))
    assert done.returncode == 0 and (tmp_path / "home" / "models" / "checkpoint-int4").is_dir(), done.stderr
    assert qmix("list", QMIX_HOME="relative").returncode == 2


def test_only_stores_are_deleted(qmix: Command, tmp_path: Path) -> None:
    assert qmix("run", CHECKPOINT, "-y", *ASK).returncode == 0
    name = "checkpoint-int4"
    folder = store(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.txt").write_text("x")
    done = qmix("rm", name)
    assert done.returncode == 2 and "No terminal to ask on" in done.stderr and folder.is_dir()
    (folder / "mine.txt").write_text("x")
    done = qmix("rm", name, "-y")
    assert done.returncode == 2 and "mine.txt" in done.stderr and (folder / "qmix.json").exists(), done.stderr
    (folder / "mine.txt").unlink()
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "elsewhere" / "thesis.txt")
    assert qmix("rm", name, "-y").returncode == 2
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    folder.symlink_to(moved)
    done = qmix("rm", name, "-y")
    assert done.returncode == 2 and "a link" in done.stderr and (moved / "qmix.json").exists()
    folder.unlink()
    folder.symlink_to(tmp_path / "elsewhere")
    assert qmix("rm", name, "-y").returncode == 2 and (tmp_path / "elsewhere" / "thesis.txt").exists()
    folder.unlink()
    folder.mkdir()
    (folder / "notes").write_text("x")
    assert qmix("rm", name, "-y").returncode == 2 and (folder / "notes").exists()


def test_a_download_in_use_is_not_deleted(server: Served, qmix: Command, monkeypatch: pytest.MonkeyPatch,
                                          tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    assert qmix("run", "org/name", "-y", *ASK, **server.env).returncode == 0
    with hub.claimed("org/name") as folder:
        (folder / "blobs").mkdir()
        (folder / "blobs" / "x").write_bytes(b"x" * 10000)
        done = qmix("rm", "name-int4", "--source", "-y", **server.env)
        assert done.returncode == 1 and "another qmix discards" in done.stderr, done.stderr
        assert (folder / "blobs" / "x").exists() and paths.local_stores(), "nothing is lost"
    assert qmix("rm", "name-int4", "--source", "-y", **server.env).returncode == 0
    assert not folder.exists() and not paths.local_stores()


def test_a_folder_that_was_deleted_while_its_lock_was_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The lock is of the folder that is there then."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    flock, deleted = fcntl.flock, []

    def late(fd: int, how: int) -> None:
        if not deleted:
            deleted.append(os.fstat(fd).st_ino)
            with hub.claimed("org/name"):
                drop("org/name")
        flock(fd, how)

    monkeypatch.setattr("fcntl.flock", late)
    with hub.claimed("org/name") as folder:
        assert deleted and folder.is_dir()
        with pytest.raises(QmixError, match="another qmix"), hub.claimed("org/name"):
            pass


@pytest.mark.parametrize("flag", [("--format", "int3"), ("--update",), ("--discard-source",)])
def test_flags_that_a_store_of_the_hub_has_no_use_for(server: Served, qmix: Command, flag: tuple[str, ...]) -> None:
    (server.handler.folder / "qmix.json").write_text("{}")
    done = qmix("run", "org/name", "-y", *flag, *ASK, **server.env)
    assert done.returncode == 2 and "org/name: is a store already" in done.stderr, done.stderr
    assert not server.weights()


def test_what_an_unfinished_run_left(server: Served, qmix: Command, tmp_path: Path, warm_python: WarmPython) -> None:
    done = warm_python.run("-c", KILLED, "qmix.quantize.target.Target.commit", "run", "org/name", "-y", *ASK,
                           env=server.env, cwd=tmp_path)
    assert done.returncode == -9
    assert "unfinished" in qmix("list").stdout
    assert qmix("rm", "name-int4", "-y").returncode == 0
    assert "no stores" in qmix("list").stderr and not [p for p in paths.models_folder().iterdir() if p.is_dir()]


def test_a_disk_that_cannot_take_the_store(server: Served, tmp_path: Path, warm_python: WarmPython) -> None:
    code = ("import shutil, sys; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**6, 0, 10**5);"
            "from qmix.cli import main; main(sys.argv[1:])")
    done = warm_python.run("-c", code, "run", "org/name", "-y", *ASK, env=server.env, cwd=tmp_path)
    assert done.returncode == 3 and "short of" in done.stderr and "QMIX_HOME" in done.stderr, done.stderr
    assert not server.weights()
