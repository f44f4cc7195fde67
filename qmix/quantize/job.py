"""Checkpoint to store, streaming and resumable.

    claim OUT -> take over what an earlier run finished -> check the disk -> make the rest, region by region
    -> manifest -> sync -> rename

You can kill it at any moment and run it again: finished regions are taken over after their checksums have been
compared, and the store comes out byte for byte the same. target.py lists what a killed run may leave behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qmix import hardware, modelfiles
from qmix.bounded import read_file
from qmix.checkpoint import Checkpoint
from qmix.config import CALIBRATED, ExpertKey, QuantConfig
from qmix.errors import CheckpointError, DoesNotFit, Interrupted, QmixError, StoreError, UsageError
from qmix.quantize import journal as journals
from qmix.quantize.budget import peak_bytes
from qmix.quantize.calibration import Calibration
from qmix.quantize.discard import Discard
from qmix.quantize.journal import Finished, Journal
from qmix.quantize.onethread import one_torch_thread
from qmix.quantize.pipeline import Work, all_work, route, run
from qmix.quantize.report import Report
from qmix.quantize.target import Target, cannot_write, resolve, sync_folder, written_bytes
from qmix.render import Progress
from qmix.shards import MAX_JSON
from qmix.sizes import format_bytes
from qmix.store import (
    CONFIG,
    MANIFEST,
    CalibrationEntry,
    StoreLayout,
    StoreWriter,
    classes,
    fell_back,
    layer_rows,
    worst_experts,
)
from qmix.store.manifest import DenseEntry, FileEntry, Manifest, RecordEntry
from qmix.store.raw import digest

AGAIN = "run the same command again: it resumes"
CHECKERS = 4  # threads that compare checksums of what is there already
LINE_BYTES = 600  # of manifest and journal, per region, at most


def quantize_checkpoint(source: Checkpoint, out: Path | str, quant: QuantConfig, *,
                        calibration: Calibration | None = None, threads: int | None = None, force: bool = False,
                        dry_run: bool = False, progress: Progress | None = None,
                        discard: Discard | None = None) -> Report:
    """Quantize `source` into a new store at `out`; resumes where an earlier run broke off.

    calibration: the text that the method gptq wants; no other takes one.
    threads: of the quantizer, default the physical cores; no bit of the store depends on it. force: replace
    a store at `out`, once the new one is whole, and drop an unfinished one made with other arguments.
    dry_run: report what would be written and touch nothing. progress(done, total, label): source bytes. discard: frees
    the source while the store is written.

    UsageError: `out` is taken, or an unfinished store there was made with other arguments. DoesNotFit: the
    disk is too small, or became so; CheckpointError: the source is damaged; Interrupted: Ctrl-C. After
    all of them but the first the same call resumes.
    """
    out, threads = resolve(Path(out)), hardware.compute_cores() if threads is None else hardware.check_threads(threads)
    _check_outside(source, out)
    if (quant.method in CALIBRATED) != (calibration is not None):
        raise UsageError(f"method {quant.method!r}: {'takes no' if calibration else 'needs a'} calibration")
    layout = StoreLayout.of(source.model, quant)
    work = all_work(source, layout, quant)
    _account(source, work)
    copies = _read_copies(source)
    if dry_run:
        return _report(source, quant, out, layout, copies, None, None if calibration is None else calibration.entry)
    if calibration is not None:
        check_memory(source, calibration.tokens, threads)
    target = Target.claim(out, force)
    try:
        job = _Job(source, quant, layout, work, copies, target, force, calibration, discard)
        return job.run(threads, progress or (lambda done, total, label: None))
    except KeyboardInterrupt:
        raise Interrupted(f"{out}: stopped before it was finished", AGAIN) from None
    except OSError as e:
        raise _failure(e, target.partial) from None
    finally:
        target.release()


def check_out(source: Checkpoint, out: Path, force: bool) -> None:
    """An error, before any work is done, where quantize_checkpoint would refuse `out` or cannot write there."""
    _check_outside(source, resolve(out))
    check_target(out, force)


def check_target(out: Path, force: bool) -> None:
    """That part of it which needs no source: before one is fetched."""
    Target.claim(resolve(out), force).release()


def _check_outside(source: Checkpoint, out: Path) -> None:
    if out.is_relative_to(source.path.resolve()):
        raise UsageError(f"{out}: lies inside the checkpoint {source.path}", "choose an OUT beside it")


class _Job:
    """One run: what it makes, where, and what it knows to be finished."""

    def __init__(self, source: Checkpoint, quant: QuantConfig, layout: StoreLayout, work: list[Work],
                 copies: Mapping[str, bytes], target: Target, force: bool, calibration: Calibration | None,
                 discard: Discard | None):
        self._source, self._quant, self._layout, self._work = source, quant, layout, work
        self._copies, self._target, self._force = copies, target, force
        self._calibration = calibration
        self._discard = discard
        self._entry = None if calibration is None else calibration.entry
        self._arguments = journals.arguments(source.fingerprint(), quant, self._entry)
        self._done: dict[str, Finished] = {}

    def run(self, threads: int, progress: Progress) -> Report:
        folder, total = self._target.partial, self._source.nbytes
        claimed = self._recall()
        self._check_disk()
        journal = Journal.create(folder, self._arguments, claimed)
        try:
            sync_folder(folder)
            (folder / MANIFEST).unlink(missing_ok=True)  # of a run that was killed before its rename
            with StoreWriter(folder, self._layout) as writer, one_torch_thread():
                done, running = 0, False

                def finished(work: Work, result: Finished | None) -> None:
                    nonlocal done
                    if result is not None:
                        self._done[work.region.name] = result
                        done += work.nbytes
                    progress(done, total, work.label)
                    if running and self._discard is not None:
                        self._discard.written(work)

                for work, result in self._verified(writer, claimed):
                    finished(work, result)
                rest = self._rest()
                self._free_source(rest)
                running = True
                resumed, at_start, start = len(self._done), done, time.perf_counter()
                run(self._source, self._quant, rest, writer, journal, self._done, threads, finished,
                    self._calibration)
                assert done == total, (done, total)  # every byte of the checkpoint, exactly once
                writer.sync()
                if self._discard is not None:
                    self._discard.flush()
                seconds = time.perf_counter() - start
        finally:
            journal.close()
        manifest = self._finish()
        return _report(self._source, self._quant, self._target.out, self._layout, self._copies, manifest,
                       self._entry, len(self._work), resumed, seconds, (total - at_start) / 1e6 / seconds)

    def _free_source(self, rest: list[Work]) -> None:
        """Fetch what was discarded and `rest` reads; free what only finished regions were made of."""
        if self._discard is not None:
            self._discard.restore(rest)
            reads = {work.region.name for work in rest}
            for work in self._work:
                if work.region.name not in reads:
                    self._discard.written(work)

    def _rest(self) -> list[Work]:
        """What `run` has to go through."""
        if self._calibration is not None:
            return route(self._work, self._done, self._source.model)
        return [work for work in self._work if work.region.name not in self._done]

    def _recall(self) -> dict[str, Finished]:
        """What the journal of an earlier run claims; UsageError where that run was another job."""
        target = self._target
        try:
            found = journals.recall(target.partial)
        except StoreError as e:
            differences = [e.message]
        else:
            then, done = found or (self._arguments, {})
            differences = journals.differences(then, self._arguments)
        if differences and not self._force:
            listed = "; ".join(differences)
            raise UsageError(f"{target.partial}: an unfinished store of another job: {listed}",
                             "give the old arguments to resume it, or --force to drop it and start over")
        if differences:
            target.clear()
            return {}
        return done

    def _verified(self, writer: StoreWriter,
                  claimed: Mapping[str, Finished]) -> Iterator[tuple[Work, Finished]]:
        """The work that is on disk already, as its checksum proves."""
        todo = [work for work in self._work if work.region.name in claimed]
        with ThreadPoolExecutor(CHECKERS, "qmix-check") as checkers:
            try:
                sums = checkers.map(lambda work: writer.checksum(work.region), todo)
                for work, xxh3 in zip(todo, sums, strict=True):
                    if xxh3 == claimed[work.region.name].xxh3:
                        yield work, claimed[work.region.name]
            except BaseException:
                checkers.shutdown(wait=True, cancel_futures=True)
                raise

    def _check_disk(self) -> None:
        folder = self._target.partial
        needed = _store_bytes(self._layout, self._copies) + LINE_BYTES * len(self._work)
        there, free = written_bytes(folder), shutil.disk_usage(folder).free
        if self._discard is not None and self._discard.folder.stat().st_dev == folder.stat().st_dev:
            free += self._discard.freeable  # while the store grows
        if needed - there > free:
            already = f", {format_bytes(there)} of it written already" if there else ""
            raise DoesNotFit(f"{self._target.out}: needs {format_bytes(needed)} of disk{already}; "
                             f"{format_bytes(free)} free, short of {format_bytes(needed - there - free)}",
                             "make room, or choose an OUT on another disk")

    def _finish(self) -> Manifest:
        """Copied files, manifest, and the rename; every weight is on the disk before."""
        folder = self._target.partial
        for name in modelfiles.present(folder):
            if name not in self._copies:
                (folder / name).unlink()  # of a killed run, and gone from the checkpoint: the store would read it
        for name, data in self._copies.items():
            (folder / name).parent.mkdir(exist_ok=True)
            _write_synced(folder / name, data)
        if (folder / modelfiles.TEMPLATES).is_dir():
            sync_folder(folder / modelfiles.TEMPLATES)
        manifest = self._manifest()
        draft = folder / (MANIFEST + ".tmp")
        _write_synced(draft, manifest.to_json())
        draft.replace(folder / MANIFEST)
        self._target.commit(self._force)
        return manifest

    def _manifest(self) -> Manifest:
        source, layout = self._source, self._layout
        missing = [work.region.name for work in self._work if work.region.name not in self._done]
        if missing or set(layout.records) != set(source.model.expert_keys):
            raise QmixError(f"{source.path}: {missing[:1]}: not quantized; no store is written")
        records, dense = {}, {}
        for work in self._work:
            key, done = work.source, self._done[work.region.name]
            stored = work.region.file, work.region.offset, work.region.nbytes, done.xxh3
            if isinstance(key, ExpertKey):
                records[key] = RecordEntry(key, *stored, done.error, done.calibrated)
            else:
                spec = layout.specs[key]
                dense[key] = DenseEntry(key, spec.format if spec else "plain", *stored, done.error.get("all"),
                                        done.calibrated)
        origin, revision = _origin(source.path)
        files = {name: FileEntry(name, len(data), digest(data)) for name, data in self._copies.items()}
        return Manifest(origin, revision, self._arguments["source"], source.model, self._quant,
                        records, dense, files, self._entry)


def _failure(e: OSError, folder: Path) -> QmixError:
    where = e.filename or folder
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFit(f"{where}: {e.strerror}", f"make room on the disk, then {AGAIN}")
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return cannot_write(e)
    return QmixError(f"{where}: {e.strerror}", f"check the disk, then {AGAIN}")


def _account(source: Checkpoint, work: list[Work]) -> None:
    """All weights of the checkpoint, and nothing twice: proven by bytes before anything is written."""
    planned = sum(item.nbytes for item in work)
    if planned != source.nbytes:
        raise QmixError(f"{source.path}: weights of {source.nbytes} bytes, the store would cover {planned}")


def _read_copies(source: Checkpoint) -> dict[str, bytes]:
    """{name: bytes} of config.json and what goes with it."""
    found = {}
    for name in (CONFIG, *source.extra_files):
        if away := modelfiles.leads_away(source.folder / name):
            raise CheckpointError(f"{source.path / name}: a link to {away}, which is no file of the checkpoint",
                                  "copy that file there, if it belongs to the model")
        try:
            found[name] = read_file(source.folder / name, MAX_JSON, CheckpointError)
        except OSError as e:
            raise CheckpointError(f"{source.path / name}: {e.strerror}", "check its permissions") from None
    return found


def _store_bytes(layout: StoreLayout, copies: Mapping[str, bytes]) -> int:
    return layout.nbytes + sum(len(data) for data in copies.values())


def _origin(path: Path) -> tuple[str, str | None]:
    """(name, revision) of a checkpoint: of the hub where it lies in the hub's cache, else its folder's name.

    .../models--mistralai--Mixtral-8x7B-v0.1/snapshots/fc7a -> ("mistralai/Mixtral-8x7B-v0.1", "fc7a")
    .../models--org--name/snapshots/fc7a/q4/x.gguf -> ("org/name:q4/x.gguf", "fc7a")
    """
    path = path.absolute()
    snapshot = next((one for one in (path, *path.parents) if one.parent.name == "snapshots"
                     and one.parent.parent.name.startswith("models--")), None)
    if snapshot is None:
        return path.resolve().name, None
    repo = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
    file = path.relative_to(snapshot).as_posix()
    return repo if file == "." else f"{repo}:{file}", snapshot.name


def _report(source: Checkpoint, quant: QuantConfig, out: Path, layout: StoreLayout,
            copies: Mapping[str, bytes], manifest: Manifest | None, calibration: CalibrationEntry | None,
            regions: int = 0, resumed: int = 0, seconds: float = 0.0, mb_per_s: float = 0.0) -> Report:
    files = {file.name: file.size for file in layout.files.values()}
    files.update((name, len(data)) for name, data in copies.items())
    if manifest:
        files[MANIFEST] = len(manifest.to_json())
    summary = classes(source.model, quant, layout, manifest)
    worst = tuple(worst_experts(manifest)) if manifest else ()
    layers, without = (tuple(layer_rows(manifest)), tuple(fell_back(manifest))) if manifest else ((), ())
    return Report(out, manifest is None, files, source.nbytes, source.skipped, summary, worst, regions,
                  resumed, seconds, mb_per_s, calibration, layers, without)


def check_memory(source: Checkpoint, tokens: int, threads: int, beside: int = 0) -> None:
    """DoesNotFit where a forward pass over so many tokens, with what goes along with it and `beside` bytes, needs more
    than is free."""
    needed, available = peak_bytes(source.model, tokens, threads) + beside, hardware.memory().available
    if needed > available:
        raise DoesNotFit(f"a calibration on {tokens} tokens needs {format_bytes(needed)} of memory; "
                         f"{format_bytes(available)} is free", "take fewer with --calibration-tokens, or --threads 1")


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
