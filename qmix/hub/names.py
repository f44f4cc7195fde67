"""What a hub id says: the repository, a GGUF file in it, a revision; and which files of a repository it means.

    org/name                       a checkpoint in safetensors, a store, or the only GGUF model of the repository
    org/name@v1                    at a branch, tag or commit
    org/name:file.gguf             that file; of a model in several files, all of them
    org/name:folder/file           the same without its end, or without its -00001-of-00003
    org/name:Q4_K_M                the GGUF model whose name carries this type
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qmix.errors import CheckpointError, UsageError
from qmix.gguf.split import MAX_FILES, NAME, REFETCH

ID = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(:(?P<file>[\w][\w.+/-]*))?(@(?P<revision>[\w][\w./-]*))?")
TYPE = re.compile(r"(I?Q|TQ|B?F|MXFP)\d", re.IGNORECASE)
SHOWN = 20  # files that an error lists
NO_MODEL = re.compile(r"(^|/)(mmproj|imatrix|mtp-|draft-)[^/]*$", re.IGNORECASE)  # what lies beside models


@dataclass(frozen=True, slots=True)
class HubName:
    """repo: "org/name"; file: a GGUF file, stem or type, None where none is named; revision: None = the default."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f":{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """None for what cannot be a hub id."""
        found = ID.fullmatch(text)
        if found is None or any(part in ("", ".", "..") for part in (found["file"] or "x").split("/")):
            return None
        return cls(found["repo"], found["file"], found["revision"])

    def at(self, revision: str | None) -> HubName:
        """With the revision of --revision; UsageError where the name has another."""
        if revision is None:
            return self
        if self.revision not in (None, revision):
            raise UsageError(f"--revision {revision}: {self} names another", "drop one of the two")
        return HubName(self.repo, self.file, revision)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """stem: the path in the repository without .gguf and without the number of a piece; files: all of it, in order."""

    stem: str
    files: tuple[str, ...]


def gguf_models(files: Iterable[str]) -> list[GgufModel]:
    """The models in GGUF files of a repository, by name. A model of which a piece is missing has those that are
    there."""
    groups: dict[str, list[str]] = {}
    for name in sorted(files):
        if name.lower().endswith(".gguf") and not NO_MODEL.search(name):
            groups.setdefault(_stem(name), []).append(name)
    return [GgufModel(stem, tuple(names)) for stem, names in groups.items()]


def choose_gguf(name: HubName, files: Iterable[str]) -> GgufModel:
    """The one that `name` means; CheckpointError, with a list, where it means none or several, or a piece of it is
    missing."""
    files = [*files]
    models = gguf_models(files)
    if not models:
        raise CheckpointError(f"{name}: the repository holds no GGUF model", f"its files: {_listed(files)}")
    found = models if name.file is None else _named(name.file, models)
    if len(found) != 1:
        what = "names no GGUF model of the repository" if not found else \
            f"could be any of {len(found)} GGUF models"
        shown = [model.files[0] for model in found or models]
        raise CheckpointError(f"{name}: {what}: {_listed(shown)}", f"name one: {name.repo}:{shown[0]}")
    _check_whole(name, found[0])
    return found[0]


def _named(text: str, models: list[GgufModel]) -> list[GgufModel]:
    """By file or stem, with or without its folder; else by the type in its name."""
    for paths in (lambda m: (m.stem, *m.files), lambda m: (m.stem.rpartition("/")[2],
                                                           *(f.rpartition("/")[2] for f in m.files))):
        if found := [m for m in models if {text, _without_end(text)} & {*paths(m)}]:
            return found
    if text.lower().endswith(".gguf"):
        return []
    before = "[-._/]" if TYPE.match(text) else "[-./]"  # K_M is no type, though Q4_K_M ends so
    tag = re.compile(rf"(?:^|{before}){re.escape(text)}(?:$|[-./])", re.IGNORECASE)
    found = [m for m in models if tag.search(m.stem)]
    # UD-Q4_K_M is another type than Q4_K_M, which a tag without UD means where both are there.
    other = re.compile(rf"(?:^|[-._/])UD[-_]{re.escape(text)}(?:$|[-./])", re.IGNORECASE)
    return [m for m in found if not other.search(m.stem)] or found


def _stem(name: str) -> str:
    match = NAME.fullmatch(name)
    return match[1] if match else _without_end(name)


def _without_end(name: str) -> str:
    return name[:-len(".gguf")] if name.lower().endswith(".gguf") else name


def _check_whole(name: HubName, model: GgufModel) -> None:
    matches = [match for file in model.files if (match := NAME.fullmatch(file))]
    if not matches:
        return
    counts = {int(match[3]) for match in matches}
    count = max(counts)
    if len(counts) > 1 or len(matches) < len(model.files):
        raise CheckpointError(f"{name}: could be any of several files: {_listed(model.files)}", "name one of them")
    there = {int(match[2]) for match in matches}
    absent = [i for i in range(1, min(count, MAX_FILES) + 1) if i not in there]
    if absent or count > MAX_FILES:
        piece = absent[0] if absent else count
        raise CheckpointError(f"{name}: the repository lacks piece {piece} of {count}", REFETCH)


def _listed(files: Iterable[str]) -> str:
    files = [*files]
    return ", ".join(files[:SHOWN]) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "") or "none"
