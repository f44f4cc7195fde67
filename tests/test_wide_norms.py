"""GGUF files whose norms, routers and biases, in F32, have numbers that the dtype of the weights has not: they are
computed as they are, wherever a token is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")

import bounds
import gguf_models as models
from architectures import quantized, random_model
from carried_files import WIDE as SIZES
from carried_files import q4_k_m, write
from gguf_late_models import reversible
from helpers import UNQUANTIZED
from model_configs import with_keys
from test_architectures import IDS, logits, paged
from test_cli import qmix
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import QuantConfig
from qmix.device import StandIn
from qmix.engine import Placement, load
from qmix.errors import ConfigError
from qmix.models import read_model
from qmix.quantize import quantize_checkpoint
from qmix.quantize.carried import carry_all
from qmix.store import Store
from qmix.store.summary import describe

KINDS = ("mixtral", "qwen3_moe", "glm4_moe", "gpt_oss", "qwen3_next", "gemma4")
MATRICES = ("embed_tokens.weight", "lm_head.weight", "_proj.weight", "_proj", "_qkvz.weight", "_ba.weight")


def widened(raw: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> Any:
    """A model in fp32 whose matrices are numbers of `dtype`, and nothing else is."""
    model, random = reversible(random_model(raw)), torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if name.endswith(MATRICES) and "router.proj" not in name:
            tensor.copy_(tensor.to(dtype))
        else:
            tensor.mul_(1 + torch.rand(tensor.shape, generator=random) / 64)
    return model


def theirs(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS[:46]]), use_cache=False, output_hidden_states=True).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Weights in F16, which qmix computes in fp32. Norms rounded to fp16 would be 2^-12 off, ten times the bound."""
    model = widened(models.CONFIGS[kind])
    path = write(tmp_path / "m.gguf", kind, lambda name: "F16", model)
    want = theirs(model)
    with load(quantized(path, tmp_path / "store", UNQUANTIZED), threads=1, context=64, scoring=True) as engine:
        got, ours = logits(engine), engine.model
    assert {"before_mixer", "final_norm"} < {*ours.wide} and ours.dtype == "float16"
    apart = (got - want).norm(dim=1) / want.norm(dim=1)
    assert apart.median() < bounds.fp32_model(ours)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "qwen3_next", "gemma4"])
def test_wherever_a_token_is_computed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as the file has them in Q8_0: paged as resident and Op by Op as in native runs, bit for bit, and on a
    device that the CPU stands in for."""
    model = widened(models.CONFIGS[kind])
    path, store = write(tmp_path / "m.gguf", kind, lambda name: "Q8_0", model), tmp_path / "store"
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.model.dtype == "bfloat16" and not any("rounded" in note for note in checkpoint.notes)
        quantize_checkpoint(checkpoint, store, carry_all(checkpoint, QuantConfig(), None), threads=1)
    with load(store, threads=1, context=64, activations="bf16") as engine:
        want = logits(engine)
    with paged(store, activations="bf16") as engine:
        assert not engine.plan.resident and torch.equal(logits(engine), want)
    with load(store, threads=1, context=64, activations="bf16", placement=Placement(StandIn())) as engine:
        assert engine.device is not None
        there, layers = logits(engine), engine.model.num_layers
    exact = theirs(models.reread(model, kind, "Q8_0", torch.float32))[32:]
    for got in (want, there):
        apart = (got - exact).norm(dim=1) / exact.norm(dim=1)
        assert apart.median() < bounds.chain(bounds.ACTIVATIONS_OF_A_LAYER * layers + 1, bounds.BF16)
    monkeypatch.setattr("qmix.forward.runner.unsupported", lambda *_: "not asked for")
    with load(store, threads=1, context=64, activations="bf16") as engine:
        assert torch.equal(logits(engine), want) and engine._model.single_tokens == "not asked for"


def test_the_command_writes_them(tmp_path: Path) -> None:
    """Checksums agree, and `qmix show` says what the plain tensors are."""
    raw = with_keys(models.CONFIGS["mixtral"], SIZES["mixtral"])
    path = write(tmp_path / "m.gguf", "mixtral", q4_k_m, widened(raw))
    assert qmix("quantize", path, tmp_path / "store", "--threads", 1).returncode == 0
    with Store.open(tmp_path / "store") as opened:
        assert opened.verify(deep=True) == []
        assert opened.dense("layers.1.router.weight").dtype == torch.float32  # type: ignore[union-attr]
        assert describe(opened)["classes"][-1]["format"] == "fp32"


@pytest.mark.parametrize("wide", [("embedding",), ("attention.q",), ("layers.0.before_mixer",), ("nothing",)])
def test_other_names_are_refused(wide: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.wide: got .*, want names of norms, routers and biases"):
        replace(read_model(models.CONFIGS["mixtral"]), wide=wide)


def test_a_name_that_is_there_twice_is_refused() -> None:
    """Millions of one name would cost every command that opens the store minutes."""
    with pytest.raises(ConfigError, match="want each name once, 1 in all"):
        replace(read_model(models.CONFIGS["mixtral"]), wide=("final_norm",) * 3)
