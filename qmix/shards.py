"""The weight files of a checkpoint: which files belong to it, what each holds, and how they are read.

The rules are those of transformers: model.safetensors has priority over an index. Of an index only the names of the
files count, so a tensor is found in whichever of them holds it. Files are read with pread into fresh memory, never
mapped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmix.bounded import parse_json, read_file
from qmix.errors import CheckpointError
from qmix.formats import memory
from qmix.hub.discarded import discarded_in
from qmix.tensorfile import Entry, TensorFile, read_exact, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 256 * 2**20  # bytes of an index; of a model of a million tensors it has half of that
SAMPLE = 4096  # bytes of each tensor that go into a fingerprint
CHANGED = "let the download finish, then start again"
REFETCH = "the checkpoint is incomplete or damaged: fetch it again"


class Shard:
    """One open file of weights; reads are safe from several threads. header: what is read of it first, by default that
    of a safetensors file. discarded: tensors whose bytes are gone, but for those that `sample_of` names."""

    def __init__(self, path: Path, header: Callable[[Path, int], TensorFile] | None = None):
        if not path.is_file():  # before opening: a pipe would block
            raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'missing'}", REFETCH)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise CheckpointError(f"{path}: {e.strerror}", "check its permissions") from None
        self._lock = threading.Lock()  # from a change to the new state
        self.discarded: set[str] = set()
        try:
            self.discarded = discarded_in(path)
            self._state = self._stat()
            self.file = read_header(path, CheckpointError) if header is None else header(path, self._fd)
            # The header may have been read of another file that took the name meanwhile.
            if not os.path.samestat(os.fstat(self._fd), path.stat()) or self._stat() != self._state:
                raise CheckpointError(f"{path}: changed while it was being read", CHANGED)
        except OSError as e:
            self.close()
            raise CheckpointError(f"{path}: {e.strerror}", CHANGED) from None
        except BaseException:
            self.close()
            raise

    def read(self, entry: Entry, begin: int = 0, nbytes: int | None = None, out: Tensor | None = None) -> Tensor:
        """Bytes [begin, begin + nbytes) of a tensor, by default all, in `out`, by default a fresh uint8 tensor."""
        nbytes = entry.nbytes - begin if nbytes is None else nbytes
        buffer = torch.empty(nbytes, dtype=torch.uint8) if out is None else out
        assert buffer.nbytes == nbytes
        offset = entry.offset + begin
        if entry.name in self.discarded and not _within(begin, nbytes, sample_of(entry)):
            raise CheckpointError(f"{self.file.path}: {entry.name}: was discarded by --discard-source",
                                  "give the model's hub id: with --discard-source what is needed is fetched again")
        try:
            read_exact(self._fd, memory(buffer), offset)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
            with self._lock:
                changed = self._stat() != self._state
        except EOFError:
            changed = True
        except OSError as e:
            raise CheckpointError(f"{self.file.path}: {entry.name}: {e.strerror}", REFETCH) from None
        if changed:
            raise CheckpointError(f"{self.file.path}: changed while it was being read ({entry.name})", CHANGED)
        return buffer

    def change(self, act: Callable[[], None]) -> None:
        """Let `act` change bytes of the file that nobody reads meanwhile: others do not take it for a change."""
        with self._lock:
            act()
            self._state = self._stat()

    def is_open_on(self, fd: int) -> bool:
        """Whether `fd` is of the same file."""
        return os.path.samestat(os.fstat(self._fd), os.fstat(fd))

    def _stat(self) -> tuple[int, int]:
        state = os.fstat(self._fd)
        return state.st_size, state.st_mtime_ns

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sample_of(entry: Entry, most: int = SAMPLE) -> tuple[int, int]:
    """(first byte, bytes) of a tensor that its checkpoint's fingerprint reads: from its middle."""
    nbytes = min(most, entry.nbytes)
    return (entry.nbytes - nbytes) // 2, nbytes


def _within(begin: int, nbytes: int, sample: tuple[int, int]) -> bool:
    return sample[0] <= begin and begin + nbytes <= sample[0] + sample[1]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tensor lies."""

    shard: Shard
    entry: Entry


def read_json(path: Path) -> dict[str, Any]:
    try:
        raw = parse_json(read_file(path, MAX_JSON, CheckpointError, REFETCH))
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}", REFETCH) from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON ({str(e).splitlines()[0]})", REFETCH) from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object", REFETCH)
    return raw


def locate(path: Path, opened: ExitStack) -> tuple[dict[str, Location], list[str], list[str]]:
    """Open the weight files and find every tensor: ({name: location}, names of weight files not used, notes on
    an index that disagrees with the files)."""
    single, listed = (path / SINGLE).is_file(), (path / INDEX).exists()
    weight_map = _read_index(path / INDEX) if listed and not single else None
    files = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    absent = [name for name in files if not (path / name).exists()]
    if absent:
        raise CheckpointError(f"{path / absent[0]}: missing ({len(absent)} of {len(files)} files)", REFETCH)
    locations = _open_all(path, files, opened)
    notes = [] if weight_map is None else _disagreements(path / INDEX, weight_map, locations)
    unused = sorted(p.name for p in path.glob("*.safetensors") if p.name not in files)
    return locations, unused + [INDEX] * (single and listed), notes


def read_shards(path: Path, files: list[str], opened: ExitStack) -> tuple[dict[str, Location], list[str]]:
    """The same of files that no index needs to name, ({name: location}, notes on one that is there). An index may say
    that one of them is missing."""
    index = next(iter(sorted(path.glob("consolidated*.safetensors.index.json"))), None)
    weight_map = None if index is None else _read_index(index)
    absent = sorted(set(weight_map.values()) - {*files}) if weight_map is not None else []
    if absent:
        raise CheckpointError(f"{path / absent[0]}: missing ({len(absent)} files)", REFETCH)
    locations = _open_all(path, files, opened)
    return locations, [] if index is None or weight_map is None else _disagreements(index, weight_map, locations)


def _open_all(path: Path, files: list[str], opened: ExitStack) -> dict[str, Location]:
    locations: dict[str, Location] = {}
    for name in files:
        shard = Shard(path / name)
        opened.callback(shard.close)
        for tensor, entry in shard.file.entries.items():
            location = Location(shard, entry)
            if tensor in locations:
                _check_copy(locations[tensor], location)
            locations[tensor] = location
    return locations


def _check_copy(one: Location, two: Location) -> None:
    """A tensor may stand in two files, but must be the same in both. Of one that is discarded in either the sample
    counts, which stays: all of it was compared when it was whole."""
    if not equal(one, two, any(p.entry.name in p.shard.discarded for p in (one, two))):
        raise CheckpointError(f"{two.shard.file.path}: {two.entry.name}: differs from the one in "
                              f"{one.shard.file.path.name}", "remove the file that does not belong to the model, from "
                              f"{INDEX} too")


def _disagreements(index: Path, weight_map: Mapping[str, str], locations: Mapping[str, Location]) -> list[str]:
    """Lines on what a stale index says otherwise than the files."""
    found = []
    for words, tensors in (
            ("places {} in another file than holds it", [n for n, file in weight_map.items() if n in locations
                                                         and locations[n].shard.file.path.name != file]),
            ("does not name {}", [n for n in locations if n not in weight_map]),
            ("names {}, which no file holds", [n for n in weight_map if n not in locations])):
        if tensors:
            more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
            found.append(f"{index}: {words.format(tensors[0])}{more}: the files' own headers are used")
    return found


def _read_index(path: Path) -> dict[str, str]:
    """The weight map {tensor name: file name}; file names must be plain names of safetensors files."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: got {weight_map!r:.80}, want {{tensor: file}}", REFETCH)
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and "/" not in name and "\\" not in name and "\0" not in name
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: weight_map.{tensor}: got {name!r:.80}, want a .safetensors file in the same folder",
                "do not use this checkpoint unless you trust its source")
    return weight_map


def equal(one: Location, two: Location, sampled: bool = False, step: int = 2**24) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; sampled: those of `sample_of` alone."""
    same = (one.entry.dtype, one.entry.shape) == (two.entry.dtype, two.entry.shape)
    first, count = sample_of(one.entry) if sampled else (0, one.entry.nbytes)
    for begin in range(first, first + count if same else first, step):
        nbytes = min(step, first + count - begin)
        same = same and torch.equal(*(p.shard.read(p.entry, begin, nbytes) for p in (one, two)))
    return same
