"""Full and read-only disks at every call that writes: an interposer before the C library fails from the Nth call on.

Each command first runs whole, which lists its calls; then it runs anew for the calls at which it is to fail: in the
suite some, of the quantizer a few of the first of each kind on each file; with the marker `models` every one. What is
asserted each time: a documented exit code, one line and no traceback, what was good before is good afterwards, nothing
half-made is taken for whole, and the same command, with space again, ends as if nothing had been.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers import write_tiny_checkpoint
from odd_stores import ODD, QUANTS, quantize
from tokenizer_files import demo_folder
from warm_python import WarmPython

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler for the interposer")
SMALL = {**ODD, "num_hidden_layers": 1, "num_local_experts": 2, "vocab_size": 512}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """As warm_python, with the interposer before the C library."""
    library = tmp_path_factory.mktemp("interposer") / "failing_writes.so"
    done = subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", library, Path(__file__).parent / "failing_writes.c",
                           "-ldl"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the interposer is not for this system: {done.stderr[:200]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        server = WarmPython()
    with server:
        yield server


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(demo_folder(tmp_path_factory.mktemp("full") / "source"), **SMALL)


@pytest.fixture(scope="module")
def store(source: Path) -> Path:
    return quantize(source, source.parent / "store", QUANTS["int4"])

# The server has looked for a folder of temporary files before it knew which.
COMMAND = """
import sys, tempfile
tempfile.tempdir = None
from qmix.cli import main
main(sys.argv[1:])
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Disk:
    """A folder that is the disk of a command: home, temporary files and OUT lie in it."""

    python: WarmPython
    folder: Path
    log: list[str] = field(default_factory=list)

    def run(self, *args: object, at: int = 10**9, error: int = errno.ENOSPC,
            program: str = COMMAND) -> subprocess.CompletedProcess[str]:
        """`qmix ARGS` whose calls fail from number `at` on. log: its calls."""
        log = self.folder.parent / "calls"
        log.unlink(missing_ok=True)
        home = self.folder / "home"
        env = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(self.folder / "tmp"), "TERM": "dumb",
               "FAIL_UNDER": str(self.folder), "FAIL_AT": str(at), "FAIL_WITH": str(error), "FAIL_LOG": str(log)}
        done = self.python.run("-c", program, *args, env=env, cwd=self.folder.parent)
        self.log = log.read_text().splitlines() if log.exists() else []
        assert done.returncode in (0, 1, 2, 3, 4), (done.returncode, done.stderr)
        assert "Traceback" not in done.stderr and "fault in qmix" not in done.stderr, done.stderr
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            # Half a write is taken for a full disk, whatever its end would have said.
            reasons = (os.strerror(error), os.strerror(errno.ENOSPC))
            assert len(said) == 1 and any(reason in said[0] for reason in reasons), done.stderr
        return done

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("home", "tmp"):
            (self.folder / name).mkdir(parents=True)


@pytest.fixture
def disk(python: WarmPython, tmp_path: Path) -> Disk:
    found = Disk(python, tmp_path / "disk")
    found.clear()
    return found


def kinds(log: list[str]) -> list[int]:
    """The first call of each kind on each file, numbered from 1; numbers in names are all one."""
    first: dict[str, int] = {}
    for number, line in enumerate(log, 1):
        first.setdefault(re.sub(r"-\w{8}\b|\.[\w-]{8}(?=\.|$)|\d+", "*", line), number)
    return [*first.values()]


ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
ALL = [pytest.param("all", error, marks=pytest.mark.models) for error in ERRORS]
SWEEPS = pytest.mark.parametrize(("sweep", "error"), [("few kinds", "full"), ("ends", "read-only"), *ALL])
TAIL = pytest.mark.parametrize(("sweep", "error"), [("tail", "full"), ("ends", "read-only"), *ALL])
FEW = pytest.mark.parametrize(("sweep", "error"), [("ends", "full"), *ALL])


def calls(log: list[str], sweep: str) -> list[int]:
    """The numbers of the calls at which a command is to fail."""
    first, last = kinds(log), len(log)
    return {"few kinds": [*first[::5], last], "tail": [*range(max(1, last - 11), last + 1)],
            "ends": [1, first[len(first) // 2], last],
            "all": [*range(1, last + 1)]}[sweep]


@SWEEPS
def test_quantize(sweep: str, error: str, disk: Disk, source: Path, store: Path) -> None:
    """A fresh OUT: it is not there, or whole, and the next run takes up what was written."""
    out, command = disk.folder / "out", ("quantize", source, disk.folder / "out", "--method", "rtn", "-t", "1")
    assert disk.run(*command).returncode == 0 and files(out) == files(store)
    for at in calls(disk.log, sweep):
        disk.clear()
        done = disk.run(*command, at=at, error=ERRORS[error])
        where = (at, disk.log[at - 1], done.stderr)
        assert out.exists() == (done.returncode == 0 or ": whole, but the disk" in done.stderr), where
        assert not out.exists() or files(out) == files(store), where
        assert disk.run(*command, *["--force"] * out.exists()).returncode == 0 and files(out) == files(store), where
        assert {path.name for path in disk.folder.iterdir()} == {"home", "tmp", "out"}, where


@TAIL
def test_a_good_store_that_is_to_be_replaced(sweep: str, error: str, disk: Disk, source: Path, store: Path) -> None:
    """--force over a store: the old one stays until the new one is whole; behind OUT.replaced between two renames."""
    out, old = disk.folder / "out", disk.folder / "out.replaced"
    command = ("quantize", source, out, "--method", "rtn", "-t", "1", "--dense", "keep", "--force")
    shutil.copytree(store, out)
    before = files(out)
    assert disk.run(*command).returncode == 0
    after = files(out)
    assert before != after
    for at in calls(disk.log, sweep):
        disk.clear()
        shutil.copytree(store, out)
        done = disk.run(*command, at=at, error=ERRORS[error])
        where = (at, disk.log[at - 1], done.stderr)
        stands = files(out if out.exists() else old)
        assert stands in (before, after) and (done.returncode != 0 or stands == after), where
        assert disk.run(*command).returncode == 0 and files(out) == after, where
        assert {path.name for path in disk.folder.iterdir()} == {"home", "tmp", "out"}, where


@FEW
def test_a_gguf_file(sweep: str, error: str, disk: Disk, store: Path, tmp_path: Path) -> None:
    """Its config and tokenizer go through the folder of temporary files, which may be full while OUT's disk is not."""
    import gguf_models
    import torch
    from architectures import random_model

    from qmix.models.registry import ARCHITECTURES

    torch.manual_seed(0)
    path = gguf_models.write(tmp_path / "m.gguf", random_model(dict(ARCHITECTURES["mixtral"].TINY)), "mixtral")
    out, command = tmp_path / "out", ("quantize", path, tmp_path / "out", "--method", "rtn", "-t", "1")
    assert disk.run(*command).returncode == 0
    whole = files(out)
    for at in calls(disk.log, sweep):
        shutil.rmtree(out, ignore_errors=True)
        disk.clear()
        done = disk.run(*command, at=at, error=ERRORS[error])
        assert done.returncode == 0 or not out.exists(), (at, disk.log, done.stderr)
        assert not done.returncode or "qmix-gguf-" in done.stderr or str(disk.folder) in done.stderr, done.stderr
        if done.returncode:
            assert disk.run(*command).returncode == 0
        assert files(out) == whole


@FEW
def test_what_is_remembered_beside_an_answer(sweep: str, error: str, disk: Disk, store: Path) -> None:
    """Router statistics: without them the answer is the same, and a line says so."""
    command = ("generate", store, "-p", "fox", "-n", "3", "--temp", "0")
    whole = disk.run(*command)
    assert whole.returncode == 0 and any("routing" in line for line in disk.log), disk.log
    kept = next((disk.folder / "home").rglob("routing/*.json"))
    for at in calls(disk.log, sweep):
        disk.clear()
        done = disk.run(*command, at=at, error=ERRORS[error])
        assert done.returncode == 0 and done.stdout == whole.stdout, (at, disk.log, done.stderr)
        assert "statistics were not saved" in done.stderr or kept.exists(), (at, disk.log, done.stderr)
        assert disk.run(*command).returncode == 0 and kept.exists()


CHAT = """
import sys
from pathlib import Path
from qmix.chat.conversation import Conversation, Exchange
from qmix.chat.prompt import open_history
from qmix.chat.savefile import Autosave, save
from qmix.config import SamplingParams
from qmix.errors import QmixError
state, mine, *said = sys.argv[1:]
tell = lambda problem: print("said:", problem)
conversation = Conversation("m", None, tuple(Exchange(question, "x") for question in said))
history = open_history(Path(state) / "history", tell)
for number in (1, 2):  # after the first that fails, each is tried again
    history.append_string(f"{said[-1]} {number}")
    try:
        autosave = Autosave(Path(state), "m")
        autosave.load()
        autosave.save(conversation, SamplingParams())
    except QmixError as error:
        tell(error.message)
try:
    save(Path(mine), conversation, SamplingParams())
except QmixError as error:
    tell(error.message)
"""


@FEW
def test_a_chat(sweep: str, error: str, disk: Disk) -> None:
    """Its history, its conversation and /save: older ones stay as they were, which is said, and the chat goes on."""
    state, mine = disk.folder / "home" / "state", disk.folder / "mine.json"
    one, two = (["one"], ["one", "two"])
    assert disk.run(state, mine, *one, program=CHAT).stdout == ""
    old = mine.read_bytes()
    [saved] = state.glob("chats/*.json")
    assert disk.run(state, mine, *two, program=CHAT).stdout == ""
    new, log = mine.read_bytes(), disk.log
    for at in calls(log, sweep):
        disk.clear()
        disk.run(state, mine, *one, program=CHAT)
        done = disk.run(state, mine, *two, program=CHAT, at=at, error=ERRORS[error])
        where = (at, disk.log, done.stdout)
        assert {saved.read_bytes(), mine.read_bytes()} <= {old, new}, where
        assert os.strerror(ERRORS[error]) in done.stdout or mine.read_bytes() == new, where
        assert saved.read_bytes() == mine.read_bytes() == new or "cannot save" in done.stdout, where
        assert (state / "history").read_text().count("one") == 2, where
        assert disk.run(state, mine, *two, program=CHAT).stdout == "" and mine.read_bytes() == new, where
        left = {path.name for path in disk.folder.rglob("*") if path.is_file()}
        assert left == {"history", saved.name, mine.name} or error == "read-only", where  # where nothing is removed


@FEW
def test_an_evaluation(sweep: str, error: str, disk: Disk, store: Path, tmp_path: Path) -> None:
    """Its journal: a torn record is left out, and the next run ends with the same numbers."""
    text = tmp_path / "text.txt"
    text.write_text("The fox and the owl went home. " * 20)
    command = ("eval", store, "-f", text, "-c", "32", "--json")
    whole = disk.run(*command)
    assert whole.returncode == 0 and disk.log, whole.stderr

    def numbers(done: subprocess.CompletedProcess[str]) -> list[str]:
        return [line for line in done.stdout.splitlines() if "perplexity" in line]

    for at in calls(disk.log, sweep):
        disk.clear()
        done = disk.run(*command, at=at, error=ERRORS[error])
        assert done.returncode in (0, 1, 3), done.stderr
        again = disk.run(*command)
        assert again.returncode == 0 and numbers(again) == numbers(whole) != [], (at, disk.log, again.stderr)


@pytest.mark.models
@pytest.mark.parametrize(("sweep", "error"), ALL)
@pytest.mark.parametrize("what", ["trace", "fit", "plot"])
def test_other_files(what: str, sweep: str, error: str, disk: Disk, source: Path, store: Path, tmp_path: Path) -> None:
    """A recorded trace, the folder of plots, and remembered sensitivities."""
    text, made = tmp_path / "text.txt", disk.folder / "made"
    text.write_text("The fox and the owl went home. " * 60)
    command = {"trace": ("generate", store, "-p", "fox", "-n", "3", "--trace", made),
               "plot": ("stats", store, "-f", text, "--plot", made),
               "fit": ("quantize", source, made, "--bpw", "9", "--calibration", text, "--calibration-tokens", "64",
                       "--method", "rtn", "-t", "1")}[what]
    whole = disk.run(*command)
    assert whole.returncode == 0 and disk.log, whole.stderr
    for at in calls(disk.log, sweep):
        disk.clear()
        done = disk.run(*command, at=at, error=ERRORS[error])
        stale = [path for path in disk.folder.rglob("*") if path.suffix == ".tmp" and "partial" not in str(path)]
        assert not stale or error == "read-only", (at, disk.log)  # where nothing is removed
        if made.exists() and what == "trace":
            made.unlink()
        if what == "plot":
            continue
        again = disk.run(*command, *["--force"] * (what == "fit" and made.exists()))
        assert again.returncode == 0, (at, disk.log, done.stderr, again.stderr)
