"""How fast a disk reads files: numbers of threads x chunk sizes, without the page cache.

Reads work like those of the expert tier: os.preadv with O_DIRECT into page-aligned memory of our own, several threads
keeping the disk's queue filled. If the system refuses O_DIRECT, at open or at the first read, reads are buffered: the
system is first asked to drop the file's pages, and qmix says so.

Threads: the readers of one measurement share a counter of chunks; each owns one buffer. They end when the chunks or the
time are used up, when one fails, or when the caller is interrupted.
GB/s are decimal: 1e9 bytes a second.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from qmix.errors import DoesNotFit, QmixError, UsageError
from qmix.hardware.memory import anonymous_memory
from qmix.render import Progress
from qmix.sizes import GIB, MIB, RECORD_ALIGN, format_bytes
from qmix.tensorfile import write_exact

DIRECT = getattr(os, "O_DIRECT", 0)  # 0: this system has no such thing
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SPARE = 256 * MIB  # free bytes that a test file leaves to others


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """`depth` threads reading `chunk` bytes at a time gave `gbps` GB/s."""

    depth: int
    chunk: int
    gbps: float


@dataclass(frozen=True, slots=True)
class DiskReport:
    """rows: at least one; direct: whether they were read with O_DIRECT."""

    rows: tuple[DiskSpeed, ...]
    direct: bool

    @property
    def best(self) -> DiskSpeed:
        """The fastest row; of equals the one with fewer threads and smaller chunks."""
        return min(self.rows, key=lambda row: (-row.gbps, row.depth, row.chunk))


@dataclass(frozen=True, slots=True)
class DiskEffort:
    """What measuring may take: each pair of depth (threads) and chunk (bytes, a multiple of 4096) at most
    `nbytes` and `seconds`, and max(depths) * max(chunks) bytes of memory.

    The pairs take turns, `rounds` times over: a disk that others use too changes from second to second, and
    a pair should not win because it met a quiet one.
    """

    nbytes: int = GIB
    seconds: float = 1.0
    rounds: int = 2
    depths: tuple[int, ...] = (1, 2, 4, 8)
    chunks: tuple[int, ...] = (1 * MIB, 4 * MIB, 16 * MIB)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        return tuple(itertools.product(self.depths, self.chunks))


def measure_disk(files: Sequence[Path], effort: DiskEffort = DiskEffort(), *, say: Callable[[str], None],
                 progress: Progress | None = None, clock: Callable[[], float] = time.perf_counter) -> DiskReport:
    """Read `files` with every pair of depth and chunk.

    progress counts bytes, of all pairs. UsageError where no file holds even one of the smallest chunks;
    QmixError where one cannot be read; DoesNotFit without memory for the buffers.
    """
    buffers = _buffers(max(effort.depths), max(effort.chunks))
    for direct in (True, False) if DIRECT else (False,):
        try:
            with _opened(files, direct) as fds:
                rows = _measure_pairs(fds, direct, buffers, effort, progress, clock)
        except OSError as e:
            if not direct or e.errno not in REFUSALS:
                raise QmixError(f"{files[0].parent}: cannot read its files: {e.strerror or e}",
                                "check their permissions and the disk's health (dmesg)") from None
            say(f"{files[0].parent}: O_DIRECT refused ({e.strerror}): measuring buffered reads")
            continue
        if not rows:
            raise UsageError(f"no file to measure a disk with: want one of {format_bytes(min(effort.chunks))} or more")
        if not direct and not hasattr(os, "posix_fadvise"):
            say("this system cannot drop its page cache: the figures may be of memory, not of the disk")
        return DiskReport(rows, direct)
    raise AssertionError("unreachable")


@contextmanager
def _opened(files: Sequence[Path], direct: bool) -> Iterator[list[int]]:
    with ExitStack() as closing:
        fds = []
        for path in files:
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | (DIRECT if direct else 0)))
            closing.callback(os.close, fds[-1])
        yield fds


def _measure_pairs(fds: list[int], direct: bool, buffers: list[mmap.mmap], effort: DiskEffort,
                   progress: Progress | None, clock: Callable[[], float]) -> tuple[DiskSpeed, ...]:
    sums = {pair: [0, 0.0] for pair in effort.pairs}
    turns, done = effort.rounds * effort.pairs, 0
    for turn, (depth, chunk) in enumerate(turns, 1):
        spots = [(fd, i * chunk) for fd in fds for i in range(os.fstat(fd).st_size // chunk)]
        if not spots:
            continue
        count = max(1, effort.nbytes // effort.rounds // chunk)
        if not direct:
            count = min(count, len(spots))  # a chunk read twice would come from the page cache
            _forget(fds)
        first = done // chunk % len(spots)  # on from where the last turn ended: disks have caches of their own
        views = [memoryview(buffer)[:chunk] for buffer in buffers[:depth]]
        got, took = _read_all(spots[first:] + spots[:first], count, views, effort.seconds / effort.rounds, clock)
        sums[depth, chunk][0] += got
        sums[depth, chunk][1] += took
        done += got
        if progress:
            total = effort.nbytes * len(effort.pairs)
            progress(total * turn // len(turns), total, f"{depth} x {format_bytes(chunk)}")
    if not direct:
        _forget(fds)
    return tuple(DiskSpeed(depth, chunk, got / max(took, 1e-9) / 1e9)
                 for (depth, chunk), (got, took) in sums.items() if got)


def _read_all(spots: list[tuple[int, int]], count: int, buffers: list[memoryview], seconds: float,
              clock: Callable[[], float]) -> tuple[int, float]:
    """Read `count` of the (file, offset) chunks, round and round, a thread for each buffer; (bytes, seconds).
    OSError as the system gives it."""
    turns, stop = itertools.count(), threading.Event()
    start = clock()

    def read(buffer: memoryview) -> int:
        done = 0
        # next() of a count is one step under the interpreter lock: no two readers get the same number.
        while not stop.is_set() and (i := next(turns)) < count:
            fd, offset = spots[i % len(spots)]
            got = os.preadv(fd, [buffer], offset)
            if got == 0:
                raise OSError(errno.EIO, "a file became shorter while it was read")
            done += got
            if clock() - start >= seconds:
                break
        return done

    with ThreadPoolExecutor(len(buffers), "qmix-disk") as pool:
        try:
            readers = [pool.submit(read, buffer) for buffer in buffers]
            done = sum(reader.result() for reader in readers)
        finally:
            stop.set()  # one has failed, or Ctrl-C: the others end after the chunk in hand
    return done, clock() - start


def _buffers(count: int, nbytes: int) -> list[mmap.mmap]:
    """Page-aligned memory as the pools of the expert tiers have it: anonymous, in huge pages, touched before
    use. DoesNotFit where there is none left."""
    try:
        buffers = [anonymous_memory(nbytes) for _ in range(count)]
    except OSError as e:
        raise DoesNotFit(f"{format_bytes(count * nbytes)} cannot be allocated for read buffers: {e.strerror}",
                         "free some memory") from None
    for buffer in buffers:
        buffer.write(bytes(nbytes))
    return buffers


def _forget(fds: Sequence[int]) -> None:
    """Ask the system to drop the files from its page cache; it keeps what another process has mapped."""
    if hasattr(os, "posix_fadvise"):
        for fd in fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def scratch_file(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file of `nbytes` incompressible bytes in `folder`, on the disk (fsync) and removed at the end,
    whatever that end is. DoesNotFit where the disk is too full; QmixError where the folder takes no files."""
    try:
        if (free := shutil.disk_usage(folder).free) < nbytes + SPARE:
            raise DoesNotFit(f"{folder}: {format_bytes(free)} free, a test file takes {format_bytes(nbytes)} and "
                             f"leaves {format_bytes(SPARE)}", "free some space, or name a folder on another disk")
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".qmix-doctor-")  # noqa: SIM115 - `with` is below
    except OSError as e:
        raise QmixError(f"{folder}: cannot write a test file: {e.strerror}", "name a folder you may write in") from None
    with file:
        try:
            _fill(file.fileno(), nbytes)
        except OSError as e:
            kind = DoesNotFit if e.errno in FULL else QmixError
            raise kind(f"{folder}: writing a test file of {format_bytes(nbytes)}: {e.strerror}",
                       "free some space, or name a folder on another disk") from None
        yield Path(file.name)


def _fill(fd: int, nbytes: int) -> None:
    block = os.urandom(min(nbytes, 16 * MIB))
    for offset in range(0, nbytes, len(block)):
        write_exact(fd, block[:nbytes - offset], offset)
    os.fsync(fd)
    _forget([fd])  # clean now, so they can go


def direct_refusal(path: Path) -> str | None:
    """Why this file, or this folder, cannot be read with O_DIRECT, in the system's words; None where it can.
    A folder is tried with a file of one page, removed again. QmixError where there is nothing to try."""
    if not DIRECT:
        return "this system has no O_DIRECT"
    with ExitStack() as closing:
        try:
            if path.is_dir():
                file = closing.enter_context(tempfile.NamedTemporaryFile(dir=path, prefix=".qmix-doctor-"))
                write_exact(file.fileno(), bytes(RECORD_ALIGN), 0)
                path = Path(file.name)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | DIRECT)
            closing.callback(os.close, fd)
            os.preadv(fd, [mmap.mmap(-1, RECORD_ALIGN)], 0)
        except OSError as e:
            if e.errno in REFUSALS:
                return e.strerror
            raise QmixError(f"{path}: {e.strerror}", "name a folder whose files can be read") from None
    return None


def filesystem(path: Path) -> str:
    """The type of the filesystem that holds `path` ("ext4", "tmpfs", "9p"); "unknown" where the system does
    not tell."""
    path, found, depth = path.resolve(), "unknown", -1
    for mount in psutil.disk_partitions(all=True):
        place = Path(mount.mountpoint)
        if path.is_relative_to(place) and len(place.parts) >= depth:  # of two on one place the later one is seen
            found, depth = mount.fstype or "unknown", len(place.parts)
    return found
