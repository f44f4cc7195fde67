"""gpt-oss as it is published, with experts in MXFP4: kept bit for bit by default, computed as transformers computes the
decoded weights, and quantized a second time only on request."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FIRST, quantized
from helpers import UNQUANTIZED
from model_configs import CASES, with_keys
from mxfp4_checkpoints import write_published
from safetensors.torch import load_file, save_file
from test_architectures import IDS, good, logits, paged
from test_cli import qmix

from qmix.checkpoint import Checkpoint
from qmix.commands.plan.report import find_model
from qmix.commands.quantization import Flags
from qmix.config import ExpertKey, QuantConfig
from qmix.engine import load
from qmix.errors import CheckpointError
from qmix.evaluate.reference import Original
from qmix.evaluate.reference_weights import Weights
from qmix.formats import Packed, unpack
from qmix.models import mxfp4_layout, published_experts, read_model
from qmix.sizes import record_layout
from qmix.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from published import GPT_OSS

MXFP4 = QuantConfig("mxfp4", "keep", "", 0, 0)
VARIANTS = [with_keys(raw, {"vocab_size": 512}) for raw in CASES if raw["model_type"] == "gpt_oss"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return write_published(tmp_path_factory.mktemp("published") / "gpt-oss")


def decoded_experts(theirs: Any, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w13, the gate above the up, and w2, of transformers' model."""
    experts = theirs.model.layers[layer].mlp.experts
    both = experts.gate_up_proj[expert].T
    return torch.cat((both[0::2], both[1::2])).float(), experts.down_proj[expert].T.float()


def record(store: Store, key: ExpertKey) -> tuple[Packed, Packed]:
    buffer = torch.full((store.layout.record_bytes,), 255, dtype=torch.uint8)
    store.read_record(key, buffer)
    return store.expert(key, buffer)


def test_the_records_are_the_published_numbers(published: tuple[Path, Any], tmp_path: Path) -> None:
    """Exactly those that transformers decodes, of every expert; the sum of all errors in the manifest is 0."""
    source, theirs = published
    with Store.open(quantized(source, tmp_path / "store", MXFP4)) as store:
        assert store.verify(deep=True) == []
        for key in store.model.expert_keys:
            found = record(store, key)
            assert all(map(torch.equal, map(unpack, found), decoded_experts(theirs, *key)))
            bias = theirs.model.layers[key.layer].mlp.experts.gate_up_proj_bias[key.expert].float()
            assert torch.equal(found[0]["bias"], torch.cat((bias[0::2], bias[1::2])))
        assert {r.error["all"] for r in store.manifest.records.values()} == {0.0}


def test_a_checkpoint_gives_the_same_numbers_where_they_are_asked_for(published: tuple[Path, Any]) -> None:
    source, theirs = published
    with Checkpoint.open(source) as checkpoint:
        assert checkpoint.expert_format == "mxfp4" and not checkpoint.notes
        assert checkpoint.model.dtype == "bfloat16"
        for key in checkpoint.model.expert_keys[:3]:
            w13, w2 = decoded_experts(theirs, *key)
            gate, down, up = checkpoint.expert(key)
            assert torch.equal(torch.cat((gate, up)).float(), w13) and torch.equal(down.float(), w2)
            buffer = torch.empty(2 * checkpoint.model.expert_numbers, dtype=torch.uint8)
            stacked, second = checkpoint.stacked_expert(key, buffer)
            assert torch.equal(stacked.float(), w13) and torch.equal(second.float(), w2)
            assert all(map(torch.equal, (b.numbers(torch.float32) for b in checkpoint.expert_blocks(key)), (w13, w2)))


@pytest.mark.parametrize("at", range(len(VARIANTS)))
def test_the_logits_are_those_of_the_decoded_model(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, by torch: within 1e-4, and the same token wherever the reference's gap exceeds 2e-4."""
    monkeypatch.setenv("QMIX_NATIVE", "off")
    source, theirs = write_published(tmp_path / "source", VARIANTS[at], torch.float32, at)
    with torch.inference_mode():
        want = theirs(torch.tensor([IDS[:46]]), use_cache=False).logits[0]
    with load(quantized(source, tmp_path / "store", MXFP4), threads=1, context=64, scoring=True) as engine:
        got = logits(engine)
    assert want.std() > 1
    assert (got - want).abs().max() < 1e-4
    best = want.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2e-4
    assert sure.sum() > 40 and torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])


def test_paged_equals_resident(published: tuple[Path, Any], tmp_path: Path) -> None:
    store = quantized(published[0], tmp_path / "store", QuantConfig("mxfp4", "int8", "", 0, 0))
    with load(store, threads=1, context=64) as engine:
        assert engine.plan.resident
        want = logits(engine)
    with paged(store, prefetch="ahead") as engine:
        assert not engine.plan.resident
        for _ in range(2):
            assert torch.equal(logits(engine), want)


def test_eval_reads_the_decoded_weights(published: tuple[Path, Any]) -> None:
    """What transformers computes beside a store; so many bits a weight as the checkpoint has."""
    source, theirs = published
    with Checkpoint.open(source) as checkpoint:
        weights = Weights(checkpoint)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(weights[name], tensor), name
    with Original.open(source, print) as original:
        found = original.about()
    assert found["parameters"] == sum(t.numel() for t in theirs.state_dict().values())
    assert 4 < found["bits_per_weight"] == round(8 * found["bytes"] / found["parameters"], 3) < 16


# --- commands ---

def test_quantize_keeps_them_by_default_and_says_so(published: tuple[Path, Any], tmp_path: Path) -> None:
    done = good("quantize", published[0], tmp_path / "store")
    assert "experts: mxfp4 as published, kept bit for bit" in done.stderr + done.stdout
    with Store.open(tmp_path / "store") as store:
        assert store.quant == QuantConfig("mxfp4", "int8", "", 0, 0)


@pytest.mark.parametrize("kind", ["int4", "keep"])
def test_another_format_is_said(published: tuple[Path, Any], tmp_path: Path, kind: str) -> None:
    done = good("quantize", published[0], tmp_path / "store", "--format", kind)
    words = "quantizes them a second time" if kind == "int4" else "decodes them, exactly"
    assert f"--format {kind} {words}" in done.stderr + done.stdout
    with Store.open(tmp_path / "store") as store:
        w13, _ = record(store, store.model.expert_keys[5])
        want, _ = decoded_experts(published[1], *store.model.expert_keys[5])
        assert torch.equal(unpack(w13), want) == (kind == "keep")


@pytest.mark.parametrize(("flags", "words"), [
    (("--group-size", "64"), "the experts are mxfp4 already and stay so; --group-size 64: only int4"),
    (("--method", "rtn"), "the experts are mxfp4 already and stay so; --method rtn"),
    (("--calibration", "text"), "--calibration text: the experts are mxfp4 already and stay so: there are no codes")])
def test_flags_of_another_format_are_refused(published: tuple[Path, Any], tmp_path: Path, flags: tuple[str, ...],
                                             words: str) -> None:
    done = qmix("quantize", published[0], tmp_path / "store", *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_a_dense_int4_beside_them_has_its_own_method(published: tuple[Path, Any], tmp_path: Path) -> None:
    """By gptq, whose text passes through the experts: they still stay as they are."""
    (tmp_path / "text").write_text("The lamp at the harbour was lit, and nobody asked who had lit it. " * 60)
    good("quantize", published[0], tmp_path / "store", "--dense", "int4", "--calibration", tmp_path / "text",
         "--calibration-tokens", 500)
    with Store.open(tmp_path / "store") as store:
        assert (store.quant.experts, store.quant.dense, store.quant.method) == ("mxfp4", "int4", "gptq")
        for key in store.model.expert_keys[::7]:
            assert all(map(torch.equal, map(unpack, record(store, key)), decoded_experts(published[1], *key)))


def test_a_size_with_room_for_them_keeps_them(published: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The lamp at the harbour was lit, and nobody asked who had lit it. " * 60)
    how = ("--calibration", tmp_path / "text", "--calibration-tokens", 300)
    done = good("quantize", published[0], tmp_path / "large", "--fit", "1G", *how)
    assert "kept bit for bit: --fit 1.0 GiB has room" in done.stderr + done.stdout
    with Store.open(tmp_path / "large") as store:
        assert store.quant.experts == "mxfp4"
    done = good("quantize", published[0], tmp_path / "small", "--bpw", "7", *how)
    assert "--bpw 7 quantizes them a second time" in done.stderr + done.stdout
    with Store.open(tmp_path / "small") as store:
        assert store.quant.experts == "mixed"


def test_a_plan_from_a_config_alone(tmp_path: Path) -> None:
    """gpt-oss-20b: its experts take 4.25 bits a weight, and their biases."""
    raw = {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw))
    said: list[str] = []
    planned = find_model(file, None, None, said.append)
    assert planned.quant == QuantConfig("mxfp4", "int8", "", 0, 0)
    assert said == ["experts: mxfp4 as published, kept bit for bit"]
    layout = record_layout(planned.model, planned.quant)
    weights = 3 * 2880 * 2880
    assert layout.payload == weights * 17 // 32 + 4 * 3 * 2880  # no padding: 2880 is 45 blocks of 64
    assert find_model(file, Flags("int4"), None, said.append).quant.experts == "int4"
    assert len(said) == 2 and "--format int4 quantizes them a second time" in said[1]
    found = json.loads(good("plan", file, "--ram", "16G", "--device", "cpu", "--dense", "int4", "--json").stdout)
    assert found["record_bytes"] == layout.nbytes and found["in_memory"] == found["records"] == 24 * 32


def test_which_configs_say_so() -> None:
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    assert published_experts({**FIRST["gpt_oss"], **config}) == "mxfp4"
    assert published_experts(FIRST["gpt_oss"]) is published_experts({**FIRST["mixtral"], **config}) is None
    apart = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.experts"]}
    assert published_experts({**FIRST["gpt_oss"], "quantization_config": apart}) is None


# --- files that are wrong ---

def change_of(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(("change", "words"), [
    (lambda tensors: tensors.pop(DOWN + "_scales"), f"{DOWN}_scales: missing (1 of "),
    (change_of(DOWN + "_blocks", lambda t: t[..., :8].contiguous()), "want [rows, blocks, 16]"),
    (change_of(DOWN + "_blocks", lambda t: t[:, :32].contiguous()), f"{DOWN}_blocks: got shape [32, 32]"),
    (change_of(DOWN + "_scales", lambda t: t[:, :32].contiguous()), f"{DOWN}_scales: got shape [32, 1]"),
    (change_of(DOWN + "_scales", lambda t: t.to(torch.bfloat16)), f"{DOWN}_scales: got dtype BF16, want U8"),
    (change_of(DOWN + "_bias", lambda t: t.float()), f"{DOWN}_bias: got float32, want bfloat16"),
])
def test_a_checkpoint_that_is_not_of_its_config(published: tuple[Path, Any], tmp_path: Path, words: str,
                                                change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(published[0] / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((published[0] / "config.json").read_bytes())
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(tmp_path)
    assert words in refusal.value.message and refusal.value.cure


@pytest.mark.parametrize("value", [253, 255])
def test_a_scale_that_no_weight_has(published: tuple[Path, Any], tmp_path: Path, value: int) -> None:
    tensors = load_file(published[0] / "model.safetensors")
    tensors[DOWN + "_scales"][3, 7, 0] = value
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_bytes((published[0] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=rf"{DOWN}_scales\[3\]: holds {value}, want at most 252"):
        quantized(source, tmp_path / "store", MXFP4)


def test_a_config_that_says_otherwise_than_the_files(published: tuple[Path, Any], tmp_path: Path) -> None:
    """The files count: bf16 experts beside quantization_config are read as they are, and it is said."""
    source, _ = published
    with Checkpoint.open(source) as checkpoint:
        store = quantized(source, tmp_path / "keep", UNQUANTIZED)
        assert checkpoint.nbytes < sum(f.stat().st_size for f in store.glob("*.safetensors"))
    theirs = published[1]
    theirs.save_pretrained(tmp_path / "plain")
    raw = json.loads((source / "config.json").read_bytes())
    (tmp_path / "plain" / "config.json").write_text(json.dumps(raw))
    with Checkpoint.open(tmp_path / "plain") as checkpoint:
        assert checkpoint.expert_format is None
        assert len(checkpoint.notes) == 1 and "says that the experts are MXFP4" in checkpoint.notes[0]


def test_other_models_refuse_such_a_config(tmp_path: Path) -> None:
    raw = {**FIRST["mixtral"], "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="the weights are quantized already, as mxfp4"):
        Checkpoint.open(tmp_path)
    assert mxfp4_layout(read_model(FIRST["mixtral"])) is None


def test_mxfp4_is_no_format_for_dense_matrices() -> None:
    done = qmix("quantize", "nowhere", "out", "--dense", "mxfp4")
    assert done.returncode == 2 and "dense" in done.stderr


@pytest.mark.parametrize(("more", "words"), [
    ({"modules_to_not_convert": 7}, "modules_to_not_convert: got 7, want a list of names"),
    ({"modules_to_not_convert": ["lm_head", 1]}, "want a list of names"),
    ({"block_size": 16}, "quantization_config: block_size: a key that qmix does not know")])
def test_what_a_config_says_of_them_is_understood_or_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    raw = {**FIRST["gpt_oss"], "quantization_config": {"quant_method": "mxfp4", **more}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path)
    done = qmix("plan", tmp_path / "config.json", "--ram", "8G")
    assert done.returncode == 4 and words in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_numbers_that_float16_does_not_have_are_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    write_published(tmp_path, dtype=torch.float16)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[DOWN + "_scales"][...] = 102  # 2^-25
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.expert(ExpertKey(0, 0))[1].dtype == torch.float16
        checkpoint.expert_blocks(ExpertKey(1, 0))  # kept as they are, they are exact
        with pytest.raises(CheckpointError, match=f"{DOWN}_blocks: has numbers that float16 does not have"):
            checkpoint.expert(ExpertKey(1, 0))
