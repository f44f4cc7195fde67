"""Models in several GGUF files: NAME-00001-of-00003.gguf and so on. The first has the metadata of the model; each has
split.no (from 0), split.count and the tensors of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qmix.errors import CheckpointError
from qmix.gguf.header import Header

NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
MAX_FILES = 4096
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
REFETCH = "fetch all files of the model, from the same place, into one folder"


def pieces(path: Path) -> list[Path]:
    """The files of the model of which `path` is one, in order, by their names; they must be there."""
    match = NAME.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[3])
    if not 1 <= int(match[2]) <= count <= MAX_FILES:
        raise CheckpointError(f"{path}: file {int(match[2])} of {count}, by its name", REFETCH)
    found = [path.with_name(f"{stem}-{i:05}-of-{count:05}{path.suffix}") for i in range(1, count + 1)]
    absent = [piece for piece in found if not piece.exists()]
    if absent:
        raise CheckpointError(f"{absent[0]}: missing ({len(absent)} of {count} files)", REFETCH)
    return found


def of_split(header: Header) -> Header:
    """A header with no other metadata than `check_pieces` reads: many files must not cost the memory of as many
    vocabularies."""
    return replace(header, metadata={key: header.metadata[key] for key in (NUMBER, COUNT, TENSORS)
                                     if key in header.metadata})


def check_pieces(paths: Sequence[Path], headers: Sequence[Header]) -> None:
    """CheckpointError unless the files say of themselves what their names say, and have all tensors, each once."""
    seen: dict[str, Path] = {}
    for i, (path, header) in enumerate(zip(paths, headers, strict=True)):
        for key, want in ((COUNT, len(paths)), (NUMBER, i)):
            got = header.metadata.get(key, 1 if key == COUNT else 0)
            if got == 0 == i and key == COUNT and len(paths) == 1:
                continue  # some tools write that a whole model has no pieces
            if type(got) is not int or got != want:
                named = NAME.fullmatch(path.name) is not None
                raise CheckpointError(f"{path}: {key}: got {got!r:.40}, want {want} by its name",
                                      REFETCH if named else "the file is one of several: give it the name that it had, "
                                      "NAME-00001-of-00003.gguf, beside the others")
        for name in header.file.entries:
            if name in seen:
                raise CheckpointError(f"{path}: {name}: also in {seen[name].name}", REFETCH)
            seen[name] = path
    total = headers[0].metadata.get(TENSORS, len(seen))
    if len(paths) > 1 and total != len(seen):
        raise CheckpointError(f"{paths[0]}: {TENSORS}: got {total!r:.40}, but the files hold {len(seen)}", REFETCH)
