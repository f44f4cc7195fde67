"""--discard-source: frees the weights of a downloaded checkpoint while its store is written.

    region written -> journal of the store -> all regions of a source tensor written -> discarded.jsonl, synced
    -> its bytes are punched out of the file

Only tensors of experts go, which are nearly all of the bytes; of quantized ones the codes. A file keeps its size, its
header, its other tensors and the few bytes of each tensor that the fingerprint reads, so a checkpoint that is half gone
still opens as the same one.
What is gone is refused when it is read, never taken for zeros; where a resumed run needs it (another format, a store
that was damaged) it is fetched again. The files are qmix's own copies: see hub.private_cache.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey
from qmix.errors import CheckpointError
from qmix.hub.discarded import Key, file_in, gone_in, note
from qmix.quantize.pipeline import Work
from qmix.shards import Location, sample_of
from qmix.sizes import format_bytes

BATCH = 2**26  # bytes that are freed together, since each time the journal is synced
KEEP_SIZE, PUNCH_HOLE = 1, 2  # of fallocate(2)

Refetch = Callable[[str, int, int, int], None]  # (file in the repository, first byte, bytes, descriptor to write to)


class Discard:
    """Of one run. owned: the repository's folder in a cache of qmix's own, whose files may be freed unless they are
    links out of it; snapshot: the checkpoint's folder there; refetch: brings bytes of a file back."""

    def __init__(self, source: Checkpoint, owned: Path, snapshot: Path, refetch: Refetch, say: Callable[[str], None]):
        self._source, self._snapshot, self._refetch, self._say = source, snapshot, refetch, say
        self.folder = owned
        self._gone = set(gone_in(owned))
        self._locations: dict[Key, Location] = {}
        self._of: dict[ExpertKey, list[Key]] = {}
        self._pending: Counter[Key] = Counter()
        self._queue: list[Key] = []
        self._freed = 0
        self._can = True
        for key in source.model.expert_keys:
            for location in source.expert_locations(key):
                file = file_in(owned, location.shard.file.path)
                if file is None:
                    continue
                name = file, location.entry.name
                self._locations[name] = location
                self._of.setdefault(key, []).append(name)
                self._pending[name] += 1

    @property
    def freeable(self) -> int:
        """Bytes that are still to be freed."""
        return sum(location.entry.nbytes for name, location in self._locations.items() if name not in self._gone)

    def restore(self, work: Iterable[Work]) -> None:
        """Fetch again what `work` reads and is gone."""
        needed = dict.fromkeys(name for item in work if isinstance(item.source, ExpertKey)
                               for name in self._of.get(item.source, ()) if name in self._gone)
        if not needed:
            return
        nbytes = sum(self._locations[name].entry.nbytes for name in needed)
        self._say(f"{len(needed)} tensors that were discarded are needed again: {format_bytes(nbytes)} to fetch")
        for name in needed:
            self._fetch(name)

    def written(self, work: Work) -> None:
        """The region of `work` is in the store, or was found there: its source may go."""
        if not isinstance(work.source, ExpertKey):
            return
        for name in self._of.pop(work.source, ()):
            self._pending[name] -= 1
            if not self._pending[name] and name not in self._gone:
                self._queue.append(name)
        if sum(self._locations[name].entry.nbytes for name in self._queue) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Free what is queued."""
        queue, self._queue = self._queue, []
        if not queue or not self._can:
            return
        note(self.folder, queue, gone=True)
        for name in queue:
            location = self._locations[name]
            location.shard.discarded.add(name[1])
            self._gone.add(name)
            location.shard.change(partial(self._punch, location))
            self._freed += location.entry.nbytes

    def line(self) -> str:
        return f"discarded {format_bytes(self._freed)} of the source while it was quantized" if self._can else \
            "this file system cannot free parts of a file: the source goes as a whole, now"

    def _punch(self, location: Location) -> None:
        entry = location.entry
        first, count = sample_of(entry)
        fd = _open(location)
        try:
            for begin, end in ((entry.offset, entry.offset + first),
                               (entry.offset + first + count, entry.offset + entry.nbytes)):
                if self._can and end > begin:
                    self._can = _punch_hole(fd, begin, end - begin)
        finally:
            os.close(fd)

    def _fetch(self, name: Key) -> None:
        location = self._locations[name]
        entry = location.entry
        path = Path(os.path.relpath(location.shard.file.path, self._snapshot)).as_posix()

        def fill() -> None:
            fd = _open(location)
            try:
                self._refetch(path, entry.offset, entry.nbytes, fd)
                os.fsync(fd)
            finally:
                os.close(fd)

        location.shard.change(fill)
        note(self.folder, [name], gone=False)
        self._gone.discard(name)
        location.shard.discarded.discard(name[1])


def _open(location: Location) -> int:
    """The file for writing; it is the one that is read."""
    path = Path(os.path.realpath(location.shard.file.path))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not location.shard.is_open_on(fd):
        os.close(fd)
        raise CheckpointError(f"{path}: replaced while it was read", "start again")
    return fd


def _punch_hole(fd: int, begin: int, nbytes: int) -> bool:
    """Whether the file system could give up these bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return False
    wide = ctypes.c_int64
    if libc.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, wide(begin), wide(nbytes)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))
