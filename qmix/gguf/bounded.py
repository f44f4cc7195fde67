"""Reads the values of a GGUF header one after the other, within bounds.

Every length and count is compared with what is left of the file before anything is allocated for it, and with a limit
of its own where the file may be large. So a header costs memory and time in proportion to its bytes, whatever it says.
The file is read with pread in windows; it is never mapped.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from qmix.errors import CheckpointError
from qmix.tensorfile import DAMAGED

WINDOW = 2**20
MAX_HEADER = 256 * 2**20  # a vocabulary of 262,144 tokens with its merges takes 16 MB
MAX_ITEMS = 4 * 2**20  # of all arrays of a file, each of which costs some 60 bytes; real ones have 1.5 million
# What a value's type is called, and how struct reads one; arrays and strings are read here.
SCALARS = {0: ("uint8", "B"), 1: ("int8", "b"), 2: ("uint16", "H"), 3: ("int16", "h"), 4: ("uint32", "I"),
           5: ("int32", "i"), 6: ("float32", "f"), 7: ("bool", "B"), 10: ("uint64", "Q"), 11: ("int64", "q"),
           12: ("float64", "d")}
BOOL, STRING, ARRAY = 7, 8, 9


class Reader:
    """`position`: of the next byte. Errors are CheckpointError, and name the file and what was being read."""

    def __init__(self, path: Path, fd: int):
        self.path = path
        self.size = os.fstat(fd).st_size
        self.position = 0
        self._fd = fd
        self._window = b""
        self._begin = 0  # of the window
        self._items = 0  # of the arrays read

    def fail(self, what: str, problem: str, cure: str = DAMAGED) -> NoReturn:
        raise CheckpointError(f"{self.path}: {what}: {problem}", cure)

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        end = self.position + count
        if end > min(self.size, MAX_HEADER):
            self.fail(what, f"{count} bytes at byte {self.position}, but the file ends at {self.size} (truncated?)"
                      if end > self.size else f"the header has more than {MAX_HEADER} bytes")
        first = self.position - self._begin
        if first + count > len(self._window):
            self._begin, first = self.position, 0
            self._window = self._read(max(count, WINDOW), what)
        if first + count > len(self._window):
            self.fail(what, f"the file ends at byte {self._begin + len(self._window)} (it changed while it was read)")
        self.position = end
        return self._window[first:first + count]

    def _read(self, count: int, what: str) -> bytes:
        found = bytearray()
        try:
            while len(found) < count and (piece := os.pread(self._fd, count - len(found), self._begin + len(found))):
                found += piece
        except OSError as e:
            self.fail(what, e.strerror or str(e), "check the disk")
        return bytes(found)

    def number(self, code: str, what: str) -> Any:
        """One number, `code` as struct has it."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str, most: int | None = None) -> str:
        """A string: its length in 8 bytes, then UTF-8."""
        length = self.number("Q", what)
        if most is not None and length > most:
            self.fail(what, f"a text of {length} bytes, want at most {most}")
        raw = self.take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            self.fail(what, f"byte {e.start} of a text of {length} bytes is not UTF-8")

    def value(self, key: str) -> Any:
        """A value of the metadata: a number, a bool, a text or a tuple of these."""
        kind = self.number("I", key)
        if kind != ARRAY:
            return self._item(kind, key)()
        kind, count = self.number("I", key), self.number("Q", key)
        if kind == ARRAY:
            self.fail(key, "an array of arrays, which no model needs")
        item = self._item(kind, key)
        least = 8 if kind == STRING else struct.calcsize(SCALARS[kind][1])
        room = MAX_ITEMS - self._items
        if count > room or count * least > self.size - self.position:
            self.fail(key, f"an array of {count} values, with {self.size - self.position} bytes of the file left"
                      if count <= room else f"an array of {count} values, want at most {room}, so that all arrays of "
                      f"the file have at most {MAX_ITEMS}")
        self._items += count
        if kind in (STRING, BOOL):
            return tuple(item() for _ in range(count))
        return struct.unpack(f"<{count}{SCALARS[kind][1]}", self.take(count * least, key))

    def _item(self, kind: int, key: str) -> Callable[[], Any]:
        """What reads one value of a type; refused where there is no such type."""
        if kind == STRING:
            return lambda: self.text(key)
        if kind == BOOL:
            return lambda: self._bool(key)
        if kind not in SCALARS:
            self.fail(key, f"has type {kind}, which GGUF does not have")
        return lambda: self.number(SCALARS[kind][1], key)

    def _bool(self, key: str) -> bool:
        found = self.number("B", key)
        if found > 1:
            self.fail(key, f"a bool of {found}, want 0 or 1")
        return bool(found)
