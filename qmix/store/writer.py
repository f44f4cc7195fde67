"""Writes the weight files of a store: every file is created at its full size, then regions are written in any order.

Regions are not synced one by one, which would cost most of the speed. A resumed job finds by checksum what a crash left
incomplete. `sync` makes everything durable before the store gets its name.

One thread at a time may write; `checksum` may run in several.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import xxhash
from torch import Tensor

from qmix.formats import memory
from qmix.sizes import RECORD_ALIGN
from qmix.store import raw
from qmix.store.layout import FileLayout, Region, StoreLayout
from qmix.tensorfile import write_exact

ZEROS = bytes(RECORD_ALIGN)  # as many as a gap can be


class StoreWriter:
    """Opens (or makes) the weight files of `layout` in `folder`. OSErrors carry the file's name."""

    def __init__(self, folder: Path, layout: StoreLayout):
        self._folder = folder
        self._fds: dict[str, int] = {}
        self._written: Region | None = None
        try:
            for file in layout.files.values():
                self._open(file)
        except BaseException:
            self.close()
            raise

    def _open(self, file: FileLayout) -> None:
        fd = os.open(self._folder / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._fds[file.name] = fd
        self._put(file.name, file.header, 0)
        os.truncate(fd, file.size)

    def write(self, region: Region, tensors: Mapping[tuple[str, str], Tensor]) -> str:
        """Write a region from {(matrix, tensor name): Tensor}, gaps as zeros; returns its xxh3_128."""
        hasher, end = xxhash.xxh3_128(), 0

        def put(data: memoryview | bytes) -> None:
            nonlocal end
            self._put(region.file, data, region.offset + end)
            hasher.update(data)
            end += len(data)

        for placed in region.tensors:
            tensor = tensors[placed.matrix, placed.tensor.name]
            assert tensor.nbytes == placed.tensor.nbytes, placed
            put(ZEROS[:placed.offset - end])
            put(memory(tensor))
        put(ZEROS[:region.nbytes - end])
        assert end == region.nbytes, region
        self._let_go(region)
        return hasher.hexdigest()

    def checksum(self, region: Region) -> str:
        """xxh3_128 of what the file holds where `region` belongs."""
        return raw.checksum(self._fds[region.file], region.offset, region.nbytes)

    def sync(self) -> None:
        """Return when the disk has everything."""
        for name, fd in self._fds.items():
            try:
                os.fsync(fd)
            except OSError as e:
                raise OSError(e.errno, e.strerror, str(self._folder / name)) from None

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _put(self, name: str, data: memoryview | bytes, offset: int) -> None:
        try:
            write_exact(self._fds[name], data, offset)
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self._folder / name)) from None

    def _let_go(self, region: Region) -> None:
        """Start this region on its way to the disk; the one before is there by now and leaves the cache."""
        for done in (self._written, region):
            if done is not None:
                raw.forget(self._fds[done.file], done.offset, done.nbytes)
        self._written = region
