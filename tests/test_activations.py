"""What joins gate and up, at every level and in torch, against float64.

The logistic function 1 / (1 + exp(-a)) carries the error of the exponential on at most as it is. That has 8 roundings
and n more in a, each of which moves the exponential by |a| * U (Higham 2002, section 3.1); the rest is 6 operations.
Beyond 87 the exponential stays what it is there. torch's GELU is (1 + tanh) / 2, in fp64 for so few rows: where tanh is
near -1 the sum cancels, and what is left errs by tanh's last two bits, each 2^-54 of the whole.
"""

from __future__ import annotations

import math

import pytest
import torch
from bounds import FP32
from test_layer_variants import OPS, random
from torch import Tensor

from qmix.kernels.layer import TORCH, LayerOps
from qmix.spec import Activation

# n, and what the logistic function is taken of.
CASES = {
    "swiglu": (Activation(), 0, lambda g: g),
    "geglu": (Activation("geglu"), 8, lambda g: 2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)),
    "swiglu_clamped": (Activation("swiglu_clamped", 1.702, 7.0), 2, lambda g: 1.702 * g),
}
every_op = pytest.mark.parametrize("layer_ops", OPS, ids=lambda layer_ops: layer_ops.name)


def formula(by: Activation, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, what it is multiplied by besides the logistic function), in float64."""
    gate, up = gate.double(), up.double()
    if by.limit is None:
        return gate, up
    return gate.clamp(max=by.limit), up.clamp(-by.limit, by.limit) + 1


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(layer_ops: LayerOps, name: str, dtype: torch.dtype) -> None:
    by, roundings, argument = CASES[name]
    gate, up = random(5, 331).to(dtype) * 4, random(5, 331, seed=1).to(dtype) * 5
    gate[0, :4] = torch.tensor([0.0, 300.0, -300.0, -20.0])
    got = layer_ops.activate(by, gate, up)
    gate64, factor = formula(by, gate, up)
    inside = argument(gate64)
    want = gate64 * inside.sigmoid() * factor
    least = 2.0**-53 if layer_ops is TORCH and name == "geglu" else math.exp(-87)
    bound = (14 + roundings * inside.abs().clamp(max=88)) * FP32 * want.abs() + (gate64 * factor).abs() * least
    assert got.dtype == torch.float32
    assert ((got - want).abs() <= bound + 2.0**-126).all()


@every_op
@pytest.mark.parametrize("name", CASES)
def test_rows_are_apart_and_nan_stays(layer_ops: LayerOps, name: str) -> None:
    gate, up = random(8, 37), random(8, 37, seed=1)
    together = layer_ops.activate(CASES[name][0], gate, up)
    alone = [layer_ops.activate(CASES[name][0], *(x.clone() for x in rows)) for rows in zip(
        gate.split(1), up.split(1), strict=True)]
    assert torch.equal(together, torch.cat(alone))
    gate[3, 5], up[4, 6] = math.nan, math.nan
    assert layer_ops.activate(CASES[name][0], gate, up).isnan().nonzero().tolist() == [[3, 5], [4, 6]]
