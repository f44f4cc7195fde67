"""What GLM-4.5 has that no architecture before it had: a prediction head behind its last layer, a bias in fp32 beside
weights in bf16, a choice by groups, and a shared MLP in the dense part. test_architectures.py has the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FIRST, random_model, write
from helpers import UNQUANTIZED
from safetensors.torch import load_file, save_file
from test_architectures import document
from test_cli import qmix
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.engine import load
from qmix.errors import CheckpointError, ConfigError
from qmix.evaluate.reference import Original
from qmix.forward.lower_device import not_on_device
from qmix.models import read_model
from qmix.models.glm4_moe import TINY, VARIANTS
from qmix.offload.needs import Needs
from qmix.quantize import quantize_checkpoint
from qmix.spec import Moe
from qmix.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from published import AIR, GLM

RAW = FIRST["glm4_moe"]
BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"
IDS = list(range(5, 25))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bf16, with the bias in fp32."""
    return write(random_model(RAW, torch.bfloat16), RAW, tmp_path_factory.mktemp("glm") / "source")


def changed(source: Path, folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A copy with other tensors beside or instead of its own."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    raw = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({**load_file(source / "model.safetensors"), **tensors}, folder / "model.safetensors", {"format": "pt"})
    return folder


def stored(source: Path, out: Path, quant: QuantConfig) -> Path:
    with Checkpoint.open(source) as checkpoint:
        quantize_checkpoint(checkpoint, out, quant, threads=1)
    return out


def head(layer: int, experts: int = 8) -> dict[str, Tensor]:
    """The tensors of a prediction head as published, small."""
    names = ["eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head", "input_layernorm",
             "self_attn.q_proj", *(f"mlp.experts.{e}.{part}_proj" for e in range(experts)
                                   for part in ("gate", "up", "down"))]
    return {f"model.layers.{layer}.{name}.weight": torch.ones(2, dtype=torch.bfloat16) for name in names}


# --- plans ---

@pytest.mark.parametrize(("raw", "layers", "record"), [(AIR, 45, 9_732_096), (GLM, 89, 13_271_040)], ids=["Air", "4.5"])
def test_a_plan_of_the_published_configs(raw: dict[str, Any], layers: int, record: int, tmp_path: Path) -> None:
    """Of int4 experts with groups of 64: half a byte a weight, and 4 bytes a group; of an int8 dense part."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = read_model(raw)
    hidden, inner = model.hidden, model.expert_inner
    assert record == 3 * hidden * inner // 2 + 4 * (hidden // 64 * 2 * inner + inner // 64 * hidden)
    how = ("--ram", "64G", "--disk", 5, "--ram-speed", 80, "-c", 8192, "--json")
    found, on_gpu = (document("plan", tmp_path / "config.json", *how, *more) for more in (
        ("--device", "cpu"), ("--vram", "24G", "--vram-speed", 900, "--pcie", 25)))
    for plan in (found, on_gpu):
        assert (plan["records"], plan["record_bytes"]) == (layers * raw["n_routed_experts"], record)
    matrices = sum(prod(t.shape) for t in model.tensors() if t.role in ("linear", "mlp", "head"))
    embedding = model.vocab * hidden
    (there,) = ((row["memory"], row["bytes"]) for row in found["memory"] if row["holds"] == "dense")
    assert matrices + 2 * embedding < there[1] < 1.01 * (matrices + 2 * embedding)
    assert ("VRAM", there[1]) in ((row["memory"], row["bytes"]) for row in on_gpu["memory"] if row["holds"] == "dense")


# --- the prediction head ---

def test_the_prediction_head_is_skipped_by_name(source: Path, tmp_path: Path) -> None:
    layers = RAW["num_hidden_layers"]
    more = head(layers)
    with Checkpoint.open(changed(source, tmp_path / "more", more)) as checkpoint:
        assert set(checkpoint.skipped) == set(more)
    done = qmix("quantize", tmp_path / "more", tmp_path / "store", "--dry-run")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("skipped: ")]
    assert said == [f"skipped: model.layers.{layers}.* ({len(more)} tensors of a multi-token-prediction head, which "
                    "qmix does not use)"]


def test_a_layer_that_the_config_does_not_count_is_no_prediction_head(source: Path, tmp_path: Path) -> None:
    """Its tensors are those of a layer; what tells a head apart is missing."""
    layers = RAW["num_hidden_layers"] - 1
    folder = changed(source, tmp_path / "less", {}, num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match=rf"model\.layers\.{layers}\..*: not a tensor of this model"):
        Checkpoint.open(folder)


def test_a_second_head_is_one_too_many(source: Path, tmp_path: Path) -> None:
    layers = RAW["num_hidden_layers"]
    folder = changed(source, tmp_path / "two", {**head(layers), **head(layers + 1)})
    with pytest.raises(CheckpointError, match=rf"model\.layers\.{layers + 1}\..*: not a tensor of this model"):
        Checkpoint.open(folder)
    folder = changed(source, tmp_path / "none", head(layers), num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=rf"model\.layers\.{layers}\..*: not a tensor of this model"):
        Checkpoint.open(folder)


# --- the bias of the choice ---

def test_the_bias_stays_in_fp32(source: Path, tmp_path: Path) -> None:
    """Bits that bf16 does not have decide between experts."""
    there = load_file(source / "model.safetensors")
    published = there[BIAS.format(1)]
    assert published.dtype == torch.float32 and not torch.equal(published, published.bfloat16().float())
    with Store.open(stored(source, tmp_path / "store", QuantConfig())) as store:
        assert torch.equal(store.dense("layers.1.router.choice_bias"), published)
        assert store.dense("layers.1.router.weight").dtype == torch.bfloat16


def test_a_bias_in_the_dtype_of_the_weights_is_widened(source: Path, tmp_path: Path) -> None:
    """As a checkpoint has it that was saved again in one dtype; the store is laid out as any other."""
    biases = {BIAS.format(i): load_file(source / "model.safetensors")[BIAS.format(i)].bfloat16() for i in (1, 2, 3)}
    narrow = changed(source, tmp_path / "narrow", biases)
    with Store.open(stored(narrow, tmp_path / "store", QuantConfig())) as store:
        assert torch.equal(store.dense("layers.2.router.choice_bias"), biases[BIAS.format(2)].float())
    for dtype in (torch.float16, torch.float64):
        wrong = changed(source, tmp_path / str(dtype), {BIAS.format(1): torch.ones(8, dtype=dtype)})
        with pytest.raises(CheckpointError, match=r"e_score_correction_bias: got (dtype F64|float16), want"):
            Checkpoint.open(wrong)


def test_what_is_said_of_the_original_counts_the_bias_once(source: Path) -> None:
    with Original.open(source, lambda line: None) as original:
        found = original.about()["parameters"]
    assert found == sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())


# --- the router ---

def test_what_the_config_says_of_the_choice() -> None:
    router = read_model({**TINY, **VARIANTS[0]}).layers[-1].mlp.router  # type: ignore[union-attr]
    assert (router.score, router.choice_bias, router.group_score) == ("sigmoid", True, "top2")
    assert (router.groups, router.top_groups, router.scale, router.normalize) == (4, 2, 2.5, True)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("n_group", 3, "n_group: got 3, want a divisor of n_routed_experts = 8"),
    ("n_group", 8, "n_group: got 8, want a divisor of n_routed_experts = 8 that leaves two experts or more to a group"),
    ("topk_group", 2, "topk_group: got 2, want <= n_group = 1"),
    ("num_experts_per_tok", 9, "num_experts_per_tok: got 9, want <= 8"),
    ("n_shared_experts", 0, "n_shared_experts: got 0, want >= 1"),
    ("first_k_dense_replace", -1, "first_k_dense_replace: got -1, want >= 0"),
    ("routed_scaling_factor", 0, "routed_scaling_factor: got 0, want > 0"),
    ("partial_rotary_factor", 1.5, "partial_rotary_factor: got 1.5, want an even number of the"),
    ("num_mtp_layers", 2, "num_mtp_layers: got 2, want the same as num_nextn_predict_layers"),
])
def test_what_a_config_may_not_say(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_model({**TINY, "num_nextn_predict_layers": 1, key: value})


def test_chosen_experts_must_lie_in_the_chosen_groups() -> None:
    with pytest.raises(ConfigError, match="num_experts_per_tok: got 4, want <= 2, the experts of topk_group groups"):
        read_model({**TINY, "n_group": 4})


# --- the dense part ---

def test_shared_and_dense_mlps_take_the_dense_format_and_stay_resident(source: Path, tmp_path: Path) -> None:
    """A budget for the fewest records changes neither, and the plan counts them with attention."""
    found = {}
    for dense in ("keep", "int8"):
        path = stored(source, tmp_path / dense, QuantConfig(dense=dense))
        with Store.open(path) as store:
            model = store.model
            for name in ("layers.0.mlp.gate", "layers.1.shared.up", "layers.3.shared.down"):
                assert store.layout.specs[name].format == {"keep": "bf16", "int8": "int8"}[dense]  # type: ignore[union-attr]
                assert store.layout.dense[name].file == "dense.safetensors"
            assert {key.layer for key in model.expert_keys} == set(model.moe_layers) == {1, 2, 3}
            found[dense] = Needs.of(model, store.quant, 64).dense
    mlp = model.layers[1].mlp
    assert isinstance(mlp, Moe) and mlp.shared is not None and mlp.shared.inner == 32
    assert found["int8"] < 0.7 * found["keep"]


@pytest.mark.parametrize("dense", ["int4", "int8"])
def test_quantized_dense_parts_run(source: Path, tmp_path: Path, dense: str) -> None:
    """Near the store that has them as they are."""
    logits = []
    for how in ("keep", dense):
        with load(stored(source, tmp_path / how, QuantConfig(dense=how)), threads=1, context=64) as engine:
            session = engine.session()
            logits.append(torch.stack([session.prefill(IDS), session.decode(3), session.decode(4)]))
    assert not torch.equal(*logits)
    assert torch.nn.functional.cosine_similarity(*logits, dim=1).min() > 0.9


def test_a_gpu_computes_every_configuration() -> None:
    """With the dense part on it: test_architectures_device.py has the bits."""
    assert [not_on_device(read_model({**TINY, **variant})) for variant in ({}, *VARIANTS)] == [""] * 4


def test_the_first_layers_may_all_be_dense(tmp_path: Path) -> None:
    """Then it is a model without experts, whose MLPs are the records."""
    raw = {**RAW, "first_k_dense_replace": RAW["num_hidden_layers"]}
    theirs = random_model(raw)
    path = stored(write(theirs, raw, tmp_path / "source"), tmp_path / "store", UNQUANTIZED)
    with torch.inference_mode():
        want = theirs(torch.tensor([IDS])).logits[0, -1]
    with load(path, threads=1, context=64) as engine:
        assert engine.model.moe_layers == () and len(engine.model.expert_keys) == RAW["num_hidden_layers"]
        assert (engine.session().prefill(IDS) - want).abs().max() < 1e-4
