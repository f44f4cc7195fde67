"""Headers of GGUF files: what is read, against the package gguf; and everything wrong is one error that names it."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import gguf_files as files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qmix.errors import CheckpointError
from qmix.gguf import bounded, pieces
from qmix.gguf.header import Header, is_gguf, open_header
from qmix.gguf.split import check_pieces
from qmix.tensorfile import Entry


def header(folder: Path, raw: bytes) -> Header:
    path = folder / "m.gguf"
    path.write_bytes(raw)
    return open_header(path)


def test_values_and_places(tmp_path: Path) -> None:
    for version in (2, 3):
        found = header(tmp_path, b"".join(files.parts(version=version)))
        assert found.version == version and is_gguf(found.file.path)
        assert found.metadata == {key: tuple(what) if kind.endswith("[]") else what
                                  for key, (kind, what) in files.KEYS.items()}
        assert found.metadata["a.bool"] is True and found.metadata["a.bools"] == (True, False)
        start = found.file.data_start
        assert list(found.file.entries.values()) == [
            Entry("a.weight", "F32", (3, 64), start, 768), Entry("b.weight", "Q8_0", (2, 32), start + 768, 68),
            Entry("c.weight", "F16", (5,), start + 864, 10)]


def test_as_the_package_reads_what_it_writes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_custom_alignment(64)
    writer.add_token_list([f"token {i}" for i in range(300)])
    writer.add_token_scores([float(-i) for i in range(300)])
    writer.add_add_bos_token(False)
    writer.add_layer_norm_rms_eps(1e-6)
    arrays = {"x.weight": np.ones((3, 5, 7), np.float32), "y.weight": np.zeros(9, np.float16)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, want = open_header(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in want.fields.items() if not key.startswith("GGUF.")}
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in found.metadata.items()} == fields
    assert [(e.name, e.dtype, e.shape, e.offset, e.nbytes) for e in found.file.entries.values()] == [
        (t.name, t.tensor_type.name, tuple(map(int, t.shape[::-1])), t.data_offset, t.n_bytes) for t in want.tensors]


def test_truncated_anywhere(tmp_path: Path) -> None:
    found = files.parts()
    whole = b"".join(found)
    ends = {at for end in accumulate(map(len, found)) for at in (end - 1, end, end + 1)} | {0, 1}
    last = len(whole) - 22  # padding behind the last tensor may be missing
    for at in sorted(at for at in ends if at < len(whole)):
        if at < last:
            with pytest.raises(CheckpointError, match=r"m\.gguf: "):
                header(tmp_path, whole[:at])
        else:
            header(tmp_path, whole[:at])


def changed(key: str, kind: str, what: Any) -> bytes:
    return b"".join(files.parts({**files.KEYS, key: (kind, what)}))


def raw_value(raw: bytes) -> bytes:
    """A file whose only key has these bytes for type and value."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text("a.key") + raw


HOSTILE = {
    "not GGUF": (b"PK\3\4" + bytes(100), "not a GGUF file"),
    "version 1": (b"".join(files.parts(version=1)), "version: got 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "big-endian"),
    "version 9": (b"".join(files.parts(version=9)), "version: got 9"),
    "2^63 tensors": (b"".join(files.parts(tensor_count=2**63)), "number of tensors: got 9223372036854775808"),
    "2^63 keys": (b"".join(files.parts(key_count=2**63)), "number of keys"),
    "one key too many": (b"".join(files.parts(key_count=len(files.KEYS) + 1)), "m.gguf: "),
    "long name": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63), "name of key 0: a text of"),
    "long text": (raw_value(struct.pack("<IQ", 8, 2**63)), "a.key: 9223372036854775808 bytes"),
    "long array": (raw_value(struct.pack("<IIQ", 9, 0, 2**63)), "a.key: an array of 9223372036854775808"),
    "array past the end": (raw_value(struct.pack("<IIQ", 9, 12, 100)), "a.key: an array of 100 values"),
    "nested": (raw_value(struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IIQ", 9, 9, 1)), "a.key: an array of arrays"),
    "no such type": (raw_value(struct.pack("<I", 13)), "a.key: has type 13"),
    "no such item": (raw_value(struct.pack("<IIQ", 9, 99, 1)), "a.key: has type 99"),
    "not a bool": (raw_value(struct.pack("<IB", 7, 2)), "a.key: a bool of 2"),
    "not UTF-8": (changed("a.text", "string", b"ab\xff"), "a.text: byte 2 of a text of 3 bytes is not UTF-8"),
    "key not UTF-8": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + files.text(b"\xff"), "name of key 0"),
    "alignment 0": (changed("general.alignment", "uint32", 0), "general.alignment: got 0"),
    "alignment 48": (changed("general.alignment", "uint32", 48), "general.alignment: got 48"),
    "alignment text": (changed("general.alignment", "string", "32"), "general.alignment: got '32'"),
    "hole": (b"".join(files.parts(gap=32)), "b.weight: starts at offset 800, want 768 "),
    "not aligned": (b"".join(files.parts(gap=4)), "b.weight: starts at offset 772, want a multiple of 32"),
    "twice": (b"".join(files.parts(tensors=[*files.TENSORS, files.TENSORS[0]])), "a.weight: is there twice"),
    "no weights": (b"".join(files.parts(tensors=[("a", (0, 4), 0, 0)])), "a: has shape"),
    "too many": (b"".join(files.parts(tensors=[("a", (2**40, 2**40), 0, 0)])), "a: has shape"),
    "five dimensions": (b"".join(files.parts(tensors=[("a", (1,) * 5, 0, 4)])), "a: has 5 dimensions"),
    "row of a part of a block": (b"".join(files.parts(tensors=[("a", (2, 48), 8, 0)])), "a: has 48 columns"),
    "old type": (b"".join(files.parts(tensors=[("a", (2, 32), 31, 0)])), "a: has type Q4_0_4_4"),
    "unknown type": (b"".join(files.parts(tensors=[("a", (2, 32), 99, 0)])), "a: has type 99"),
    "long tensor name": (b"".join(files.parts(tensors=[("a" * 65, (2,), 0, 8)])), "name of tensor 0"),
}


@pytest.mark.parametrize("raw, said", HOSTILE.values(), ids=HOSTILE.keys())
def test_refused_by_name(tmp_path: Path, raw: bytes, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        header(tmp_path, raw)
    assert said in caught.value.message and caught.value.exit_code == 4 and caught.value.cure


def test_overlapping_tensors(tmp_path: Path) -> None:
    raw = b"".join(files.parts())
    at = raw.index(b"b.weight") + len("b.weight") + 4 + 16 + 4
    for offset, said in ((0, "b.weight: starts at offset 0|a.weight: starts at offset 0"), (2**63, "starts at offset")):
        with pytest.raises(CheckpointError, match=said):
            header(tmp_path, raw[:at] + struct.pack("<Q", offset) + raw[at + 8:])


def test_many_empty_texts_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(raw_value(struct.pack("<IIQ", 9, 8, 10**7)))
    os.truncate(path, 10**8)
    with pytest.raises(CheckpointError, match=r"a\.key: an array of 10000000 values, want at most"):
        open_header(path)


def test_all_arrays_of_a_file_have_a_limit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = b"".join(files.parts())
    monkeypatch.setattr(bounded, "MAX_ITEMS", 7)  # 3 texts, 2 numbers, 2 bools
    header(tmp_path, raw)
    monkeypatch.setattr(bounded, "MAX_ITEMS", 6)
    with pytest.raises(CheckpointError, match=r"a\.bools: an array of 2 values, want at most 1, so that all arrays"):
        header(tmp_path, raw)


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 8))
def test_any_change_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]],
                                       width: int) -> None:
    raw = bytearray(b"".join(files.parts()))
    for at, byte in changes:
        raw[at:at + width] = bytes([byte]) * min(width, len(raw) - at)
    try:
        found = header(tmp_path_factory.getbasetemp(), bytes(raw))
    except CheckpointError as e:
        assert "\n" not in e.message
        return
    assert all(e.offset + e.nbytes <= len(raw) for e in found.file.entries.values())


def split(folder: Path, wrong: Mapping[str, int] | None = None, name: str = "", count: int = 3) -> list[Path]:
    """A model in `count` files, of a tensor each. wrong: keys that say something else; name: of all tensors."""
    found = []
    for i in range(count):
        keys = {"split.no": ("uint16", i), "split.count": ("uint16", count), "split.tensors.count": ("int32", count)}
        keys |= {key: ("int32", what) for key, what in (wrong or {}).items()}
        path = folder / f"m-{i + 1:05}-of-{count:05}.gguf"
        path.write_bytes(b"".join(files.parts(keys, [(name or f"t{i}", (4,), 0, 16)])))
        found.append(path)
    return found


def test_split_files(tmp_path: Path) -> None:
    paths = split(tmp_path)
    assert pieces(paths[1]) == paths and pieces(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]
    check_pieces(paths, [open_header(path) for path in paths])
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf: missing"):
        pieces(paths[0])


@pytest.mark.parametrize("wrong, name, said", [
    ({"split.count": 4}, "", "split.count: got 4, want 3"), ({"split.no": 7}, "", "split.no: got 7, want 0"),
    ({"split.tensors.count": 5}, "", "split.tensors.count: got 5, but the files hold 3"),
    ({}, "x", "x: also in m-00001-of-00003")])
def test_split_files_that_do_not_fit(tmp_path: Path, wrong: dict[str, int], name: str, said: str) -> None:
    paths = split(tmp_path, wrong, name)
    with pytest.raises(CheckpointError, match=said):
        check_pieces(paths, [open_header(path) for path in paths])


def test_one_of_several_under_another_name(tmp_path: Path) -> None:
    path = split(tmp_path)[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"split\.count: got 3, want 1") as caught:
        check_pieces([path], [open_header(path)])
    assert "the name that it had" in str(caught.value.cure)
