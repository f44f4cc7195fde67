"""Tensors read by their Source: every step against plain indexing, and a fused checkpoint against the published one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixtrals as names
import pytest
import torch
from helpers import UNQUANTIZED, tiny_config, tiny_tensors, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qmix import sources
from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey
from qmix.errors import CheckpointError
from qmix.models import Source, layouts, read_model
from qmix.models.source import Index, PerHead, Rows, Squeeze, Step, Strided, Transpose
from qmix.quantize import quantize_checkpoint
from qmix.shards import Location, Shard

MIXTRAL = {**tiny_config(), "dtype": "bfloat16"}


def test_every_step_against_plain_indexing() -> None:
    t = torch.arange(24).view(6, 4)
    for step, want in ((Index(2, 6), t[2]), (Rows(1, 4, 6), t[1:4]), (Strided(1, 2), t[[1, 3, 5]]),
                       (Transpose(), torch.stack([t[:, i] for i in range(4)])),
                       (PerHead(2, (1, 2)), t[[0, 3, 1, 2, 4, 5]]),
                       (PerHead(3, (1, 1)), t[[0, 2, 4, 1, 3, 5]])):
        assert torch.equal(sources.apply(t, (step,)), want)
        assert tuple(want.shape) == step.shape_out((6, 4))
    assert torch.equal(sources.apply(t.view(6, 1, 4), (Squeeze(1),)), t)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Step, ...]]:
    """A shape, and steps that fit it one after the other."""
    shape = first = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    steps: list[Step] = []
    for _ in range(draw(st.integers(0, 4))):
        rows = shape[0]
        options: list[Step] = [Rows(b := draw(st.integers(0, rows - 1)), draw(st.integers(b + 1, rows)), rows)]
        options += [Index(draw(st.integers(0, rows - 1)), rows)] if len(shape) > 1 else []
        options += [Transpose()] if len(shape) == 2 else []
        options += [Squeeze(1)] if len(shape) > 1 and shape[1] == 1 else []
        options += [Strided(draw(st.integers(0, 1)), 2), PerHead(2, (rows // 2,))] if rows % 2 == 0 else []
        options += [PerHead(2, (1, rows // 2 - 1))] if rows % 2 == 0 and rows > 2 else []
        steps.append(draw(st.sampled_from(options)))
        shape = steps[-1].shape_out(shape)
    return first, tuple(steps)


@settings(deadline=None)
@given(chains(), st.booleans())
def test_reading_a_piece_is_reading_all_and_taking_it(tmp_path_factory: Any, case: Any, into: bool) -> None:
    shape, steps = case
    path = tmp_path_factory.getbasetemp() / "piece.safetensors"
    whole = torch.randn(shape)
    save_file({"before": torch.ones(3), "x": whole}, path)
    shard = Shard(path)
    try:
        want = sources.apply(whole, steps)
        source = Source("x", steps)
        assert source.shape_out(shape) == tuple(want.shape)
        out = torch.full((want.numel() * 4,), 255, dtype=torch.uint8) if into else None
        got = sources.read(Location(shard, shard.file.entries["x"]), source, out)
        assert torch.equal(got, want) and got.is_contiguous()
        assert out is None or torch.equal(out.view(torch.float32).view(want.shape), want)
    finally:
        shard.close()


# --- Mixtral as transformers 5 holds it ---

def fused(path: Path, **overrides: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Mixtral in the fused layout, and the same weights by their published names."""
    raw = {**MIXTRAL, **overrides}
    model, published = read_model(raw), tiny_tensors(read_model(raw))
    one, two = layouts(model)
    stacks: dict[str, torch.Tensor] = {}
    for name, source in two.items():
        tensor = published[one[name].name]
        if not source.steps:
            stacks[source.name] = tensor
            continue
        expert, *rows = source.steps
        assert isinstance(expert, Index)
        count = rows[0].of if rows else tensor.shape[0]  # type: ignore[union-attr]
        stack = stacks.setdefault(source.name, torch.zeros(expert.of, count, tensor.shape[1], dtype=tensor.dtype))
        begin = rows[0].begin if rows else 0  # type: ignore[union-attr]
        stack[expert.at, begin:begin + tensor.shape[0]] = tensor
    return write_checkpoint(path, raw, stacks), published


def test_a_fused_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    path, published = fused(tmp_path / "fused")
    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.model
        for dense in names.dense_tensors(config):
            assert torch.equal(checkpoint.dense(names.canonical(checkpoint.model)[dense.name]), published[dense.name])
        for key in config.expert_keys:
            want = [published[names.expert_tensors(config, key)[part][0]] for part in ("w1", "w2", "w3")]
            assert all(map(torch.equal, checkpoint.expert(key), want))
            out = torch.empty_like(want[0])
            checkpoint.read_into(f"layers.{key.layer}.experts.{key.expert}.gate", out)
            assert torch.equal(out, want[0])
        assert checkpoint.nbytes == sum(t.nbytes for t in published.values())
        quantize_checkpoint(checkpoint, tmp_path / "a", UNQUANTIZED, threads=1)
    with Checkpoint.open(write_checkpoint(tmp_path / "published", MIXTRAL, published)) as checkpoint:
        quantize_checkpoint(checkpoint, tmp_path / "b", UNQUANTIZED, threads=1)
    for file in sorted((tmp_path / "b").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()


def test_a_fused_checkpoint_that_is_transformers_own(tmp_path: Path) -> None:
    """save_pretrained without undoing the fusion, read beside the model that wrote it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MIXTRAL))
    model.save_pretrained(tmp_path, save_original_format=False)
    with Checkpoint.open(tmp_path) as checkpoint:
        w1, w2, w3 = checkpoint.expert(ExpertKey(2, 3))
        experts = model.model.layers[2].mlp.experts
        assert torch.equal(torch.cat([w1, w3]), experts.gate_up_proj[3]) and torch.equal(w2, experts.down_proj[3])
        assert torch.equal(checkpoint.dense("layers.1.router.weight"),
                           model.model.layers[1].mlp.gate.weight)


def test_a_fused_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    path, _ = fused(tmp_path)
    for key, value, said in (("num_local_experts", 3, r"want \[3, 64\] by config.json"),
                             ("intermediate_size", 64, "want 128 rows by config.json")):
        (path / "config.json").write_text(json.dumps({**MIXTRAL, key: value}))
        with pytest.raises(CheckpointError, match=f"model.safetensors: model.layers.*got shape .*{said}"):
            Checkpoint.open(path)
