"""What of the files in a repository's private folder is gone (--discard-source): discarded.jsonl there.

    [1, "blobs/ETAG", "model.layers.0..."]      a tensor's bytes are gone
    [0, "blobs/ETAG", "model.layers.0..."]      they are back

A file goes by its real path in the folder, so that the same bytes are the same file under whichever name a commit has
them. By its real path, too, whoever opens one learns what it lacks, also by a link or as any other local checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from qmix.bounded import read_file
from qmix.errors import CheckpointError, QmixError

NAME = "discarded.jsonl"
MAX_JOURNAL = 2**28

Key = tuple[str, str]  # (file in the folder, tensor's name)


def file_in(folder: Path, path: Path) -> str | None:
    """What the journal of `folder` calls a file; None for one that lies elsewhere, perhaps behind a link."""
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real.relative_to(folder).as_posix() if real.is_relative_to(folder) else None


def discarded_in(path: Path) -> set[str]:
    """The tensors of a file that are gone. CheckpointError where a journal cannot be read."""
    for folder in Path(os.path.realpath(path)).parents:
        if os.path.lexists(folder / NAME) and (folder / "snapshots").is_dir():
            mine = file_in(folder, path)  # once: a journal has a line for each tensor of a large model
            return {tensor for file, tensor in gone_in(folder) if file == mine}
    return set()


def gone_in(folder: Path) -> frozenset[Key]:
    """By the journal of `folder`, which may have none; a torn line stands for nothing that was done."""
    path = folder / NAME
    try:
        found = path.stat()
        return _read(path, found.st_size, found.st_mtime_ns)
    except FileNotFoundError:
        return frozenset()
    except (OSError, QmixError) as e:
        raise CheckpointError(f"{path}: {e}", f"delete {folder}, and start again") from None


@lru_cache(maxsize=1)  # of a model in a hundred files each asks
def _read(path: Path, size: int, mtime: int) -> frozenset[Key]:
    found: set[Key] = set()
    for line in read_file(path, MAX_JOURNAL).split(b"\n")[:-1]:
        try:
            gone, file, tensor = json.loads(line)
            (found.add if gone else found.discard)((str(file), str(tensor)))
        except (ValueError, TypeError, RecursionError):
            continue  # torn by a full disk, and then nothing of it was done
    return frozenset(found)


def note(folder: Path, keys: Iterable[Key], gone: bool) -> None:
    """Onto the disk before it is done. OSError where that fails."""
    # On a line of their own, whatever a broken run left at the end.
    data = "".join("\n" + json.dumps([int(gone), *key]) for key in keys).encode() + b"\n"
    path = folder / NAME
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(fd)
    finally:
        os.close(fd)
