"""The finished part of an evaluation, so that an interrupted one can continue: a file in the state folder, a record per
window.

    {"qmix eval": 1, "arguments": {"model": "5e...", "window": 2048, ...}}
      all that decides a number
    uint32 tokens, uint32 columns, columns x fp32 [tokens], 8 bytes xxh3_64 of all before      little-endian, in order

Records are appended with one write each. Reading stops at the first record that is torn or damaged, and the rest of the
file is cut off. The file is locked while it is open: two runs must not append to one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from qmix.errors import UsageError
from qmix.evaluate.score import Scores

VERSION = 1
HEAD = struct.Struct("<II")
SUM = 8  # bytes of a checksum
LOST = "an interrupted evaluation cannot be continued"


class Journal:
    """Open for appending; `done` holds the windows that it knew when it was opened, in order. Close it. path is None
    where no file can be kept: then it forgets what is appended."""

    def __init__(self, fd: int, path: Path | None, done: list[Scores]):
        self._fd = fd
        self.path = path
        self.done = done

    @classmethod
    def open(cls, folder: Path | None, arguments: Mapping[str, Any], sizes: Sequence[int], *, fresh: bool,
             say: Callable[[str], None]) -> Journal:
        """The journal of an evaluation with these arguments, whose windows score `sizes` tokens. fresh: forget what it
        has. Without a folder, or in one that cannot be written, there is none, which is said. UsageError where another
        process has it open."""
        if folder is None:
            say(f"no home folder: {LOST} (set HOME or XDG_STATE_HOME)")
            return cls(-1, None, [])
        head = json.dumps({"qmix eval": VERSION, "arguments": arguments}, sort_keys=True).encode("ascii") + b"\n"
        path = folder / f"{xxhash.xxh3_128_hexdigest(head)}.scores"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            say(f"{e.filename or path}: {e.strerror}: {LOST} (set XDG_STATE_HOME to a folder that can be written)")
            return cls(-1, None, [])
        try:
            _lock(fd, path, say)
            done, keep = ([], 0) if fresh else _read(fd, head, sizes)
            os.ftruncate(fd, keep)
            os.lseek(fd, 0, os.SEEK_END)
            journal = cls(fd, path, done)
            if not keep:
                journal._write(head)
        except BaseException:
            os.close(fd)
            raise
        return journal

    def append(self, scores: Scores) -> None:
        if self.path is None:
            return
        columns = torch.stack([column for column in scores.columns if len(column)])
        body = HEAD.pack(columns.shape[1], len(columns)) + bytes(columns.view(torch.uint8).flatten().tolist())
        self._write(body + xxhash.xxh3_64_digest(body))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._fd, data)
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.path)) from None
        if written != len(data):  # a full disk takes part of it; nothing must follow
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def _lock(fd: int, path: Path, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{path}: the same evaluation is running in another process",
                         "wait for it, or stop it") from None
    except OSError as e:
        say(f"{path}: cannot be locked ({e.strerror}): do not run the same evaluation twice at once")


def _read(fd: int, head: bytes, sizes: Sequence[int]) -> tuple[list[Scores], int]:
    """(the windows finished, bytes of the file that they and the head take; 0 where the head is another)."""
    done: list[Scores] = []
    with os.fdopen(os.dup(fd), "rb") as file:
        if file.read(len(head)) != head:
            return done, 0
        keep = len(head)
        for size in sizes:
            start = file.read(HEAD.size)
            tokens, columns = HEAD.unpack(start) if len(start) == HEAD.size else (0, 0)
            if tokens != size or columns not in (1, 4):
                break
            body = start + file.read(4 * tokens * columns)
            if file.read(SUM) != xxhash.xxh3_64_digest(body):
                break
            done.append(_scores(body[HEAD.size:], columns))
            keep += len(body) + SUM
    return done, keep


def _scores(data: bytes, columns: int) -> Scores:
    values = torch.frombuffer(bytearray(data), dtype=torch.float32).view(columns, -1)
    return Scores(*values) if columns == 4 else Scores(values[0], *[torch.empty(0)] * 3)
