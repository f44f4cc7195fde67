"""GGUF files as checkpoints: the store that comes of one is, byte for byte, that of the same weights in safetensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")

import gguf
import gguf_models as models
import numpy as np
from architectures import quantized, random_model
from architectures import write as write_safetensors
from gguf_late_models import reversible
from helpers import UNQUANTIZED

from qmix import gguf_checkpoint
from qmix.checkpoint import Checkpoint
from qmix.commands.plan.report import find_model
from qmix.commands.skipped import skipped_lines
from qmix.config import QuantConfig
from qmix.errors import CheckpointError, ConfigError, Interrupted
from qmix.gguf import header as gguf_header
from qmix.gguf.model import _ends
from qmix.models import Keys, Source, glm4_moe
from qmix.models.gguf import rope_config
from qmix.models.mtp import mtp_head
from qmix.models.source import Index, Rows
from qmix.quantize import quantize_checkpoint
from qmix.quantize.carried import quantized_types
from qmix.shards import Location
from qmix.store import Store
from qmix.tensorfile import Entry

TEXT, FLOAT = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.bfloat16}


@cache
def model_of(kind: str, dtype: torch.dtype) -> Any:
    return reversible(random_model(models.CONFIGS[kind], dtype))


def same_store(one: Path, two: Path) -> None:
    with Store.open(one) as first, Store.open(two) as second:
        assert first.model == second.model
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in two.glob("*.safetensors"))
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def compare(tmp_path: Path, kind: str, type_name: str, **how: Any) -> Checkpoint:
    dtype = DTYPES[type_name]
    model = reversible(random_model(models.CONFIGS[kind], dtype)) if type_name == "Q8_0" else model_of(kind, dtype)
    path = models.write(tmp_path / "m.gguf", model, kind, lambda name: type_name, **how)
    if type_name == "Q8_0":
        models.reread(model, kind, type_name, dtype)
    source = write_safetensors(model, models.CONFIGS[kind], tmp_path / "st", published=False)
    same_store(quantized(path, tmp_path / "a", UNQUANTIZED), quantized(source, tmp_path / "b", UNQUANTIZED))
    return Checkpoint.open(path)


@pytest.mark.parametrize("kind, type_name", [
    ("mixtral", "F32"), ("mixtral", "F16"), ("mixtral", "Q8_0"), ("mistral", "F16"), ("qwen3_moe", "Q8_0"),
    ("olmoe", "BF16"), ("glm4_moe", "Q8_0"), ("gpt_oss", "Q8_0"), ("qwen3_next", "BF16"), ("qwen3_next", "Q8_0"),
    ("qwen3_5_moe", "F32"), ("qwen3_5_moe", "Q8_0"), ("gemma4", "BF16"), ("gemma4", "Q8_0")])
def test_the_store_is_that_of_the_same_weights(tmp_path: Path, kind: str, type_name: str) -> None:
    with compare(tmp_path, kind, type_name) as checkpoint:
        assert quantized_types(checkpoint) == (["Q8_0"] if type_name == "Q8_0" else [])
        assert "rounded" not in " ".join(checkpoint.notes) and not checkpoint.skipped


@pytest.mark.parametrize("experts", ["single", "joined"])
def test_experts_as_other_files_have_them(tmp_path: Path, experts: str) -> None:
    compare(tmp_path, "mixtral", "F32", experts=experts).close()


def test_a_model_in_several_files(tmp_path: Path) -> None:
    model = model_of("mixtral", torch.float32)
    whole = models.write(tmp_path / "m.gguf", model, "mixtral")
    first = models.write_split(tmp_path / "split" / "m.gguf", model, "mixtral", most=9)
    parts = sorted(first.parent.glob("*.gguf"))
    assert len(parts) > 2
    same_store(quantized(whole, tmp_path / "a", UNQUANTIZED), quantized(parts[1], tmp_path / "b", UNQUANTIZED))
    parts[-1].unlink()
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint.open(first)


def test_pieces_behind_the_first_keep_no_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = models.write_split(tmp_path / "split" / "m.gguf", model_of("mixtral", torch.float32), "mixtral", most=9)
    kept: list[Any] = []
    monkeypatch.setattr(gguf_checkpoint, "check_pieces", lambda paths, headers: kept.extend(headers))
    monkeypatch.setattr(gguf_header, "_read_metadata", lambda reader, count, read=gguf_header._read_metadata: {
        **read(reader, count), "a.vocabulary": ("x",) * 9})
    Checkpoint.open(first).close()
    assert "a.vocabulary" in kept[0].metadata and len(kept) > 2
    assert all({*header.metadata} <= {"split.no", "split.count", "split.tensors.count"} for header in kept[1:])


@pytest.mark.parametrize("shape, kind, whole", [((4, 96), "Q8_0", False), ((4, 96), "F32", True),
                                                ((4, 128), "Q8_0", True), ((4, 128), "Q4_K", False)])
def test_a_tensor_that_begins_within_a_block_is_refused(shape: tuple[int, int], kind: str, whole: bool) -> None:
    """The upper half of an expert's biases, where gate and up are one tensor."""
    shard = SimpleNamespace(file=SimpleNamespace(path=Path("m.gguf")))
    location = Location(shard, Entry("up.bias", kind, shape, 0, 0))  # type: ignore[arg-type]
    half = shape[1] // 2
    wanted = SimpleNamespace(name="x", shape=(half,))
    source = Source("up.bias", (Index(1, 4), Rows(half, 2 * half, 2 * half)))
    if whole:
        gguf_checkpoint._check_tensor(wanted, source, {"up.bias": location})  # type: ignore[arg-type]
        return
    with pytest.raises(CheckpointError, match=rf"^m\.gguf: up\.bias: has type {kind}, in blocks") as caught:
        gguf_checkpoint._check_tensor(wanted, source, {"up.bias": location})  # type: ignore[arg-type]
    assert "F32" in str(caught.value.cure)


def test_a_prediction_head_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of an architecture of which qmix has the head: GGUF files have other names for it."""
    monkeypatch.setattr(glm4_moe, "mtp_head", mtp_head, raising=False)
    model, rows = model_of("glm4_moe", torch.bfloat16), torch.ones(64, 128)
    layers = model.config.num_hidden_layers

    def keys(writer: Any) -> None:
        writer.add_key_value("glm4moe.block_count", layers + 1, gguf.GGUFValueType.UINT32)
        writer.add_nextn_predict_layers(1)

    head = {f"blk__{layers}__nextn__eh_proj__weight": rows, f"blk__{layers}__attn_norm__weight": rows[0]}
    path = models.write(tmp_path / "m.gguf", model, "glm4_moe", keys=keys, **head)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.model.num_layers == layers and checkpoint.model.mtp == 1
        assert checkpoint.model.mtp_head is None and not checkpoint.has_mtp_head
        assert set(checkpoint.skipped) == {f"blk.{layers}.nextn.eh_proj.weight", f"blk.{layers}.attn_norm.weight"}
        many = SimpleNamespace(skipped=[f"blk.{layers}.{i}" for i in range(4)], model=checkpoint.model)
        assert skipped_lines(many) == [  # type: ignore[arg-type]
            f"blk.{layers}.* (4 tensors of a multi-token-prediction head, which qmix does not use)"]
    said: list[str] = []
    find_model(path, None, None, said.append)
    assert f"skipped: blk.{layers}.attn_norm.weight (the model does not need it)" in said


def test_mxfp4_experts_stay_as_they_are(tmp_path: Path) -> None:
    model = model_of("gpt_oss", torch.bfloat16)
    path = models.write(tmp_path / "m.gguf", model, "gpt_oss", lambda name: "MXFP4" if "_exps" in name else "Q8_0")
    want = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.expert_format == "mxfp4" and quantized_types(checkpoint) == ["MXFP4", "Q8_0"]
        for key in checkpoint.model.expert_keys:
            for blocks, parts in zip(checkpoint.expert_blocks(key), (("gate", "up"), ("down",)), strict=True):
                found = [want[f"blk.{key.layer}.ffn_{part}_exps.weight"] for part in parts]
                exact = np.concatenate([gguf.dequantize(t.data, t.tensor_type)[key.expert] for t in found])
                assert torch.equal(blocks.numbers(torch.float32), torch.from_numpy(exact))
    quant = QuantConfig(experts="mxfp4", dense="int8", method="", group_size=0, block=0)
    with Store.open(quantized(path, tmp_path / "st", quant)) as store:
        assert store.manifest.records and all(r.error["all"] == 0 for r in store.manifest.records.values())


def test_norms_and_routers_that_lose_bits_stay_fp32(tmp_path: Path) -> None:
    model = model_of("mixtral", torch.float32)
    path = models.write(tmp_path / "m.gguf", model, "mixtral", lambda name: "Q8_0")
    with Checkpoint.open(path) as checkpoint:
        assert set(checkpoint.model.wide) == {"before_mixer", "before_mlp", "router.weight", "final_norm"}
        assert not any("rounded" in note for note in checkpoint.notes)
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with Store.open(quantized(path, tmp_path / "st", UNQUANTIZED)) as store:
        assert store.model.wide == checkpoint.model.wide and store.manifest.version == 3
        for i in range(store.model.num_layers):
            for ours, theirs in (("before_mixer", "attn_norm"), ("before_mlp", "ffn_norm"),
                                 ("router.weight", "ffn_gate_inp")):
                exact = torch.from_numpy(np.array(there[f"blk.{i}.{theirs}.weight"].data))
                assert torch.equal(store.dense(f"layers.{i}.{ours}"), exact)


def test_one_layer_decides_for_all(tmp_path: Path) -> None:
    """Layers of two dtypes would have routers asked apart. The embedding is rounded, and named."""
    model = random_model(models.CONFIGS["mixtral"], torch.bfloat16).float()
    path = models.write(tmp_path / "a.gguf", model, "mixtral", lambda name: "Q8_0")
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.model.wide == ()
    for weight in (model.model.layers[1].mlp.gate.weight, model.model.embed_tokens.weight):
        weight.data[2, 3] = 1 + 2.0**-20
    path = models.write(tmp_path / "b.gguf", model, "mixtral", lambda name: "F32" if "embd" in name else "Q8_0")
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.model.wide == ("router.weight",)
        assert checkpoint.dense("layers.0.router.weight").dtype == torch.float32
        assert checkpoint.dense("layers.0.before_mlp").dtype == torch.bfloat16
        assert ["token_embd.weight: rounded to bfloat16" in note for note in checkpoint.notes] == [True]


def test_what_is_planned_says_what_the_file_has(tmp_path: Path) -> None:
    path = models.write(tmp_path / "m.gguf", model_of("mixtral", torch.float32), "mixtral",
                        lambda name: "F16" if "embd" in name else "Q8_0")
    with Checkpoint.open(path) as checkpoint:
        notes = checkpoint.notes
        assert any("token_embd.weight: rounded to bfloat16" in note for note in notes)
    said: list[str] = []
    find_model(tmp_path / "m.gguf", None, None, said.append)
    assert said[:len(notes)] == [f"note: {note}" for note in notes]
    assert said[len(notes)].startswith("experts: kept bit for bit: ")


def test_resumes(tmp_path: Path) -> None:
    path = models.write(tmp_path / "m.gguf", model_of("mixtral", torch.float32), "mixtral", lambda name: "Q8_0")
    quant, seen = QuantConfig(), []

    def stop(done: int, total: int, label: str) -> None:
        seen.append(label)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with Checkpoint.open(path) as checkpoint, pytest.raises(Interrupted):
        quantize_checkpoint(checkpoint, tmp_path / "a", quant, progress=stop)
    with Checkpoint.open(path) as checkpoint:
        report = quantize_checkpoint(checkpoint, tmp_path / "a", quant)
    assert report.resumed >= 8
    same_store(tmp_path / "a", quantized(path, tmp_path / "b", quant))


def changed(key: str, value: Any, kind: Any = gguf.GGUFValueType.UINT32) -> Callable[[Any], None]:
    def keys(writer: Any) -> None:
        for shard in writer.kv_data:
            shard.pop(key, None)
        if value is not None:
            writer.add_key_value(key, value, kind)
    return keys


@pytest.mark.parametrize("how, said", [
    ({"keys": changed("general.architecture", "gemma3", TEXT)}, "general.architecture: got 'gemma3'"),
    ({"keys": changed("general.type", "adapter", TEXT)}, "general.type: got 'adapter'"),
    ({"keys": changed("llama.embedding_length", None)}, "llama.embedding_length: missing"),
    ({"keys": changed("llama.embedding_length", 65)}, "token_embd.weight: got shape [512, 64], want [512, 65]"),
    ({"keys": changed("llama.block_count", 10**9)}, "llama.block_count: got 1000000000"),
    ({"keys": changed("llama.block_count", 4)}, "blk.3.attn_norm.weight: missing"),
    ({"keys": changed("llama.block_count", 2)}, "blk.2."),
    ({"keys": changed("llama.expert_count", 0)}, "expert_used_count"),
    ({"keys": changed("llama.expert_count", 4096)}, "llama.expert_count: got 4096, want 4, the experts of blk.0.ffn_"),
    ({"keys": changed("llama.expert_count", 9), "experts": "single"}, "llama.expert_count: got 9, want 4, the experts"),
    ({"keys": changed("llama.expert_used_count", 5)}, "num_experts_per_tok: got 5"),
    ({"keys": changed("llama.attention.layer_norm_rms_epsilon", float("nan"), FLOAT)},
     "llama.attention.layer_norm_rms_epsilon: got nan"),
    ({"keys": changed("llama.attention.head_count", "4", TEXT)}, "llama.attention.head_count: got"),
    ({"keys": changed("llama.attn_logit_softcapping", 30.0, FLOAT)},
     "llama.attn_logit_softcapping: got 30.0, a key that qmix does not know"),
    ({"keys": changed("tokenizer.ggml.eom_token_id", 512)}, "tokenizer.ggml.eom_token_id: got 512, want less than 512"),
    ({"left_out": ("blk.1.ffn_norm.weight",)}, "blk.1.ffn_norm.weight: missing (1 of"),
    ({"left_out": ("token_embd.weight",)}, "token_embd.weight: missing"),
    ({"rope_freqs__weight": torch.ones(7)}, "rope_freqs.weight: got 7, want 8 numbers"),
    ({"rope_factors__weight": torch.ones(8)}, "rope_factors.weight: not a tensor of this model (1 such"),
])
def test_refused_by_name(tmp_path: Path, how: dict[str, Any], said: str) -> None:
    path = models.write(tmp_path / "m.gguf", model_of("mixtral", torch.float32), "mixtral", **how)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert said in caught.value.message and "m.gguf: " in caught.value.message and caught.value.exit_code == 4
    assert "\n" not in caught.value.message and caught.value.cure


def test_what_ends_an_answer() -> None:
    """eos, eot and eom, and control tokens that end one whatever the file says."""
    tokens = ("<s>", "</s>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>", "<|user|>", "<|observation|>")
    said = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": (3, 3, 3, 3, 1, 3, 3),
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.ggml.eom_token_id": 6}
    assert _ends(Keys(said), 7) == {"bos_token_id": 0, "eos_token_id": [1, 5, 6, 2, 3]}
    for name in ("eos", "eot", "eom"):
        with pytest.raises(ConfigError, match=rf"^tokenizer\.ggml\.{name}_token_id: got 7, want less than 7"):
            _ends(Keys({**said, f"tokenizer.ggml.{name}_token_id": 7}), 9)


@pytest.mark.parametrize("keys, kind", [
    ({"rope.scaling.factor": 4.0}, "linear"), ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "default"),
    ({"rope.scale_linear": 4.0}, "linear"), ({}, "default")])
def test_a_factor_without_a_type_is_linear(keys: dict[str, Any], kind: str) -> None:
    found = rope_config(Keys(keys), 64)["rope_parameters"]
    assert found["rope_type"] == kind and found.get("factor") == (4.0 if kind == "linear" else None)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = models.write(tmp_path / "m.gguf", model_of("mixtral", torch.float32), "mixtral",
                        lambda name: "NVFP4" if "ffn_up" in name else "F32")
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up_exps\.weight: has type NVFP4"):
        Checkpoint.open(path)


def test_a_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="1 GGUF file") as caught:
        Checkpoint.open(tmp_path)
    assert "m.gguf" in str(caught.value.cure)
