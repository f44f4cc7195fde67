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

import pytest
import torch
from helpers import tiny_config, tiny_tensors, write_checkpoint, write_tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qmix import names
from qmix.checkpoint import INDEX, SINGLE, Checkpoint
from qmix.config import ExpertKey, ModelConfig
from qmix.errors import CheckpointError
from qmix.tensorfile import build_header

W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
CONFIG = ModelConfig.from_hf(tiny_config())


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
    tensors = tiny_tensors(ModelConfig.from_hf(raw))
    change(tensors)
    return write_checkpoint(path, raw, tensors, shards)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reads_what_was_written(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    wrote = tiny_tensors(CONFIG, seed=5, dtype=dtype)
    path = write_tiny_checkpoint(tmp_path, seed=5, dtype=dtype, shards=shards)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.config.dtype == str(dtype).removeprefix("torch.")
        assert checkpoint.skipped == ()
        assert checkpoint.nbytes == sum(t.nbytes for t in wrote.values())
        for dense in names.dense_tensors(CONFIG):
            got = checkpoint.dense(dense.name)
            assert got.dtype == dtype
            assert got.is_contiguous()
            assert torch.equal(got, wrote[dense.name])
        for key in CONFIG.expert_keys:
            parts = names.expert_tensors(CONFIG, key)
            for part, got in zip(("w1", "w2", "w3"), checkpoint.expert(key), strict=True):
                assert torch.equal(got, wrote[parts[part][0]])


def test_tensors_are_fresh_memory(tmp_path: Path) -> None:
    with Checkpoint.open(write_tiny_checkpoint(tmp_path)) as checkpoint:
        first = checkpoint.dense(names.HEAD)
        copy = first.clone()
        first.zero_()
        assert torch.equal(checkpoint.dense(names.HEAD), copy)


def test_agrees_with_the_safetensors_library_on_a_trained_model(wiki_moe: Path) -> None:
    from safetensors import safe_open
    with Checkpoint.open(wiki_moe) as checkpoint, safe_open(wiki_moe / SINGLE, "pt") as reference:
        assert checkpoint.config.num_experts == 8
        assert torch.equal(checkpoint.dense(names.EMBEDDING), reference.get_tensor(names.EMBEDDING))
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
        assert checkpoint.config.dtype == "bfloat16"


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
        assert checkpoint.config.dtype == "float16"


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


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    one, two = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    path = write_tiny_checkpoint(tmp_path, shards=2)
    index = json.loads((path / INDEX).read_text())
    where = index["weight_map"][W1]
    other = one if where == two else two

    def say(**change: Any) -> None:
        weight_map = {**index["weight_map"], **change.get("put", {})}
        weight_map.pop(change.get("drop"), None)
        (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    say(put={W1: other})
    refused(path, f"{where}: {W1}: {INDEX} places it in {other}")
    say(drop=W1)
    refused(path, f"{where}: {W1}: {INDEX} does not name it")
    say(put={"model.ghost": one})
    refused(path, f"{one}: model.ghost: not in it")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, shards=2)
    where = json.loads((path / INDEX).read_text())["weight_map"]
    other = path / next(name for name in where.values() if name != where[W1])
    tensors = {n: t for n, t in tiny_tensors(CONFIG).items() if n == W1 or where[n] == other.name}
    save_file(tensors, other)
    refused(path, W1, f"places it in {where[W1]}")


def test_single_file_beside_an_index(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, shards=2)
    write_tiny_checkpoint(path)
    refused(path, f"both {SINGLE} and {INDEX}")


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
    b'{"a": {"dtype": "F32", "shape": [99999999999999], "data_offsets": [0, 399999999999996]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
    b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
])
def test_hostile_headers(tmp_path: Path, header: bytes) -> None:
    path = write_tiny_checkpoint(tmp_path)
    (path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(path, SINGLE)


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
            for dense in names.dense_tensors(checkpoint.config):
                assert tuple(checkpoint.dense(dense.name).shape) == dense.shape
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
            for key in checkpoint.config.expert_keys:
                checkpoint.expert(key)
        assert caught.value.cure
    (path / SINGLE).write_bytes(good)
    with Checkpoint.open(path) as checkpoint:
        os.utime(path / SINGLE, ns=(1, 1))  # rewritten in place with the same length
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            checkpoint.dense(names.HEAD)


def test_unlinked_files_stay_readable(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path)
    want = tiny_tensors(CONFIG)[names.HEAD]
    with Checkpoint.open(path) as checkpoint:
        shutil.rmtree(path)
        assert torch.equal(checkpoint.dense(names.HEAD), want)


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
    for key in checkpoint.config.expert_keys:
        total += sum(t.nbytes for t in checkpoint.expert(key))
    print(peak() - before, total)
"""


def test_streaming_takes_the_memory_of_one_expert(tmp_path: Path) -> None:
    raw = tiny_config(hidden_size=1024, intermediate_size=2048, num_local_experts=8)
    config = ModelConfig.from_hf({**raw, "dtype": "bfloat16"})
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
