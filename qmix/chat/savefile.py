"""Conversations as files, readable by their owner only, written whole or not at all.

The chat saves its conversation after each change, a file each in the state folder, named by model and number:

    chats/mixtral-int4-5e0c1a2b.1.json     --continue=1
    chats/mixtral-int4-5e0c1a2b.2.json     --continue=2, and --continue where it is the one last saved

Two chats with one model never write one file. A new conversation takes the next free number. A chat that continues a
saved one first checks that the file is still as the chat left it. If another chat has written it since, this one
continues under a number of its own. A lock on the folder makes check and write one step. If the file system has no
locks, two saves in the same millisecond could still collide.

Before conversations had numbers there was MODEL.json, the last one, and MODEL.previous.json. They are still found, as
"old" and "previous".
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qmix.chat.conversation import Conversation
from qmix.chat.document import foreign, parsed, written
from qmix.config import SamplingParams
from qmix.errors import QmixError, UsageError

LARGEST = 64 << 20  # bytes; a conversation of a million tokens is a tenth of it
OLD, PREVIOUS = "old", "previous"
FILE = re.compile(r"(?P<stem>.*-[0-9a-f]{8})(\.(?P<name>[1-9][0-9]*|previous))?\.json")
FIRST_WORDS = 60  # characters of the first question that a list shows
Identity = tuple[int, int, int]


def save(path: Path, conversation: Conversation, params: SamplingParams, *, new: bool = False) -> None:
    """Write or replace `path`. QmixError where that fails; then an older file is as it was. new: never replace;
    FileExistsError where there is a file of that name."""
    text = written(conversation, params)
    temporary = None
    try:
        # A private name in the same folder: mkstemp gives mode 0600, and replace needs one file system.
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _into_place(Path(temporary), path, new)
    except FileExistsError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a name with a NUL byte
        reason = e.strerror if isinstance(e, OSError) else e
        raise QmixError(f"{path}: cannot save: {reason}", "choose another file") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()  # gone already, unless something failed


def _into_place(temporary: Path, path: Path, new: bool) -> None:
    """Give a whole file its name. A hard link, unlike a rename, fails where the name is taken."""
    if new:
        try:
            os.link(temporary, path)
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if exists(path):
                raise FileExistsError(str(path)) from None
    temporary.replace(path)


def exists(path: Path) -> bool:
    """Whether something stands under this name, a broken link included."""
    try:
        path.lstat()
    except (OSError, ValueError):  # save() says what is wrong with the name
        return False
    return True


def load(path: Path) -> tuple[Conversation, SamplingParams]:
    """Read what `save` wrote; QmixError names the file and what is wrong with it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise foreign(path, "not a regular file")
        if status.st_size > LARGEST:
            raise foreign(path, f"{status.st_size} bytes, want at most {LARGEST}")
        data = path.read_bytes()
    except OSError as e:
        raise QmixError(f"{path}: cannot read: {e.strerror or e}") from None
    except ValueError as e:  # a name with a NUL byte
        raise QmixError(f"{path}: cannot read: {e}") from None
    return parsed(path, data)


@dataclass(frozen=True, slots=True)
class Saved:
    """A saved conversation. stem: of which model; name: what --continue takes; changed: nanoseconds since 1970."""

    stem: str
    name: str
    path: Path
    changed: int


class Autosave:
    """The conversation that goes on, saved whenever it changes. path and name: of its file, None before the first
    save and where there is no state folder."""

    def __init__(self, state_dir: Path | None, model: str):
        self._folder = None if state_dir is None else state_dir / "chats"
        self._stem = stem_of(model)
        self._written: Identity | None = None  # the file as this chat wrote or read it last
        self.path: Path | None = None
        self.name: str | None = None

    def start_new(self) -> None:
        """What is saved from now on is another conversation."""
        self.path = self.name = self._written = None

    def save(self, conversation: Conversation, params: SamplingParams) -> str:
        """QmixError where it cannot be saved. What to tell the user, "" for nothing."""
        if self._folder is None:
            raise QmixError("there is no home folder for it", "set HOME or XDG_STATE_HOME")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self._folder):
                return self._save(self._folder, conversation, params)
        except OSError as e:
            raise QmixError(f"{self._folder}: cannot save: {e.strerror or e}") from None

    def _save(self, folder: Path, conversation: Conversation, params: SamplingParams) -> str:
        before = self.name
        if self.path is not None and self._written is not None and _identity(self.path) == self._written:
            save(self.path, conversation, params)
        else:
            self.path, self.name = self._new_file(folder, conversation, params)
        self._written = _identity(self.path)
        if before in (None, self.name):
            return ""
        return (f"conversation {before} was changed or removed outside this chat: it stays as it is, and this one is "
                f"now conversation {self.name}")

    def _new_file(self, folder: Path, conversation: Conversation, params: SamplingParams) -> tuple[Path, str]:
        """Saved under the next free number."""
        number = 1 + max((int(one.name) for one in self.saved() if one.name.isdigit()), default=0)
        while True:
            path = folder / f"{self._stem}.{number}.json"
            try:
                save(path, conversation, params, new=True)
                return path, str(number)
            except FileExistsError:  # no locks here, and another chat was faster
                number += 1

    def saved(self) -> list[Saved]:
        """All saved conversations with this model, the one last saved first."""
        return [one for one in _saved(self._folder) if one.stem == self._stem]

    def load(self, name: str = "") -> tuple[Conversation, SamplingParams] | None:
        """The conversation of that name, or the one last saved, to be gone on with; None where there is none to go on
        with. UsageError for a name that there is not; QmixError where its file is damaged."""
        found = self.saved()
        one = next((one for one in found if name in ("", one.name)), None)
        if one is None and name:
            names = ", ".join(each.name for each in found) or "none"
            raise UsageError(f"--continue={name}: no such conversation with this model",
                             f"saved: {names}; qmix chat --list shows them")
        if one is None:
            return None
        written = _identity(one.path)
        loaded = load(one.path)
        self.path, self.name, self._written = one.path, one.name, written
        return loaded


def stem_of(model: str) -> str:
    """What the files of a model's conversations begin with: readable, and different for each name."""
    readable = re.sub(r"[^\w.-]+", "_", model)[-60:].lstrip(".")
    return f"{readable}-{hashlib.sha256(os.fsencode(model)).hexdigest()[:8]}"


def rows(state_dir: Path, model: str | None = None) -> list[dict[str, Any]]:
    """What `qmix chat --list` prints: a row for each saved conversation, the one last saved first. model: only with
    this one."""
    stem = None if model is None else stem_of(model)
    found = []
    for one in _saved(state_dir / "chats"):
        if stem not in (None, one.stem):
            continue
        try:
            conversation, _ = load(one.path)
        except QmixError as e:
            name, count, first = one.stem, 0, f"(damaged: {e.message})"
        else:
            name, count = conversation.model, len(conversation)
            first = conversation.exchanges[0].question.strip().partition("\n")[0][:FIRST_WORDS] if count else ""
        when = datetime.fromtimestamp(one.changed / 1e9).strftime("%Y-%m-%d %H:%M")
        found.append({"name": one.name, **({"model": name} if model is None else {}), "saved": when,
                      "exchanges": count, "begins": first})
    return found


def _saved(folder: Path | None) -> list[Saved]:
    """Of all models, the one last saved first; of two saved at once, the one with the larger number."""
    found = []
    for path in folder.iterdir() if folder is not None and folder.is_dir() else ():
        if (parts := FILE.fullmatch(path.name)) and (identity := _identity(path)):
            found.append(Saved(parts["stem"], parts["name"] or OLD, path, identity[1]))
    return sorted(found, key=lambda one: (one.changed, one.name != PREVIOUS, len(one.name), one.name), reverse=True)


def _identity(path: Path) -> Identity | None:
    """What changes whenever a file is replaced: inode, time, size; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other chat saves meanwhile."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
