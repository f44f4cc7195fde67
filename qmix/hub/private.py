"""Downloads of qmix's own, beside the hub's cache, that are given up while they are used (--discard-source).

HF_HOME/qmix has the layout of the hub's cache. What the cache has already is linked there, and so never freed. A
process that uses a repository's folder locks it; it goes when the store is whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qmix.errors import CheckpointError, QmixError
from qmix.hub import blobs
from qmix.hub.errors import AGAIN, hub_error


def private_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME).expanduser() / "qmix"


def folder_of(cache: Path, repo: str) -> Path:
    """A repository's folder in a cache."""
    return cache / f"models--{repo.replace('/', '--')}"


@contextmanager
def claimed(repo: str) -> Iterator[Path]:
    """The private folder of a repository, which no other process uses meanwhile."""
    folder = folder_of(private_cache(), repo)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise CheckpointError(f"{e.filename or folder}: {e.strerror}", "set HF_HOME to a folder that can be "
                                  "written") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise QmixError(f"{folder}: another qmix discards this model's files while it quantizes them",
                                "wait until it is done, or leave out --discard-source and --source") from None
            if _is_at(folder, fd):  # else the process that had it was done, and deleted it
                yield folder
                return
        finally:
            os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False


def link_cached(repo: str, commit: str | None, folder: Path, name: str) -> bool:
    """Link a file of the user's cache into a private snapshot; whether it is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=commit)
    if not isinstance(found, str):
        return False
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.symlink_to(os.path.realpath(found))
    return True


def refetch(repo: str, commit: str | None, name: str, begin: int, nbytes: int, fd: int) -> None:
    """Bytes of a file of the hub, once more, to their place in the file `fd`. CheckpointError where they do not
    come."""
    from huggingface_hub import hf_hub_url

    at = begin

    def take(data: bytes) -> None:
        nonlocal at
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, at)
            view, at = view[written:], at + written

    try:
        came = blobs.fetch_range(hf_hub_url(repo, name, revision=commit), begin, nbytes, take)
    except QmixError:
        raise
    except Exception as e:
        raise hub_error(repo, e) from None
    if came < nbytes:
        raise CheckpointError(f"{repo}: {name}: {came} of {nbytes} bytes came", AGAIN)


def drop(repo: str) -> int:
    """Delete a repository's private folder, which this process has claimed: bytes that this frees. Links in it are not
    followed."""
    folder = folder_of(private_cache(), repo)
    if not _has_own(repo):
        return 0
    freed = sum(path.lstat().st_blocks * 512 for path in (folder / "blobs").glob("*"))
    shutil.rmtree(folder, ignore_errors=True)
    return freed


def drop_unused(repo: str) -> int:
    """As `drop`, of a folder that this process has not claimed. QmixError where another one uses it."""
    if not _has_own(repo):
        return 0
    with claimed(repo):
        return drop(repo)


def _has_own(repo: str) -> bool:
    folder = folder_of(private_cache(), repo)
    return folder.is_dir() and not folder.is_symlink()
