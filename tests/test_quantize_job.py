"""The quantizer as a job: what it writes, refuses, keeps and takes over; test_quantize_resume.py breaks it off."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import quantize_jobs
import torch
from helpers import UNQUANTIZED, write_tiny_checkpoint
from quantize_jobs import EXPERTS, LAYERS, NF4, REGIONS, RTN, Whole, beside, files, run

from qmix import modelfiles
from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.errors import QmixError, UsageError
from qmix.store import Store

source = pytest.fixture(scope="module")(quantize_jobs.source)
whole = pytest.fixture(scope="module")(quantize_jobs.whole)
out, made = pytest.fixture(quantize_jobs.out), pytest.fixture(quantize_jobs.made)


def test_a_whole_store(source: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    labels = set()

    def progress(done: int, total: int, label: str) -> None:
        seen.append((done, total))
        labels.add(label)

    report = run(source, out, progress=progress)
    assert beside(out) == set()
    assert set(files(out)) == {"config.json", "tokenizer.model", "generation_config.json", "chat_template.jinja",
                               "dense.safetensors", "qmix.json", *(f"experts-0{i}.safetensors" for i in range(3))}
    for name in ("config.json", "tokenizer.model", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert report.files == {name: len(data) for name, data in files(out).items()}
    with Checkpoint.open(source) as checkpoint, Store.open(out) as store:
        assert store.verify(deep=True) == []
        assert store.manifest.fingerprint == checkpoint.fingerprint() and store.manifest.source == "tiny"
        assert seen == sorted(seen) and seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)
        assert report.source_bytes == checkpoint.nbytes == 2 * sum(c.weights for c in report.classes)
    assert len(seen) == REGIONS and "layer 2 expert 3" in labels
    experts, dense, plain = report.classes
    # int4, group size 64: 4 bits and two bf16 per group; width 64 x 96 pads w13's rows 2 x 96 to 2 x 128, w2's columns
    # to 128: (256 * 64 + 64 * 128) * 4.5 / 8 bytes, and that up to 4096.
    assert experts.nbytes == LAYERS * EXPERTS * 16384 and experts.format == "int4 g64 rtn, block 64"
    assert dense.format == "int8" and 8.2 < dense.bits_per_weight < 8.4
    assert plain.bits_per_weight == 16 and plain.error_mean is None
    assert experts.error_max == report.worst[0][1] >= experts.error_mean
    assert (report.regions, report.resumed, report.dry_run) == (REGIONS, 0, False)
    assert any("int4 g64 rtn" in line for line in report.lines())


@pytest.mark.parametrize("quant", [RTN, QuantConfig(dense="int4", group_size=32), NF4, UNQUANTIZED],
                         ids=["rtn", "hqq", "nf4", "keep"])
def test_same_bytes_for_every_thread_count_and_place(source: Path, tmp_path: Path, quant: QuantConfig) -> None:
    before = torch.get_num_threads()
    run(source, tmp_path / "a", quant, threads=1)
    moved = Path(shutil.copytree(source, tmp_path / "elsewhere" / "tiny"))
    os.utime(moved / "config.json", (0, 0))
    run(moved, tmp_path / "b" / "c", quant, threads=3)
    assert files(tmp_path / "a") == files(tmp_path / "b" / "c")
    assert torch.get_num_threads() == before


def test_a_hub_snapshot_names_repository_and_revision(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--mistralai--Mixtral-8x7B-v0.1" / "snapshots" / "fc7a"
    run(write_tiny_checkpoint(snapshot), tmp_path / "out")
    with Store.open(tmp_path / "out") as store:
        assert (store.manifest.source, store.manifest.revision) == ("mistralai/Mixtral-8x7B-v0.1", "fc7a")


def test_dry_run_writes_nothing_and_is_right(source: Path, out: Path, whole: Whole) -> None:
    report = run(source, out, dry_run=True)
    assert not out.parent.exists() and report.dry_run
    assert report.files == {name: len(data) for name, data in whole.files.items() if name != "qmix.json"}
    assert report.classes[0].bits_per_weight == pytest.approx(8 * 16384 / (3 * 64 * 96))
    assert "would write" in report.lines()[0]
    out.mkdir(parents=True)
    (out / "mine").touch()
    run(source, out, dry_run=True, force=True)
    assert (out / "mine").exists()


# What stands at OUT.

def with_templates(source: Path, folder: Path) -> Path:
    """A copy of the checkpoint with all the files that a tokenizer and a chat template may come in."""
    shutil.copytree(source, folder)
    (folder / modelfiles.TEMPLATES).mkdir()
    templates = [f"{modelfiles.TEMPLATES}/{name}" for name in ("default.jinja", "tool_use.jinja")]
    for name in (*modelfiles.FILES, *templates):
        (folder / name).write_text(f"the {name}")
    (folder / modelfiles.TEMPLATES / "notes.txt").write_text("is not copied")
    return folder


def test_all_files_that_the_tokenizer_reads_are_copied(source: Path, out: Path, tmp_path: Path) -> None:
    folder = with_templates(source, tmp_path / "tiny")
    run(folder, out)
    names = [*modelfiles.present(folder)]
    assert len(names) == len(modelfiles.FILES) + 2 and [*modelfiles.present(out)] == names
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    with Store.open(out) as store:
        assert store.verify(deep=True) == [] and set(store.manifest.files) == {"config.json", *names}
    (out / modelfiles.TEMPLATES / "default.jinja").write_text("another")
    with Store.open(out) as store:
        assert any("default.jinja" in problem for problem in store.verify(deep=False))
    run(source, out, force=True)  # a folder of templates is a part of the store, and goes with it
    assert not (out / modelfiles.TEMPLATES).exists()


def test_what_else_lies_in_a_folder_of_templates_is_never_touched(source: Path, out: Path, whole: Whole) -> None:
    shutil.copytree(whole.path, out)
    (out / modelfiles.TEMPLATES).mkdir()
    (out / modelfiles.TEMPLATES / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"additional_chat_templates/notes\.txt"):
        run(source, out, force=True)


def test_a_template_that_is_gone_from_the_checkpoint_is_not_in_the_store(source: Path, out: Path,
                                                                         tmp_path: Path) -> None:
    """A run that was killed just before its end leaves copies behind, which the store's reader would read."""
    folder = with_templates(source, tmp_path / "tiny")
    run(folder, out)
    out.rename(out.parent / "out.partial")
    for name in ("chat_template.json", f"{modelfiles.TEMPLATES}/default.jinja"):
        (folder / name).unlink()
    run(folder, out)
    assert [*modelfiles.present(out)] == [*modelfiles.present(folder)]


def test_a_store_is_replaced_only_with_force(source: Path, out: Path, whole: Whole) -> None:
    run(source, out, UNQUANTIZED)
    old = files(out)
    with pytest.raises(UsageError, match="exists") as error:
        run(source, out)
    assert "--force" in str(error.value.cure) and error.value.exit_code == 2
    assert files(out) == old and beside(out) == set()
    seen = []

    def progress(done: int, total: int, label: str) -> None:
        seen.append(files(out) == old)

    run(source, out, force=True, progress=progress)
    assert all(seen) and len(seen) == REGIONS, "the old store must stay until the new one is whole"
    assert files(out) == whole.files and beside(out) == set()


def test_a_damaged_store_can_be_replaced(source: Path, out: Path, whole: Whole) -> None:
    shutil.copytree(whole.path, out)
    (out / "qmix.json").write_text("{")
    (out / "experts-01.safetensors").unlink()
    run(source, out, force=True)
    assert files(out) == whole.files


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors", ".git", "qmix.json/x", "config.json"])
def test_what_qmix_did_not_write_is_never_touched(source: Path, out: Path, name: str, force: bool) -> None:
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(UsageError, match="exists and holds"):
        run(source, out, force=force)
    assert (out / name).read_text() == "mine" and beside(out) == set()


def test_a_file_added_to_a_store_is_not_lost(source: Path, out: Path, whole: Whole) -> None:
    shutil.copytree(whole.path, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        run(source, out, force=True)
    (out / "notes.txt").unlink()

    def progress(done: int, total: int, label: str) -> None:
        (out / "notes.txt").write_text("added while the job ran")

    with pytest.raises(UsageError, match=r"notes\.txt"):
        run(source, out, force=True, progress=progress)
    assert files(out) == {**whole.files, "notes.txt": b"added while the job ran"}
    (out / "notes.txt").rename(out.parent / "notes.txt")
    assert run(source, out, force=True).resumed == REGIONS


def test_files_links_and_empty_folders_at_out(source: Path, tmp_path: Path, whole: Whole) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/")):
        with pytest.raises(QmixError):
            run(source, out, force=True)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty")
    assert files(tmp_path / "empty") == whole.files
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away" / "store")
    run(source, tmp_path / "link")
    run(source, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and files(tmp_path / "far" / "away" / "store") == whole.files


def test_a_folder_in_the_way_of_the_partial_one(source: Path, out: Path) -> None:
    partial = out.parent / "out.partial"
    partial.mkdir(parents=True)
    for name in ("config.json", "download.tmp"):
        (partial / name).write_text("someone else's")
        with pytest.raises(UsageError, match=name):
            run(source, out, force=True)
        assert files(partial) == {name: b"someone else's"}
        (partial / name).unlink()


def test_a_folder_that_cannot_be_written(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *rest: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(QmixError, match="Permission denied") as error:
        run(source, out)
    assert error.value.exit_code == 1 and str(out.parent) in error.value.message and error.value.cure


def test_two_at_once(source: Path, out: Path, whole: Whole) -> None:
    """The second is refused while the first is at it, by flock and in another process alike."""
    running, go = threading.Event(), threading.Event()

    def progress(done: int, total: int, label: str) -> None:
        running.set()
        assert go.wait(20)

    first = threading.Thread(target=run, args=(source, out), kwargs={"progress": progress})
    first.start()
    try:
        assert running.wait(20)
        with pytest.raises(QmixError, match=r"out\.partial: another qmix") as error:
            run(source, out, force=True)
        assert error.value.exit_code == 1
    finally:
        go.set()
        first.join()
    assert files(out) == whole.files and beside(out) == set()
    folder = out.parent / "next.partial"
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(QmixError, match="another qmix"):
        run(source, out.parent / "next")
    os.close(fd)
    run(source, out.parent / "next")
