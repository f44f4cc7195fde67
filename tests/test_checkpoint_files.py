"""The files of a checkpoint: shards and their index, damaged and hostile headers, and what changes while they are
read."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import mixtrals as names
import pytest
import torch
from helpers import tiny_config, tiny_tensors, write_tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoint import CONFIG, W1, edit_json, open_files, read_back, refused

from qmix.checkpoint import INDEX, SINGLE, Checkpoint
from qmix.errors import CheckpointError
from qmix.hub import discarded
from qmix.models import read_model
from qmix.tensorfile import build_header

# --- shards and their index ---

@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors",
                                  "..\\x.safetensors", "x\0.safetensors", "..", "", 3, None, "model.pt"])
def test_index_names_only_files_of_the_folder(tmp_path: Path, name: Any) -> None:
    path = write_tiny_checkpoint(tmp_path / "in", shards=2)
    save_file({W1: torch.ones(96, 64).bfloat16()}, tmp_path / "x.safetensors")
    edit_json(path / INDEX, lambda raw: raw["weight_map"].update({W1: name}))
    refused(path, f"weight_map.{W1}", "want a .safetensors file in the same folder")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", ...])
def test_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    path = write_tiny_checkpoint(tmp_path, shards=2)
    (path / INDEX).write_text(json.dumps({} if weight_map is ... else {"weight_map": weight_map}))
    refused(path, f"{INDEX}: weight_map: got")


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    refused(path, "model-00002-of-00003.safetensors: missing (1 of 3 files)")
    (path / INDEX).unlink()
    assert INDEX in str(refused(path, "neither").cure)


def test_shard_that_is_a_folder_or_a_pipe(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, shards=2)
    shard = path / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.mkdir()
    refused(path, f"{shard}: not a file")
    shard.rmdir()
    os.mkfifo(shard)
    refused(path, f"{shard}: not a file")


def test_a_stale_index_is_read_as_transformers_does(tmp_path: Path) -> None:
    """Only the names of the files count; what the index says otherwise about a tensor is a note."""
    one, two = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    path = write_tiny_checkpoint(tmp_path, shards=2)
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    other = one if weight_map[W1] == two else two
    for changed, note in (({**weight_map, W1: other}, f"places {W1} in another file"),
                          ({n: f for n, f in weight_map.items() if n != W1}, f"does not name {W1}"),
                          ({**weight_map, "model.ghost": one}, "names model.ghost, which no file holds"),
                          (dict.fromkeys(weight_map, one) | {W1: two}, "more)")):
        (path / INDEX).write_text(json.dumps({"weight_map": changed}))
        notes = read_back(path)
        assert len(notes) == 1 and note in notes[0] and INDEX in notes[0]
    (path / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "model.ghost": "ghost.safetensors"}}))
    refused(path, "ghost.safetensors: missing (1 of 3 files)")


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    """The claim of the tests around this one, for the two that decide which bytes are read."""
    from transformers import MixtralForCausalLM
    both = write_tiny_checkpoint(write_tiny_checkpoint(tmp_path / "both", seed=9, shards=2))
    stale = write_tiny_checkpoint(tmp_path / "stale", shards=2)
    edit_json(stale / INDEX, lambda raw: raw["weight_map"].pop(W1))
    want = tiny_tensors(CONFIG)
    for path in (both, stale):
        found = MixtralForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
        layer, expert = (int(part) for part in W1.split(".") if part.isdigit())
        assert torch.equal(found[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert, :96], want[W1])
        assert torch.equal(found[names.HEAD], want[names.HEAD])


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, shards=2)
    where = json.loads((path / INDEX).read_text())["weight_map"]
    other = path / next(name for name in where.values() if name != where[W1])
    tensors = {n: t for n, t in tiny_tensors(CONFIG).items() if n == W1 or where[n] == other.name}
    save_file(tensors, other)
    read_back(path)
    save_file({**tensors, W1: tensors[W1] * 2}, other)
    refused(path, W1, "differs from the one in model-0000")


def test_a_tensor_in_two_shards_that_is_discarded_in_one(tmp_path: Path) -> None:
    """As a resumed run with --discard-source finds it; what stays is compared."""
    path = write_tiny_checkpoint(tmp_path / "snapshots" / "one", shards=2)
    where = json.loads((path / INDEX).read_text())["weight_map"]
    other = path / next(name for name in where.values() if name != where[W1])
    tensors = {n: t for n, t in tiny_tensors(CONFIG).items() if n == W1 or where[n] == other.name}
    save_file(tensors, other)
    discarded.note(tmp_path, [(f"snapshots/one/{where[W1]}", W1)], gone=True)
    Checkpoint.open(path).close()
    save_file({**tensors, W1: tensors[W1] * 2}, other)
    with pytest.raises(CheckpointError, match="differs from the one in model-0000"):
        Checkpoint.open(path)


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """As mlx-lm writes both, and as a conversion leaves the old index, or the old shards too."""
    path = write_tiny_checkpoint(tmp_path / "old", seed=3, shards=2)
    write_tiny_checkpoint(path)
    read_back(path)
    with Checkpoint.open(path) as checkpoint:
        assert set(checkpoint.skipped) == {INDEX, *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))}
    for shard in path.glob("model-*"):
        shard.unlink()
    read_back(path)
    (path / INDEX).write_text("{")
    read_back(path)
    weight_map = dict.fromkeys(tiny_tensors(CONFIG), SINGLE)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert read_back(path) == []
    (path / SINGLE).unlink()
    refused(path, f"{SINGLE}: missing (1 of 1 files)")
    save_file({W1: torch.zeros(96, 64).bfloat16()}, path / SINGLE)
    assert INDEX in str(refused(path, "missing").cure)


# --- damaged and hostile files ---

@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = write_tiny_checkpoint(tmp_path)
    data = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(data[:keep])
    refused(path, SINGLE)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    (path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
    refused(path, f"{SINGLE}: not a safetensors file")


@pytest.mark.parametrize("header", [
    b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}}',
    b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": null, "shape": [8], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [99999999999999], "data_offsets": [0, 399999999999996]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
    b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
])
def test_hostile_headers(tmp_path: Path, header: bytes) -> None:
    path = write_tiny_checkpoint(tmp_path)
    (path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(path, SINGLE)


NEW_DTYPES = {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def with_tensor(path: Path, name: str, dtype: str, shape: list[int], nbytes: int) -> Path:
    """The checkpoint with one more tensor in its file, or another in the place of one, of any dtype."""
    data = (path / SINGLE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    header.pop(name, None)
    gap = sorted(v["data_offsets"] for v in header.values() if "data_offsets" in v)
    kept, offset = b"", 0
    for begin, end in gap:  # closes the hole that a replaced tensor leaves
        entry = next(v for v in header.values() if v.get("data_offsets") == [begin, end])
        entry["data_offsets"] = [offset, offset + end - begin]
        kept, offset = kept + body[begin:end], offset + end - begin
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
    text = json.dumps(header).encode()
    (path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + kept + bytes(nbytes))
    return path


@pytest.mark.parametrize("dtype", NEW_DTYPES)
def test_the_new_dtypes_are_understood_and_named(tmp_path: Path, dtype: str) -> None:
    from safetensors import safe_open
    scale = W1 + "_scale"
    path = with_tensor(write_tiny_checkpoint(tmp_path / "scale"), scale, dtype, [16], 2 * NEW_DTYPES[dtype])
    with safe_open(path / SINGLE, "pt") as file:
        assert scale in file.keys()  # noqa: SIM118 - not a dict
    assert "unquantized" in str(refused(path, scale, f"got dtype {dtype}", "quantized already").cure)
    path = with_tensor(write_tiny_checkpoint(tmp_path / "weight"), W1, dtype, [96, 64], 96 * 8 * NEW_DTYPES[dtype])
    refused(path, f"{W1}: got dtype {dtype}", "quantized already")


def test_a_dtype_that_nobody_knows_yet_is_no_damage(tmp_path: Path) -> None:
    path = with_tensor(write_tiny_checkpoint(tmp_path), W1 + "_scale", "F2_E1M0", [16], 4)
    error = refused(path, W1 + "_scale", "'F2_E1M0' is not supported")
    assert "unquantized" in str(error.cure) and "damaged" not in error.message


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("damaged"), num_hidden_layers=1, num_local_experts=2)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_damaged_header_is_refused_or_harmless(damaged: Path, data: st.DataObject) -> None:
    """Flipping header bytes gives CheckpointError, or a checkpoint whose tensors have the right shapes."""
    file = damaged / SINGLE
    good = file.read_bytes()
    length = 8 + struct.unpack("<Q", good[:8])[0]
    bad = bytearray(good)
    for at in data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3)):
        bad[at] = data.draw(st.sampled_from(b'0123456789"{}[],:-\\ \xffA'))
    file.write_bytes(bad)
    try:
        with Checkpoint.open(damaged) as checkpoint:
            for dense in names.dense_tensors(checkpoint.model):
                assert tuple(checkpoint.dense(names.canonical(checkpoint.model)[dense.name]).shape) == dense.shape
    except CheckpointError:
        pass
    finally:
        file.write_bytes(good)


# --- while it is being read ---

def test_files_that_change_during_the_run(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    good = (path / SINGLE).read_bytes()
    with Checkpoint.open(path) as checkpoint:
        os.truncate(path / SINGLE, len(good) // 2)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was") as caught:
            for key in checkpoint.model.expert_keys:
                checkpoint.expert(key)
        assert caught.value.cure
    (path / SINGLE).write_bytes(good)
    with Checkpoint.open(path) as checkpoint:
        os.utime(path / SINGLE, ns=(1, 1))  # rewritten in place with the same length
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            checkpoint.dense("head")


def test_unlinked_files_stay_readable(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    want = tiny_tensors(CONFIG)[names.HEAD]
    with Checkpoint.open(path) as checkpoint:
        shutil.rmtree(path)
        assert torch.equal(checkpoint.dense("head"), want)


def test_files_are_closed(tmp_path: Path) -> None:
    before = open_files()
    with Checkpoint.open(write_tiny_checkpoint(tmp_path, shards=3)):
        assert open_files() == before + 3
    assert open_files() == before


READ_ALL = """
import sys, resource
from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with Checkpoint.open(sys.argv[1]) as checkpoint:
    checkpoint.expert(ExpertKey(0, 0))
    before, total = peak(), 0
    for key in checkpoint.model.expert_keys:
        total += sum(t.nbytes for t in checkpoint.expert(key))
    print(peak() - before, total)
"""


def test_streaming_takes_the_memory_of_one_expert(tmp_path: Path) -> None:
    raw = tiny_config(hidden_size=1024, intermediate_size=2048, num_local_experts=8)
    config = read_model({**raw, "dtype": "bfloat16"})
    shapes = {t.name: t.shape for t in names.dense_tensors(config)}
    for key in config.expert_keys:
        shapes.update(names.expert_tensors(config, key).values())
    header, entries = build_header([(name, "BF16", shape) for name, shape in shapes.items()], 8)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / SINGLE).write_bytes(header)
    os.truncate(tmp_path / SINGLE, entries[-1].offset + entries[-1].nbytes)  # sparse: 300 MB of zeros
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, total = map(int, done.stdout.split())
    assert total == 24 * 3 * 2 * 1024 * 2048
    assert growth < total / 6
