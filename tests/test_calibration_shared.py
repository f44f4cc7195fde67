"""Calibration of what stands beside experts, and of delta nets, in models that qmix reads but does not run yet: against
the eager runner, which is held against transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from forward_models import eager
from test_calibration import check
from torch import Tensor

from qmix.config import ExpertKey, Step
from qmix.quantize.calibration import Calibration
from qmix.quantize.forward_pass import ForwardPass
from qmix.quantize.guide import AFTER, BEFORE, EXPERTS, Guide, stages
from qmix.spec import Activation, Attention, Branch, DeltaNet, Expert, Layer, Mlp, Model, Moe, Norm, Norms, Rope, Router

NORM, GEGLU = Norm(1e-5), Activation("geglu")
ATTENTION = Attention(4, 2, 8, Rope(1000.0, 8), output_gate=True, window=6)
SHARED = Moe(Router(5, 2, over="all"), Expert(16), shared=Mlp(24), shared_gate=True)
BESIDE = Moe(Router(5, 2), Expert(16, GEGLU), Branch(NORM, NORM), beside=(Mlp(40, GEGLU), Branch(NORM, NORM)))
TEXT = Calibration(torch.randint(0, 96, (10, 30), generator=torch.Generator().manual_seed(2)))
SPEC = Model("test", 32, 96, 512, (
    Layer(DeltaNet(2, 4, 8, 8, 4, NORM), SHARED, Norms(NORM, NORM)),
    Layer(ATTENTION, BESIDE, Norms(NORM, None, NORM, NORM), True),
    Layer(ATTENTION, SHARED, Norms(NORM, NORM, NORM, NORM))), NORM, "float32")


@dataclass
class Weights:
    """A checkpoint in memory, as layer_weights.Source has it."""

    model: Model
    tensors: Mapping[str, Tensor]
    path: str = "memory"

    def dense(self, name: str) -> Tensor:
        return self.tensors[name]

    def published(self, name: str) -> str:
        return name

    def stacked_expert(self, key: ExpertKey, buffer: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, down = (self.tensors[t.name] for t in self.model.expert_tensors(key))
        return torch.cat((gate, up)), down

    def expert_biases(self, key: ExpertKey) -> None:
        """They have none."""


@pytest.fixture(scope="module")
def source() -> Weights:
    random = torch.Generator().manual_seed(0)
    wanted = [*SPEC.tensors(), *(t for key in SPEC.expert_keys for t in SPEC.expert_tensors(key))]
    return Weights(SPEC, {t.name: torch.randn(t.shape, generator=random) * (
        2 * t.shape[-1] ** -0.5 if len(t.shape) > 1 else 0.5) + (t.role == "norm") for t in wanted})


def test_the_residual_is_that_of_the_eager_runner(source: Weights) -> None:
    forward = ForwardPass(source, TEXT)
    for layer in range(3):
        forward.enter(layer)
        for expert in range(5):
            key = ExpertKey(layer, expert)
            forward.expert(key, *source.stacked_expert(key, torch.empty(0)), False)
    forward.leave()
    runner = eager(SPEC, dict(source.tensors))
    want = torch.cat([runner.read(row, runner.new_cache(32), Step("prefill"), 0) for row in TEXT.ids])
    torch.testing.assert_close(forward.residual, want, rtol=1e-4, atol=1e-4)


def test_shared_mlps_are_measured_behind_the_experts(source: Weights) -> None:
    """gate and up share what they read, which is what the experts read too; down has its own."""
    stage = stages(SPEC)
    assert [stage(name)[1] for name in ("layers.0.delta.q", "layers.0.shared.gate", "layers.1.beside.down")] == [
        BEFORE, AFTER, AFTER]
    assert stage("embedding") < stage("layers.0.router.weight") < stage(ExpertKey(0, 3)) == (0, EXPERTS)
    assert stage(ExpertKey(2, 0)) < stage("layers.2.shared.up") < stage("head")
    guide = Guide(source, TEXT, {0}, None)  # type: ignore[arg-type]
    guide.inputs("layers.0.delta.q", {}, True)
    for expert in range(5):
        w13, w2 = source.stacked_expert(ExpertKey(0, expert), torch.empty(0))
        guide.inputs(ExpertKey(0, expert), {"w13": w13, "w2": w2}, False)
    x = guide._forward.normed.double()
    gate, up, down = (source.dense(f"layers.0.shared.{name}").double() for name in ("gate", "up", "down"))
    found = {name: guide.inputs(f"layers.0.shared.{name}", {}, True)[""] for name in ("gate", "up", "down")}
    middle = F.silu(x @ gate.T) * (x @ up.T)
    for name, read, weight in (("gate", x, gate), ("up", x, up), ("down", middle, down)):
        check(found[name], read, weight)
    assert found["gate"].factor(None) is found["up"].factor(None)
