"""The checkpoint reader: what it reads is what was written, and whatever is wrong is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixtrals as names
import pytest
import torch
from helpers import tiny_config, tiny_tensors, write_checkpoint, write_tiny_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from qmix.checkpoint import INDEX, SINGLE, Checkpoint
from qmix.config import ExpertKey
from qmix.errors import CheckpointError
from qmix.models import read_model

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
