"""The quantizer as a job that is broken off, by an interrupt, a full disk or a damaged source, and run again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import quantize_jobs
from helpers import UNQUANTIZED, tiny_config, tiny_tensors, write_checkpoint, write_tiny_checkpoint
from quantize_jobs import EXPERTS, NF4, REGIONS, RTN, Stop, Whole, beside, files, run, stop_after

from qmix.config import QuantConfig
from qmix.errors import CheckpointError, DoesNotFit, Interrupted, QmixError, StoreError, UsageError
from qmix.models import read_model
from qmix.quantize.journal import differences
from qmix.store import Store, writer

source = pytest.fixture(scope="module")(quantize_jobs.source)
whole = pytest.fixture(scope="module")(quantize_jobs.whole)
out, made = pytest.fixture(quantize_jobs.out), pytest.fixture(quantize_jobs.made)


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
