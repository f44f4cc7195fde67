"""Pipes, devices and giant files where a file of a model is wanted, and JSON that would fill the memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import write_tiny_checkpoint
from odd_stores import QUANTS, quantize
from tokenizer_files import demo_folder

from qmix.bounded import MAX_ITEMS, MAX_TEXT, parse_json, parse_unique, read_file
from qmix.checkpoint import INDEX, SINGLE, Checkpoint
from qmix.config import ExpertKey
from qmix.errors import CheckpointError, ConfigError, ModelFileError, StoreError, UsageError
from qmix.store import Store
from qmix.tokenizer import load


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def giant(path: Path) -> None:
    """A sparse file of 3 GiB."""
    path.touch()
    os.truncate(path, 3 * 2**30)


ODD = pytest.mark.parametrize("make", [pipe, device, giant])


@ODD
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_files_of_a_checkpoint(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, shards=2)
    make(path / name)
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(path)


@ODD
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "tokenizer.model",
                                  "chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_files_of_a_tokenizer(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    path = demo_folder(tmp_path)
    (path / "additional_chat_templates").mkdir()
    make(path / name)
    try:
        load(path)
    except ModelFileError as error:
        assert name.rpartition("/")[2] in error.message or "tokenizer.model" in error.message
    else:  # a pipe in the place of a template is none
        assert make is not giant and name == "chat_template.jinja"


@ODD
def test_the_manifest_of_a_store(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "qmix.json")
    with pytest.raises(StoreError, match=r"qmix\.json"):
        Store.open(tmp_path)


def test_a_file_of_the_largest_size(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert read_file(tmp_path / "x", 3) == b"abc"
    with pytest.raises(ModelFileError, match="3 bytes, want at most 2"):
        read_file(tmp_path / "x", 2)
    assert MAX_TEXT < 3 * 2**30


def test_json_of_many_values_is_refused_unparsed() -> None:
    assert parse_json(b'{"a": [1, 2]}') == {"a": [1, 2]}
    with pytest.raises(ValueError, match=f"more than {MAX_ITEMS} values"):
        parse_json(b"[" + b"[]," * MAX_ITEMS + b"1]")


def test_a_key_that_is_there_twice() -> None:
    assert parse_unique(b'{"a": 1, "b": {"a": 2}}') == {"a": 1, "b": {"a": 2}}
    with pytest.raises(ValueError, match="the key 'a' is there twice"):
        parse_unique(b'{"a": 1, "b": 2, "a": 1}')


ONE = b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(("header", "said"), [
    (b"{" + ONE + b", " + ONE + b"}", "the key 'a' is there twice"),
    (ONE.replace(b"[2]", b"[" + b"9" * 4000 + b", " + b"9" * 4000 + b"]").join((b"{", b"}")), "a: malformed"),
    (ONE.replace(b"[2]", b"[" + b"9223372036854775807, " * 99999 + b"1]").join((b"{", b"}")), "a: malformed"),
    (ONE.replace(b'"a"', b'"' + b"\\u001b" * 99999 + b'"').join((b"{", b"}")), "malformed"),
    (b'{"a":[' + b"[]," * MAX_ITEMS + b"1]}", "more than"),
])
def test_headers_that_cost_nothing(header: bytes, said: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    (path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match=said) as caught:
        Checkpoint.open(path)
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("place", ["length", "header", "data", "end"])
def test_truncated_at_every_boundary(place: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    raw = (path / SINGLE).read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    ends = sorted(entry["data_offsets"][1] for name, entry in json.loads(raw[8:start]).items() if name[0] != "_")
    cuts = {"length": range(8), "header": (8, 9, start - 1), "data": [start + end for end in (0, *ends[:-1])],
            "end": [len(raw) - 1, len(raw) + 1]}
    for cut in cuts[place]:
        (path / SINGLE).write_bytes((raw + bytes(1))[:cut])
        with pytest.raises(CheckpointError, match=SINGLE):
            Checkpoint.open(path)


def test_messages_about_files_are_one_line() -> None:
    assert ConfigError("a\nb\r\nc", "cure").message == "a\u240ab\u240ac"
    assert len(StoreError("x" * 10**6).message) < 5000


def test_records_that_were_swapped(tmp_path: Path) -> None:
    """Two experts of one layer have records of one size: only their checksums tell which is which."""
    source = write_tiny_checkpoint(tmp_path / "tiny")
    path = quantize(source, tmp_path / "store", QUANTS["int4"])
    with Store.open(path) as store:
        one, two = (store.layout.records[ExpertKey(0, expert)] for expert in (0, 1))
    raw = bytearray((path / one.file).read_bytes())
    first, second = (slice(region.offset, region.offset + region.nbytes) for region in (one, two))
    raw[first], raw[second] = raw[second], raw[first]
    (path / one.file).write_bytes(raw)
    with Store.open(path) as store, pytest.raises(StoreError, match=r"layers\.0\.experts\.0"):
        store.read_record(ExpertKey(0, 0), torch.empty(one.nbytes, dtype=torch.uint8))


def test_out_inside_the_checkpoint(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "tiny")
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "out", tmp_path / "link" / "out"):
        with pytest.raises(UsageError, match="lies inside the checkpoint"):
            quantize(source, out, QUANTS["int4"])
    assert {path.name for path in source.iterdir()} == {"config.json", SINGLE}
