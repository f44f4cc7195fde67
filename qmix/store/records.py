"""Expert records, read piece by piece from the disk itself.

O_DIRECT bypasses the page cache: the bytes land in the caller's memory at the disk's full speed, without a copy, and
evict nothing else from RAM. It needs offset, length and address on 4096-byte boundaries, which records have. If a file
system refuses it, at open or only at a read, the file is read through the page cache instead, and qmix says so.

An opened file stays open: a store that is deleted, or replaced by a rename, while it is in use is still read as it was.
A file that is touched in any way is noticed by its times and size, and from then on every record of it is checked at
every read. Reads may run in several threads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from qmix.config import ExpertKey
from qmix.errors import StoreError
from qmix.formats import memory
from qmix.store import raw
from qmix.store.layout import Region
from qmix.tensorfile import read_exact

Verify = Literal["first", "always", "never"]
VERIFY = ("first", "always", "never")
CHANGED = "its bytes are not those that were written (xxh3_128)"
CORRUPT = "the disk or the copy is at fault: `qmix verify --deep` lists all damage; copy or quantize again"
REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
O_DIRECT = getattr(os, "O_DIRECT", 0)


class RecordFiles:
    """The files of a store that hold expert records.

    direct: whether all of them are read past the page cache. verify: which reads are checked, "first": a
    record's first one in this process. Close it, after the last read has returned.
    """

    def __init__(self, folder: Path, regions: Mapping[ExpertKey, Region], sums: Mapping[ExpertKey, str],
                 verify: Verify = "first", say: Callable[[str], None] = lambda line: None):
        self._folder = folder
        self._regions = regions
        self._sums = sums
        self._verify = verify
        self._say = say
        self._lock = threading.Lock()
        self._checked: set[ExpertKey] = set()
        self._changed: set[str] = set()
        self._files: dict[str, int] = {}
        self._buffered: set[str] = set()
        self._stamps: dict[str, tuple[int, ...]] = {}
        try:
            for name in dict.fromkeys(region.file for region in regions.values()):
                self._files[name] = self._open(name)
                self._stamps[name] = _stamp(self._files[name])
        except BaseException:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        return not self._buffered

    def read(self, key: ExpertKey, target: memoryview, start: int) -> None:
        """Fill `target` from byte `start` of a record. StoreError names record and file."""
        region = self._regions[key]
        try:
            try:
                read_exact(self._files[region.file], target, region.offset + start)
            except OSError as e:
                if e.errno not in REFUSED:
                    raise
                self._fall_back(region.file, "at a read")
                read_exact(self._files[region.file], target, region.offset + start)
        except EOFError as e:
            raise StoreError(f"{self._where(key)}: {e}", CORRUPT) from None
        except OSError as e:
            raise StoreError(f"{self._where(key)}: {e.strerror}", CORRUPT) from None
        if region.file in self._buffered:
            raw.forget(self._files[region.file], region.offset + start, len(target))

    def must_check(self, key: ExpertKey) -> bool:
        """Whether a record that is read now has to be checked before it is used."""
        file = self._regions[key].file
        if file not in self._changed and _stamp(self._files[file]) != self._stamps[file]:
            with self._lock:
                new = file not in self._changed
                self._changed.add(file)
            if new:
                self._say(f"{self._folder / file} was written to, renamed or deleted while it is in use: "
                          "every record of it is checked at every read from now on")
        if file in self._changed or self._verify == "always":
            return True
        return self._verify == "first" and key not in self._checked

    def check(self, key: ExpertKey, record: Tensor) -> None:
        """StoreError unless `record`, uint8 [bytes], holds what was written."""
        if raw.digest(memory(record)) != self._sums[key]:
            raise StoreError(f"{self._where(key)}: {CHANGED}", CORRUPT)
        self._checked.add(key)

    def failed(self, key: ExpertKey, reason: str) -> StoreError:
        """The error for a record that could not be read for a reason other than its file."""
        return StoreError(f"{self._where(key)}: {reason}", "run it again; if it comes back, please report it")

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _where(self, key: ExpertKey) -> str:
        region = self._regions[key]
        return f"{self._folder / region.file}: {region.name}"

    def _open(self, name: str) -> int:
        path, flags = self._folder / name, os.O_RDONLY | os.O_CLOEXEC
        try:
            if O_DIRECT:
                try:
                    return os.open(path, flags | O_DIRECT)
                except OSError as e:
                    if e.errno not in REFUSED:
                        raise
            self._announce(name, "at open")
            return os.open(path, flags)
        except OSError as e:
            raise StoreError(f"{path}: {e.strerror}", "check the path and its permissions") from None

    def _fall_back(self, name: str, when: str) -> None:
        with self._lock:
            if name in self._buffered:
                return
            fd = self._files[name]  # the same open file, whatever its name leads to by now
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_DIRECT)
            self._announce(name, when)

    def _announce(self, name: str, when: str) -> None:
        if not self._buffered:
            self._say(f"{self._folder}: the file system refuses O_DIRECT {when}: reading experts through the page "
                      "cache, which is slower")
        self._buffered.add(name)


def _stamp(fd: int) -> tuple[int, ...]:
    """What changes when a file is written to, even by a program that puts the old times back (and also when
    it is renamed or deleted)."""
    stat = os.fstat(fd)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
