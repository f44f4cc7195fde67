"""Downloads of qmix's own, beside the hub's cache, that are given up while they are used (--discard-source).

HF_HOME/qmix has the layout of the hub's cache. What the cache has already is linked there, and so never freed. A
process that uses a repository's folder locks it; it goes when the store is whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qmix.errors import CheckpointError, QmixError
from qmix.hub import blobs
from qmix.hub.discarded import NAME, Key, file_in, gone_in, note
from qmix.hub.errors import AGAIN, hub_error

WEIGHTS = (".safetensors", ".gguf")
INCOMPLETE = ".incomplete"  # of small files, which the hub's library fetches


def private_cache() -> Path:
    """CheckpointError for a user without a home folder, as in a container under any uid."""
    from huggingface_hub import constants

    try:
        return Path(constants.HF_HOME).expanduser() / "qmix"
    except RuntimeError:
        raise CheckpointError(f"{constants.HF_HOME}: no home folder for the hub's cache",
                              "set HF_HOME to a folder that can be written") from None


def private_folder(repo: str) -> Path | None:
    """A repository's folder there, where one has weights."""
    folder = _own_folder(repo)
    return folder if folder is not None and _has_weights(folder) else None


def _own_folder(repo: str) -> Path | None:
    """A repository's folder there, where one is."""
    try:
        folder = folder_of(private_cache(), repo)
    except CheckpointError:
        return None
    return folder if folder.is_dir() else None


def folder_of(cache: Path, repo: str) -> Path:
    """A repository's folder in a cache."""
    return cache / f"models--{repo.replace('/', '--')}"


@contextmanager
def claimed(repo: str) -> Iterator[Path]:
    """The private folder of a repository, which no other process uses meanwhile. On an error it goes, where no weights
    were fetched into it."""
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
                try:
                    yield folder
                except BaseException:
                    if not _has_weights(folder):
                        drop(repo)
                    raise
                return
        finally:
            os.close(fd)


def _has_weights(folder: Path) -> bool:
    """Whether a folder has weights of its own, a part of some, or a journal of what is gone of them."""
    with suppress(FileNotFoundError):
        if (folder / NAME).stat().st_size:
            return True
    links = [path for path in (folder / "snapshots").rglob("*") if path.is_symlink() or path.is_file()]
    if any(path.suffix in WEIGHTS and file_in(folder, path) is not None for path in links):
        return True
    small = {os.path.realpath(path) for path in links}
    # A blob without a link is of a download that was interrupted.
    return any(os.path.realpath(path) not in small and path.suffix != INCOMPLETE
               for path in (folder / "blobs").glob("*"))


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


def refetch(repo: str, commit: str | None, offline: bool, name: str, begin: int, nbytes: int, fd: int) -> None:
    """Bytes of a file of the hub, once more, to their place in the file `fd`. CheckpointError where they do not come,
    or the hub must not be asked (offline)."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled

    at = begin

    def take(data: bytes) -> None:
        nonlocal at
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, at)
            view, at = view[written:], at + written

    if offline:
        raise hub_error(repo, OfflineModeIsEnabled(), offline)
    try:
        came = blobs.fetch_range(hf_hub_url(repo, name, revision=commit), begin, nbytes, take,
                                 "fetch the model as a whole: the same command without --discard-source")
    except QmixError:
        raise
    except Exception as e:
        raise hub_error(repo, e) from None
    if came < nbytes:
        raise CheckpointError(f"{repo}: {name}: {came} of {nbytes} bytes came", AGAIN)


def drop(repo: str) -> int:
    """Delete a repository's private folder, which this process has claimed: bytes that this frees. Links in it are not
    followed."""
    if not _has_own(repo):
        return 0
    folder = folder_of(private_cache(), repo)
    freed = sum(path.lstat().st_blocks * 512 for path in (folder / "blobs").glob("*"))
    shutil.rmtree(folder, ignore_errors=True)
    return freed


def drop_weights(repo: str, snapshot: Path, names: Iterable[str]) -> tuple[int, bool]:
    """Delete the weights `names` of a snapshot in a repository's private folder, but for those that another snapshot
    has too; and the folder, where it then has no weights that another run fetched: (bytes that this frees, whether the
    folder is gone)."""
    folder = folder_of(private_cache(), repo)
    mine = {os.path.realpath(snapshot / name) for name in names}
    for name in names:
        (snapshot / name).unlink(missing_ok=True)
    links = [path for path in (folder / "snapshots").rglob("*") if path.is_symlink() or path.is_file()]
    used = {os.path.realpath(path): path.suffix in WEIGHTS for path in links}
    freed, left, gone, back = 0, False, gone_in(folder), list[Key]()
    for path in (folder / "blobs").glob("*"):
        real = os.path.realpath(path)
        if real in mine and real not in used:
            freed += path.lstat().st_blocks * 512
            file = file_in(folder, path)
            path.unlink()
            back += [key for key in gone if key[0] == file]
        elif used.get(real, path.suffix != INCOMPLETE):  # without a link: of a download that was interrupted
            left = True
    if left:
        note(folder, back, gone=False)  # if one is fetched once more, it is whole
    return (freed, False) if left else (freed + drop(repo), True)


def drop_unused(repo: str) -> int:
    """As `drop`, of a folder that this process has not claimed. QmixError where another one uses it."""
    if not _has_own(repo):
        return 0
    with claimed(repo):
        return drop(repo)


def _has_own(repo: str) -> bool:
    folder = _own_folder(repo)
    return folder is not None and not folder.is_symlink()
