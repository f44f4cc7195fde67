"""Quantized GGUF files from end to end: what they have in a format of a store stays so, bit for bit, and is computed as
transformers computes the decoded numbers, wherever a record lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")

import bounds
import gguf
import gguf_models as models
import k_blocks
import numpy as np
from architectures import random_model
from model_configs import with_keys
from sentencepiece import SentencePieceProcessor
from test_architectures import IDS, logits, paged
from test_cli import qmix
from tokenizer_files import spm_model
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.commands.plan.report import Machine, find_gpu, find_model
from qmix.commands.quantization import Flags
from qmix.config import QuantConfig
from qmix.device import StandIn
from qmix.engine import Placement, load
from qmix.errors import ConfigError, Interrupted, UsageError
from qmix.formats import Packed, unpack
from qmix.kernels.device_table import choose_device_kernels
from qmix.kernels.table import select
from qmix.quantize import quantize_checkpoint
from qmix.quantize.carried import carry_all
from qmix.sizes import CARRIED
from qmix.store import Store

WIDE = {"mixtral": {"hidden_size": 256, "intermediate_size": 512},
        "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64},
        "gpt_oss": {"hidden_size": 96, "intermediate_size": 160}}  # no multiples of 256, as the real one's 2880
TypeOf = Callable[[str], str]


def q4_k_m(name: str) -> str:
    """As llama-quantize chooses for Q4_K_M: more bits where they help most."""
    if name == "output.weight" or "attn_v" in name or ("ffn_down" in name and "blk.1." not in name):
        return "Q6_K"
    return "Q8_0" if "attn_k" in name else "Q4_K"


def narrow(name: str) -> str:
    """The same where columns are no multiple of 256."""
    return "Q8_0" if "ffn_down" in name or name == "output.weight" else "Q5_1" if "attn_v" in name else "Q5_0"


TYPES: dict[str, TypeOf] = {"mixtral": q4_k_m, "qwen3_moe": q4_k_m, "gpt_oss": narrow}


@dataclass(frozen=True)
class Files:
    """A GGUF file, the store that `qmix quantize` makes of it without flags and what it said, and transformers' model
    with the numbers that the store should have."""

    kind: str
    gguf: Path
    store: Path
    said: str
    theirs: Any


def write(path: Path, kind: str, type_of: TypeOf, model: Any = None, **how: Any) -> Path:
    """With a tokenizer."""
    model = model if model is not None else random_model(with_keys(models.CONFIGS[kind], WIDE[kind]))
    pieces = SentencePieceProcessor(model_proto=spm_model())

    def keys(writer: Any) -> None:
        ids, kinds = range(len(pieces)), gguf.TokenType
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.id_to_piece(i).encode() for i in ids])
        writer.add_token_scores([pieces.get_score(i) for i in ids])
        writer.add_token_types([kinds.UNKNOWN if pieces.is_unknown(i) else kinds.CONTROL if pieces.is_control(i) else
                                kinds.BYTE if pieces.is_byte(i) else kinds.NORMAL for i in ids])

    return models.write(path, model, kind, type_of, keys=keys, **how)


def reread(model: Any, kind: str, type_of: TypeOf) -> Any:
    """Give the model the numbers of the file: exact where the store carries them, else rounded to bf16."""
    names = gguf.get_tensor_name_map(models.ARCHITECTURES[kind], model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            layer, part = name.split(".")[2], "down" if "down" in name else "gate"
            mapped = f"blk.{layer}.ffn_{part}_exps." + ("bias" if name.endswith("bias") else "weight")
        else:
            mapped = names.get_name(name, try_suffixes=(".weight", ".bias")) or ""
        if name.endswith("_proj_bias") and ".experts." in name:
            continue  # these stay fp32
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # the embedding
        if not models.is_matrix(mapped, tensor):
            tensor.copy_(tensor.bfloat16())
            continue
        turned = kind == "gpt_oss" and ".experts." in name
        rows = (tensor.transpose(1, 2) if turned else tensor).contiguous()
        number = gguf.GGMLQuantizationType[type_of(mapped)]
        exact = torch.from_numpy(np.array(gguf.dequantize(k_blocks.quantize(rows.numpy(), number.name), number)))
        exact = exact.view(rows.shape)
        tensor.copy_(exact.transpose(1, 2) if turned else exact)
    return model


@pytest.fixture(scope="module", params=list(WIDE))
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = random_model(with_keys(models.CONFIGS[kind], WIDE[kind]))
    path = write(folder / "m.gguf", kind, TYPES[kind], model)
    ran = qmix("quantize", path, folder / "store", "--threads", 1)
    assert ran.returncode == 0, ran.stderr
    return Files(kind, path, folder / "store", ran.stderr, reread(model, kind, TYPES[kind]))


@pytest.fixture(scope="module")
def want(files: Files) -> Tensor:
    with load(files.store, threads=1, context=64) as engine:
        assert engine.plan.resident
        return logits(engine)


def matrices(store: Store) -> dict[str, Packed]:
    """By what GGUF files call the first tensor of each."""
    found = {}
    for key in store.model.expert_keys:
        buffer = torch.full((store.layout.record(key).nbytes,), 255, dtype=torch.uint8)
        store.read_record(key, buffer)
        w13, w2 = store.expert(key, buffer)
        found[f"blk.{key.layer}.ffn_gate_exps.weight", key.expert] = w13
        found[f"blk.{key.layer}.ffn_down_exps.weight", key.expert] = w2
    return found


def test_every_expert_has_the_files_numbers(files: Files) -> None:
    """Bit for bit those that the package gguf decodes, and no error in the manifest."""
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(files.gguf).tensors}
    decoded = {name: gguf.dequantize(t.data, t.tensor_type) for name, t in there.items() if "_exps.weight" in name}
    with Store.open(files.store) as store:
        assert store.verify(deep=True) == []
        for (name, expert), m in matrices(store).items():
            assert m.spec.format == there[name].tensor_type.name.lower()
            exact = decoded[name][expert]
            if "gate" in name:
                exact = np.concatenate((exact, decoded[name.replace("gate", "up")][expert]))
            assert torch.equal(unpack(m).view(torch.int32), torch.from_numpy(exact).view(torch.int32)), name
        assert all(r.error["all"] == 0 for r in store.manifest.records.values())
        carried = [d for d in store.manifest.dense.values() if d.format in CARRIED]
        assert len(carried) == 4 * len(store.model.layers) + 2 and all(d.error == 0 for d in carried)


def test_what_happens_is_said(files: Files) -> None:
    said = " ".join(files.said.split())
    assert "experts: kept bit for bit: " in said
    assert "attention, head, embedding and other matrices: kept bit for bit: " in said
    assert "again" not in said and "decoded" not in said
    for kind in {(files.kind != "gpt_oss" and "q6_k") or "q8_0", (files.kind != "gpt_oss" and "q4_k") or "q5_0"}:
        assert kind in said
    shown = qmix("show", files.store)
    assert shown.returncode == 0 and " % q" in shown.stdout


def test_logits_are_those_of_transformers(files: Files) -> None:
    """Activations in bf16 are the only thing that is rounded otherwise: attention's and experts' weights are exact."""
    with torch.inference_mode():
        exact = files.theirs(torch.tensor([IDS[:46]]), use_cache=False).logits[0][32:]
    with load(files.store, threads=1, context=64, activations="bf16") as engine:
        got = logits(engine)
        layers = len(engine.store.model.layers)
    apart = (got - exact).norm(dim=1) / exact.norm(dim=1)
    assert apart.median() < bounds.chain(bounds.ACTIVATIONS_OF_A_LAYER * layers + 1, bounds.BF16)
    best = exact.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2 * (got - exact).abs().amax(1)
    assert sure.sum() > len(sure) // 3
    assert torch.equal(got.argmax(-1)[sure], exact.argmax(-1)[sure])


def test_int8_activations_are_close(files: Files, want: Tensor) -> None:
    with torch.inference_mode():
        exact = files.theirs(torch.tensor([IDS[:46]]), use_cache=False).logits[0][32:]
    layers = files.theirs.config.num_hidden_layers
    rest = bounds.chain(bounds.ACTIVATIONS_OF_A_LAYER * layers + 1, bounds.BF16)  # keys, values, sums
    assert ((want - exact).norm(dim=1) / exact.norm(dim=1)).median() < bounds.int8_activations(layers, 32) + rest


@pytest.mark.parametrize("prefetch", ["off", "both"])
def test_paged_equals_resident(files: Files, want: Tensor, prefetch: str) -> None:
    with paged(files.store, prefetch=prefetch) as engine:
        assert not engine.plan.resident
        assert torch.equal(logits(engine), want)
        assert engine.stats()["offload"]["decode"]["misses"] > 0


def test_without_native_kernels(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMIX_NATIVE", "off")
    said: list[str] = []
    with load(files.store, threads=1, context=64, say=said.append) as engine:
        got = logits(engine, count=1)
    with torch.inference_mode():
        exact = files.theirs(torch.tensor([IDS[:34]]), use_cache=False).logits[0][32:]
    assert any("without native kernels decodes every weight" in line for line in said)
    apart = bounds.chain(bounds.ACTIVATIONS_OF_A_LAYER * files.theirs.config.num_hidden_layers + 1, bounds.BF16)
    assert ((got - exact).norm(dim=1) / exact.norm(dim=1)).median() < apart


def test_a_tied_head_is_the_embedding_as_the_file_has_it(tmp_path: Path) -> None:
    model = random_model(with_keys(models.CONFIGS["mixtral"], {**WIDE["mixtral"], "tie_word_embeddings": True}))
    path = write(tmp_path / "m.gguf", "mixtral", q4_k_m, model)
    with Checkpoint.open(path) as checkpoint:
        quantize_checkpoint(checkpoint, tmp_path / "store", carry_all(checkpoint, QuantConfig(), None), threads=1)
    with load(tmp_path / "store", threads=1, context=64, activations="bf16") as engine:
        assert engine.store.manifest.dense["embedding"].format == "q4_k"
        got = logits(engine)
        layers = len(engine.store.model.layers)
    with torch.inference_mode():
        exact = reread(model, "mixtral", q4_k_m)(torch.tensor([IDS[:46]]), use_cache=False).logits[0][32:]
    apart = (got - exact).norm(dim=1) / exact.norm(dim=1)
    assert apart.median() < bounds.chain(bounds.ACTIVATIONS_OF_A_LAYER * layers + 1, bounds.BF16)


def test_drafts_have_the_bits_of_single_tokens(files: Files, want: Tensor) -> None:
    with load(files.store, threads=1, context=64) as engine:
        session = engine.session()
        session.prefill(IDS[:33])
        assert torch.equal(session.verify(IDS[33:39]), want[1:7])


def test_a_device_that_the_cpu_stands_in_for(files: Files) -> None:
    with load(files.store, threads=1, context=64, activations="bf16", placement=Placement(StandIn())) as engine:
        there = logits(engine)
    with torch.inference_mode():
        exact = files.theirs(torch.tensor([IDS[:46]]), use_cache=False).logits[0][32:]
    apart = bounds.chain(bounds.ACTIVATIONS_OF_A_LAYER * files.theirs.config.num_hidden_layers + 1, bounds.BF16)
    assert ((there - exact).norm(dim=1) / exact.norm(dim=1)).median() < apart


def test_a_gpu_refuses_by_name() -> None:
    table = select(["q4_k"], say=lambda line: None)
    with pytest.raises(UsageError, match="matrices in q4_k, for which there are no GPU kernels") as refused:
        choose_device_kernels(torch.device("cpu"), torch.bfloat16, ["q4_k", "bf16"], [], table, triton=True)
    assert "--device" in (refused.value.cure or "")


def test_resumed_is_the_same(files: Files, tmp_path: Path) -> None:
    seen: list[str] = []

    def stop(done: int, total: int, label: str) -> None:
        seen.append(label)
        if len(seen) == 25:
            raise KeyboardInterrupt

    with Checkpoint.open(files.gguf) as checkpoint:
        quant = carry_all(checkpoint, QuantConfig(), None)
        with pytest.raises(Interrupted):
            quantize_checkpoint(checkpoint, tmp_path / "out", quant, threads=1, progress=stop)
        assert quantize_checkpoint(checkpoint, tmp_path / "out", quant, threads=2).resumed > 20
    assert all(file.read_bytes() == (tmp_path / "out" / file.name).read_bytes() for file in files.store.iterdir())


def mixture(name: str) -> str:
    """Types that no store has, and gate and up of different ones."""
    if "ffn_up" in name and "blk.1." in name:
        return "Q6_K"
    if "ffn_down" in name or "attn_q" in name:
        return "Q3_K"
    return "Q4_K"


def test_what_cannot_stay_gets_at_least_a_bit_more(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "mixtral", mixture)
    ran = qmix("quantize", path, tmp_path / "store", "--threads", 1, "--method", "rtn")
    assert ran.returncode == 0, ran.stderr
    said = " ".join(ran.stderr.split())
    assert "12 matrices in Q3_K are quantized again as int4g64" in said
    assert "4 matrices in Q4_K and Q6_K, gate and up of different types, are quantized again as q8_0" in said
    assert "3 Q3_K are quantized again as --dense says" in said
    there = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
             for tensor in gguf.GGUFReader(path).tensors if "_exps" in tensor.name}
    with Store.open(tmp_path / "store") as store:
        assert store.verify(deep=True) == []
        for (name, expert), m in matrices(store).items():
            exact = there[name][expert]
            if "gate" in name:
                exact = np.concatenate((exact, there[name.replace("gate", "up")][expert]))
            off = np.linalg.norm(unpack(m).numpy() - exact) / np.linalg.norm(exact)
            layer = name.split(".")[1]
            assert m.spec.format == ("int4" if "down" in name else "q8_0" if layer == "1" else "q4_k")
            assert off == 0 if m.spec.format == "q4_k" else 0 < off < (0.02 if m.spec.format == "q8_0" else 0.15)
        errors = [r.error for key, r in store.manifest.records.items() if key.layer == 0]
        assert all(e["w13"] == 0 < e["all"] < e["w2"] for e in errors)  # carried weights count in the whole
    with load(tmp_path / "store", threads=1, context=64) as engine:
        resident = logits(engine)
    with paged(tmp_path / "store") as engine:
        assert torch.equal(logits(engine), resident)


def test_flags_decide(files: Files, tmp_path: Path) -> None:
    """--dense is followed; a flag of int4 without int4 is refused; --format int4 quantizes all again, and says so."""
    made = qmix("quantize", files.gguf, tmp_path / "a", "--dense", "int8", "--format", "auto", "--threads", 1)
    assert made.returncode == 0
    with Store.open(tmp_path / "a") as store:
        assert not store.quant.dense_formats and store.quant.expert_formats <= CARRIED.keys()
        assert {d.format for d in store.manifest.dense.values()} == {"int8", "plain"}
    refused = qmix("quantize", files.gguf, tmp_path / "b", "--method", "rtn")
    assert refused.returncode == 2 and "no codes to choose" in refused.stderr
    again = qmix("quantize", files.gguf, tmp_path / "c", "--format", "int4", "--method", "rtn", "--dry-run")
    assert again.returncode == 0 and "are quantized already" in " ".join(again.stderr.split())


def test_auto_refuses_a_text(files: Files, tmp_path: Path) -> None:
    """A text would choose codes, and there are none to choose; without --format auto it has all quantized again."""
    (tmp_path / "text").write_text("the fox " * 50)
    for how in (("--calibration", tmp_path / "text"), ("--method", "gptq", "--calibration", tmp_path / "text")):
        refused = qmix("quantize", files.gguf, tmp_path / "b", "--format", "auto", *how)
        assert refused.returncode == 2 and "--format auto: keeps the codes that the file has" in refused.stderr
        assert "--calibration" in refused.stderr and "--format int4" in refused.stderr
    assert Flags(calibration=tmp_path / "text", method="gptq").config().experts == "int4"


@pytest.mark.parametrize("flags", [
    Flags(), Flags("auto"), Flags(dense="int8"), Flags(dense="q8_0"), Flags("int4"), Flags("mxfp4"), Flags("q8_0"),
    Flags("auto", "int4", group_size=32), Flags(dense="keep"), Flags(group_size=32)])
def test_plan_decides_as_quantize(files: Files, flags: Flags, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same config and the same lines, or the same error."""
    given = {"--format": flags.format, "--dense": flags.dense, "--group-size": flags.group_size}
    args = [part for flag, value in given.items() if value is not None for part in (flag, value)]
    made = qmix("quantize", files.gguf, tmp_path / "out", *args, "--dry-run")
    planned = qmix("plan", files.gguf, *args, "--ram", "4G", "--device", "cpu", "--json")
    assert planned.returncode == made.returncode, planned.stderr + made.stderr
    if made.returncode:
        assert planned.stderr == made.stderr
        return

    def decided(said: str) -> list[str]:
        return [line for line in said.splitlines() if line.startswith(("experts: ", "attention, ", "note: "))]

    assert decided(planned.stderr) == decided(made.stderr)
    seen: list[QuantConfig] = []
    monkeypatch.setattr("qmix.quantize.quantize_checkpoint",
                        lambda checkpoint, out, quant, **how: seen.append(quant) or SimpleNamespace(lines=list))
    assert qmix("quantize", files.gguf, tmp_path / "out", *args).returncode == 0
    assert seen == [find_model(files.gguf, flags, None, lambda line: None).quant]


def test_plan_plans_for_no_gpu_that_lacks_the_kernels(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is described, nor one of this machine, as the engine; a device that the CPU stands in for has
    them."""
    lacking = "there are matrices in q"
    refused = qmix("plan", files.store, "--vram", "24G", "--ram", "4G")
    assert refused.returncode == 2 and lacking in refused.stderr and "no GPU kernels yet" in refused.stderr
    monkeypatch.setattr("qmix.engine.machine.TINY", 0)
    for triton in (True, False):
        monkeypatch.setattr("qmix.engine.machine._any", lambda say, triton=triton: StandIn(triton=triton))
        said: list[str] = []
        machine = find_gpu(find_model(files.store, None, None, said.append), Machine(ram=2**32), "auto", said.append)
        assert (machine.vram is None) == triton == any(lacking in line and "for the CPU" in line for line in said)
        said.clear()
        with load(files.store, threads=1, context=64, placement=Placement("auto"), say=said.append) as engine:
            assert (engine.device is None) == triton
        assert any(lacking in line and "the CPU computes" in line for line in said) == triton
    monkeypatch.setattr("qmix.engine.machine._any", lambda say: StandIn(triton=True))
    with pytest.raises(UsageError, match=lacking):
        load(files.store, threads=1, context=64, placement=Placement(StandIn(triton=True)))


def test_unquantized_experts_in_a_quantized_file(tmp_path: Path) -> None:
    """q8_0 is the most that they get, and the line says so; --format q8_0 says what it keeps."""
    types = {"ffn_gate": "Q8_0", "ffn_up": "Q6_K", "ffn_down": "F32"}

    def type_of(name: str) -> str:
        return next((kind for part, kind in types.items() if part in name), "Q8_0" if "attn_q" in name else "F32")

    path = write(tmp_path / "m.gguf", "mixtral", type_of)
    said = " ".join(qmix("quantize", path, tmp_path / "out", "--dry-run").stderr.split())
    assert "matrices in F32 are quantized as q8_0, the most that a mix has" in said
    assert "in Q8_0 and Q6_K, gate and up of different types, are quantized again as q8_0, the most that" in said
    assert "F32 are stored as --dense says" in said
    for dense, kept in (("q8_0", "3 of 15 matrices are in the format asked for and stay so"),
                        ("int8", "(Q6_K, Q8_0); they are read as")):
        said = " ".join(qmix("quantize", path, tmp_path / "out", "--format", "q8_0", "--dense", dense,
                             "--dry-run").stderr.split())
        assert kept in said and "adds to their error" in said


def test_a_half_carried_expert_is_summed_by_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its carried half is never decoded whole."""
    path = write(tmp_path / "m.gguf", "mixtral", mixture)
    monkeypatch.setattr("qmix.formats.unpack", None)  # calling it would fail
    with Checkpoint.open(path) as checkpoint:
        quantize_checkpoint(checkpoint, tmp_path / "out", carry_all(checkpoint, QuantConfig(method="rtn"), None))


def test_q8_0_from_unquantized_weights(tmp_path: Path) -> None:
    """--format q8_0 carries Q8_0, says so, and quantizes what is not quantized."""
    path = write(tmp_path / "m.gguf", "mixtral", lambda name: "Q8_0" if "_exps" in name else "F32")
    made = qmix("quantize", path, tmp_path / "a", "--format", "q8_0", "--dense", "q8_0")
    assert made.returncode == 0
    said = " ".join(made.stderr.split())
    assert "matrices are in the format asked for and stay as they are" in said and "adds to" not in said
    with Store.open(tmp_path / "a") as store:
        assert store.quant.experts == "q8_0" and all(r.error["all"] == 0 for r in store.manifest.records.values())
        assert all(0 < d.error < 0.01 for d in store.manifest.dense.values() if d.error is not None)
    with load(tmp_path / "a", threads=1, context=64) as engine:
        assert torch.isfinite(logits(engine)).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_a_scale_that_is_no_number_is_refused(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "mixtral", lambda name: kind)
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down_exps.weight")
    nbytes = gguf.GGML_QUANT_SIZES[found.tensor_type][1]
    with open(path, "r+b") as file:
        file.seek(found.data_offset + 7 * nbytes + {"Q6_K": 208}.get(kind, 0))
        file.write(b"\x00\x7c")
    ran = qmix("quantize", path, tmp_path / "out", "--threads", 1)
    assert ran.returncode == 4 and "blk.1.ffn_down_exps.weight: holds a scale that is not a number" in " ".join(
        ran.stderr.split()), ran.stderr


def test_experts_in_mxfp4_beside_matrices_in_q8_0(tmp_path: Path) -> None:
    """As gpt-oss's GGUF files are published: nothing is quantized again."""
    path = write(tmp_path / "m.gguf", "gpt_oss", lambda name: "MXFP4" if "_exps" in name else "Q8_0")
    ran = qmix("quantize", path, tmp_path / "store", "--threads", 1)
    said = " ".join(ran.stderr.split())
    assert ran.returncode == 0 and "kept bit for bit: 10 q8_0" in said and "again" not in said, said
    with Store.open(tmp_path / "store") as store:
        assert store.quant.experts == "mxfp4" and store.verify(deep=True) == []
        assert {d.format for d in store.manifest.dense.values()} == {"q8_0", "plain"}
        assert all(not d.error for d in store.manifest.dense.values())
    with load(tmp_path / "store", threads=1, context=64) as engine:
        resident = logits(engine)
    with paged(tmp_path / "store") as engine:
        assert torch.equal(logits(engine), resident)
    assert "kept bit for bit: 10 q8_0" in " ".join(qmix("plan", path, "--ram", "4G").stderr.split())


def test_a_config_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="q4_x"):
        QuantConfig("mixed", kinds=(("q4_x", "q4_k"),), mix=("0",), method="", group_size=0, block=0)
    with pytest.raises(ConfigError, match="method"):
        QuantConfig("mixed", kinds=(("q4_k", "q4_k"),), mix=("0",))
    with pytest.raises(ConfigError, match="dense_formats"):
        QuantConfig(dense_formats=(("head", "int4"),))
    with pytest.raises(ConfigError, match="each tensor once"):
        QuantConfig(dense_formats=(("head", "q4_k"), ("head", "q6_k")))
    with pytest.raises(ConfigError, match="format"):
        QuantConfig("q4_k", method="", group_size=0, block=0)
