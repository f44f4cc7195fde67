"""Files of strangers, read within bounds: a pipe or a device in the place of a file is refused, and so is a file that
would take more memory than any real one, before it is read or parsed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from qmix.errors import ModelFileError

MAX_ITEMS = 2**23  # values of a JSON text, each of which takes 60 to 100 bytes of memory; real ones have 3 million
MAX_TEXT = 2**26  # bytes of a config.json or a text; real ones have less than one MiB
FETCH = "fetch the file again from where the model came from"


def read_file(path: Path, most: int, error: type[ModelFileError] = ModelFileError, cure: str = FETCH) -> bytes:
    """All bytes of a regular file, `most` at most; `error` for any other, OSError as the system gives it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))  # to open a pipe must not block
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path}: not a file", cure)
        if found.st_size > most:
            raise error(f"{path}: {found.st_size} bytes, want at most {most}", cure)
        data = file.read(found.st_size + 1)  # Python makes room for as much as is asked for
    if len(data) > found.st_size:
        raise error(f"{path}: grew while it was read", cure)
    return data


def parse_json(data: bytes) -> Any:
    """What json.loads gives; ValueError, too, where it has more than MAX_ITEMS values."""
    _check_items(data)
    return json.loads(data)


def parse_unique(data: bytes) -> Any:
    """As `parse_json`; ValueError where an object has the same key twice, of which programs take one or the other."""
    _check_items(data)
    return json.loads(data, object_pairs_hook=_unique)


def _check_items(data: bytes) -> None:
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_ITEMS:
        raise ValueError(f"more than {MAX_ITEMS} values")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return found
