"""What Gemma 4 alone has: experts as tensors of their own, towers that are skipped, ends beside text_config, an
embedding scale of the weights' dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import FIRST, random_model, write
from model_configs import TINY, with_keys
from safetensors.torch import load_file, save_file

from qmix.checkpoint import Checkpoint
from qmix.errors import ConfigError
from qmix.forward.program import embed_program
from qmix.models import read_model
from qmix.spec import ExpertKey


@pytest.mark.parametrize("alone", [False, True])
def test_experts_apart_and_towers_that_are_skipped(alone: bool, tmp_path: Path) -> None:
    """alone: the names of the language model by itself."""
    source = write(random_model(FIRST["gemma4"], torch.bfloat16), FIRST["gemma4"], tmp_path / "fused")
    tensors, towers = load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if ".experts." in name]:
        stack = tensors.pop(name)
        for expert, one in enumerate(stack):
            parts = {"down": one} if "down" in name else dict(zip(("gate", "up"), one.chunk(2), strict=True))
            layer = name.rpartition(".")[0]
            tensors |= {f"{layer}.{expert}.{part}_proj.weight": t.clone() for part, t in parts.items()}
    if alone:
        tensors = {name.replace("model.language_model.", "model."): t for name, t in tensors.items()}
    else:
        towers = {f"model.{tower}.weight": torch.ones(2) for tower in (
            "vision_tower.encoder", "audio_tower.conv", "embed_vision.norm", "embed_audio.norm")}
    (tmp_path / "apart").mkdir()
    save_file({**tensors, **towers}, tmp_path / "apart" / "model.safetensors", {"format": "pt"})
    (tmp_path / "apart" / "config.json").write_bytes((source / "config.json").read_bytes())
    with Checkpoint.open(source) as fused, Checkpoint.open(tmp_path / "apart") as apart:
        assert set(apart.skipped) == set(towers) and not fused.skipped
        names = [t.name for key in (ExpertKey(0, 0), ExpertKey(5, 7)) for t in apart.model.expert_tensors(key)]
        for name in (*names, "layers.3.beside.up", "layers.5.output_scale"):
            assert torch.equal(apart._tensor(name), fused._tensor(name)), name


def test_the_ends_of_the_whole_model_are_more() -> None:
    assert read_model({**TINY["gemma4"], "eos_token_id": [1, 106]}).eos == (1, 106)
    assert read_model(with_keys(TINY["gemma4"], {"eos_token_id": 7})).eos == (7,)


def test_the_embedding_scale_is_rounded_as_the_weights_are() -> None:
    """sqrt(2816) is 53.066; a model in bfloat16 was trained with 53."""
    for dtype, scale in (("bfloat16", 53.0), ("float32", torch.tensor(2816**0.5).item())):
        model = read_model({**with_keys(TINY["gemma4"], {"hidden_size": 2816}), "dtype": dtype})
        assert embed_program(model).scale == scale  # type: ignore[attr-defined]


def test_embeddings_of_each_layer_are_refused_by_their_key() -> None:
    raw = json.loads(json.dumps(with_keys(TINY["gemma4"], {"hidden_size_per_layer_input": 256})))
    with pytest.raises(ConfigError, match=r"^text_config\.hidden_size_per_layer_input: got 256, want 0"):
        read_model(raw)
