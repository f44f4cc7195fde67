"""The header of a GGUF file (version 2 or 3, little endian), checked before anything else is read.

    "GGUF", u32 version, u64 tensors, u64 keys
    each key:     name, u32 type, value
    each tensor:  name, u32 dimensions, u64 each (columns first), u32 type, u64 offset
    padding to `general.alignment`, 32 by default; then the tensors, each padded to it

Lengths are u64, texts UTF-8. Offsets count from the first byte behind the header's padding. As llama.cpp wants it, each
tensor begins where the one before it ends, padded: neither holes nor overlaps.
Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qmix.errors import CheckpointError
from qmix.gguf.bounded import Reader
from qmix.gguf.types import TYPES, BlockType
from qmix.sizes import round_up
from qmix.tensorfile import Entry, TensorFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20
MAX_KEYS = 2**16
MAX_TENSORS = 2**20
MAX_KEY = 2**16 - 1  # bytes, by the specification
MAX_NAME = 64  # bytes of a tensor's name, by the specification
MAX_DIMENSIONS = 4
MAX_WEIGHTS = 2**48  # of a tensor


@dataclass(frozen=True, slots=True)
class Header:
    """metadata: numbers, bools, texts and tuples of these. file: where the tensors are, with shapes rows first and
    types by ggml's names."""

    version: int
    metadata: Mapping[str, Any]
    file: TensorFile


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF does or is named so."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path, fd: int) -> Header:
    """The header of the open file; CheckpointError names the file, and the key or tensor at fault."""
    reader = Reader(path, fd)
    version = _read_version(reader)
    tensors, keys = (reader.number("Q", f"number of {what}") for what in ("tensors", "keys"))
    for what, count, most in (("tensors", tensors, MAX_TENSORS), ("keys", keys, MAX_KEYS)):
        if count > most:
            reader.fail(f"number of {what}", f"got {count}, want at most {most}")
    metadata = _read_metadata(reader, keys)
    alignment = _alignment(reader, metadata)
    drafts = _read_tensors(reader, tensors)
    start = round_up(reader.position, alignment)
    entries = _place(reader, drafts, start, alignment)
    return Header(version, metadata, TensorFile(path, entries, {}, start, reader.size))


def _read_version(reader: Reader) -> int:
    if reader.size < 8 or reader.take(4, "the first bytes") != MAGIC:
        reader.fail("the first bytes", "not a GGUF file")
    version: int = reader.number("I", "version")
    if version in VERSIONS:
        return version
    if version == 1:
        reader.fail("version", "got 1, which is older than what qmix reads (2 and 3)",
                    "convert the model again with a current llama.cpp, or fetch a newer file")
    if version and version & 0xFFFF == 0:
        reader.fail("version", "the file is big-endian; qmix reads little-endian GGUF files",
                    "fetch the little-endian file, or convert it with gguf's gguf-convert-endian")
    return reader.fail("version", f"got {version}, want 2 or 3", "update qmix, or fetch the file again")


def _read_metadata(reader: Reader, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i in range(count):
        key = reader.text(f"name of key {i}", MAX_KEY)
        if not key or key in found:
            reader.fail(key or f"name of key {i}", "is there twice" if key else "is empty")
        found[key] = reader.value(key)
    return found


def _alignment(reader: Reader, metadata: Mapping[str, Any]) -> int:
    value = metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    good = type(value) is int and 1 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0
    if not good:
        reader.fail(ALIGNMENT, f"got {value!r:.40}, want a power of two up to {MAX_ALIGNMENT}")
    return int(value)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A tensor as the header has it; its offset counts from the start of the data."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.kind.weights * self.kind.nbytes


def _read_tensors(reader: Reader, count: int) -> dict[str, _Draft]:
    found: dict[str, _Draft] = {}
    for i in range(count):
        name = reader.text(f"name of tensor {i}", MAX_NAME)
        if not name or name in found:
            reader.fail(name or f"name of tensor {i}", "is there twice" if name else "is empty")
        dimensions = reader.number("I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            reader.fail(name, f"has {dimensions} dimensions, want 1 to {MAX_DIMENSIONS}")
        shape = tuple(reader.number("Q", name) for _ in range(dimensions))[::-1]
        number, offset = reader.number("I", name), reader.number("Q", name)
        if number not in TYPES:
            reader.fail(name, f"has type {number}, which this version of qmix does not know",
                        "update qmix, or give the model in another type")
        kind = TYPES[number]
        if not kind.nbytes:
            reader.fail(name, f"has type {kind.name}, which ggml no longer has",
                        "fetch the file in a current type, for example Q4_K_M")
        if 0 in shape or prod(shape) > MAX_WEIGHTS:
            reader.fail(name, f"has shape {list(shape)}, want 1 to {MAX_WEIGHTS} weights")
        if shape[-1] % kind.weights:
            reader.fail(name, f"has {shape[-1]} columns, want a multiple of {kind.weights} for {kind.name}")
        found[name] = _Draft(name, kind, shape, offset)
    return found


def _place(reader: Reader, drafts: Mapping[str, _Draft], start: int, alignment: int) -> dict[str, Entry]:
    """Where each tensor lies in the file."""
    entries, end = {}, 0
    for draft in sorted(drafts.values(), key=lambda draft: (draft.offset, draft.nbytes)):
        if draft.offset % alignment:
            reader.fail(draft.name, f"starts at offset {draft.offset}, want a multiple of {alignment}")
        if draft.offset != end:
            reader.fail(draft.name, f"starts at offset {draft.offset}, want {end} (hole or overlap)")
        if start + draft.offset + draft.nbytes > reader.size:
            reader.fail(draft.name, f"ends at byte {start + draft.offset + draft.nbytes}, the file at {reader.size} "
                        "(truncated?)")
        entries[draft.name] = Entry(draft.name, draft.kind.name, draft.shape, start + draft.offset, draft.nbytes)
        end = round_up(draft.offset + draft.nbytes, alignment)
    return {name: entries[name] for name in drafts}


def open_header(path: Path) -> Header:
    """The header of a file that is only to be looked at."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}", "check the path and its permissions") from None
    try:
        return read_header(path, fd)
    finally:
        os.close(fd)

