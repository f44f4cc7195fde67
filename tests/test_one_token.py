"""One token through experts in slots, what they are made of put together from addresses: the bits of Products of
tensors, with biases and without, for every activation.

H hidden, F inner, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qmix.formats import int8
from qmix.formats.packed import Packed
from qmix.kernels import native
from qmix.kernels.native import NativeProducts, Product
from qmix.offload.one_token import OneToken
from qmix.quantize.methods import quantize
from qmix.sizes import MatrixSpec
from qmix.spec import Activation

LEVELS = [(level, activations) for level in native.levels() for activations in ("int8", "bf16")]
KINDS = [Activation(), Activation("geglu"), Activation("swiglu_clamped", 1.702, 1.0)]
SLOTS, K, H, F = 5, 3, 130, 70  # neither size fills its blocks

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native kernels were not built: no C compiler")


def matrix(spec: MatrixSpec, seed: int) -> Packed:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.rows, spec.cols, generator=random) / spec.cols**0.5
    alone = quantize(weight, spec.without_bias, "rtn") if spec.bits else int8.pack(weight, spec.without_bias)
    bias = {"bias": torch.randn(spec.rows, generator=random)} if spec.bias else {}
    return Packed.of(spec, {**alone.tensors, **bias}, "matrix")


def slots(name: str, bias: bool, activation: Activation) -> list[tuple[Packed, Packed]]:
    spec = MatrixSpec(name, 2 * F, H, 2, bias=bias, activation=activation)
    if name != "int8":
        spec = replace(spec, group_size=32, block=32)
    down = replace(spec, rows=H, cols=F, parts=1, activation=Activation())
    return [(matrix(spec, 2 * slot), matrix(down, 2 * slot + 1)) for slot in range(SLOTS)]


def by_products(own: NativeProducts, views: list[tuple[Packed, Packed]], x: Tensor, chosen: list[int]) -> Tensor:
    rows, between = torch.empty(K, H), torch.empty(K, F)
    own.run([Product(x, views[slot][0], between[rank:rank + 1], gated=True) for rank, slot in enumerate(chosen)])
    own.run([Product(between[rank:rank + 1], views[slot][1], rows[rank:rank + 1]) for rank, slot in enumerate(chosen)])
    return rows


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["int4", "int3", "int8"])
def test_the_bits_of_products(name: str, bias: bool, activation: Activation) -> None:
    views = slots(name, bias, activation)
    for level, activations in LEVELS:
        own = NativeProducts(level, activations)
        one = OneToken(own, views, K)
        for seed, chosen in enumerate(([4, 0, 2], [2, 3, 1])):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(1, H, generator=torch.Generator().manual_seed(seed)).to(dtype)
                some = [(slot, rank) for rank, slot in enumerate(chosen)]
                one.gate_up(x, some[:1])
                one.gate_up(x, some[1:])
                one.down(some)
                assert torch.equal(one.rows[0], by_products(own, views, x, chosen)), (level, activations)
