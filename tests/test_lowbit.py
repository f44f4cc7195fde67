"""Checkpoints that are quantized already, in every layout that qmix reads: the numbers are those of an independent
decoder (lowbit_checkpoints.py), the logits those of transformers on these numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import FIRST, quantized
from helpers import UNQUANTIZED
from lowbit_checkpoints import CASES, write_lowbit
from test_architectures import IDS, good, logits
from test_mxfp4 import record

from qmix.checkpoint import Checkpoint
from qmix.engine import load
from qmix.evaluate.reference import Weights
from qmix.formats import unpack
from qmix.store import Store

KINDS = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_decoded_ones(case: str, tmp_path: Path) -> None:
    """Every tensor, bit for bit, in bfloat16; and it is said what was read as what."""
    kind = KINDS[list(CASES).index(case) % 2]
    source, theirs = write_lowbit(tmp_path / "source", FIRST[kind], case)
    with Checkpoint.open(source) as checkpoint:
        weights = Weights(checkpoint)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(weights[name], tensor), name
        assert checkpoint.nbytes == sum(map(checkpoint.nbytes_of, checkpoint._shares))
        (note,) = checkpoint.notes
        assert "quantized already" in note and "rounded to bfloat16" in note


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for case in ("fp8-blocks", "nvfp4", "awq", "gptq-desc-act")
                                            for kind in KINDS])
def test_the_logits_are_those_of_the_decoded_model(kind: str, case: str, tmp_path: Path) -> None:
    """In fp32, quantized with `--format keep --dense keep`: within 1e-4, and the same token wherever the reference's
    gap exceeds 2e-4."""
    source, theirs = write_lowbit(tmp_path / "source", FIRST[kind], case, torch.float32)
    with torch.inference_mode():
        want = theirs(torch.tensor([IDS[:46]]), use_cache=False).logits[0]
    with load(quantized(source, tmp_path / "store", UNQUANTIZED), threads=1, context=64, scoring=True) as engine:
        got = logits(engine)
    assert want.std() > 0.5
    assert (got - want).abs().max() < 1e-4
    best = want.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2e-4
    assert sure.sum() > 40 and torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])


# --- carried as they are ---

KEPT = {"awq": "q5_0", "gptq": "q4_0", "gptq-bf16": "int4g32", "gptq-zeros": "q5_0", "gptq8": "q8_0", "gptq2": "q4_0",
        "gptq3": "q4_0", "gptq-rows": "q5_0", "gptq-v2": "q5_0", "pack4": "int4g32", "pack4-fp16": "q4_0",
        "pack4-rows": "int4g128", "pack4-zeros": "q5_0", "pack8": "q8_0", "int8-rows": "q8_0", "int8-groups": "q8_0",
        "mxfp4": "mxfp4"}


@pytest.mark.parametrize("case", CASES)
def test_what_fits_a_format_is_kept(case: str, tmp_path: Path) -> None:
    """By default, to the last bit of the numbers that the file's codes and scales stand for: they are exact in fp32. It
    is said; of other layouts it is said that they are quantized a second time."""
    kind = KINDS[list(CASES).index(case) % 2]
    source, theirs = write_lowbit(tmp_path / "source", FIRST[kind], case, torch.float32)
    done = good("quantize", source, tmp_path / "store", "--threads", 1)
    with Store.open(tmp_path / "store") as store:
        quant = store.quant
        kinds = {name for pair in quant.kinds for name in pair} or \
            {quant.experts + (f"g{quant.group_size}" if quant.experts == "int4" else "")}
        if case not in KEPT:
            assert kinds == {"int4g64"}
            assert "quantized again adds to their error" in done.stderr and "read as float32" in done.stderr
            return
        assert kinds == {KEPT[case]}
        assert "kept bit for bit" in done.stderr
        for key in store.model.expert_keys[::3]:
            experts = theirs.model.layers[key.layer].mlp.experts
            found = map(unpack, record(store, key))
            assert all(map(torch.equal, found, (experts.gate_up_proj[key.expert], experts.down_proj[key.expert])))
        assert {r.error["all"] for r in store.manifest.records.values()} == {0.0}
        assert len(quant.dense_formats) >= (12 if KEPT[case] != "mxfp4" else 0)
