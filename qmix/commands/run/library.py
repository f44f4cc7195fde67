"""What each store that `qmix run` made was made of: NAME.json beside the store NAME in the models folder.

It is written before the store is, so that a run that breaks off finds its way back. A store without it (made by
`qmix quantize`, or moved there) is a store like any other: its manifest says what it was made of.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from qmix import json_cache, paths
from qmix.commands.quantization import Flags
from qmix.errors import ConfigError, QmixError

FORMAT, VERSION = "qmix_run", 1
WEIGHTS = ("config.json", "params.json", "*.safetensors", "*.gguf")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """source: a hub id, or the absolute path of a folder or GGUF file; state: the hub's commit, or a digest of sizes
    and times of the source's files; options: the flags that decide the store's bytes."""

    name: str
    source: str
    state: str
    options: str
    hub: bool

    def __post_init__(self) -> None:
        for field in ("name", "source", "state", "options"):
            if not isinstance(getattr(self, field), str):
                raise ConfigError(f"{field}: want text")
        if type(self.hub) is not bool:
            raise ConfigError("hub: want true or false")

    @property
    def folder(self) -> Path:
        return paths.models_folder() / self.name

    @property
    def is_made(self) -> bool:
        return (self.folder / "qmix.json").is_file()

    @property
    def repo(self) -> str | None:
        """The hub's repository."""
        return re.split("[:@]", self.source)[0] if self.hub else None


def options_of(flags: Flags) -> str:
    """"int4" of --format int4, "" where no flag was given."""
    found = [flags.format, *(f"{name}-{value}" for name, value in
                             (("dense", flags.dense), ("g", flags.group_size), ("method", flags.method))
                             if value is not None)]
    return "-".join(part for part in found if part)


def load(name: str, say: Say) -> Entry | None:
    """None where there is none, or, said, where it is not one."""
    def make(values: dict[str, Any]) -> Entry:
        try:
            found = Entry(**values)
        except TypeError:
            raise ValueError("its keys are not those of such a file") from None
        if found.name != name:
            raise ValueError(f"it is about {found.name!r:.80}")
        return found

    return json_cache.load(_file(name), FORMAT, VERSION, make, "qmix run", say)


def save(entry: Entry) -> None:
    json_cache.save(_file(entry.name), FORMAT, VERSION, asdict(entry))


def forget(name: str) -> None:
    with suppress(OSError):
        _file(name).unlink()


def find(source: str, options: str, say: Say) -> Entry | None:
    """What was made, or begun, of that source with these flags."""
    for path in sorted(paths.models_folder().glob("*.json")):
        entry = load(path.stem, say)
        if entry is not None and (entry.source, entry.options) == (source, options):
            return entry
    return None


def free_name(source: str, hub: bool, options: str, suffix: str) -> str:
    """Of a new store: the model's own name and how it is quantized, with a mark where something else has that name,
    and a number where that is taken too."""
    model = re.sub(r"@.*", "", source).rpartition(":")[2] if hub else source
    base = re.sub(r"\.gguf$|-\d{5}-of-\d{5}(\.gguf)?$", "", model.rpartition("/")[2], flags=re.IGNORECASE)
    if hub and ":" in source and not re.search("[./-]", base):  # a type alone
        base = f"{source.partition(':')[0].rpartition('/')[2]}-{base}"
    ending = options or suffix
    name = re.sub(r"[^\w.-]", "-", base + (f"-{ending}" if ending and not base.lower().endswith(ending) else ""))
    name = name.lstrip(".-") or "model"
    mark = hashlib.blake2b(f"{source} {options}".encode(errors="surrogateescape"), digest_size=3).hexdigest()
    names = chain((name, f"{name}-{mark}"), (f"{name}-{mark}-{i}" for i in count(2)))
    return next(name for name in names if not _is_taken(name))


def local_state(path: Path) -> str:
    """A digest of the sizes and times of the files of a local checkpoint: another one once one was replaced."""
    files = sorted({file for pattern in WEIGHTS for file in path.glob(pattern)}) if path.is_dir() else \
        sorted(path.parent.glob(re.sub(r"-\d{5}-of-", "-*-of-", path.name.replace("[", "[[]"))))
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        found = file.stat()
        digest.update(repr((file.name, found.st_size, found.st_mtime_ns)).encode(errors="surrogateescape"))
    return digest.hexdigest()


@contextmanager
def alone(name: str, say: Say) -> Iterator[None]:
    """While no other `qmix run` makes that store; waits for one that does."""
    folder = paths.models_folder()
    path = folder / f".{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as e:
        raise QmixError(f"{e.filename or path}: {e.strerror}",
                        "set QMIX_HOME to a folder that can be written") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another qmix is making {name}: waiting for it")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def own_name(name: str, source: str, hub: bool, options: str, suffix: str,
             say: Say) -> Iterator[tuple[str, Entry | None]]:
    """While no other `qmix run` makes that store: its name and what is known of it now. That is `name`, unless since it
    was chosen something else came to have it; then another one is chosen, as free_name does, which is said."""
    while True:
        with alone(name, say):
            entry = load(name, say)
            if (entry is None and not _is_taken(name)) or \
                    (entry is not None and (entry.source, entry.options) == (source, options)):
                yield name, entry
                return
        other = find(source, options, say)
        new = free_name(source, hub, options, suffix) if other is None else other.name
        say(f"{name}: has become a store of something else meanwhile: {new} instead")
        name = new


def _is_taken(name: str) -> bool:
    folder = paths.models_folder()
    return any(os.path.lexists(folder / f"{name}{ending}") for ending in ("", ".json", ".partial"))


def _file(name: str) -> Path:
    return paths.models_folder() / f"{name}.json"
