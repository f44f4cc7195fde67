"""Checkpoints that are quantized already, in every layout that qmix reads: the numbers are those of an independent
decoder (lowbit_checkpoints.py), the logits those of transformers on these numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FIRST, quantized
from helpers import UNQUANTIZED
from lowbit_checkpoints import CASES, write_lowbit
from test_architectures import IDS, logits

from qmix.checkpoint import Checkpoint
from qmix.engine import load
from qmix.evaluate.reference import Weights

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
