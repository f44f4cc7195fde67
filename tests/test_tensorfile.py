"""safetensors headers: read and built by qmix, held to the safetensors library; hostile ones refused."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError, ModelFileError
from qmix.tensorfile import ITEM_BYTES, build_header, read_exact, read_header, write_exact

TENSORS = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16),
           "c": torch.zeros(0, 4, dtype=torch.float16), "d": torch.tensor(7, dtype=torch.uint8)}


def write_raw(path: Path, header: object, data: bytes = b"", text: bytes | None = None) -> Path:
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    found = read_header(path)
    data = path.read_bytes()
    assert found.metadata == {"format": "pt"} and found.size == len(data)
    assert found.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        entry = found.entries[name]
        assert entry.shape == tuple(tensor.shape) and entry.nbytes == tensor.nbytes
        assert data[entry.offset:entry.offset + entry.nbytes] == bytes(tensor.contiguous().view(-1).view(
            torch.uint8).tolist() if tensor.numel() else b"")


@pytest.mark.parametrize("align", [8, 64, 4096])
def test_the_library_reads_what_is_built(tmp_path: Path, align: int) -> None:
    tensors = {"w": torch.randn(3, 8).bfloat16(), "pad": torch.zeros(16, dtype=torch.uint8), "i": torch.arange(
        -4, 4, dtype=torch.int8), "f": torch.randn(4)}
    kinds = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32"}
    header, entries = build_header([(n, kinds[t.dtype], tuple(t.shape)) for n, t in tensors.items()], align)
    assert len(header) % align == 0 and entries[0].offset == len(header)
    path = tmp_path / "m.safetensors"
    with open(path, "wb") as file:
        file.write(header)
        for entry, tensor in zip(entries, tensors.values(), strict=True):
            assert file.tell() == entry.offset
            file.write(bytes(tensor.view(-1).view(torch.uint8).tolist()))
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name]), name
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
    assert list(read_header(path).entries.values()) == entries


@pytest.mark.parametrize(("header", "size", "named"), [
    (one(dtype="U9"), 4, ": x: "), (one(dtype=[]), 4, ": x: "), (one(shape=(5,)), 4, ": x: "),
    (one(shape=(-4,)), 4, ": x: "), (one(shape="4"), 4, ": x: "), (one(shape=(2.0, 2)), 4, ": x: "),
    (one(shape=(True, 4)), 4, ": x: "), (one(offsets=(0,)), 4, ": x: "), (one(offsets=(4, 8)), 8, ": x: "),
    (one(offsets=(-4, 0)), 4, ": x: "), (one(offsets=None), 4, ": x: "), ({"x": 3}, 4, ": x: "),
    ({"x": []}, 4, ": x: "), (one(shape=(2**70,), offsets=(0, 2**70)), 4, "describes"),
    (one(), 3, "describes"), (one(), 5, "describes"), ([], 0, "object"), (None, 0, "object"),
    ({**one(), "y": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}, 6, "overlap"),
    ({**one(), "y": {"dtype": "U8", "shape": [1], "data_offsets": [5, 6]}}, 6, "hole"),
])
def test_hostile_headers_are_refused_by_name(tmp_path: Path, header: object, size: int, named: str) -> None:
    path = write_raw(tmp_path / "m.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError) as error:
        read_header(path, CheckpointError)
    assert str(path) in error.value.message and named in error.value.message and error.value.cure


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe{}", b'{"x":' + b"1" * 5000 + b"}", b"[" * 100_000,
                                  b'{"x":NaN}'])
def test_headers_that_are_not_json(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(ModelFileError):
        read_header(write_raw(tmp_path / "m.safetensors", None, text=text))


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}",
                                     b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a"])
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="not a safetensors file"):
        read_header(path)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ModelFileError) as error:
            read_header(path)
        assert str(path) in error.value.message


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 60))
def test_a_damaged_file_is_an_error_or_the_same_size(tmp_path_factory: pytest.TempPathFactory, place: int,
                                                     byte: int, cut: int) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    save_file(TENSORS, path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    path.write_bytes(data[:len(data) - cut])
    try:
        found = read_header(path)
    except ModelFileError:
        return
    assert cut == 0
    assert sum(e.nbytes for e in found.entries.values()) == len(data) - found.data_start
    assert all(e.dtype in ITEM_BYTES for e in found.entries.values())


def test_reads_and_writes_go_on_after_a_partial_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, b, o: preadv(fd, [b[0][:3]], o))
    monkeypatch.setattr(os, "pwritev", lambda fd, b, o: pwritev(fd, [b[0][:5]], o))
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    try:
        write_exact(fd, bytes(range(100)), 7)
        buffer = memoryview(bytearray(60))
        read_exact(fd, buffer, 17)
        assert bytes(buffer) == bytes(range(10, 70))
        with pytest.raises(EOFError, match="107"):
            read_exact(fd, buffer, 100)
    finally:
        os.close(fd)


def test_a_full_disk_is_the_systems_own_error() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError) as error:
            write_exact(fd, b"x", 0)
        assert error.value.errno == errno.ENOSPC
    finally:
        os.close(fd)
