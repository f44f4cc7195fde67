"""config.json of published models, with the keys that they have: read, and of the known count of parameters."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

from qmix.models import read_model
from qmix.spec import Attention, Model, Moe

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from published import AIR, GLM, MISTRAL, NEXT, OLMOE, PUBLISHED, QWEN3, QWEN35


def parameters(model: Model) -> int:
    dense = sum(prod(t.shape) for t in model.tensors())
    return dense + sum(prod(t.shape) for key in model.expert_keys for t in model.expert_tensors(key))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    raw, count = PUBLISHED[name]
    assert parameters(read_model(raw).trunk) == count


@pytest.mark.parametrize(("raw", "count"), [(AIR, 110_468_824_832), (GLM, 358_337_791_296)], ids=["Air", "4.5"])
def test_the_checkpoints_of_glm_have_a_prediction_head_more(raw: dict[str, Any], count: int) -> None:
    """What is counted of their files: one more layer, with an embedding, a head, a projection [H, 2H] and three norms
    of its own."""
    model = read_model(raw)
    (layer, _), hidden = model.expert_keys[-1], model.hidden
    head = sum(prod(t.shape) for t in model.layer_tensors(layer)) + sum(
        prod(t.shape) for key in model.expert_keys if key.layer == layer for t in model.expert_tensors(key))
    assert model.mtp == 1 and parameters(model) + head + 2 * model.vocab * hidden + 2 * hidden**2 + 3 * hidden == count


@pytest.mark.parametrize(("raw", "count"), [
    ({**NEXT, "num_nextn_predict_layers": 1}, 81_324_862_720), (QWEN35, 35_951_822_704 - 446_571_248)],
    ids=["Next", "3.5 without the tower for pictures"])
def test_the_checkpoints_of_qwen_have_a_prediction_head_more(raw: dict[str, Any], count: int) -> None:
    """What is counted of their files: one more layer with attention, a projection [H, 2H] and three norms. The
    config.json of Qwen3-Next does not say so."""
    model = read_model(raw)
    assert parameters(model) == count and read_model(NEXT).mtp_head is None
    assert sum(key.layer == model.num_layers for key in model.expert_keys) == model.num_experts


def test_what_a_token_of_glm_meets() -> None:
    """ "106B-A12B" leaves out the embedding and the head, or one of them; "355B-A32B" the embedding."""
    for raw, low, high in ((AIR, 12.1e9, 12.9e9), (GLM, 32.0e9, 33.0e9)):
        model = read_model(raw)
        idle = sum(prod(t.shape) for key in model.expert_keys if key.expert >= model.top_k
                   for t in model.expert_tensors(key))
        assert low < parameters(model) - idle - model.vocab * model.hidden < high


def test_what_tells_them_apart() -> None:
    mistral, qwen, olmoe = (read_model(raw).layers[0] for raw in (MISTRAL, QWEN3, OLMOE))
    for layer in (mistral, qwen, olmoe):
        assert isinstance(layer.mixer, Attention)
    assert mistral.mixer.window == 4096 and qwen.mixer.window is None  # type: ignore[union-attr]
    assert (qwen.mixer.norm_over, olmoe.mixer.norm_over) == ("head", "whole")  # type: ignore[union-attr]
    assert isinstance(qwen.mlp, Moe) and isinstance(olmoe.mlp, Moe)
    assert (qwen.mlp.router.normalize, olmoe.mlp.router.normalize) == (True, False)
    assert read_model(MISTRAL).expert_keys[-1] == (31, 0) and read_model(MISTRAL).moe_layers == ()
