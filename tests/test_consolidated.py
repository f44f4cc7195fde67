"""Mistral's own layout: the same model as in Hugging Face's, from params.json and consolidated.safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import quantized
from helpers import UNQUANTIZED
from lowbit_checkpoints import plain
from safetensors.torch import save_file
from test_architectures import IDS, good, logits
from test_checkpoint import refused
from tokenizer_files import spm_model
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.checkpoint.account import all_tensors
from qmix.engine import load
from qmix.errors import ConfigError
from qmix.models.consolidated import consolidated_config

ENDS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2", "block_sparse_moe": "feed_forward"}
TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}


def paired(w: Tensor, heads: int) -> Tensor:
    """Row 2 i of a head is row i of Hugging Face's, row 2 i + 1 is row i + half."""
    size = len(w) // heads
    order = [h * size + (r // 2 if r % 2 == 0 else size // 2 + r // 2) for h in range(heads) for r in range(size)]
    return w[order]


def consolidated(tensors: dict[str, Tensor], raw: dict[str, Any], old: bool = False) -> dict[str, Tensor]:
    """Tensors in Hugging Face layout as Mistral has them. old: all experts of a layer in one tensor."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removesuffix(".weight")
        if name in TOP:
            found[f"{TOP[name]}.weight"] = tensor
            continue
        name = name.removeprefix("model.")
        for theirs, ours in ENDS.items():
            if not (old and theirs == "block_sparse_moe"):
                name = name.replace(theirs, ours)
        if ".self_attn." in name:
            before, _, part = name.partition(".self_attn.")
            name = f"{before}.attention.w{part[0]}"
            if part[0] in "qk":
                tensor = paired(tensor, raw["num_attention_heads" if part[0] == "q" else "num_key_value_heads"])
        found[f"{name}.weight"] = tensor.contiguous()
    if old:
        for layer in range(raw["num_hidden_layers"]):
            for part in ("w1", "w2", "w3"):
                start = f"layers.{layer}.block_sparse_moe"
                each = [found.pop(f"{start}.experts.{e}.{part}.weight") for e in range(raw["num_local_experts"])]
                found[f"{start}.{part}"] = torch.cat([w.T if part == "w2" else w for w in each])
    return found


def params_of(raw: dict[str, Any]) -> dict[str, Any]:
    found = {"dim": raw["hidden_size"], "n_layers": raw["num_hidden_layers"], "hidden_dim": raw["intermediate_size"],
             "head_dim": raw["hidden_size"] // raw["num_attention_heads"], "n_heads": raw["num_attention_heads"],
             "n_kv_heads": raw["num_key_value_heads"], "norm_eps": raw["rms_norm_eps"], "vocab_size": raw["vocab_size"],
             "rope_theta": raw["rope_parameters"]["rope_theta"]}
    if raw.get("sliding_window"):
        found["sliding_window"] = str(raw["sliding_window"])
    if raw["model_type"] == "mixtral":
        found["moe"] = {"num_experts": raw["num_local_experts"], "num_experts_per_tok": raw["num_experts_per_tok"]}
    return found


def write(path: Path, kind: str, old: bool = False, shards: int = 1, dtype: torch.dtype = torch.float32,
          change: Callable[[dict[str, Any]], Any] = lambda params: None) -> dict[str, Tensor]:
    """A checkpoint in Mistral's layout; the tensors by their names in Hugging Face's."""
    tensors, raw, _ = plain(kind, dtype)
    params = params_of(raw)
    change(params)
    path.mkdir()
    (path / "params.json").write_text(json.dumps(params))
    (path / "tokenizer.model.v3").write_bytes(spm_model())
    whole = consolidated(tensors, raw, old)
    if shards == 1:
        save_file(whole, path / "consolidated.safetensors")
    for i in range(shards if shards > 1 else 0):
        save_file(dict(list(whole.items())[i::shards]), path / f"consolidated-{i + 1:05}-of-{shards:05}.safetensors")
    return tensors


@pytest.mark.parametrize(("kind", "old", "shards"), [("mixtral", False, 1), ("mixtral", True, 3),
                                                     ("mistral", False, 2)])
def test_it_is_the_same_model(kind: str, old: bool, shards: int, tmp_path: Path) -> None:
    """Every tensor, bit for bit, and the same config."""
    write(tmp_path / "own", kind, old, shards)
    _, _, theirs = plain(kind, torch.float32)
    theirs.save_pretrained(tmp_path / "hf")
    with Checkpoint.open(tmp_path / "own") as own, Checkpoint.open(tmp_path / "hf") as hf:
        for tensor in all_tensors(hf.model):
            assert torch.equal(own.dense(tensor.name), hf.dense(tensor.name)), tensor.name
        assert own.nbytes == hf.nbytes and own.skipped == ()
        assert own.model.layers == hf.model.layers and own.model.dtype == hf.model.dtype
        assert any("tokenizer.model.v3: read as tokenizer.model" in note for note in own.notes)
        assert any("the rows of q and k" in note for note in own.notes)
        assert (own.folder / "tokenizer.model").is_file()
        folder = own.folder
    assert not folder.exists()


def test_the_logits_are_those_of_transformers(tmp_path: Path) -> None:
    """In fp32: within 1e-4, and the same token wherever the reference's gap exceeds 2e-4."""
    write(tmp_path / "own", "mixtral")
    _, _, theirs = plain("mixtral", torch.float32)
    with torch.inference_mode():
        want = theirs(torch.tensor([IDS[:46]]), use_cache=False).logits[0]
    store = quantized(tmp_path / "own", tmp_path / "store", UNQUANTIZED)
    with load(store, threads=1, context=64, scoring=True) as engine:
        got = logits(engine)
    assert want.std() > 1 and (got - want).abs().max() < 1e-4
    best = want.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2e-4
    assert sure.sum() > 40 and torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])


def test_the_commands_take_it(tmp_path: Path) -> None:
    write(tmp_path / "own", "mistral", dtype=torch.bfloat16)
    good("quantize", tmp_path / "own", tmp_path / "store", "-t", 1)
    assert good("generate", tmp_path / "store", "-p", "fox", "-n", 2, "-t", 1).stdout
    good("plan", tmp_path / "own")
    assert good("run", tmp_path / "own", "-y", "-p", "fox", "--max-tokens", 2, "-t", 1).stdout


PARAMS = {"dim": 64, "n_layers": 2, "hidden_dim": 96, "head_dim": 16, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
          "vocab_size": 512}


def test_what_params_json_does_not_say_is_noted() -> None:
    raw, notes = consolidated_config(PARAMS)
    assert raw["rope_theta"] == 1e6 and raw["model_type"] == "mistral"
    assert "rope_theta: absent, taken as 1e+06" in notes[0]
    raw, notes = consolidated_config({**PARAMS, "sliding_window": "4096"})
    assert raw["rope_theta"] == 1e4 and raw["sliding_window"] == 4096
    assert "max_position_embeddings, max_seq_len: absent, taken as 32768" in notes[1]
    for key in ("max_position_embeddings", "max_seq_len"):
        raw, notes = consolidated_config({**PARAMS, "rope_theta": 5e5, key: 65536})
        assert raw["max_position_embeddings"] == 65536 and notes == []


@pytest.mark.parametrize(("key", "value", "words"), [
    ("quantization", {"qformat_weight": "fp8_e4m3"}, "quantization: got"), ("yarn", {"factor": 2}, "yarn: got"),
    ("dim", "64", "dim: got '64'"), ("dim", None, "dim"), ("n_heads", 0, "n_heads: got 0"), ("norm_eps", 0, "norm_eps"),
    ("moe", {"num_experts": 8}, "moe.num_experts_per_tok: missing"), ("moe", [8], "moe: got [8]"),
    ("moe", {"num_experts": 8, "num_experts_per_tok": 2, "shared": 1}, "moe.shared: got 1"),
    ("model_type", "mamba", "model_type: got 'mamba'"), ("lora", {"rank": 3}, "lora: got"),
    ("rope_theta", float("nan"), "rope_theta")])
def test_params_that_qmix_does_not_know_are_refused_by_name(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        consolidated_config({**PARAMS, key: value})
    assert words in caught.value.message


def test_broken_folders(tmp_path: Path) -> None:
    write(tmp_path / "own", "mixtral", change=lambda params: params.update(n_layers=3))
    refused(tmp_path / "own", "layers.2.attention_norm.weight: missing")
    write(tmp_path / "heads", "mixtral", change=lambda params: params.update(n_kv_heads=4))
    refused(tmp_path / "heads", "layers.0.attention.wk.weight: got shape [32, 64]")
    write(tmp_path / "known", "mixtral", change=lambda params: params.update(yarn={"factor": 2}))
    refused(tmp_path / "known", "params.json: yarn")
    write(tmp_path / "part", "mistral", shards=2)
    (tmp_path / "part" / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": {
        "norm.weight": "consolidated-00003-of-00003.safetensors"}}))
    refused(tmp_path / "part", "consolidated-00003-of-00003.safetensors: missing")
    write(tmp_path / "pickled", "mistral")
    (tmp_path / "pickled" / "consolidated.safetensors").rename(tmp_path / "pickled" / "consolidated.00.pth")
    refused(tmp_path / "pickled", "consolidated.00.pth", "can run code")


def test_a_tekken_tokenizer_is_said(tmp_path: Path) -> None:
    write(tmp_path / "own", "mistral")
    (tmp_path / "own" / "tokenizer.model.v3").rename(tmp_path / "own" / "tekken.json")
    with Checkpoint.open(tmp_path / "own") as own:
        assert any("Tekken" in note and "tokenizer.json" in note for note in own.notes)
