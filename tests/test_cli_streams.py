"""The command line where the streams, the locale, the home folder or the address space are not as usual."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from test_cli import qmix, refused
from warm_python import CLOSED, WarmPython

from qmix import settings, streams
from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.demo import CHECKPOINT
from qmix.errors import QmixError
from qmix.hardware import bandwidth
from qmix.quantize import quantize_checkpoint

Command = Callable[..., "subprocess.CompletedProcess[str]"]
ANSWER = ("-p", "Who are you?", "--temp", "0", "-n", "6", "-t", "1")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("streams") / "store"
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        quantize_checkpoint(checkpoint, out, QuantConfig(method="rtn"), threads=1)
    return out


@pytest.fixture(scope="module")
def generate(store: Path, warm_python: WarmPython) -> Command:
    """generate(*FLAGS, **STREAMS) -> an answer in a process of its own."""
    return lambda *flags, **how: warm_python.run("-m", "qmix", "generate", store, *flags, **how)


@pytest.fixture(scope="module")
def answer(generate: Command) -> str:
    done = generate(*ANSWER)
    assert done.returncode == 0 and done.stdout.strip()
    return done.stdout


@pytest.fixture(scope="module")
def full() -> Iterator[IO[str]]:
    """A disk that is full."""
    with open("/dev/full", "w") as stream:
        yield stream


@pytest.mark.parametrize("closed", [("stderr",), ("stdin",), ("stdin", "stderr")])
def test_the_answer_survives_streams_that_are_closed(generate: Command, answer: str, closed: tuple[str, ...]) -> None:
    done = generate(*ANSWER, **dict.fromkeys(closed, CLOSED))
    assert (done.returncode, done.stdout) == (0, answer)


def test_the_answer_survives_a_full_disk_behind_stderr(generate: Command, answer: str, full: IO[str]) -> None:
    done = generate(*ANSWER, stderr=full)
    assert (done.returncode, done.stdout) == (0, answer)


@pytest.mark.parametrize("closed", [("stdout",), ("stdin", "stdout")])
def test_an_answer_that_can_go_nowhere_is_refused_at_once(generate: Command, closed: tuple[str, ...]) -> None:
    done = generate(*ANSWER, **dict.fromkeys(closed, CLOSED))
    assert done.returncode == 1 and done.stderr.count("error: ") == 1
    assert "stdout" in done.stderr and "experts" not in done.stderr, done.stderr


def test_a_full_disk_behind_stdout_is_an_error(store: Path, full: IO[str], warm_python: WarmPython) -> None:
    done = warm_python.run("-m", "qmix", "show", store, "--json", stdout=full)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "No space left" in done.stderr


def test_closed_streams_have_no_numbers_for_files_to_take(tmp_path: Path) -> None:
    """With all three closed, as a user types it, the store's files must not be what a library's stderr goes into."""
    command = f"{sys.executable} -m qmix quantize '{CHECKPOINT}' '{tmp_path / 'out'}' -t 1 --method rtn <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], timeout=300).returncode == 0
    assert qmix("verify", tmp_path / "out", "--deep").returncode == 0


def test_bytes_on_stdin_that_are_not_utf8_are_replaced_and_said(generate: Command) -> None:
    done = generate(*ANSWER[2:], "--json", input="-price: 5 \udca3\n+price: 6 \udca3\n", errors="surrogateescape")
    assert done.returncode == 0, done.stderr
    assert "stdin: 2 pieces that are not UTF-8, the first at byte 10 (0xa3)" in done.stderr
    clean = generate(*ANSWER[2:], "--json", input="-price: 5 \ufffd\n+price: 6 \ufffd\n")
    assert json.loads(clean.stdout)["token_ids"] == json.loads(done.stdout)["token_ids"]
    assert "not UTF-8" not in clean.stderr


@pytest.mark.parametrize(("data", "text", "first"), [
    (b"plain", "plain", None), (b"\xff", "\ufffd", 0), ("é".encode() + b"\xc3", "é\ufffd", 2),
    ("\ufffd".encode(), "\ufffd", None), ("\ufffd".encode() + b"\xff", "\ufffd\ufffd", 3),
])
def test_decoding_of_pipes(data: bytes, text: str, first: int | None) -> None:
    found, problem = streams.decoded(data)
    assert found == text
    assert (problem == "") if first is None else f"1 piece that is not UTF-8, the first at byte {first} " in problem


def test_characters_that_the_locale_lacks(store: Path, warm_python: WarmPython) -> None:
    """An answer of a model that says an en dash, on an ASCII stdout: replaced and counted; JSON escapes it."""
    program = ("import sys; from qmix.tokenizer.stream import StreamDecoder; from qmix.cli import main\n"
               "push = StreamDecoder.push\n"
               "StreamDecoder.push = lambda self, i: push(self, i).replace('a', chr(0x2013))\n"
               "main(sys.argv[1:])")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}

    done, document = (warm_python.run("-c", program, "generate", store, *ANSWER, *flags, env=env)
                      for flags in ((), ("--json",)))
    assert done.returncode == document.returncode == 0, done.stderr
    assert "?" in done.stdout and "became ?: stdout's encoding, ascii, lacks them" in done.stderr
    assert "\u2013" in json.loads(document.stdout)["text"] and "became ?" not in document.stderr


def test_a_path_that_is_not_utf8_is_printed_as_it_is(store: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    (tmp_path / os.fsdecode(b"st\xff")).symlink_to(store)
    done = warm_python.run("-m", "qmix", "verify", bytes(tmp_path) + b"/st\xff", errors="surrogateescape")
    assert "Traceback" not in done.stderr and "a fault in qmix" not in done.stderr, done.stderr


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container under any uid: no HOME, and no entry in the system's list of users."""
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_home_folder(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_home(monkeypatch)
    assert qmix("--version").returncode == 0
    assert qmix("show", store).returncode == 0
    done = qmix("generate", store, *ANSWER)
    assert done.returncode == 0 and "router statistics are not kept" in done.stderr
    assert qmix("plan", store).returncode == 0
    (tmp_path / "text").write_text("the fox and the owl")
    done = qmix("eval", store, "-f", tmp_path / "text", "-t", 1)
    assert done.returncode == 0 and "no home folder: an interrupted evaluation cannot be continued" in done.stderr
    assert "perplexity" in done.stdout and qmix("stats", store, "-f", tmp_path / "text", "-t", 1).returncode == 0
    for args in (("list",), ("stats", store), ("demo", "-p", "x"), ("chat", "--list")):
        refused(qmix(*args), 1, "no home folder", "HOME")
    refused(qmix("show", "~/x"), 2, "~/x", "no home folder")
    with pytest.raises(settings.NoHome):
        settings.xdg_folder("data", {})


def test_bandwidths_are_measured_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = bandwidth.Bandwidths(30.0, None, 0, 0, False, None, None, "2026-01-01")
    monkeypatch.setattr(bandwidth, "measure", lambda *args, **kwargs: figures)
    monkeypatch.setattr("qmix.commands.doctor.report.examine_disk", lambda *args: ({}, None, []))
    without_home(monkeypatch)
    done = qmix("doctor", "--bandwidth", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["bandwidths"]["source"] == "measured now"
    (problem,) = [p for p in found["problems"] if "not kept" in p["problem"]]
    assert "no home folder" in problem["problem"] and "XDG_CACHE_HOME" in problem["cure"]


def test_the_hub_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", homeless)
    monkeypatch.setattr("qmix.hub.repository.check_small_files", lambda *args: None)
    refused(qmix("plan", "org/name"), 4, "no home folder for the hub's cache", "set HF_HOME")


def test_an_evaluation_whose_journal_cannot_be_written(store: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    """HOME=/ of a container under any uid: a folder that cannot be made. Root may write anywhere, so a file is in the
    way here. An interrupt says that nothing is kept."""
    (tmp_path / "file").touch()
    (tmp_path / "text").write_text("the fox and the owl " * 300)
    args = ["eval", str(store), "-f", str(tmp_path / "text"), "-t", "1", "-c", "16"]
    program = ("import sys; from qmix.cli import main; from qmix.evaluate import suite\n"
               "from qmix.errors import Interrupted\n"
               "score, count = suite._score, 0\n"
               "def third(*args):\n"
               "    global count\n"
               "    count += 1\n"
               "    if count == 3: raise Interrupted('cancelled')\n"
               "    return score(*args)\n"
               "suite._score = third\n"
               "main(sys.argv[1:])")
    done = warm_python.run("-c", program, *args, env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "file")})
    assert done.returncode == 130, done.stderr
    assert "Not a directory: an interrupted evaluation cannot be continued" in done.stderr
    assert "2 of" in done.stderr and "none of them is kept" in done.stderr and "goes on" not in done.stderr


def test_a_user_that_there_is_not(tmp_path: Path) -> None:
    for command in ("show", "plan", "generate", "verify", "quantize"):
        refused(qmix(command, "~nobody-here/model", *([tmp_path / "out"] if command == "quantize" else [])), 2,
                "~nobody-here/model", "no such user")


@pytest.mark.parametrize(("limit", "codes"), [(500, {3}), (1100, {1, 3})])  # MiB
def test_a_tight_address_space_does_not_fit(store: Path, limit: int, codes: set[int]) -> None:
    """Less than torch needs, which is told before torch is imported; and less than the model needs beside it. What
    torch takes differs by its version: there the plan refuses (3), or a library runs out before it is made (1)."""
    done = subprocess.run(["bash", "-c", f"ulimit -v {limit * 1024}; exec {sys.executable} -m qmix generate {store} "
                           "-p x -n 2 -t 1"], capture_output=True, text=True, timeout=300)
    assert done.returncode in codes, done.stderr
    assert "ulimit -v" in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_fault_is_one_line_and_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fault() -> None:
        raise AttributeError("nothing has no name\nsecond line")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("qmix.paths.local_stores", fault)
    done = qmix("list")
    refused(done, 1, "a fault in qmix: AttributeError: nothing has no name;", "please report it")
    (file,) = tmp_path.glob("qmix-error-*.txt")
    assert str(file) in done.stderr and done.stderr.count("\n") == 1
    text = file.read_text()
    assert "Traceback" in text and "second line" in text and "qmix 0." in text
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    lost = qmix("list")
    assert lost.returncode == 1 and "Traceback" in lost.stderr and "please report it" in lost.stderr


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("can't start new thread"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    ImportError("libtorch.so: failed to map segment from shared object"),
])
def test_memory_that_the_system_refuses_is_no_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr("qmix.paths.local_stores", refuse)
    refused(qmix("list"), 1, "out of memory")


def test_an_interrupt_at_any_moment_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qmix.paths.local_stores", interrupt)
    done = qmix("list")
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_stop_strings_from_the_environment(store: Path) -> None:
    """One is one, spaces and all; a JSON list is several."""
    def text(*args: object, **env: str) -> str:
        return str(json.loads(qmix("generate", store, "-p", "Who are you?", "--temp", 0, "-n", 20, "-t", 1, "--json",
                                   *args, **env).stdout)["text"])

    whole = text()
    first, second = whole[4:10], whole[8:14]
    assert " " in first
    assert text(QMIX_GENERATE_STOP=first) == text("--stop", first) == whole[:whole.index(first)]
    assert text(QMIX_GENERATE_STOP="### a") == text("--stop", "### a")
    both = json.dumps(["no such text", second])
    assert text(QMIX_GENERATE_STOP=both) == text("--stop", second)
    assert text("--stop", second, QMIX_GENERATE_STOP=first) == text("--stop", second)


def test_files_from_the_environment_may_have_spaces(store: Path, tmp_path: Path) -> None:
    text = tmp_path / "a text: one.txt"
    text.write_text("The fox carried a lantern over the hill. " * 20)
    done = qmix("stats", store, "--json", QMIX_STATS_FILE=str(text))
    assert done.returncode == 0, done.stderr


def test_check_stdout_lets_streams_without_a_file_through(monkeypatch: pytest.MonkeyPatch) -> None:
    streams.check_stdout()
    with open(os.devnull) as read_only:
        monkeypatch.setattr("sys.stdout", read_only)
        with pytest.raises(QmixError, match="stdout"):
            streams.check_stdout()


def test_the_list_of_saved_conversations(tmp_path: Path) -> None:
    from qmix.chat.conversation import Conversation, Exchange
    from qmix.chat.savefile import Autosave
    from qmix.config import SamplingParams

    empty = qmix("chat", "--list", XDG_STATE_HOME=str(tmp_path))
    assert (empty.returncode, empty.stdout) == (0, "") and "no saved conversations" in empty.stderr
    said = Conversation("tiny", None, (Exchange("Hi\x1b[2J", "x"),))
    Autosave(tmp_path / "qmix", "tiny").save(said, SamplingParams())
    done = qmix("chat", "--list", XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 0 and "tiny" in done.stdout and "Hi" in done.stdout and "\x1b" not in done.stdout
    assert "Hi" in qmix("chat", "tiny", "--list", XDG_STATE_HOME=str(tmp_path)).stdout
    assert qmix("chat", "other", "--list", XDG_STATE_HOME=str(tmp_path)).stdout == ""
