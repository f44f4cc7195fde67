"""safetensors files, read and laid out by header alone, without loading or mapping them.

qmix reads with pread into buffers of its own: a mapped 94 GB checkpoint would count against the process's memory, and a
record must be one read. Headers of foreign files are hostile until checked: every range must lie inside the file, match
its shape and dtype, and leave no hole or overlap.

Layout (safetensors specification): u64 little-endian header length, JSON header padded with spaces, then the tensors'
bytes; offsets in the header count from the end of the header.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType

from qmix.bounded import parse_unique
from qmix.errors import ModelFileError

ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
              "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
# Every dtype of the specification, in bits. Those below 8 bits and the scales of microscaling formats (F8_E8M0) are
# listed only so that a file that holds them is understood: qmix writes none of them.
DTYPE_BITS = MappingProxyType({**{name: 8 * size for name, size in ITEM_BYTES.items()}, "F4": 4, "F6_E2M3": 6,
                               "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64})
DAMAGED = "the file is damaged or still downloading: fetch or write it again"
UNKNOWN_DTYPE = ("qmix reads BF16, F16 and F32 weights: give the original, unquantized checkpoint; if the file should "
                 "hold these, it is damaged: fetch it again")
MAX_HEADER = 100 * 2**20  # the safetensors library's own limit
MAX_NAME = 1024  # bytes of a tensor's name
MAX_DIMENSIONS = 16
MAX_NUMBER = 2**100  # far above any file, and short when it is shown
SHOWN = 100  # characters of a name that is wrong


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; offset counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int
    size: int


def read_header(path: Path, error: type[ModelFileError] = ModelFileError) -> TensorFile:
    """Read and check the header of a safetensors file; raises `error` naming the file and the tensor."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise error(f"{path}: not a safetensors file (header of {length} bytes, file of {size})",
                            DAMAGED)
            raw = parse_unique(file.read(length))
    except OSError as e:
        raise error(f"{path}: {e.strerror or e}", "check the path and its permissions") from None
    except (ValueError, RecursionError) as e:  # ValueError also from an absurdly long number
        raise error(f"{path}: the safetensors header is not JSON ({str(e).splitlines()[0]:.100})", DAMAGED) from None
    if not isinstance(raw, dict):
        raise error(f"{path}: the safetensors header is not an object", DAMAGED)
    metadata = raw.pop("__metadata__", {}) or {}
    start = 8 + length
    entries = {name: _entry(path, name, value, start, error) for name, value in raw.items()}
    end = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != end:
            raise error(f"{path}: {entry.name}: starts at byte {entry.offset}, want {end} (hole or overlap)",
                        DAMAGED)
        end += entry.nbytes
    if end != size:
        raise error(f"{path}: holds {size} bytes, its header describes {end} (truncated?)", DAMAGED)
    return TensorFile(path, entries, metadata, start, size)


def _entry(path: Path, name: str, raw: object, start: int, error: type[ModelFileError]) -> Entry:
    try:
        dtype, shape, (begin, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]  # type: ignore[index]
        known = DTYPE_BITS.get(dtype) is not None
        # Compared before they are multiplied: a product of a million numbers takes hours.
        sane = all(type(n) is int and 0 <= n < MAX_NUMBER for n in (*shape[:MAX_DIMENSIONS], begin, end))
        if len(name.encode()) > MAX_NAME or len(shape) > MAX_DIMENSIONS or not sane:
            raise ValueError
        nbytes = -(-prod(shape) * DTYPE_BITS.get(dtype, 0) // 8)
    except (KeyError, TypeError, ValueError):
        raise error(f"{path}: {name:.{SHOWN}}: malformed header entry {raw!r:.200}", DAMAGED) from None
    if not known and isinstance(dtype, str):
        raise error(f"{path}: {name}: dtype {dtype!r:.40} is not supported (this version of qmix does not know it)",
                    UNKNOWN_DTYPE)
    if end - begin != nbytes:
        raise error(f"{path}: {name}: {dtype} {list(shape)} takes {nbytes} bytes, the header gives it "
                    f"[{begin}, {end})", DAMAGED)
    return Entry(name, dtype, shape, start + begin, nbytes)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]],
                 align: int) -> tuple[bytes, list[Entry]]:
    """Header bytes for (name, dtype, shape) tensors laid out in the given order without holes, padded
    with spaces so that the first tensor starts on a multiple of `align`; and where each one lands."""
    placed, offset = [], 0
    for name, dtype, shape in tensors:
        nbytes = prod(shape) * ITEM_BYTES[dtype]
        placed.append(Entry(name, dtype, shape, offset, nbytes))
        offset += nbytes
    table = {e.name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": (e.offset, e.offset + e.nbytes)}
             for e in placed}
    text = json.dumps(table, separators=(",", ":")).encode()
    start = -(-(8 + len(text)) // align) * align
    header = struct.pack("<Q", start - 8) + text.ljust(start - 8)
    entries = [replace(e, offset=start + e.offset) for e in placed]
    return header, entries


def read_exact(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `offset`; EOFError when the file ends early, OSError as the system gives it."""
    view = memoryview(buffer).cast("B")
    while view:
        got = os.preadv(fd, [view], offset)
        if got == 0:
            raise EOFError(f"file ends at byte {offset}, {len(view)} bytes short")
        view, offset = view[got:], offset + got


def write_exact(fd: int, buffer: memoryview | bytes, offset: int) -> None:
    """Write all of `buffer` at `offset`; OSError (ENOSPC included) as the system gives it."""
    view = memoryview(buffer).cast("B")
    while view:
        put = os.pwritev(fd, [view], offset)
        view, offset = view[put:], offset + put
