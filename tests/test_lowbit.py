"""Checkpoints that are quantized already, in every layout that qmix reads: the numbers are those of an independent
decoder (lowbit_checkpoints.py), the logits those of transformers on these numbers."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import torch
from architectures import quantized
from helpers import UNQUANTIZED
from lowbit_checkpoints import (
    CASES,
    GPTQ,
    compressed,
    decoded_model,
    gptq,
    pack_quantized,
    write_fused,
    write_lowbit,
)
from model_configs import with_keys
from test_architectures import IDS, good, logits
from test_mxfp4 import record
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.checkpoint.account import all_tensors
from qmix.commands.quantization import Flags, choose
from qmix.engine import load
from qmix.evaluate.reference import Original, Weights
from qmix.formats import unpack
from qmix.quantize import quantize_checkpoint
from qmix.store import Store

KINDS = ("mixtral", "qwen3_moe")
# Layouts whose numbers a format of a store has exactly; the others are quantized a second time.
KEPT = {"awq": "q5_0", "gptq": "q4_0", "gptq-bf16": "int4g32", "gptq-zeros": "q5_0", "gptq8": "q8_0", "gptq2": "q4_0",
        "gptq3": "q4_0", "gptq-rows": "q5_0", "gptq-v2": "q5_0", "pack3": "int4g32", "pack4": "int4g32",
        "pack4-fp16": "q4_0", "pack4-rows": "int4g128", "pack4-zeros": "q5_0", "pack5-old": "q8_0", "pack8": "q8_0",
        "int8-rows": "q8_0", "int8-groups": "q8_0", "mxfp4": "mxfp4"}


def kind_of(case: str) -> str:
    return KINDS[list(CASES).index(case) % 2]


def stacked(decoded: dict[str, Tensor], checkpoint: Checkpoint, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """w13 and w2 of an expert."""
    gate, up, down = (decoded[checkpoint.published(t.name)] for t in checkpoint.model.expert_tensors(key)[:3])
    return torch.cat((gate, up)).float(), down.float()


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_decoded_ones_and_stay_so_where_they_can(case: str, tmp_path: Path) -> None:
    """Every tensor, bit for bit, in fp32. By default a store has experts with just these numbers where a format of it
    can, which is said; of other layouts it is said that they are quantized a second time."""
    decoded, said = write_lowbit(tmp_path / "source", kind_of(case), case), list[str]()
    with Checkpoint.open(tmp_path / "source") as checkpoint:
        for tensor in all_tensors(checkpoint.model):
            assert torch.equal(checkpoint.dense(tensor.name), decoded[checkpoint.published(tensor.name)]), tensor.name
        assert checkpoint.nbytes == sum(map(checkpoint.nbytes_of, (t.name for t in all_tensors(checkpoint.model))))
        (note,) = checkpoint.notes
        assert "quantized already" in note and "rounded to float32" in note
        quant, _ = choose(checkpoint, Flags(), None, said.append)
        kinds = {name for pair in quant.kinds for name in pair} or \
            {quant.experts + (f"g{quant.group_size}" if quant.experts == "int4" else "")}
        if case not in KEPT:
            assert kinds == {"int4g64"} and not quant.dense_formats
            assert "quantized again adds to their error" in said[0] and "read as float32" in said[0]
            return
        assert kinds == {KEPT[case]} and "kept bit for bit" in said[0]
        quantize_checkpoint(checkpoint, tmp_path / "store", quant, threads=1)
        with Store.open(tmp_path / "store") as store:
            assert store.verify(deep=True) == []
            for key in store.model.expert_keys:
                assert all(map(torch.equal, map(unpack, record(store, key)), stacked(decoded, checkpoint, key)))
            assert {r.error["all"] for r in store.manifest.records.values()} == {0.0}
            if KEPT[case] != "mxfp4":
                dense = [t for t in store.model.tensors() if t.role in ("linear", "mlp")]
                assert len(quant.dense_formats) == len(dense)
            for name, _ in quant.dense_formats:
                assert torch.equal(unpack(store.dense(name)), decoded[checkpoint.published(name)])


@pytest.mark.parametrize(("moved", "kind"), [(32, "Q4_0"), (64, "INT4G64"), (16, "int4, groups of 64 (pack")])
@pytest.mark.parametrize("case", ["pack4", "gptq-bf16"])
def test_groups_that_moved(case: str, moved: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 64 columns that begin elsewhere stay as they are only in formats whose blocks each lie in one."""
    config = compressed("pack-quantized", group_size=64, actorder="group") if case == "pack4" else \
        {**GPTQ, "group_size": 64, "desc_act": True}
    packer = pack_quantized(4, 64, moved=moved) if case == "pack4" else \
        gptq(4, 64, symmetric=True, dtype=torch.bfloat16, moved=moved)
    monkeypatch.setitem(architectures.FIRST, "wide", with_keys(architectures.FIRST["mixtral"],
                                                              {"intermediate_size": 128}))
    monkeypatch.setitem(CASES, "moved", (config, packer))
    decoded = write_lowbit(tmp_path / "source", "wide", "moved")
    with Checkpoint.open(tmp_path / "source") as checkpoint:
        for key in checkpoint.model.expert_keys:
            down = checkpoint.model.expert_tensors(key)[2].name
            want = decoded[checkpoint.published(down)]
            assert torch.equal(checkpoint.w2(key, torch.empty(3 * want.nbytes, dtype=torch.uint8)), want)
            assert checkpoint.types[down].startswith(kind if moved > 16 or case == "pack4" else "GPTQ, 4 bits")
            if checkpoint.carriable(down):
                assert torch.equal(checkpoint.blocks(down).numbers(torch.float32), want)


@pytest.mark.parametrize("case", ["fp8-blocks", "nvfp4", "nvfp4-modelopt", "awq", "pack4-zeros", "gptq-desc-act"])
def test_they_are_rounded_to_the_model_s_dtype_once(case: str, tmp_path: Path) -> None:
    """bfloat16; and so transformers' model gets them for `qmix eval --against`."""
    kind = kind_of(case)
    decoded = write_lowbit(tmp_path / "source", kind, case, torch.bfloat16)
    with Checkpoint.open(tmp_path / "source") as checkpoint:
        weights = Weights(checkpoint)
        for name, tensor in decoded_model(kind, decoded, tmp_path / "decoded").state_dict().items():
            assert torch.equal(weights[name], tensor), name
    with Original.open(tmp_path / "source", print) as original:
        assert 4 < original.about()["bits_per_weight"] < 16


@pytest.mark.parametrize(("kind", "case"), [("mixtral", "fp8-blocks"), ("qwen3_moe", "fp8-blocks"), ("mixtral", "awq"),
                                            ("qwen3_moe", "nvfp4"), ("mixtral", "gptq-desc-act")])
def test_the_logits_are_those_of_the_decoded_model(kind: str, case: str, tmp_path: Path) -> None:
    """In fp32, quantized with `--format keep --dense keep`: within 1e-4, and the same token wherever the reference's
    gap exceeds 2e-4."""
    decoded = write_lowbit(tmp_path / "source", kind, case)
    with torch.inference_mode():
        want = decoded_model(kind, decoded, tmp_path / "decoded")(torch.tensor([IDS[:46]]), use_cache=False).logits[0]
    store = quantized(tmp_path / "source", tmp_path / "store", UNQUANTIZED)
    with load(store, threads=1, context=64, scoring=True) as engine:
        got = logits(engine)
    assert want.std() > 0.5
    assert (got - want).abs().max() < 1e-4
    best = want.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2e-4
    assert sure.sum() > 40 and torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])


@pytest.mark.parametrize("case", ["fp8-blocks", "fp8-matrix", "int8-rows"])
def test_experts_in_one_tensor(case: str, tmp_path: Path) -> None:
    """Scales have a first dimension for the experts, too. int8 with a scale a row stays as it is."""
    decoded = write_fused(tmp_path / "source", "qwen3_moe", case)
    with Checkpoint.open(tmp_path / "source") as checkpoint:
        for key in checkpoint.model.expert_keys:
            start = f"model.layers.{key.layer}.mlp.experts."
            want = decoded[f"{start}gate_up_proj"][key.expert], decoded[f"{start}down_proj"][key.expert]
            gate, down, up = checkpoint.expert(key)
            assert torch.equal(torch.cat((gate, up)), want[0]) and torch.equal(down, want[1])
            names = [t.name for t in checkpoint.model.expert_tensors(key)]
            assert checkpoint.carriable(*names[:2]) == ("q8_0" if case == "int8-rows" else None)
            if case == "int8-rows":
                assert torch.equal(checkpoint.blocks(*names[:2]).numbers(torch.float32), want[0])
        assert checkpoint.nbytes == sum(map(checkpoint.nbytes_of, (t.name for t in all_tensors(checkpoint.model))))


@pytest.mark.parametrize(("case", "words"), [("awq", "kept bit for bit"), ("fp8-blocks", "adds to their error")])
def test_the_command_says_it(case: str, words: str, tmp_path: Path) -> None:
    write_lowbit(tmp_path / "source", "mixtral", case)
    done = good("quantize", tmp_path / "source", tmp_path / "store", "--threads", 1)
    assert "quantized already, " in done.stderr and words in done.stderr
    assert words in good("plan", tmp_path / "source").stderr
