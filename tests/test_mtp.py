"""The multi-token-prediction head of Qwen3-Next and Qwen3.5: its logits against a reference in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import RUNNING, VOCAB, quantized
from helpers import UNQUANTIZED
from model_configs import ids as name_of
from mtp_models import Reference, write_with_head
from torch import Tensor

from qmix.config import QuantConfig
from qmix.engine import load
from qmix.forward import program, weights
from qmix.forward.run_eager import Eager

CONTEXT = 160
IDS = torch.randint(3, VOCAB, (90,), generator=torch.Generator().manual_seed(5)).tolist()
HEADED = [raw for raw in RUNNING if raw["model_type"] in ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")]


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Those of each step of a head, [V], as they are computed."""
    found: list[Tensor] = []
    whole = Eager.head_buffers

    def noting(self: Eager, residual: Tensor, phase: str) -> dict[str, Tensor]:
        buffers = whole(self, residual, phase)
        found.append(buffers["logits"][-1].clone())
        return buffers

    monkeypatch.setattr(Eager, "head_buffers", noting)
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("raw", HEADED, ids=name_of)
def test_guesses_are_those_of_the_reference(raw: Mapping[str, Any], fused: bool, tmp_path: Path,
                                            logits: list[Tensor]) -> None:
    """Behind a prompt, behind decoded tokens, and behind drafts of which some were taken back."""
    model, source = write_with_head(raw, tmp_path / "source", fused)
    reference = Reference(model, raw, fused)
    with load(quantized(source, tmp_path / "store", UNQUANTIZED), threads=1, context=CONTEXT, mtp=True) as engine:
        assert engine.pace(7) is not None
        session = engine.session()

        def compare(count: int) -> None:
            del logits[:]
            guessed = session.draft(IDS[session.length], count)
            want = reference.guess(IDS[:session.length + 1], count)
            assert len(guessed) == len(logits) == count
            for got, right in zip(logits, want, strict=True):
                # fp32 on both sides of the final norm; a wrong token, norm or order moves logits by a tenth and more
                assert (got - right).norm() < 1e-4 * right.norm() and right.std() > 0.3
                two = right.topk(2).values
                assert two[0] - two[1] < 2e-4 or got.argmax() == right.argmax()

        session.prefill(IDS[:20])
        compare(3)
        for token in IDS[20:33]:
            session.decode(token)
        compare(2)
        session.verify([*IDS[33:36], 7, 9])
        session.trim(36)
        compare(4)
        session.prefill(IDS[36:50])
        compare(1)


@pytest.mark.parametrize("quant", [UNQUANTIZED, QuantConfig(), QuantConfig(dense="q8_0"),
                                   QuantConfig(dense="int4")], ids=["keep", "int8", "q8_0", "int4"])
def test_only_the_first_ids_of_a_large_vocabulary_are_guessed(quant: QuantConfig, tmp_path: Path, logits: list[Tensor],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits for fewer ids, without memory of their own; in int4 the rows of a head do not lie apart."""
    _, source = write_with_head(HEADED[0], tmp_path / "source", dtype=torch.bfloat16)
    store, found = quantized(source, tmp_path / "store", quant), []
    for ids in (VOCAB, 128):
        for module in (program, weights):
            monkeypatch.setattr(module, "MTP_VOCAB", ids)
        with load(store, threads=1, context=CONTEXT, mtp=True) as engine:
            assert engine.pace(7) is not None
            session = engine.session()
            session.prefill(IDS[:20])
            del logits[:]
            found.append((session.draft(IDS[20], 1)[0], logits[0]))
            held = engine._model._weights.dense.matrices
            assert {t.data_ptr() for t in held["mtp.head"].tensors.values()} == {
                t.data_ptr() for t in held["head"].tensors.values()}
    (_, whole), (guess, some) = found
    count = VOCAB if quant.dense == "int4" else 128
    assert torch.equal(some, whole[:count]) and guess == int(whole[:count].argmax())
