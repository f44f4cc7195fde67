"""Stores of version 3: records with biases or another activation than SwiGLU. What an older qmix says of one, which
stores stay version 2, and that biases are the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import FIRST, quantized, random_model, write
from helpers import write_tiny_stores
from safetensors.torch import load_file

import qmix
from qmix.config import QuantConfig
from qmix.errors import StoreError
from qmix.models import ARCHITECTURES, read_model
from qmix.store import Store, manifest


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = FIRST["gpt_oss"]
    return write(random_model(raw, torch.bfloat16), raw, tmp_path_factory.mktemp("gpt_oss") / "source", published=False)


@pytest.fixture(scope="module")
def store(source: Path) -> Path:
    return quantized(source, source.parent / "int4", QuantConfig())


def head(store: Path) -> tuple[int, str]:
    raw = json.loads((store / "qmix.json").read_text())
    return raw["format_version"], raw["needs_qmix"]


def test_only_stores_that_need_it_have_version_3(store: Path, tmp_path: Path) -> None:
    assert head(store) == (3, "0.3.0")
    assert head(write_tiny_stores(tmp_path, {"int4": QuantConfig()})["int4"]) == (2, "0.2.0")
    versions = {kind: manifest.version_of(read_model(file.TINY), QuantConfig()) for kind, file in ARCHITECTURES.items()}
    assert {kind for kind, version in versions.items() if version == 3} == {
        "gpt_oss", "gemma4", "gemma4_text", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"}
    carried = QuantConfig("mxfp4", method="", group_size=0, block=0)
    assert manifest.version_of(read_model(ARCHITECTURES["mixtral"].TINY), carried) == 3


def test_this_qmix_is_one_that_reads_what_it_writes() -> None:
    needs = [manifest.NEEDS_QMIX[version] for version in range(2, manifest.FORMAT_VERSION + 1)]
    numbers = [[int(part) for part in text.split(".")] for text in (*needs, qmix.__version__)]
    assert numbers == sorted(numbers)


def test_an_older_qmix_says_which_one_reads_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 0.2.0 does, whose only difference here is how far it reads."""
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 2)
    with pytest.raises(StoreError, match=r"format_version: got 3; this qmix, .*, reads up to 2") as refusal:
        Store.open(store)
    assert "install qmix 0.3.0" in str(refusal.value.cure)


def test_biases_are_those_of_the_checkpoint(source: Path, store: Path) -> None:
    """Gate and up of a published bias lie in turns, in a record one behind the other; fp32, not quantized."""
    tensors = load_file(source / "model.safetensors")
    with Store.open(store) as opened:
        for key in opened.model.expert_keys:
            record = torch.empty(opened.layout.record_bytes, dtype=torch.uint8)
            opened.read_record(key, record)
            w13, w2 = opened.expert(key, record)
            prefix = f"model.layers.{key.layer}.mlp.experts."
            both = tensors[f"{prefix}gate_up_proj_bias"][key.expert].float()
            assert torch.equal(w13["bias"], torch.cat((both[::2], both[1::2])))
            assert torch.equal(w2["bias"], tensors[f"{prefix}down_proj_bias"][key.expert].float())


def test_a_delta_net_keeps_what_was_published_in_fp32(tmp_path: Path) -> None:
    """Qwen3.5 has these two in fp32 beside weights in bf16, Qwen3.6 all in bf16."""
    raw = FIRST["qwen3_5_moe"]
    model = random_model(raw, torch.bfloat16)
    delta = model.get_submodule("model.layers.0.linear_attn")
    published = {"a_log": delta.A_log, "norm": delta.norm.weight}
    for name, dtype in (("3.5", torch.float32), ("3.6", torch.bfloat16)):
        delta.A_log.data, delta.norm.weight.data = delta.A_log.data.to(dtype), delta.norm.weight.data.to(dtype)
        source = write(model, raw, tmp_path / f"{name} source")
        with Store.open(quantized(source, tmp_path / name, QuantConfig())) as store:
            for part, want in published.items():
                got = store.dense(f"layers.0.delta.{part}")
                assert isinstance(got, torch.Tensor) and torch.equal(got, want.detach().float())
                assert name == "3.6" or not torch.equal(got, got.bfloat16().float())
