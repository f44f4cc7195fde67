"""An open store: checked against its own manifest and configs, then read region by region.

Opening reads only the headers, and refuses every inconsistency by file and key. What a hostile qmix.json says about
files, offsets and sizes is only compared with what the configs imply, and never used. A read is one pread into a buffer
of the caller's, then its checksum: no copies, no mapping. Reads may run in several threads.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qmix.bounded import parse_json, read_file
from qmix.config import ExpertKey
from qmix.errors import ConfigError, StoreError, UsageError
from qmix.formats import Packed, memory, view
from qmix.spec import Model
from qmix.store import raw, version1
from qmix.store.json_object import DAMAGED
from qmix.store.layout import CONFIG, JOURNAL, MANIFEST, FileLayout, Region, StoreLayout, record_name
from qmix.store.manifest import DenseEntry, Manifest, RecordEntry
from qmix.store.records import CHANGED, CORRUPT, RecordFiles, Verify
from qmix.tensorfile import read_exact, read_header

READERS = 4  # threads that keep an NVMe disk's queue filled


class Store:
    """path: the folder. model, quant: what it holds and how. manifest: qmix.json. layout: where everything lies.

    Use as a context manager, or close it.
    """

    def __init__(self, path: Path, model: Model, manifest: Manifest, layout: StoreLayout,
                 fds: dict[str, int], opened: ExitStack):
        self.path = path
        self.model = model
        self.quant = manifest.quant
        self.manifest = manifest
        self.layout = layout
        self._paged_layers = model.paged_layers  # put together at every look
        self._fds = fds
        self._opened = opened
        self._sums = {name: entry.xxh3 for name, entry in manifest.dense.items()}
        self._sums.update((record_name(key), entry.xxh3) for key, entry in manifest.records.items())

    @classmethod
    def open(cls, path: Path | str, mtp: bool = True) -> Store:
        """Open and check; StoreError names file and key. UsageError, with the command that quantizes
        it, for an unquantized checkpoint. mtp: `model` has the multi-token-prediction head that the store has; without,
        the head is checked and verified like all else, but nothing is planned or read for it."""
        path = Path(path)
        try:
            _check_folder(path)
        except OSError as e:
            raise StoreError(f"{path}: {e.strerror}", "check the path and its permissions") from None
        manifest = Manifest.read(path / MANIFEST)
        model = _read_model(path, manifest)
        names = version1.labels(model) if manifest.version == 1 else None
        if names is not None:
            manifest = version1.canonical(manifest, names)
        try:
            layout = StoreLayout.of(model, manifest.quant, names)
        except ConfigError as e:
            raise StoreError(f"{path / MANIFEST}: quantization.{e.message}", DAMAGED) from None
        _check_manifest(path, manifest, layout)
        with ExitStack() as opened:
            fds: dict[str, int] = {}
            opened.callback(_close_all, fds)
            for file in layout.files.values():
                _check_file(path, file)
                try:
                    fds[file.name] = os.open(path / file.name, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as e:
                    raise StoreError(f"{path / file.name}: {e.strerror}", "check its permissions") from None
            store = cls(path, model, manifest, layout, fds, opened.pop_all())
            if not mtp:
                store.leave_out_mtp_head()
            return store

    def leave_out_mtp_head(self) -> None:
        """From here on `model` is without its multi-token-prediction head, and records are counted so."""
        self.model = self.model.trunk
        self._paged_layers = self.model.paged_layers

    def dense(self, name: str, verify: bool = True) -> Packed | Tensor:
        """A dense tensor by its canonical name, in fresh memory: Packed for linear layers and head, else a
        Tensor in the checkpoint's dtype."""
        region, spec = self.layout.dense[name], self.layout.specs[name]
        buffer = torch.empty(region.nbytes, dtype=torch.uint8)
        self._read(region, buffer, verify)
        tensors = {p.tensor.name: view(buffer, p.offset, p.tensor) for p in region.tensors}
        if spec is None:
            return tensors["weight"]
        return Packed.of(spec, tensors, f"{self.path / region.file}: {name}")

    def read_record(self, key: ExpertKey, buffer: Tensor, verify: bool = True) -> None:
        """Fill `buffer`, uint8 of its size, with an expert's record: one read, then its checksum.
        StoreError where the file is short or the bytes are not those that were written."""
        self._read(self.layout.records[key], buffer, verify)

    def records(self, verify: Verify = "first", say: Callable[[str], None] = lambda line: None) -> RecordFiles:
        """The expert files, opened once more for reads past the page cache; the caller closes them. Keys count the
        layers that have records, as all of offload does: see `kind_of`."""
        ranked = {ExpertKey(rank, expert): ExpertKey(layer, expert)
                  for rank, layer in enumerate(self._paged_layers) for expert in range(self.model.num_experts)}
        regions = {key: self.layout.records[stored] for key, stored in ranked.items()}
        sums = {key: self._sums[record_name(stored)] for key, stored in ranked.items()}
        return RecordFiles(self.path, regions, sums, verify, say)

    def kind_of(self, key: ExpertKey) -> int:
        """The kind of a record; key.layer: which one of the layers that have records."""
        return self.layout.kind_of[ExpertKey(self._paged_layers[key.layer], key.expert)]

    @property
    def identity(self) -> str:
        """The store's name in files about it: a digest of its manifest, 32 hex digits. Stores with the same
        bytes share it, wherever they lie."""
        return self.manifest.digest

    def expert(self, key: ExpertKey, buffer: Tensor) -> tuple[Packed, Packed]:
        """(w13, w2) of a record, as views into `buffer`, which holds it or will."""
        return self.expert_views(self.layout.kind_of[key], buffer, str(key))

    def expert_views(self, kind: int, buffer: Tensor, where: str = "slot") -> tuple[Packed, Packed]:
        """(w13, w2) of any record of that kind (see StoreLayout.kinds)."""
        record = self.layout.kinds[kind]
        parts: dict[str, dict[str, Tensor]] = {"w13": {}, "w2": {}}
        for placed in record.placed:
            parts[placed.matrix][placed.tensor.name] = view(buffer, placed.offset, placed.tensor)
        return (Packed.of(record.w13, parts["w13"], f"{where} w13"), Packed.of(record.w2, parts["w2"], f"{where} w2"))

    def verify(self, deep: bool, progress: Callable[[int, int, str], None] | None = None) -> list[str]:
        """What is wrong with the store, a line each: structure, also as the safetensors library sees it, and
        copied files; with `deep` the checksum of every region. progress(done bytes, all bytes, label)."""
        report = progress or (lambda done, total, label: None)
        found = [_problem(_check_file, self.path, file) for file in self.layout.files.values()]
        found += [_problem(_check_portable, self.path / file.name) for file in self.layout.files.values()]
        found += [_problem(_check_copied, self.path, self.manifest, name) for name in self.manifest.files]
        problems = [problem for problem in found if problem]
        if not deep:
            return problems
        regions = list(self.layout.regions)
        done, total = 0, sum(region.nbytes for region in regions)
        with ThreadPoolExecutor(READERS, "qmix-verify") as readers:
            try:
                for region, problem in zip(regions, readers.map(self._examine, regions), strict=True):
                    problems += [problem] if problem else []
                    done += region.nbytes
                    report(done, total, region.file)
            except BaseException:
                readers.shutdown(wait=True, cancel_futures=True)
                raise
        return problems

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _read(self, region: Region, buffer: Tensor, verify: bool) -> None:
        assert buffer.dtype == torch.uint8 and buffer.shape == (region.nbytes,)
        where, target = f"{self.path / region.file}: {region.name}", memory(buffer)
        try:
            read_exact(self._fds[region.file], target, region.offset)
        except EOFError as e:
            raise StoreError(f"{where}: {e}", CORRUPT) from None
        except OSError as e:
            raise StoreError(f"{where}: {e.strerror}", CORRUPT) from None
        if verify and raw.digest(target) != self._sums[region.name]:
            raise StoreError(f"{where}: {CHANGED}", CORRUPT)

    def _examine(self, region: Region) -> str | None:
        """What is wrong with the bytes of a region, or None."""
        where = f"{self.path / region.file}: {region.name}"
        try:
            found = raw.checksum(self._fds[region.file], region.offset, region.nbytes)
        except EOFError as e:
            return f"{where}: {e}"
        except OSError as e:
            return f"{where}: {e.strerror}"
        return None if found == self._sums[region.name] else f"{where}: {CHANGED}"


def _close_all(fds: dict[str, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])


def _problem(check: Callable[..., Any], *arguments: Any) -> str | None:
    """What `check` complains of, or None."""
    try:
        check(*arguments)
    except StoreError as e:
        return e.message
    return None


def _check_folder(path: Path) -> None:
    """Refuse, each with its own cure, what is not a finished store."""
    if not path.exists():
        raise StoreError(f"{path}: no such folder", "give the folder that `qmix quantize` wrote")
    if not path.is_dir():
        raise StoreError(f"{path}: a file, not a folder", "give the folder that `qmix quantize` wrote")
    if (path / JOURNAL).exists():
        raise StoreError(f"{path}: not finished", "run the same `qmix quantize` again: it resumes")
    if (path / MANIFEST).exists():
        return
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        command = shlex.join(["qmix", "quantize", str(path), f"{path.resolve().name}-int4"])
        raise UsageError(f"{path}: a checkpoint that is not quantized yet", f"quantize it first: {command}")
    raise StoreError(f"{path / MANIFEST}: missing", "give the folder that `qmix quantize` wrote")


def _read_model(path: Path, manifest: Manifest) -> Model:
    """The manifest's, or in version 1 that of config.json; its size is bound to the manifest's list of records."""
    model, where = manifest.model, path / MANIFEST
    if model is None:
        model, where = _read_config(path, manifest), path / CONFIG
    elif CONFIG in manifest.files:
        _check_copied(path, manifest, CONFIG)
    count = sum(map(model.experts_in, model.paged_layers))  # compared before anything of that size is made
    if count != len(manifest.records):
        raise StoreError(f"{path / MANIFEST}: records: got {len(manifest.records)}, want {count}: the model of "
                         f"{where.name} has {model.num_layers} layers of up to {model.num_experts} experts", DAMAGED)
    return model


def _read_config(path: Path, manifest: Manifest) -> Model:
    """Of version 1."""
    if CONFIG not in manifest.files:
        raise StoreError(f"{path / MANIFEST}: files: {CONFIG} is not among them", DAMAGED)
    data = _check_copied(path, manifest, CONFIG)
    try:
        return version1.read_config(parse_json(data), manifest)
    except (ValueError, TypeError, RecursionError):
        raise StoreError(f"{path / CONFIG}: not a JSON object", DAMAGED) from None
    except ConfigError as e:
        raise StoreError(f"{path / CONFIG}: {e.message}", DAMAGED) from None


def _check_copied(path: Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of a copied file, checked."""
    entry, file = manifest.files[name], path / name
    if not file.is_file():
        raise StoreError(f"{file}: {'not a file' if file.exists() else 'missing'}", DAMAGED)
    try:
        changed = file.stat().st_size != entry.nbytes  # compared before a byte is read
        data = b"" if changed else read_file(file, entry.nbytes, StoreError, DAMAGED)
    except OSError as e:
        raise StoreError(f"{file}: {e.strerror}", "check its permissions") from None
    if changed or raw.digest(data) != entry.xxh3:
        raise StoreError(f"{file}: not as it was written", "put the original back, or quantize again")
    return data


def _check_manifest(path: Path, manifest: Manifest, layout: StoreLayout) -> None:
    """Every entry of the manifest must say what the configs imply."""
    file = path / MANIFEST
    for expected, listed in ((layout.dense, manifest.dense), (layout.records, manifest.records)):
        for name in expected.keys() ^ listed.keys():
            reason = "missing" if name in expected else "not part of this model"
            raise StoreError(f"{file}: {str(name)!r:.80}: {reason}", DAMAGED)
    for key, record in manifest.records.items():
        _check_region(file, record, layout.records[key])
    for name, entry in manifest.dense.items():
        _check_region(file, entry, layout.dense[name])
        spec = layout.specs[name]
        kind = "plain" if spec is None else spec.format
        if entry.format != kind:
            raise StoreError(f"{file}: {name}: format: got {entry.format!r:.40}, want {kind}", DAMAGED)
        if (entry.error is None) != (spec is None):
            raise StoreError(f"{file}: {name}: error: got {entry.error} for {kind}", DAMAGED)


def _check_region(file: Path, entry: RecordEntry | DenseEntry, want: Region) -> None:
    for key, got, right in (("file", entry.file, want.file), ("offset", entry.offset, want.offset),
                            ("bytes", entry.nbytes, want.nbytes)):
        if got != right:
            raise StoreError(f"{file}: {want.name}: {key}: got {got}, want {right}", DAMAGED)


def _check_file(path: Path, file: FileLayout) -> None:
    """The header on disk must describe exactly the tensors that the configs imply, byte for byte."""
    if not (path / file.name).is_file():  # before opening: a pipe would block
        raise StoreError(f"{path / file.name}: missing, or not a file", DAMAGED)
    found = dict(read_header(path / file.name, StoreError).entries)
    for want in file.entries:
        got = found.pop(want.name, None)
        if got is None:
            raise StoreError(f"{path / file.name}: {want.name}: missing", DAMAGED)
        if got != want:
            raise StoreError(f"{path / file.name}: {want.name}: got {got.dtype} {list(got.shape)} at byte "
                             f"{got.offset}, want {want.dtype} {list(want.shape)} at {want.offset}", DAMAGED)
    if found:
        raise StoreError(f"{path / file.name}: {next(iter(found))!r:.80}: not part of this store", DAMAGED)


def _check_portable(file: Path) -> None:
    """A store promises files that any safetensors reader opens: ask the library, which shares no code
    with us. It takes no path that is not UTF-8, so it gets a name of the open file."""
    try:
        with open(file, "rb") as held, safe_open(f"/proc/self/fd/{held.fileno()}" if _odd(file) else file,
                                                 framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as e:
        raise StoreError(f"{file}: the safetensors library refuses it: {e}", DAMAGED) from None


def _odd(path: Path) -> bool:
    """Whether a path holds bytes that are no UTF-8, which Python shows as lone surrogates."""
    return any("\ud800" <= letter <= "\udfff" for letter in str(path))
