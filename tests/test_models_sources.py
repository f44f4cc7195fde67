"""The tables of tensor names against the models of transformers, and the shape rules of their steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_configs import ALONE, CASES, TINY, ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qmix.models import ARCHITECTURES, Layout, Misfit, Source, choose_layout, layouts, read_model
from qmix.models.source import Index, PerHead, Rows, Squeeze, Strided, Transpose
from qmix.spec import Model


def transformers_shapes(raw: Mapping[str, Any], kind: Any = AutoModelForCausalLM) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what transformers has in memory for that config.json; nothing is allocated."""
    config = AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = kind.from_config(config)
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def wanted_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    wanted = {t.name: t.shape for t in model.tensors()}
    for key in model.expert_keys:
        wanted.update((t.name, t.shape) for t in model.expert_tensors(key))
    return wanted


def check(model: Model, there: dict[str, tuple[int, ...]]) -> Layout:
    """Every tensor has a source, no tensor that is there is left, all shapes are as the steps say, and every number of
    each tensor is used once. Returns the layout."""
    if model.tied:
        there.pop("lm_head.weight", None)
    layout, wanted = choose_layout(layouts(model), there), wanted_shapes(model)
    assert layout.keys() == wanted.keys()
    assert {source.name for source in layout.values()} == there.keys()
    used: dict[str, int] = defaultdict(int)
    for name, source in layout.items():
        assert source.shape_out(there[source.name]) == wanted[name], name
        used[source.name] += prod(wanted[name])
    assert used == {name: prod(shape) for name, shape in there.items()}
    return layout


@pytest.mark.parametrize("raw", CASES, ids=ids)
def test_the_layout_in_memory_is_that_of_transformers(raw: Mapping[str, Any]) -> None:
    model = read_model(raw)
    layout = check(model, transformers_shapes(raw))
    if model.moe_layers:
        assert any(isinstance(step, Index) for source in layout.values() for step in source.steps), "experts are fused"


@pytest.mark.parametrize("raw", CASES, ids=ids)
def test_the_published_layout_is_what_transformers_writes(raw: Mapping[str, Any], tmp_path: Any) -> None:
    """save_pretrained undoes the fusion of the experts: its file has the names of the published checkpoints."""
    from safetensors import safe_open

    model = read_model(raw)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    layout = check(model, there)
    if model.architecture in ("mixtral", "mistral", "qwen3_moe", "olmoe"):
        assert layout == layouts(model)[0]


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "out_hidden_size": 64}


@pytest.mark.parametrize("kind", ["gemma4", "qwen3_5_moe"])
def test_the_towers_of_a_model_that_also_sees_are_skipped_by_name(kind: str) -> None:
    raw = {**TINY[kind], "vision_config": {"model_type": "qwen3_5_moe_vision" if "qwen" in kind else "gemma4_vision",
                                           **VISION}}
    there = transformers_shapes(raw, AutoModelForImageTextToText)
    skipped = [name for name in there if ARCHITECTURES[kind].SKIPPED.fullmatch(name)]
    assert skipped and "model.language_model.embed_tokens.weight" in there
    check(read_model(raw), {name: shape for name, shape in there.items() if name not in skipped})


def test_every_architecture_has_at_least_four_configurations() -> None:
    kinds = [raw["model_type"] for raw in CASES]
    assert all(kinds.count(kind) >= 4 for kind in TINY)
    assert {*TINY, *(raw["model_type"] for raw in ALONE)} == ARCHITECTURES.keys()


# --- steps ---

def test_steps_compose() -> None:
    up = Source("x", (Index(3, 8), Transpose(), Strided(1, 2)))
    assert up.shape_out((8, 64, 192)) == (96, 64)
    assert Source("x", (Rows(2, 5, 8), Squeeze(1))).shape_out((8, 1, 4)) == (3, 4)
    assert Source("x", (PerHead(2, (1, 2)), Rows(0, 2, 6))).shape_out((6, 7)) == (2, 7)


@pytest.mark.parametrize(("step", "shape"), [
    (Index(0, 8), (7, 2, 2)), (Index(0, 8), (8,)), (Rows(0, 4, 8), (9, 2)), (Rows(0, 0, 1), ()),
    (Strided(0, 2), (3, 2)), (Transpose(), (2, 2, 2)), (PerHead(2, (1, 2)), (5, 2)), (Squeeze(1), (2, 2)),
    (Squeeze(2), (2, 1))])
def test_a_shape_that_a_step_is_not_made_for(step: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(Misfit, match=r"got shape .*, want"):
        Source("x", (step,)).shape_out(shape)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4))
def test_halves_and_heads_keep_the_count(sizes: list[int], heads: int) -> None:
    shape = (heads * sum(sizes), 3)
    assert PerHead(heads, tuple(sizes)).shape_out(shape) == shape
