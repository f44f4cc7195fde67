"""One file of the hub into its cache, resumed where an earlier try stopped.

The cache keeps the bytes of a file under their checksum, blobs/ETAG, and each snapshot has links to them. What is
being fetched lies beside, as ETAG.qmix-partial, locked by the process that writes it; it gets its name when it is whole
and, where the name is a SHA-256, as it is of large files, when the bytes have that sum. Making the links is left to the
hub's library. ETAG is noted in `.qmix-downloads` first: what qmix fetched it may delete, what was there before never.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qmix.bounded import read_file
from qmix.errors import CheckpointError
from qmix.hub.errors import AGAIN, BUSY, status_of

PARTIAL = ".qmix-partial"
NOTES = ".qmix-downloads"
MAX_NOTES = 2**24
ETAG = re.compile(r"[\w-]{8,128}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
PIECE = 2**22
TRIES, PAUSE = 4, 1.0  # of an answer that says that a later try may succeed; seconds between

Count = Callable[[int], None]  # of bytes that came


class Stopped(Exception):
    """Another file failed, or Ctrl-C: this one is left where it is."""


class _TooMuch(Exception):
    pass


class _Sink:
    """What the library writes a download to: into the file, the checksum and the count alike. most: bytes of the
    file, beyond which _TooMuch is raised."""

    def __init__(self, file: IO[bytes], most: int, hashed: bool, count: Count, stop: threading.Event):
        self._file, self._most, self._hashed, self._count, self._stop = file, most, hashed, count, stop
        self.sum = hashlib.sha256()
        self.size = 0
        while piece := file.read(PIECE):  # of an earlier try
            self._take(piece)

    def _take(self, data: bytes) -> None:
        if self._stop.is_set():
            raise Stopped
        self.size += len(data)
        if self._hashed:
            self.sum.update(data)
        self._count(len(data))

    def write(self, data: bytes) -> int:
        if self.size + len(data) > self._most:
            raise _TooMuch
        view = memoryview(data)
        while view:
            view = view[self._file.write(view):]
        self._take(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def seek(self, position: int, whence: int = 0) -> int:
        """The library goes back to the start alone, where a server does not know ranges."""
        if position or whence:
            raise OSError("the hub's library asks for a place that is not the start")
        return 0

    def truncate(self, size: int | None = None) -> int:
        self._file.seek(0)
        self._file.truncate(0)
        self._count(-self.size)
        self.size, self.sum = 0, hashlib.sha256()
        return 0


def fetch_blob(folder: Path, etag: str, size: int, url: str, count: Count, stop: threading.Event) -> None:
    """blobs/`etag` of `size` bytes, in the repository's `folder` of the cache. Raises what the hub's library raises;
    CheckpointError where the bytes are not those that were promised."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    blob = folder / "blobs" / etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _locked(blob.with_name(etag + PARTIAL), stop) as file:
        if blob.exists():  # another process was faster
            count(size)
            return
        if os.fstat(file.fileno()).st_size > size:
            file.truncate(0)
        hashed = SHA256.fullmatch(etag) is not None
        sink = _Sink(file, size, hashed, count, stop)
        for left in range(TRIES - 1, -1, -1):
            if sink.size == size:
                break
            before = sink.size
            try:
                # No expected size: the library would refuse more than 50 GB. It is compared below.
                http_get(url, sink, resume_size=before, headers={**build_hf_headers(), "Accept-Encoding": "identity"})  # type: ignore[arg-type]
                break
            except _TooMuch:
                sink.truncate()
                raise CheckpointError(f"{url.partition('?')[0]}: more came than the {size} bytes that the hub "
                                      "promised", AGAIN) from None
            except Exception as e:
                if status_of(e) == 416:  # what is there is no part of it
                    sink.truncate()
                elif status_of(e) not in BUSY or not left:
                    raise
                time.sleep(PAUSE)
        if sink.size != size or (hashed and sink.sum.hexdigest() != etag):
            got = f"{sink.size} of {size} bytes came" if sink.size < size else "the bytes are not those that the hub " \
                "promised"
            if sink.size >= size:
                sink.truncate()
            raise CheckpointError(f"{url.partition('?')[0]}: {got}", AGAIN)
        os.fsync(file.fileno())
        _note(folder, etag)
        blob.with_name(etag + PARTIAL).rename(blob)


class _Enough(Exception):
    pass


class _Window:
    """As _Sink, of a part of a file, whose bytes are given on. cure: of a hub that gives whole files alone."""

    def __init__(self, first: int, nbytes: int, take: Callable[[bytes], object], cure: str):
        self.came, self._first, self._nbytes, self._take, self._cure = 0, first, nbytes, take, cure

    def write(self, data: bytes) -> int:
        self._take(data[:self._nbytes - self.came])
        self.came += len(data)
        if self.came >= self._nbytes:
            raise _Enough
        return len(data)

    def tell(self) -> int:
        return self._first + self.came

    def seek(self, position: int, whence: int = 0) -> int:
        return position

    def truncate(self, size: int | None = None) -> int:
        raise CheckpointError("the hub does not give parts of files", self._cure)


def fetch_range(url: str, begin: int, nbytes: int, take: Callable[[bytes], object], cure: str) -> int:
    """take() the `nbytes` bytes of a file of the hub from `begin`, piece by piece: how many came, fewer where the file
    ends before. Raises what the hub's library raises; CheckpointError, with `cure`, where only whole files are given.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    window = _Window(begin, nbytes, take, cure)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    with contextlib.suppress(_Enough):  # the rest is not waited for
        http_get(url, window, resume_size=begin, headers=headers)  # type: ignore[arg-type]
    return min(window.came, nbytes)


def begun(folder: Path, etag: str) -> int:
    """Bytes that an earlier try left."""
    with contextlib.suppress(OSError):
        found = os.lstat(folder / "blobs" / (etag + PARTIAL))
        return found.st_size if stat.S_ISREG(found.st_mode) else 0
    return 0


def fetched(folder: Path) -> set[str]:
    """The checksums of all that qmix fetched into a repository's folder."""
    try:
        lines = read_file(folder / NOTES, MAX_NOTES).decode("ascii", "replace").splitlines()
    except OSError:
        return set()
    return {line for line in lines if ETAG.fullmatch(line)}


def free(folder: Path) -> int:
    """Delete what qmix fetched into a repository's folder of the cache, and the links to it: the bytes that this frees.
    Files that were there before stay, and what another process fetches now."""
    freed = 0
    for etag in sorted(fetched(folder)):
        path = folder / "blobs" / etag
        with contextlib.suppress(OSError):
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode):
                _unlink_pointers(folder, path)
                path.unlink()
                freed += found.st_blocks * 512
    freed += sum(map(_free_partial, (folder / "blobs").glob("*" + PARTIAL)))
    (folder / NOTES).unlink(missing_ok=True)
    return freed


def _free_partial(path: Path) -> int:
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK),
                                            "r+b", buffering=0) as file:
        found = os.fstat(file.fileno())
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError where another process writes it
        if stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.lstat(path)):
            path.unlink()
            return found.st_blocks * 512
    return 0


def _unlink_pointers(folder: Path, blob: Path) -> None:
    for root, _, names in os.walk(folder / "snapshots"):
        for name in names:
            path = Path(root) / name
            if path.is_symlink() and Path(os.path.normpath(path.parent / path.readlink())) == blob:
                path.unlink()


def _note(folder: Path, etag: str) -> None:
    with open(folder / NOTES, "a", encoding="ascii") as file:
        file.write(etag + "\n")


@contextmanager
def _locked(path: Path, stop: threading.Event) -> Iterator[IO[bytes]]:
    """The file, made where there is none, which no other process writes meanwhile. A link in its place is an error."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        with open(fd, "r+b", buffering=0) as file:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if stop.wait(0.2):
                        raise Stopped from None
            try:
                same = os.path.samestat(os.fstat(fd), os.lstat(path))
            except FileNotFoundError:
                same = False  # the other one was done and gave it its name
            if same:
                yield file
                return
            if path.with_name(path.name.removesuffix(PARTIAL)).exists():
                yield file  # whole by now: nothing is written
                return
