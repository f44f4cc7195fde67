"""GGUF files for tests, written byte by byte from the specification, so that they can be wrong in any place."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

CODES = {"uint8": (0, "B"), "int8": (1, "b"), "uint16": (2, "H"), "int16": (3, "h"), "uint32": (4, "I"),
         "int32": (5, "i"), "float32": (6, "f"), "bool": (7, "B"), "uint64": (10, "Q"), "int64": (11, "q"),
         "float64": (12, "d")}
KEYS: Mapping[str, tuple[str, Any]] = {
    "general.architecture": ("string", "llama"), "llama.block_count": ("uint32", 2), "a.bool": ("bool", 1),
    "a.float": ("float32", 0.5), "a.int": ("int64", -2), "a.texts": ("string[]", ("é", "", "abc")),
    "a.numbers": ("float64[]", (1.0, 2.5)), "a.bools": ("bool[]", (1, 0)), "a.none": ("int8[]", ())}
TENSORS = (("a.weight", (3, 64), 0, 768), ("b.weight", (2, 32), 8, 68), ("c.weight", (5,), 1, 10))


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(kind: str, what: Any) -> bytes:
    """A value with its type in front."""
    if kind.endswith("[]"):
        kind = kind[:-2]
        number = 8 if kind == "string" else CODES[kind][0]
        return struct.pack("<IIQ", 9, number, len(what)) + b"".join(value(kind, item)[4:] for item in what)
    if kind == "string":
        return struct.pack("<I", 8) + text(what)
    number, code = CODES[kind]
    return struct.pack("<I" + code, number, what)


def parts(keys: Mapping[str, tuple[str, Any]] = KEYS,
          tensors: Sequence[tuple[str, tuple[int, ...], int, int]] = TENSORS, version: int = 3, gap: int = 0,
          align: int = 32, tensor_count: int | None = None, key_count: int | None = None) -> list[bytes]:
    """The pieces of a file, in order. tensors: name, shape, type, bytes; gap: between them, beside the padding."""
    found = [b"GGUF", struct.pack("<I", version),
             struct.pack("<Q", len(tensors) if tensor_count is None else tensor_count),
             struct.pack("<Q", len(keys) if key_count is None else key_count)]
    for key, (kind, what) in keys.items():
        raw = value(kind, what)
        found += [text(key), raw[:4], raw[4:]]
    offset, data = 0, []
    for i, (name, shape, kind, nbytes) in enumerate(tensors):
        found += [text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]),
                  struct.pack("<IQ", kind, offset)]
        data.append(bytes([i]) * nbytes + bytes(-nbytes % align + gap))
        offset += len(data[-1])
    return [*found, bytes(-sum(map(len, found)) % align), *data]
