"""OUT, and what stands beside it while it is replaced.

    OUT             the finished store: it appears by one rename, whole and synced, or not at all
    OUT.partial     where it is written, with the journal; locked by the process that writes
    OUT.replaced    the store that stood at OUT, for the moment between two renames (--force)

A process may be killed anywhere. Left behind is then one of:
    OUT.partial with a journal             unfinished: the next run resumes
    OUT.partial with qmix.json             finished, not renamed: the next run checks and renames it
    OUT.replaced, no OUT                   broken off between the renames: the old store goes back first
    OUT.replaced and OUT                   broken off while deleting: deleting goes on

A mount point (a Docker volume, a disk of its own) cannot be renamed, and its parent is another disk; nor may the
folder above OUT be written everywhere. The store is then written in OUT/store.partial, and its files are moved up one
by one, qmix.json last, so that no half of a store ever opens. Left behind is then one of:
    OUT/store.partial with a journal       unfinished, as above
    OUT/store.partial with qmix.json       finished; files that were moved up already go back, and it is checked
    ... and with qmix.json.replaced        the old store's manifest: its other files are being deleted

Nothing is ever removed or renamed except folders that hold files of a qmix store and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from pathlib import Path

import psutil

from qmix import modelfiles
from qmix.errors import QmixError, StoreError, UsageError
from qmix.store import CONFIG, JOURNAL, MANIFEST, Manifest

WEIGHTS = re.compile(r"dense\.safetensors|experts-\d{2,}\.safetensors")
OLD_MANIFEST = MANIFEST + ".replaced"
OURS = frozenset({CONFIG, MANIFEST, OLD_MANIFEST, JOURNAL, MANIFEST + ".tmp", JOURNAL + ".tmp", *modelfiles.FILES})
INSIDE = "store.partial"


class Target:
    """A claim on OUT: from `claim` until `release` no other qmix process writes there."""

    def __init__(self, out: Path, lock: int):
        self.out = out
        self.partial, self.replaced = partial_of(out), _beside(out, ".replaced")
        self._lock = lock

    @classmethod
    def claim(cls, out: Path, force: bool) -> Target:
        """Check OUT, mend what an earlier run left, and lock. UsageError (exit 2) where OUT may not be
        written, QmixError where another process is at it. `out` is free of links: see `resolve`."""
        try:
            if not _half_moved(out, partial_of(out)):
                check_replaceable(out, force)  # first of all, so that a refusal leaves no trace
            out.parent.mkdir(parents=True, exist_ok=True)
            target = cls(out, _lock(partial_of(out)))
        except OSError as e:
            raise cannot_write(e) from None
        try:
            target._mend()
            check_replaceable(out, force)
            _check_partial(target.partial)
        except OSError as e:
            target.release()
            raise cannot_write(e) from None
        except BaseException:
            target.release()
            raise
        return target

    def clear(self) -> None:
        """Forget what was written so far."""
        _remove_files(self.partial)

    def commit(self, force: bool) -> None:
        """Make the folder, complete and synced, the store at OUT; what was there is deleted after that."""
        check_replaceable(self.out, force)  # hours may have passed
        sync_folder(self.partial)
        (self.partial / JOURNAL).unlink()
        sync_folder(self.partial)
        if self.partial.parent == self.out or not self._rename():
            self._move_up()

    def _rename(self) -> bool:
        """Give the folder its name; False where the system cannot rename what stands at OUT: it became a mount point,
        or it belongs to a lower layer of an overlay, as in a container's image."""
        if self.out.exists() and any(self.out.iterdir()):
            try:
                self.out.rename(self.replaced)
            except OSError as e:
                if e.errno in (errno.EXDEV, errno.EBUSY):
                    return False
                raise
        self.partial.rename(self.out)
        try:
            sync_folder(self.out.parent)
        except OSError as e:  # the old store, if there was one, stays until the next run finds both
            raise QmixError(f"{self.out}: whole, but the disk did not confirm its new name: {e.strerror}",
                            "make room on the disk, or check it; `qmix verify --deep` reads the store again") from None
        if self.replaced.exists():
            _remove(self.replaced)
        return True

    def _move_up(self) -> None:
        """Delete the old store's files, then move the new one's to OUT; the module's prose says what a kill leaves."""
        if (self.out / MANIFEST).exists():
            (self.out / MANIFEST).rename(self.partial / OLD_MANIFEST)  # closes the old store, and says what follows
            sync_folder(self.partial)
        self._delete_replaced()
        for path in sorted(self.partial.iterdir(), key=lambda path: path.name == MANIFEST):
            if path.name != OLD_MANIFEST:
                if path.name == MANIFEST:
                    sync_folder(self.out)
                path.rename(self.out / path.name)
        sync_folder(self.out)
        (self.partial / OLD_MANIFEST).unlink(missing_ok=True)
        self.partial.rmdir()
        sync_folder(self.out)

    def _delete_replaced(self) -> None:
        """What is left of the old store in OUT."""
        if (self.partial / OLD_MANIFEST).exists() and foreign(self.out) is None:
            for path in _entries(self.out):
                path.unlink()

    def release(self) -> None:
        """Give up the lock; a folder in which nothing was written goes too."""
        if self._lock < 0:
            return
        try:
            if not any(self.partial.iterdir()):
                self.partial.rmdir()
        except OSError:
            pass  # renamed by now, or not ours to remove
        os.close(self._lock)
        self._lock = -1

    def _mend(self) -> None:
        """Undo or finish what a killed run left between two renames."""
        if _half_moved(self.out, self.partial):
            for name in _names(self.partial / MANIFEST):
                if not (self.partial / name).exists() and (self.out / name).is_file():
                    (self.out / name).rename(self.partial / name)
            self._delete_replaced()
            (self.partial / OLD_MANIFEST).unlink(missing_ok=True)
        if (self.out / MANIFEST).exists():  # killed behind the last rename
            (self.partial / OLD_MANIFEST).unlink(missing_ok=True)
        if not self.replaced.exists():
            return
        stranger = foreign(self.replaced)
        if stranger:
            raise UsageError(f"{self.replaced}: holds {stranger}, which qmix did not write", "move it away")
        if (self.out / MANIFEST).exists():
            _remove(self.replaced)
        else:
            self.replaced.rename(self.out)


def resolve(out: Path) -> Path:
    """OUT without links, so that what stands beside it is on the same disk. UsageError for links that form a ring."""
    found = Path(os.path.realpath(out))
    try:
        ring = found.is_symlink()
    except OSError as e:  # a name too long
        raise cannot_write(e) from None
    if ring:
        raise UsageError(f"{out}: a link that leads back to itself", "choose another OUT, or remove the link")
    return found


def partial_of(out: Path) -> Path:
    """Where a store for OUT is written: beside it, or inside where it is a mount point or nothing may stand beside."""
    if out.is_dir() and (is_mount(out) or (out / INSIDE).is_dir() or not os.access(out.parent, os.W_OK)):
        return out / INSIDE
    return _beside(out, ".partial")


def is_mount(folder: Path) -> bool:
    """Whether something is mounted there; a bind mount of the same disk shows in the system's list alone."""
    return os.path.ismount(folder) or any(Path(m.mountpoint) == folder for m in psutil.disk_partitions(all=True))


def _half_moved(out: Path, partial: Path) -> bool:
    """Whether a finished store may lie partly in OUT already."""
    return (partial / MANIFEST).exists() and not (partial / JOURNAL).exists() and not (out / MANIFEST).exists()


def _names(manifest: Path) -> set[str]:
    """The files of a finished store, but for the manifest; none where it cannot be read: then all is made again."""
    try:
        found = Manifest.read(manifest)
    except StoreError:
        return set()
    files = [r.file for r in found.records.values()] + [d.file for d in found.dense.values()]
    return {*files, *found.files}


def _entries(out: Path) -> list[Path]:
    """What a folder holds, but for a store that is being written in it and what a disk of its own begins with."""
    ours = {INSIDE, "lost+found"} if is_mount(out) or (out / INSIDE).is_dir() else set()
    return sorted(path for path in out.iterdir() if path.name not in ours or not path.is_dir())


def check_replaceable(out: Path, force: bool) -> None:
    """UsageError unless OUT is free, an empty folder, or with `force` a qmix store and nothing more."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: a file is in the way", "choose another OUT")
    if not _entries(out):
        return
    stranger = foreign(out)
    if stranger is None and not (out / MANIFEST).exists():
        stranger = "files that are not a qmix store"
    if stranger:
        raise UsageError(f"{out}: exists and holds {stranger}, which qmix did not write: even --force keeps "
                         "it", "choose another OUT, or move the folder away")
    if not force:
        raise UsageError(f"{out}: exists", "--force replaces it once the new store is whole")


def check_removable(folder: Path) -> None:
    """UsageError unless a folder is a store of qmix's, or an unfinished one, and holds nothing else."""
    if folder.is_symlink():
        raise UsageError(f"{folder}: a link, which qmix does not follow to delete", "delete what it leads to yourself")
    if not folder.is_dir():
        raise UsageError(f"{folder}: not a folder", "qmix deletes stores alone")
    stranger = foreign(folder)
    if stranger is None and not any((folder / name).exists() for name in (MANIFEST, JOURNAL)) and any(folder.iterdir()):
        stranger = "files that are not a qmix store"
    if stranger:
        raise UsageError(f"{folder}: holds {stranger}, which qmix did not write: it is not deleted",
                         "move that away, or delete the folder yourself")


def remove_store(folder: Path) -> int:
    """Delete a store, or an unfinished one: bytes of disk that this frees. Errors as `check_removable`; QmixError where
    another process writes it."""
    check_removable(folder)
    fd = _lock(folder)
    try:
        check_removable(folder)
        freed = written_bytes(folder)
        _remove(folder)
    except OSError as e:
        raise QmixError(f"{e.filename or folder}: {e.strerror}", "check the folder's permissions") from None
    finally:
        os.close(fd)
    return freed


def _check_partial(partial: Path) -> None:
    """UsageError unless OUT.partial is empty or was left by an earlier run."""
    stranger = foreign(partial)
    if stranger is None and not (partial / JOURNAL).exists() and not (partial / MANIFEST).exists():
        others = [p.name for p in partial.iterdir() if p.name != JOURNAL + ".tmp"]
        stranger = others[0] if others else None
    if stranger:
        raise UsageError(f"{partial}: holds {stranger}, which qmix did not write",
                         "move it away, or choose another OUT")


def foreign(folder: Path) -> str | None:
    """The first entry of a folder that is no file of a qmix store, quoted, or None."""
    for path in _entries(folder):
        if path.name == modelfiles.TEMPLATES and path.is_dir() and not path.is_symlink():
            for inner in _entries(path):
                name = f"{path.name}/{inner.name}"
                if not modelfiles.TEMPLATE_NAME.fullmatch(name) or inner.is_symlink() or not inner.is_file():
                    return f"{name!r:.80}"
            continue
        known = path.name in OURS or WEIGHTS.fullmatch(path.name)
        if not known or path.is_symlink() or not path.is_file():
            return f"{path.name!r:.80}"
    return None


def written_bytes(folder: Path) -> int:
    """Bytes of disk that the files of a folder take already."""
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder) if entry.is_file())


def sync_folder(folder: Path) -> None:
    """Return when the disk knows the folder's names."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def cannot_write(e: OSError) -> QmixError:
    if isinstance(e, FileExistsError | NotADirectoryError):
        return UsageError(f"{e.filename or 'OUT'}: a file is in the way", "choose another OUT")
    return QmixError(f"{e.filename or 'OUT'}: {e.strerror}",
                     "choose an OUT in a folder that you may write to")


def _beside(out: Path, suffix: str) -> Path:
    if not out.name:
        raise UsageError(f"{out}: not a folder that can be written", "choose another OUT")
    return out.parent / (out.name + suffix)


def _lock(folder: Path) -> int:
    """Make and lock a folder (the lock is on the folder itself and leaves no file): its descriptor."""
    while True:
        folder.mkdir(exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(fd), folder.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise QmixError(f"{folder}: another qmix is writing there",
                            "wait until it is done, or choose another OUT") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the other one finished and renamed it just now


def _remove_files(folder: Path) -> None:
    """Delete a store's files, manifest and journal last, so that half of a store still shows what it is."""
    assert foreign(folder) is None, folder
    last = (MANIFEST, JOURNAL)
    for entry in sorted(os.scandir(folder), key=lambda e: (e.name in last, e.name)):
        if entry.is_dir(follow_symlinks=False):  # of chat templates
            for inner in os.scandir(entry.path):
                Path(inner.path).unlink()
            Path(entry.path).rmdir()
        else:
            Path(entry.path).unlink()


def _remove(folder: Path) -> None:
    _remove_files(folder)
    folder.rmdir()
