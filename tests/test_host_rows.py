"""The CPU's share of a layer on a device: rows of several experts in one call are those of each alone, to the bit, and
nothing that was made for another layer goes up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from qmix.device import Routed, StandIn
from qmix.formats import Packed, pack
from qmix.kernels.table import KernelTable, native_block, select
from qmix.offload.host_rows import HostRows
from qmix.quantize.methods import quantize
from qmix.sizes import MX_BLOCK, MX_GROUP, MatrixSpec
from qmix.spec import Activation

HIDDEN, INNER, EXPERTS, TOP_K = 96, 64, 6, 3


CLAMPED = Activation("swiglu_clamped", 1.702, 0.5)


def kernels(format: str) -> KernelTable:
    blocks = {MX_BLOCK} if format == "mxfp4" else {native_block()}
    return select({format, "int8"}, blocks, say=lambda line: None, activations="auto")


def records(format: str) -> list[tuple[Packed, Packed]]:
    random = torch.Generator().manual_seed(5)
    found = []
    for _ in range(EXPERTS):
        pair = []
        for rows, cols, parts in ((2 * INNER, HIDDEN, 2), (HIDDEN, INNER, 1)):
            grouped = {"int4": (32, native_block()), "mxfp4": (MX_GROUP, MX_BLOCK)}.get(format, ())
            spec = MatrixSpec(format, rows, cols, parts, *grouped)
            weight = torch.randn(rows, cols, generator=random) / cols**0.5
            packed = quantize(weight, spec, "rtn") if format == "int4" else pack(weight, spec)
            if format == "mxfp4":  # as gpt-oss has them
                spec = replace(spec, bias=True, activation=CLAMPED if parts == 2 else Activation())
                packed = Packed.of(spec, {**packed.tensors, "bias": torch.randn(rows, generator=random)}, "a record")
            pair.append(packed)
        found.append((pair[0], pair[1]))
    return found


def choose(routed: Routed, ids: Sequence[Sequence[int]], seed: int) -> None:
    """What a readback would bring."""
    routed.host_ids.copy_(torch.tensor(ids))
    routed.host_x.copy_(torch.randn(routed.host_x.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("format", ["int4", "mxfp4", "fp32"])
@pytest.mark.parametrize("ids", [[[4, 0, 5]], [[4, 0, 5], [1, 4, 2], [0, 1, 4]]], ids=["one token", "three"])
def test_rows_of_several_experts_are_those_of_each_alone(format: str, ids: list[list[int]]) -> None:
    """In two calls of one layer, then another layer's: rows that were not asked for stay as the device has them."""
    device, table, pairs = StandIn(), kernels(format), records(format)
    slots = [2, 5, 0, 1, 3, 4]  # of each expert
    placed = [pairs[slots.index(slot)] for slot in range(EXPERTS)]
    host, routed = HostRows(device, table, placed, TOP_K), Routed(device, len(ids), HIDDEN, TOP_K, 0, 0)
    for layer, calls in enumerate(([[4], [0]], [[5, 4]], [[0]])):
        choose(routed, ids, layer)
        device.compute.run(lambda: routed.rows.fill_(7.0))
        host.begin()
        for experts in calls:
            host.compute(routed, [(expert, slots[expert]) for expert in experts])
        device.wait(device.compute.record())
        made = {expert for experts in calls for expert in experts}
        for expert in range(EXPERTS):
            tokens, ranks = (torch.tensor(ids) == expert).nonzero(as_tuple=True)
            alone = table.expert(routed.host_x[tokens], *pairs[expert]).float()
            expected = alone if expert in made else torch.full_like(alone, 7.0)
            assert torch.equal(routed.rows[tokens, ranks], expected), (layer, expert)


def test_experts_join_where_the_native_kernels_compute_them() -> None:
    table, other = kernels("int4"), kernels("fp32")
    assert HostRows(StandIn(), table, records("int4"), TOP_K).joins == (table.native is not None)
    assert not HostRows(StandIn(), other, records("fp32"), TOP_K).joins
