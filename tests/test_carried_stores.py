"""Quantized GGUF files from end to end: what they have in a format of a store stays so, bit for bit, and is computed as
transformers computes the decoded numbers, wherever a record lies."""

from __future__ import annotations

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
from carried_files import WIDE, TypeOf, decoded, matrices, narrow, q4_k_m, write
from fast_interpreter import HAVE_TRITON
from model_configs import with_keys
from test_architectures import IDS, logits, paged
from test_cli import qmix
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.commands.plan.report import Machine, find_gpu, find_model
from qmix.commands.quantization import Flags
from qmix.config import QuantConfig
from qmix.device import StandIn
from qmix.device.cuda import open_cuda
from qmix.engine import Placement, load
from qmix.errors import Interrupted
from qmix.formats import unpack
from qmix.forward.weights import load_dense
from qmix.offload.needs import resident_dense_bytes
from qmix.quantize import quantize_checkpoint
from qmix.quantize.carried import carry_all
from qmix.sizes import CARRIED
from qmix.store import Store

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


def reread(model: Any, kind: str, type_of: TypeOf) -> Any:
    """Give the model the numbers of the file, which the store carries."""
    names = gguf.get_tensor_name_map(models.ARCHITECTURES[kind], model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            layer, part = name.split(".")[2], "down" if "down" in name else "gate"
            mapped = f"blk.{layer}.ffn_{part}_exps." + ("bias" if name.endswith("bias") else "weight")
        else:
            mapped = names.get_name(name, try_suffixes=(".weight", ".bias")) or ""
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # the embedding
        if not models.is_matrix(mapped, tensor):  # norms, routers and biases stay fp32
            continue
        turned = kind == "gpt_oss" and ".experts." in name
        rows = (tensor.transpose(1, 2) if turned else tensor).contiguous()
        exact = torch.empty_like(rows)
        joined = ".experts." in name and "gate" in name  # gate above up, or in turns
        gates = slice(0, None, 2) if turned else slice(rows.shape[1] // 2)
        ups = slice(1, None, 2) if turned else slice(rows.shape[1] // 2, None)
        for which, of in ((gates, mapped), (ups, mapped.replace("gate", "up"))) if joined else ((..., mapped),):
            some, number = (rows[:, which] if joined else rows).contiguous(), gguf.GGMLQuantizationType[type_of(of)]
            found = torch.from_numpy(np.array(gguf.dequantize(k_blocks.quantize(some.numpy(), number.name), number)))
            (exact[:, which] if joined else exact).copy_(found.view(some.shape))
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


def test_every_expert_has_the_files_numbers(files: Files) -> None:
    """Bit for bit those that the package gguf decodes, and no error in the manifest."""
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(files.gguf).tensors}
    exact = decoded(files.gguf)
    with Store.open(files.store) as store:
        assert store.verify(deep=True) == []
        for (name, expert), m in matrices(store).items():
            assert m.spec.format == there[name].tensor_type.name.lower()
            assert torch.equal(unpack(m).view(torch.int32), exact[name, expert].view(torch.int32)), name
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
    """Bit for bit what the same matrix gives as a head of its own, which the tests above hold to transformers."""
    keys = {**WIDE["mixtral"], "tie_word_embeddings": True}
    tied = random_model(with_keys(models.CONFIGS["mixtral"], keys))
    apart = random_model(with_keys(models.CONFIGS["mixtral"], {**keys, "tie_word_embeddings": False}))
    apart.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.get_input_embeddings().weight})

    def type_of(name: str) -> str:
        return q4_k_m("token_embd.weight" if name == "output.weight" else name)

    found = []
    for name, model in (("tied", tied), ("apart", apart)):
        with Checkpoint.open(write(tmp_path / f"{name}.gguf", "mixtral", type_of, model)) as checkpoint:
            quantize_checkpoint(checkpoint, tmp_path / name, carry_all(checkpoint, QuantConfig(), None), threads=1)
        with load(tmp_path / name, threads=1, context=64) as engine:
            assert engine.store.model.tied == (name == "tied")
            assert engine.store.manifest.dense["embedding"].format == "q4_k"
            found.append(logits(engine))
    assert torch.equal(*found) and found[0].std() > 0.1


def test_the_plan_counts_what_is_uploaded(files: Files) -> None:
    """Each piece of memory once, the packed embedding among them."""
    with Store.open(files.store) as store:
        weights = load_dense(store.model, torch.bfloat16, store.dense, StandIn())
        packed = (*weights.matrices.values(), *weights.stacks.values())
        assert weights.matrices["embedding"].spec.format in CARRIED and "embedding" not in weights.tensors
        pieces = {t.data_ptr(): t.nbytes for t in (*weights.tensors.values(), *(t for m in packed
                                                                                 for t in m.tensors.values()))}
        assert sum(pieces.values()) == resident_dense_bytes(store.model, store.quant)


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


@pytest.mark.models
@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
def test_tritons_kernels_in_the_engine(files: Files) -> None:
    """Under the interpreter, or on a GPU: the numbers of the CPU's kernels, for a prompt and two tokens at once."""
    # The interpreter gets bf16 products wrong.
    triton = open_cuda(0) if torch.cuda.is_available() else StandIn(half=torch.float16, triton=True)
    found = []
    for device in (StandIn(), triton):
        with load(files.store, threads=1, context=64, activations="bf16", placement=Placement(device)) as engine:
            assert engine.device is not None
            session = engine.session()
            session.prefill(IDS[:3])
            found.append(session.verify(IDS[3:5]).cpu())
    errors = (found[1] - found[0]).norm(dim=1) / found[0].norm(dim=1)
    assert errors.max() < bounds.model_apart(engine.model.num_layers)


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


def test_a_gpu_is_planned_for_and_computes(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is described, and one of this machine, as the engine: with the CPU's kernels in a GPU's place."""
    planned = qmix("plan", files.store, "--vram", "24G", "--ram", "4G")
    assert planned.returncode == 0, planned.stderr
    monkeypatch.setattr("qmix.engine.machine.TINY", 0)
    monkeypatch.setattr("qmix.engine.machine._any", lambda say: StandIn(triton=False))
    said: list[str] = []
    machine = find_gpu(find_model(files.store, None, None, said.append), Machine(ram=2**32), "auto", said.append)
    assert machine.vram is not None
    with load(files.store, threads=1, context=64, placement=Placement("auto"), say=said.append) as engine:
        assert engine.device is not None
    assert not any(line.startswith("not on") for line in said)


