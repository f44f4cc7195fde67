"""The checkpoint reader: what it reads is what was written, and whatever is wrong is named."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixtrals as names
import pytest
import torch
from helpers import tiny_config, tiny_tensors, write_checkpoint, write_tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qmix.checkpoint import INDEX, SINGLE, Checkpoint
from qmix.config import ExpertKey
from qmix.errors import CheckpointError
from qmix.models import read_model
from qmix.tensorfile import build_header

W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
CONFIG = read_model(tiny_config())


def refused(path: Path, *parts: str) -> CheckpointError:
    """Opening `path` fails with a message that has every part, and with a cure."""
    before = open_files()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert open_files() == before, "a refused checkpoint leaves files open"
    for part in parts:
        assert part in caught.value.message
    assert caught.value.cure
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 4
    return caught.value


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def build(path: Path, change: Callable[[dict[str, Tensor]], Any], shards: int = 1, **overrides: Any) -> Path:
    """A tiny checkpoint whose tensors were changed before writing."""
    raw = tiny_config(**overrides)
    tensors = tiny_tensors(read_model(raw))
    change(tensors)
    return write_checkpoint(path, raw, tensors, shards)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reads_what_was_written(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    wrote = tiny_tensors(CONFIG, seed=5, dtype=dtype)
    path = write_tiny_checkpoint(tmp_path, seed=5, dtype=dtype, shards=shards)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.model.dtype == str(dtype).removeprefix("torch.")
        assert checkpoint.skipped == ()
        assert checkpoint.nbytes == sum(t.nbytes for t in wrote.values())
        for dense in names.dense_tensors(CONFIG):
            got = checkpoint.dense(names.canonical(checkpoint.model)[dense.name])
            assert got.dtype == dtype
            assert got.is_contiguous()
            assert torch.equal(got, wrote[dense.name])
        for key in CONFIG.expert_keys:
            parts = names.expert_tensors(CONFIG, key)
            for part, got in zip(("w1", "w2", "w3"), checkpoint.expert(key), strict=True):
                assert torch.equal(got, wrote[parts[part][0]])


def test_tensors_are_fresh_memory(tmp_path: Path) -> None:
    with Checkpoint.open(write_tiny_checkpoint(tmp_path)) as checkpoint:
        first = checkpoint.dense("head")
        copy = first.clone()
        first.zero_()
        assert torch.equal(checkpoint.dense("head"), copy)


def test_agrees_with_the_safetensors_library_on_a_trained_model(wiki_moe: Path) -> None:
    from safetensors import safe_open
    with Checkpoint.open(wiki_moe) as checkpoint, safe_open(wiki_moe / SINGLE, "pt") as reference:
        assert checkpoint.model.num_experts == 8
        assert torch.equal(checkpoint.dense("embedding"), reference.get_tensor(names.EMBEDDING))
        w1, w2, w3 = checkpoint.expert(ExpertKey(7, 3))
        prefix = "model.layers.7.block_sparse_moe.experts.3."
        for part, got in (("w1", w1), ("w2", w2), ("w3", w3)):
            assert torch.equal(got, reference.get_tensor(f"{prefix}{part}.weight"))


# --- every tensor is used, skipped by name, or refused by name ---

@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", [W1, names.EMBEDDING, names.FINAL_NORM,
                                  "model.layers.0.self_attn.k_proj.weight"])
def test_missing_tensor(tmp_path: Path, name: str, shards: int) -> None:
    refused(build(tmp_path, lambda t: t.pop(name), shards), f"{name}: missing")


@pytest.mark.parametrize("name", ["model.layers.3.input_layernorm.weight", "lm_head.bias", "extra",
                                  "model.layers.0.block_sparse_moe.experts.4.w1.weight"])
def test_extra_tensor(tmp_path: Path, name: str) -> None:
    path = build(tmp_path, lambda t: t.update({name: torch.zeros(2).bfloat16()}))
    refused(path, f"{name}: not a tensor of this model")


@pytest.mark.parametrize(("name", "shape"), [(W1, (64, 96)), (W1, (96, 65)), (W1, (96 * 64,)),
                                             (names.FINAL_NORM, (64, 1)), (names.HEAD, (127, 64))])
def test_misshapen_tensor(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    path = build(tmp_path, lambda t: t.update({name: torch.zeros(shape).bfloat16()}))
    refused(path, name, f"got shape {list(shape)}", "want")


@pytest.mark.parametrize(("dtype", "want"), [
    (torch.float32, "want bfloat16"), (torch.float16, "want bfloat16"),
    (torch.uint8, "want BF16, F16 or F32"), (torch.float8_e4m3fn, "want BF16, F16 or F32")])
def test_wrong_dtype(tmp_path: Path, dtype: torch.dtype, want: str) -> None:
    refused(build(tmp_path, lambda t: t.update({W1: t[W1].to(dtype)})), W1, want)


def test_float8_throughout(tmp_path: Path) -> None:
    path = build(tmp_path, lambda t: t.update({n: w.to(torch.float8_e4m3fn) for n, w in t.items()}))
    refused(path, names.EMBEDDING, "F8_E4M3", "want BF16, F16 or F32")


def test_old_rotary_buffers_are_skipped_by_name(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with Checkpoint.open(build(tmp_path, lambda t: t.update({name: torch.ones(8)}))) as checkpoint:
        assert checkpoint.skipped == (name,)
        assert checkpoint.model.dtype == "bfloat16"


def test_weight_files_that_the_index_does_not_use_are_named(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, shards=2)
    save_file({"x": torch.ones(1)}, path / "consolidated.safetensors")
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.skipped == ("consolidated.safetensors",)


def test_tied_embeddings(tmp_path: Path) -> None:
    def with_head(tensors: dict[str, Tensor], change: float = 0.0) -> None:
        tensors[names.HEAD] = tensors[names.EMBEDDING] + 0
        tensors[names.HEAD][-1, -1] += change

    tied = build(tmp_path / "tied", lambda t: None, tie_word_embeddings=True)
    with Checkpoint.open(tied) as checkpoint:
        assert checkpoint.skipped == ()
        without = checkpoint.nbytes
    with Checkpoint.open(build(tmp_path / "copy", with_head, tie_word_embeddings=True)) as checkpoint:
        assert checkpoint.skipped == (names.HEAD,)
        assert checkpoint.nbytes == without
    differs = build(tmp_path / "differs", lambda t: with_head(t, 1.0), tie_word_embeddings=True)
    refused(differs, f"{names.HEAD}: differs from {names.EMBEDDING}")
    other_dtype = build(tmp_path / "dtype", lambda t: t.update({names.HEAD: t[names.EMBEDDING].float()}),
                        tie_word_embeddings=True)
    refused(other_dtype, names.HEAD)
    untied = build(tmp_path / "untied", lambda t: t.pop(names.HEAD))
    assert "tie_word_embeddings" in str(refused(untied, f"{names.HEAD}: missing").cure)


@pytest.mark.parametrize("said", ["float32", "auto", ["x"], ...])
def test_dtype_comes_from_the_files(tmp_path: Path, said: Any) -> None:
    raw = tiny_config(torch_dtype=said)
    path = write_checkpoint(tmp_path, raw, tiny_tensors(CONFIG, dtype=torch.float16))
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.model.dtype == "float16"


# --- folders and config.json ---

def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none: no such folder")
    path = write_tiny_checkpoint(tmp_path / "a")
    refused(path / SINGLE, "a file, not a folder")
    (path / "qmix.json").write_text("{}")
    assert "qmix chat" in str(refused(path, "a qmix store").cure)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "config.json: missing")
    (empty / "params.json").write_text("{}")
    refused(empty, "Mistral's own layout")
    (empty / "config.json").write_text(json.dumps(tiny_config()))
    refused(empty, f"{SINGLE}: missing")


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "safetensors" in str(refused(tmp_path, "pytorch_model.bin", "can run code").cure)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {names.EMBEDDING: "pytorch_model.bin"}}))
    refused(tmp_path, INDEX, "pytorch_model.bin")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"x"', "\xff", "[" * 10_000])
def test_config_that_is_not_an_object(tmp_path: Path, text: str) -> None:
    path = write_tiny_checkpoint(tmp_path)
    (path / "config.json").write_bytes(text.encode("latin-1"))
    refused(path, "config.json: not")


def read_back(path: Path) -> list[str]:
    """Open and compare every tensor with the ones that the factory wrote; the notes."""
    want = tiny_tensors(CONFIG)
    with Checkpoint.open(path) as checkpoint:
        for dense in names.dense_tensors(CONFIG):
            assert torch.equal(checkpoint.dense(names.canonical(checkpoint.model)[dense.name]), want[dense.name])
        for key in CONFIG.expert_keys:
            parts = names.expert_tensors(CONFIG, key)
            for part, got in zip(("w1", "w2", "w3"), checkpoint.expert(key), strict=True):
                assert torch.equal(got, want[parts[part][0]])
        return list(checkpoint.notes)


@pytest.mark.parametrize(("key", "value", "note"), [
    ("quantization_config", None, ""), ("auto_map", None, ""), ("auto_map", {}, ""), ("hidden_act", "swish", ""),
    ("auto_map", {"AutoModelForCausalLM": "modeling_x.Mixtral"}, "auto_map names code"),
    ("sliding_window", 0, "sliding_window 0: read as no window"), ("sliding_window", -1, "no window"),
    ("eos_token_id", -1, "eos_token_id -1"), ("eos_token_id", [2, -1], "negative"), ("pad_token_id", 10**6, "")])
def test_what_transformers_loads_is_read_and_said(tmp_path: Path, key: str, value: Any, note: str) -> None:
    path = write_tiny_checkpoint(tmp_path)
    edit_json(path / "config.json", lambda raw: raw.update({key: value}))
    notes = read_back(path)
    assert len(notes) == bool(note) and all(note in line and "config.json: " in line for line in notes)


def test_the_quantizer_of_the_weights_is_named_before_a_header_is_read(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    edit_json(path / "config.json", lambda raw: raw.update(quantization_config={"quant_method": "mxfp8"}))
    (path / SINGLE).write_bytes(b"what an unknown dtype would look like")
    assert "original" in str(refused(path, "quantized already, as mxfp8").cure)
    edit_json(path / "config.json", lambda raw: raw.update(quantization_config={"quant_method": "mxfp4"}))
    assert "dequantize=True" in str(refused(path, "quantization_config", "quantized already, as mxfp4").cure)


@pytest.mark.parametrize(("key", "value"), [
    ("num_local_experts", 0), ("hidden_size", "64"), ("model_type", "llama"), ("rope_theta", None),
    ("quantization_config", {"quant_method": "gptq"}), ("num_hidden_layers", 10**12),
    ("num_local_experts", 10**9)])
def test_bad_config_value_names_file_and_key(tmp_path: Path, key: str, value: Any) -> None:
    path = write_tiny_checkpoint(tmp_path)
    edit_json(path / "config.json", lambda raw: raw.update({key: value}))
    refused(path, "config.json: ", key)


def test_config_that_disagrees_with_the_weights(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    edit_json(path / "config.json", lambda raw: raw.update({"num_hidden_layers": 4}))
    refused(path, "model.layers.3.input_layernorm.weight: missing (19 of 79 tensors are)")
    edit_json(path / "config.json", lambda raw: raw.update({"num_hidden_layers": 2}))
    refused(path, "model.layers.2.", "not a tensor of this model (19 such tensors)")


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


# --- identity and companions ---

def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        with Checkpoint.open(path) as checkpoint:
            assert checkpoint.fingerprint() == checkpoint.fingerprint()
            return checkpoint.fingerprint()

    first = fingerprint(write_tiny_checkpoint(tmp_path / "a"))
    again = write_tiny_checkpoint(tmp_path / "elsewhere")
    os.utime(again / SINGLE, ns=(1, 1))
    assert fingerprint(again) == first
    others = [write_tiny_checkpoint(tmp_path / "seed", seed=1), write_tiny_checkpoint(tmp_path / "half",
              dtype=torch.float16), write_tiny_checkpoint(tmp_path / "theta", rope_theta=2e4),
              build(tmp_path / "one", lambda t: t[W1].mul_(2))]
    assert len({first, *map(fingerprint, others)}) == 5


def test_companion_files(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json", "README.md"):
        (path / name).write_text("{}")
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.extra_files == ["tokenizer.model", "tokenizer_config.json", "generation_config.json"]
        assert checkpoint.raw_config == json.loads((path / "config.json").read_text())
