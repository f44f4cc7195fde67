"""The quantizer as a job: what it writes, refuses, keeps and takes over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import UNQUANTIZED, tiny_config, tiny_tensors, write_checkpoint, write_tiny_checkpoint

from qmix import modelfiles
from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.errors import CheckpointError, DoesNotFit, Interrupted, QmixError, StoreError, UsageError
from qmix.models import read_model
from qmix.quantize import Report, pipeline, quantize_checkpoint
from qmix.quantize.journal import differences
from qmix.store import Store, writer

RTN = QuantConfig(method="rtn")
NF4 = QuantConfig("nf4", "int8", "", 0, 0, double_quant=True)
LAYERS, EXPERTS = 3, 4
REGIONS = LAYERS * (7 + EXPERTS) + 3


def run(source: Path, out: Path, quant: QuantConfig = RTN, **options: Any) -> Report:
    with Checkpoint.open(source) as checkpoint:
        return quantize_checkpoint(checkpoint, out, quant, **{"threads": 1, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def beside(out: Path) -> set[str]:
    """What stands in OUT's folder apart from OUT."""
    return {path.name for path in out.parent.iterdir()} - {out.name}


class Stop(Exception):
    """Raised by a test in the middle of a job."""


def stop_after(regions: int, error: type[BaseException] = Stop) -> Callable[[int, int, str], None]:
    """A progress callback that raises once so many regions are done."""
    left = [regions]

    def progress(done: int, total: int, label: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise error

    return progress


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("job") / "tiny", seed=1, shards=3)
    for name in ("tokenizer.model", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text(f"the {name}")
    (folder / "README.md").write_text("is not copied")
    return folder


class Whole(NamedTuple):
    path: Path
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The store of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(source, out)
    return Whole(out, files(out))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "models" / "out"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the regions that are quantized while the test runs."""
    found: list[str] = []
    quantize = pipeline._quantize

    def counted(source: Any, work: Any, *rest: Any) -> Any:
        found.append(work.region.name)
        return quantize(source, work, *rest)

    monkeypatch.setattr(pipeline, "_quantize", counted)
    return found


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


# Broken off and resumed.

@pytest.mark.parametrize("regions", [1, 2, 20, 30, REGIONS])
def test_resumes_where_it_stopped(source: Path, out: Path, whole: Whole, made: list[str], regions: int) -> None:
    with pytest.raises(Stop):
        run(source, out, progress=stop_after(regions))
    assert not out.exists() and beside(out) == {"out.partial"}
    with pytest.raises(StoreError, match="not finished"):
        Store.open(out.parent / "out.partial")
    first = len(made)
    report = run(source, out)
    # One more region may have been on its way to the disk when the job stopped.
    assert report.resumed in (regions, regions + 1) and len(made) - first == REGIONS - report.resumed
    assert files(out) == whole.files and beside(out) == set()


def test_other_arguments_do_not_resume(source: Path, out: Path, whole: Whole, made: list[str]) -> None:
    with pytest.raises(Stop):
        run(source, out, QuantConfig(group_size=32), progress=stop_after(25))
    with pytest.raises(UsageError, match=r"group_size 32, now 64; method 'hqq', now 'rtn'") as error:
        run(source, out)
    assert "--force" in str(error.value.cure)
    other = write_tiny_checkpoint(out.parent / "other", seed=9)
    with pytest.raises(UsageError, match="another source"):
        run(other, out, QuantConfig(group_size=32))
    shutil.rmtree(other)
    made.clear()
    report = run(source, out, force=True)
    assert report.resumed == 0 and len(made) == REGIONS and files(out) == whole.files and beside(out) == set()


def test_another_version_of_qmix_does_not_resume() -> None:
    assert differences({"qmix": "0.1.0", "block": 64}, {"qmix": "0.2.0", "block": 64}) == ["qmix '0.1.0', now '0.2.0'"]


@pytest.mark.parametrize("damage", ["bytes", "torn", "middle", "header", "empty", "size", "weights"])
def test_a_damaged_partial_store_is_mended(source: Path, out: Path, whole: Whole, damage: str) -> None:
    partial = out.parent / "out.partial"
    with pytest.raises(Stop):
        run(source, out, progress=stop_after(30))
    journal, experts = partial / "journal.jsonl", partial / "experts-00.safetensors"
    lines = journal.read_bytes().splitlines(keepends=True)
    if damage == "bytes":  # the machine lost power: the journal knows of a record that never reached the disk
        with open(experts, "r+b") as file:
            file.seek(4096 + 16384 + 5)
            file.write(b"never written")
    elif damage == "torn":
        journal.write_bytes(b"".join(lines)[:-20])
    elif damage == "middle":
        journal.write_bytes(b"".join([*lines[:10], b'{"region": 3}\n', *lines[10:]]))
    elif damage in ("header", "empty"):
        journal.write_bytes(b"{" + lines[0][1:40] if damage == "header" else b"")
    elif damage == "size":
        os.truncate(experts, 100)
    else:
        experts.unlink()
    broken = damage in ("header", "empty")
    if broken:
        with pytest.raises(UsageError, match="first line is not a journal's"):
            run(source, out)
    known = len(lines) - 1
    assert run(source, out, force=broken).resumed == {
        "bytes": known - 1, "torn": known - 1, "middle": 9, "header": 0, "empty": 0,
        "size": known - EXPERTS, "weights": known - EXPERTS}[damage]
    assert files(out) == whole.files and beside(out) == set()


def test_a_run_killed_before_its_rename(source: Path, out: Path, whole: Whole, made: list[str]) -> None:
    shutil.copytree(whole.path, out.parent / "out.partial")
    with pytest.raises(UsageError, match="method"):
        run(source, out, QuantConfig())
    report = run(source, out)
    assert report.resumed == REGIONS and made == []
    assert files(out) == whole.files and beside(out) == set()


def test_a_run_killed_between_its_renames(source: Path, out: Path, whole: Whole) -> None:
    """The old store comes back first, whoever runs next; then the new one is as good as finished."""
    run(source, out, UNQUANTIZED)
    old = files(out)
    out.rename(out.parent / "out.replaced")
    shutil.copytree(whole.path, out.parent / "out.partial")
    with pytest.raises(UsageError, match="exists"):
        run(source, out)
    assert files(out) == old
    out.rename(out.parent / "out.replaced")
    assert run(source, out, force=True).resumed == REGIONS
    assert files(out) == whole.files and beside(out) == set()


def test_a_run_killed_while_deleting_the_old_store(source: Path, out: Path, whole: Whole) -> None:
    shutil.copytree(whole.path, out)
    run(source, out.parent / "out.replaced", UNQUANTIZED)
    (out.parent / "out.replaced" / "dense.safetensors").unlink()
    with pytest.raises(UsageError, match="exists"):
        run(source, out)
    assert files(out) == whole.files
    run(source, out, force=True)
    assert files(out) == whole.files and beside(out) == set()


def test_a_strangers_folder_beside_out_is_kept(source: Path, out: Path) -> None:
    (out.parent / "out.replaced").mkdir(parents=True)
    (out.parent / "out.replaced" / "mine").touch()
    with pytest.raises(UsageError, match="mine"):
        run(source, out)
    assert beside(out) == {"out.replaced"}


def test_ctrl_c(source: Path, out: Path, whole: Whole) -> None:
    threads = threading.active_count()
    with pytest.raises(Interrupted) as error:
        run(source, out, progress=stop_after(28, KeyboardInterrupt))
    assert error.value.exit_code == 130 and "resumes" in str(error.value.cure)
    assert threading.active_count() == threads
    run(source, out)
    assert files(out) == whole.files


# Full disks, damaged sources.

@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("writes", [0, 7, 60, 90])
def test_a_disk_that_fails(source: Path, out: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch, writes: int,
                           code: int) -> None:
    write, left = writer.write_exact, [writes]

    def failing(fd: int, data: memoryview, offset: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            write(fd, memoryview(data)[:len(data) // 2], offset)
            raise OSError(code, os.strerror(code))
        write(fd, data, offset)

    monkeypatch.setattr(writer, "write_exact", failing)
    with pytest.raises(QmixError, match=os.strerror(code)) as error:
        run(source, out)
    assert error.value.exit_code == (1 if code == errno.EIO else 3)
    assert ".safetensors" in error.value.message and "resumes" in str(error.value.cure)
    assert not out.exists() and beside(out) == {"out.partial"}
    monkeypatch.setattr(writer, "write_exact", write)
    run(source, out)
    assert files(out) == whole.files and beside(out) == set()


def test_a_journal_on_a_full_disk(source: Path, out: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = os.write, [20]

    def failing(fd: int, data: bytes) -> int:
        left[0] -= 1
        return write(fd, data) if left[0] else write(fd, data[:9])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing)
        with pytest.raises(DoesNotFit, match="journal"):
            run(source, out)
    assert run(source, out).resumed == 19
    assert files(out) == whole.files


def test_the_disk_is_checked_first(source: Path, out: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(map(len, whole.files.values()))

    def disk(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, free))

    disk(size // 2)
    with pytest.raises(DoesNotFit, match=r"needs .* KiB of disk; .* KiB free, short of .* KiB") as error:
        run(source, out)
    assert error.value.exit_code == 3 and beside(out) == set(), "an empty folder must not stay behind"
    disk(2 * size)
    with pytest.raises(Stop):
        run(source, out, progress=stop_after(REGIONS))
    disk(size // 2)
    run(source, out)  # what is written already is not needed again
    assert files(out) == whole.files


def damaged(path: Path, name: str, place: tuple[int, ...], value: float) -> Path:
    raw = tiny_config()
    tensors = tiny_tensors(read_model(raw))
    tensors[name][place] = value
    return write_checkpoint(path, raw, tensors)


@pytest.mark.parametrize("quant", [RTN, QuantConfig(), NF4, UNQUANTIZED], ids=["rtn", "hqq", "nf4", "keep"])
@pytest.mark.parametrize(("part", "place"), [("w1", (95, 63)), ("w3", (0, 5)), ("w2", (33, 95))])
def test_no_store_is_made_of_nan(tmp_path: Path, quant: QuantConfig, part: str, place: tuple[int, int]) -> None:
    name = f"model.layers.1.block_sparse_moe.experts.2.{part}.weight"
    source = damaged(tmp_path / "source", name, place, float("nan"))
    with pytest.raises(CheckpointError) as error:
        run(source, tmp_path / "out", quant)
    assert f"{name}[{place[0]}, {place[1]}] is nan" in error.value.message and error.value.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "place"), [
    ("model.embed_tokens.weight", (127, 0)), ("model.layers.0.self_attn.k_proj.weight", (3, 63)),
    ("model.layers.2.input_layernorm.weight", (63,)), ("lm_head.weight", (0, 0)),
    ("model.layers.1.block_sparse_moe.gate.weight", (3, 1))])
def test_no_store_is_made_of_infinity(tmp_path: Path, name: str, place: tuple[int, ...]) -> None:
    source = damaged(tmp_path / "source", name, place, float("-inf"))
    with pytest.raises(CheckpointError) as error:
        run(source, tmp_path / "out")
    assert f"{name}{list(place)} is -inf" in error.value.message


def test_large_finite_weights_are_no_nan(tmp_path: Path) -> None:
    raw = tiny_config()
    tensors = tiny_tensors(read_model(raw))
    tensors["model.embed_tokens.weight"][:] = 3e38  # their sum is not finite
    run(write_checkpoint(tmp_path / "source", raw, tensors), tmp_path / "out")


def test_a_source_that_shrinks(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")

    def progress(done: int, total: int, label: str) -> None:
        os.truncate(source / "model.safetensors", 20_000)

    with pytest.raises(CheckpointError, match="changed while"):
        run(source, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists() and json.loads(
        (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()[0])
