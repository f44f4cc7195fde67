"""--discard-source: what leaves the disk, what stays, and what a run that is killed finds."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import architectures
import pytest
from hub_server import Served, repository, write_gguf
from huggingface_hub import constants
from lowbit_checkpoints import write_lowbit
from model_configs import with_keys
from warm_python import WarmPython

from qmix.checkpoint import Checkpoint
from qmix.errors import CheckpointError
from qmix.hub.discarded import NAME, gone_in, note
from qmix.hub.private import claimed, drop_weights, private_folder
from qmix.quantize import discard

Command = Callable[..., subprocess.CompletedProcess[str]]
HOW = ("--method", "rtn", "-t", "1")
KILLED = """
import os, signal, sys
from qmix.cli import main
from qmix.quantize import discard
discard.BATCH = 1
written, left = discard.Discard.written, [int(sys.argv[1])]
def count(self, work):
    written(self, work)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
discard.Discard.written = count
main(sys.argv[2:])"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 384 KiB, so that holes are more than a file system's block."""
    return repository(tmp_path_factory.mktemp("discard") / "repo", shards=2, alike=True, hidden_size=256,
                      intermediate_size=256)


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path) -> Iterator[Served]:
    served = Served(checkpoint, tmp_path / "cache")
    yield served
    served.stop()


@pytest.fixture
def qmix(warm_python: WarmPython, tmp_path: Path) -> Command:
    return lambda server, *args, **more: warm_python.run("-m", "qmix", *args, env=server.env | more, cwd=tmp_path)


@pytest.fixture
def kill(warm_python: WarmPython, tmp_path: Path) -> Command:
    """kill(server, n, *args): killed once n regions are written."""
    return lambda server, count, *args: warm_python.run("-c", KILLED, count, *args, env=server.env, cwd=tmp_path)


def own(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "qmix" / "models--org--name"


def blocks(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (folder / "blobs").iterdir())


def same_store(one: Path, two: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        if name != "qmix.json":  # which names the source
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.fixture
def want(server: Served, qmix: Command, tmp_path: Path) -> Path:
    done = qmix(server, "quantize", server.handler.folder, "want", *HOW)
    assert done.returncode == 0, done.stderr
    return tmp_path / "want"


@pytest.fixture
def can_free(tmp_path: Path) -> bool:
    """Whether the file system here can free parts of a file."""
    with open(tmp_path / "hole", "w+b") as file:
        file.write(bytes(2**17))
        file.flush()
        return discard._punch_hole(file.fileno(), 0, 2**16)


CANNOT = "this file system cannot free parts of a file: the source goes as a whole"


def test_nothing_of_the_download_stays(server: Served, qmix: Command, tmp_path: Path, want: Path,
                                       can_free: bool) -> None:
    done = qmix(server, "quantize", "org/name", "out", "--discard-source", *HOW)
    assert done.returncode == 0 and not own(tmp_path).exists(), done.stderr
    assert ("discarded " if can_free else CANNOT) in done.stderr
    same_store(want, tmp_path / "out")
    assert not [*(tmp_path / "cache" / "hub").rglob("*.safetensors")]
    fetched = server.weights()
    for flags in (("--discard-source",), ()):
        again = qmix(server, "quantize", "org/name", "out", *flags, *HOW)
        assert again.returncode == 2 and "out: exists" in again.stderr, again.stderr
        assert server.weights() == fetched and not own(tmp_path).exists(), "OUT is looked at before the download"
    server.handler.gated = True
    gated = qmix(server, "quantize", "org/name", "other", "--discard-source", *HOW)
    assert gated.returncode == 4 and "gated" in gated.stderr and not own(tmp_path).exists(), gated.stderr


def test_where_no_part_of_a_file_can_be_freed(server: Served, warm_python: WarmPython, tmp_path: Path,
                                              want: Path) -> None:
    program = "import sys\nfrom qmix.cli import main\nfrom qmix.quantize import discard\n" \
        "discard._punch_hole = lambda *args: False\nmain(sys.argv[1:])"
    done = warm_python.run("-c", program, "quantize", "org/name", "out", "--discard-source", *HOW, env=server.env,
                           cwd=tmp_path)
    assert done.returncode == 0 and CANNOT in done.stderr and not own(tmp_path).exists(), done.stderr
    same_store(want, tmp_path / "out")


def test_a_killed_run_resumes_without_what_was_written(server: Served, qmix: Command, kill: Command, tmp_path: Path,
                                                       want: Path, can_free: bool) -> None:
    """Killed three times; every weight is fetched once."""
    for count in (30, 4, 3):
        assert kill(server, count, "quantize", "org/name", "out", "--discard-source", *HOW).returncode == -9
    assert (own(tmp_path) / NAME).is_file()
    whole = sum(path.stat().st_size for path in server.handler.folder.glob("model-*"))
    assert not can_free or blocks(own(tmp_path)) < whole - 4 * 384 * 1024, "experts that are written have left the disk"
    fetched = server.weights()
    done = qmix(server, "quantize", "org/name", "out", "--discard-source", *HOW)
    assert done.returncode == 0 and "resumed" in done.stderr and server.weights() == fetched, done.stderr
    assert len(fetched) == 2 and not own(tmp_path).exists()
    same_store(want, tmp_path / "out")


def test_a_half_of_a_model_is_never_taken_for_one(server: Served, qmix: Command, kill: Command, tmp_path: Path,
                                                  want: Path) -> None:
    """As a local folder; or where a later commit has the same files under other names."""
    assert kill(server, 30, "quantize", "org/name", "first", "--discard-source", *HOW).returncode == -9
    (snapshot,) = (own(tmp_path) / "snapshots").iterdir()
    local = qmix(server, "quantize", snapshot, "local", *HOW)
    assert local.returncode == 4 and "was discarded" in local.stderr and not (tmp_path / "local").exists(), local.stderr
    repo = tmp_path / "repo"
    shutil.copytree(server.handler.folder, repo)
    for path in [*repo.glob("model-*.safetensors")]:
        path.rename(repo / path.name.replace("model-", "weights-"))
    index = repo / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"weights-'))
    server.handler.folder, server.handler.commit = repo, "f" * 40
    done = qmix(server, "quantize", "org/name", "out", "--discard-source", *HOW)
    assert done.returncode == 0 and "needed again" in done.stderr, done.stderr
    for name in (path.name for path in want.glob("experts*")):
        assert (want / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("how", ["lost", "forced"])
def test_what_is_needed_again_is_fetched_again(server: Served, qmix: Command, kill: Command, tmp_path: Path,
                                               want: Path, how: str) -> None:
    """The written half is damaged, or dropped for one with other arguments."""
    first = HOW if how == "lost" else ("--format", "int8", "-t", "1")
    assert kill(server, 34, "quantize", "org/name", "out", "--discard-source", *first).returncode == -9
    if how == "lost":
        for path in (tmp_path / "out.partial").glob("experts-*"):
            path.write_bytes(bytes(path.stat().st_size))
    server.fetched.clear()
    done = qmix(server, "quantize", "org/name", "out", "--discard-source", *HOW, "--force")
    assert done.returncode == 0 and "needed again" in done.stderr and server.weights(), done.stderr
    assert all(server.handler.ranges[-len(server.weights()):]), "parts of files, from where they begin"
    same_store(want, tmp_path / "out")


def test_what_was_in_the_cache_before_stays(server: Served, qmix: Command, tmp_path: Path, want: Path) -> None:
    """One of two files."""
    assert qmix(server, "quantize", "org/name", "before", *HOW).returncode == 0
    hub = tmp_path / "cache" / "hub" / "models--org--name"
    (gone, kept) = sorted(hub.rglob("model-*.safetensors"))
    before = kept.read_bytes()
    Path(os.path.realpath(gone)).unlink()
    gone.unlink()
    server.fetched.clear()
    done = qmix(server, "quantize", "org/name", "out", "--discard-source", *HOW)
    assert done.returncode == 0 and server.weights() == [gone.name], done.stderr
    assert kept.read_bytes() == before and not own(tmp_path).exists()
    same_store(want, tmp_path / "out")
    again = qmix(server, "quantize", "org/name", "other", *HOW)
    assert again.returncode == 0 and server.weights() == [gone.name, gone.name], "it was not kept"
    done = qmix(server, "quantize", "org/name", "third", "--discard-source", *HOW)
    assert done.returncode == 0 and "nothing is left to free" in done.stderr and kept.read_bytes() == before
    server.fetched.clear()
    done = qmix(server, "quantize", "org/name", "fourth", "--discard-source", "--offline", *HOW)
    assert done.returncode == 0 and "nothing is freed: offline" in done.stderr and not server.fetched, done.stderr
    assert kept.read_bytes() == before and not own(tmp_path).exists()
    same_store(want, tmp_path / "fourth")


def test_a_gguf_model(tmp_path: Path, qmix: Command, kill: Command) -> None:
    path = write_gguf(tmp_path / "repo" / "name-Q8_0.gguf")
    server = Served(tmp_path / "repo", tmp_path / "cache")
    try:
        assert qmix(server, "quantize", path, "want", "-t", 1).returncode == 0
        args = ("quantize", "org/name:Q8_0", "out", "--discard-source", "-t", 1)
        assert kill(server, 22, *args).returncode == -9
        assert (own(tmp_path) / NAME).is_file()
        done = qmix(server, *args)
        assert done.returncode == 0 and server.weights() == ["name-Q8_0.gguf"], done.stderr
        same_store(tmp_path / "want", tmp_path / "out")
    finally:
        server.stop()


def test_a_torn_line_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('[1, "blobs/a", "t"]\n[1, "blobs')
    assert gone_in(tmp_path) == {("blobs/a", "t")}
    note(tmp_path, [("blobs/b", "t"), ("blobs/c", "t")], gone=True)
    note(tmp_path, [("blobs/a", "t")], gone=False)
    assert gone_in(tmp_path) == {("blobs/b", "t"), ("blobs/c", "t")}


def test_what_another_run_fetched_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder in which two commits share a file, and of one a download was interrupted."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    for folder in ("blobs", "snapshots/one", "snapshots/two"):
        (own(tmp_path) / folder).mkdir(parents=True)
    blobs, one, two = (own(tmp_path) / name for name in ("blobs", "snapshots/one", "snapshots/two"))
    (tmp_path / "of-the-user").write_bytes(b"weights")
    (one / "c.gguf").symlink_to(tmp_path / "of-the-user")
    for blob, links in {"shared": (one / "a.gguf", two / "d.gguf"), "mine": (one / "b.gguf",),
                        "small": (one / "config.json",), "other.qmix-partial": (), "x.incomplete": ()}.items():
        (blobs / blob).write_bytes(b"weights")
        for link in links:
            link.symlink_to(Path("..", "..", "blobs", blob))
    note(own(tmp_path), [("blobs/mine", "t"), ("blobs/shared", "t")], gone=True)

    assert not drop_weights("org/name", one, ("a.gguf", "b.gguf", "c.gguf"))[1]
    assert {path.name for path in blobs.iterdir()} == {"shared", "small", "other.qmix-partial", "x.incomplete"}
    assert gone_in(own(tmp_path)) == {("blobs/shared", "t")} and (two / "d.gguf").read_bytes() == b"weights"
    assert not drop_weights("org/name", two, ("d.gguf",))[1] and not (blobs / "shared").exists()
    (blobs / "other.qmix-partial").unlink()
    assert drop_weights("org/name", two, ("d.gguf",))[1] and not own(tmp_path).exists()
    assert (tmp_path / "of-the-user").read_bytes() == b"weights"


def test_a_run_that_fetched_no_weights_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it fetched of them stays, and a journal of what is gone."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))

    def fail(*files: str) -> bool:
        with pytest.raises(CheckpointError, match="404"), claimed("org/name") as folder:
            (folder / "snapshots" / "one").mkdir(parents=True)
            (folder / "blobs").mkdir()
            (tmp_path / "of-the-user").touch()
            (folder / "snapshots" / "one" / "c.gguf").symlink_to(tmp_path / "of-the-user")
            (folder / "blobs" / "small").touch()
            (folder / "snapshots" / "one" / "config.json").symlink_to(Path("..", "..", "blobs", "small"))
            for file in files:
                (folder / file).write_text("x")
            raise CheckpointError("404")
        stays = own(tmp_path).exists()
        assert (private_folder("org/name") == own(tmp_path)) if stays else private_folder("org/name") is None
        shutil.rmtree(own(tmp_path), ignore_errors=True)
        return stays

    assert not fail() and not fail("blobs/x.incomplete") and (tmp_path / "of-the-user").exists()
    assert fail(NAME) and fail("blobs/a.qmix-partial") and fail("blobs/whole") and fail("snapshots/one/a.safetensors")
    own(tmp_path).mkdir()
    assert private_folder("org/name") is None, "of a run that was killed before it fetched any"


def test_what_is_gone_of_a_file_in_a_folder_is_fetched_again(tmp_path: Path, qmix: Command, kill: Command) -> None:
    """By its path in the repository; not with --offline."""
    path = write_gguf(tmp_path / "repo" / "q8" / "name-Q8_0.gguf")
    server = Served(tmp_path / "repo", tmp_path / "cache")
    how = ("--format", "int8", "-t", 1)
    try:
        assert qmix(server, "quantize", path, "want", *how).returncode == 0
        assert kill(server, 22, "quantize", "org/name:Q8_0", "first", "--discard-source", "-t", 1).returncode == -9
        server.fetched.clear()
        offline = qmix(server, "quantize", "org/name:Q8_0", "out", "--discard-source", *how, "--offline")
        assert offline.returncode == 4 and not server.fetched, offline.stderr
        assert "the hub must not be asked (--offline" in offline.stderr, offline.stderr
        done = qmix(server, "quantize", "org/name:Q8_0", "out", "--discard-source", *how)
        assert done.returncode == 0 and {*server.weights()} == {"q8/name-Q8_0.gguf"}, done.stderr
        same_store(tmp_path / "want", tmp_path / "out")
    finally:
        server.stop()


def test_scales_and_zero_points_stay(tmp_path: Path, qmix: Command, kill: Command,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run chooses the formats by them again: zero points of 16 KiB, so that their blocks could be freed."""
    raw = with_keys(architectures.FIRST["mixtral"], {"hidden_size": 128, "intermediate_size": 4096,
                                                     "num_local_experts": 2})
    monkeypatch.setitem(architectures.FIRST, "wide", raw)
    write_lowbit(tmp_path / "repo", "wide", "gptq8")
    server = Served(tmp_path / "repo", tmp_path / "cache")
    try:
        assert qmix(server, "quantize", tmp_path / "repo", "want", "-t", 1).returncode == 0
        args = ("quantize", "org/name", "out", "--discard-source", "-t", 1)
        assert kill(server, 19, *args).returncode == -9
        gone = (own(tmp_path) / NAME).read_text()
        assert ".qweight" in gone and ".qzeros" not in gone and ".scales" not in gone and ".g_idx" not in gone
        done = qmix(server, *args)
        assert done.returncode == 0 and "resumed" in done.stderr, done.stderr
        same_store(tmp_path / "want", tmp_path / "out")
    finally:
        server.stop()


def test_what_is_gone_is_never_read_as_zeros(checkpoint: Path) -> None:
    with Checkpoint.open(checkpoint) as opened:
        key = opened.model.expert_keys[0]
        before = opened.fingerprint()
        for location in opened.expert_locations(key):
            location.shard.discarded.add(location.entry.name)
        with pytest.raises(CheckpointError, match="was discarded"):
            opened.expert(key)
        assert opened.fingerprint() == before


@pytest.mark.parametrize("flags", [("--bpw", "3", "--calibration", "x.txt"), ("--dry-run",)])
def test_what_needs_the_weights_twice_is_refused(server: Served, qmix: Command, flags: tuple[str, ...]) -> None:
    done = qmix(server, "quantize", "org/name", "out", "--discard-source", *flags)
    assert done.returncode == 2 and "more than once" in done.stderr and not server.fetched


def test_a_run_that_leaves_the_flag_out_says_what_is_there(server: Served, qmix: Command, kill: Command) -> None:
    assert kill(server, 30, "quantize", "org/name", "out", "--discard-source", *HOW).returncode == -9
    done = qmix(server, "quantize", "org/name", "out", *HOW)
    assert done.returncode == 0 and "with that flag it would go on there" in done.stderr


@pytest.mark.models  # gptq, three times
def test_a_text_passes_through_what_is_fetched_again(server: Served, qmix: Command, kill: Command,
                                                     tmp_path: Path) -> None:
    """A resumed gptq reads the experts of finished layers once more."""
    (tmp_path / "text.txt").write_text("the fox and the hen went to the mill " * 60)
    how = ("--calibration", "text.txt", "--calibration-tokens", "256", "-t", "1")
    done = qmix(server, "quantize", server.handler.folder, "want", *how)
    assert done.returncode == 0, done.stderr
    killed = kill(server, 34, "quantize", "org/name", "out", "--discard-source", *how)
    assert killed.returncode == -9, killed.stderr
    server.fetched.clear()
    done = qmix(server, "quantize", "org/name", "out", "--discard-source", *how)
    assert done.returncode == 0 and "needed again" in done.stderr and server.weights(), done.stderr
    same_store(tmp_path / "want", tmp_path / "out")
