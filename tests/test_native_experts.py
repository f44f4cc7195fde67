"""A table of expert records that the library reads: the bits of the products one by one, and what it does about a
record that is not in memory.

T tokens, H hidden, F inner, L layers, E experts, K chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from qmix.formats import grouped, unpack
from qmix.formats.packed import Packed
from qmix.kernels import native
from qmix.kernels.layer import TORCH
from qmix.kernels.native import CallSequence, NativeLayerOps, NativeProducts, Product, jobs
from qmix.kernels.native.experts import ExpertTable
from qmix.kernels.native.sequence import ADD, EXPERTS, ROUTE, addition
from qmix.kernels.router import RouterTensors
from qmix.sizes import MatrixSpec
from qmix.spec import Activation, Router

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native kernels were not built: no C compiler")
LEVELS = [(level, activations) for level in native.levels() or ["none"] for activations in ("int8", "bf16")]
every_level = pytest.mark.parametrize(("level", "activations"), LEVELS)
H, F, E, K, L = 128, 64, 6, 3, 2


@dataclass
class Experts:
    """Records of two kinds in slots, int4 in groups of 64 and of 32; those of odd experts are of the second kind, which
    has biases and a clamped activation."""

    table: ExpertTable
    slots: dict[tuple[int, int], Tensor]
    matrices: dict[tuple[int, int], tuple[Packed, Packed]]


CLAMPED = Activation("swiglu_clamped", 1.702, 0.8)


def matrix(rows: int, cols: int, group: int, seed: int, parts: int = 1) -> Packed:
    random = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (rows, cols), generator=random, dtype=torch.uint8)
    scale = (torch.rand(rows, cols // group, generator=random) / 100 + 0.01).bfloat16()
    zero = (torch.randn(rows, cols // group, generator=random) / 100).bfloat16()
    plain = grouped.pack(q, scale, zero, MatrixSpec("int4", rows, cols, parts, group_size=group, block=64))
    if group == 64:
        return plain
    spec = replace(plain.spec, bias=True, activation=CLAMPED if parts == 2 else Activation())
    return Packed.of(spec, {**plain.tensors, "bias": torch.randn(rows, generator=random) / 4}, "matrix")


def placed(slot: Tensor, start: int, m: Packed) -> tuple[Packed, int]:
    """The matrix, its tensors copied into the slot from `start` on; where they end."""
    tensors = {}
    for name, tensor in m.tensors.items():
        there = slot[start:start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensors[name] = there.copy_(tensor)
        start += -(-tensor.nbytes // 64) * 64
    return Packed.of(m.spec, tensors, "slot"), start


@pytest.fixture(scope="module")
def experts() -> Experts:
    slots, matrices = {}, {}
    for layer in range(L):
        for expert in range(E):
            group, seed = 32 if expert % 2 else 64, 10 * layer + expert
            slot = torch.zeros(40960, dtype=torch.uint8)
            first, at = placed(slot, 64 * (expert % 2), matrix(2 * F, H, group, seed, parts=2))
            second, _ = placed(slot, at, matrix(H, F, group, seed + 100))
            slots[layer, expert], matrices[layer, expert] = slot, (first, second)
    table = ExpertTable(L, E, [(slots[0, kind], *matrices[0, kind]) for kind in (0, 1)])
    for (layer, expert), slot in slots.items():
        table.enter(layer, expert, slot, expert % 2)
    return Experts(table, slots, matrices)


def computed(experts: Experts, native_: NativeProducts, layer: int, x: Tensor, ids: Tensor,
             topk_weights: Tensor) -> Tensor:
    count = len(x)
    between, rows, out = torch.empty(count * K, F), torch.empty(count, K, H), torch.full((count, H), torch.nan)
    job = experts.table.job(layer, x, ids, topk_weights, between, rows, out)
    assert CallSequence(native_.level, native_.code, native_.threads, [(EXPERTS, job)], tokens=count).run() is None
    return out


def one_by_one(experts: Experts, native_: NativeProducts, layer: int, x: Tensor, ids: Tensor,
               topk_weights: Tensor) -> Tensor:
    """Each expert of each token in products of its own."""
    rows = torch.empty(len(x), K, H)
    for token, chosen in enumerate(ids.tolist()):
        for rank, expert in enumerate(chosen):
            w13, w2 = experts.matrices[layer, expert]
            between = torch.empty(1, F)
            native_.run([Product(x[token:token + 1], w13, between, gated=True)])
            native_.run([Product(between, w2, rows[token:token + 1, rank])])
    return NativeLayerOps(native_.level).combine(rows, topk_weights)


def tokens(count: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=random)[:K] for _ in range(count)])
    return torch.randn(count, H, generator=random).to(dtype), ids, torch.rand(count, K, generator=random)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_bits_of_products_one_by_one(experts: Experts, level: str, activations: str, dtype: torch.dtype,
                                         count: int) -> None:
    own = NativeProducts(level, activations)
    for layer in range(L):
        x, ids, topk_weights = tokens(count, dtype, layer)
        for own.threads in (1, 3):
            assert torch.equal(computed(experts, own, layer, x, ids, topk_weights),
                               one_by_one(experts, own, layer, x, ids, topk_weights))


@every_level
def test_against_float64(experts: Experts, level: str, activations: str) -> None:
    """Of weights as they are decoded. With 8 bits an activation errs by step / sqrt(12) in the mean square, a step
    being the largest of a group over 127: about 2.5 standard deviations of 64 normal numbers, 4 of products of two; so
    by 0.006 and 0.009. silu(gate) * up passes twice the first on: sqrt(0.012^2 + 0.009^2). bf16: 2^-9 for both."""
    x, ids, topk_weights = tokens(4, torch.bfloat16)
    want = torch.zeros(4, H, dtype=torch.float64)
    for token, chosen in enumerate(ids.tolist()):
        for rank, expert in enumerate(chosen):
            w13, w2 = (unpack(m).double() for m in experts.matrices[0, expert])
            biases = [m["bias"].double() if m.spec.bias else 0 for m in experts.matrices[0, expert]]
            gate, up = (w13 @ x[token].double() + biases[0]).split(F)
            if expert % 2:
                gate, up = gate.clamp(max=0.8), up.clamp(-0.8, 0.8)
                between = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            else:
                between = torch.nn.functional.silu(gate) * up
            want[token] += topk_weights[token, rank].double() * (w2 @ between + biases[1])
    got = computed(experts, NativeProducts(level, activations), 0, x, ids, topk_weights).double()
    assert float((got - want).norm() / want.norm()) < (0.015 if activations == "int8" else 3 * 2**-9)


@every_level
def test_a_missing_record_stops_the_sequence_before_anything_is_computed(experts: Experts, level: str,
                                                                         activations: str) -> None:
    own = NativeProducts(level, activations)
    x, _, topk_weights = tokens(1, torch.float32)
    ids = torch.tensor([[4, 1, 2]])
    between, rows, out, total = torch.empty(K, F), torch.empty(1, K, H), torch.zeros(1, H), torch.zeros(1, H)
    job = experts.table.job(1, x, ids, topk_weights, between, rows, out)
    calls = CallSequence(level, own.code, 1, [(ADD, addition(x, total)), (EXPERTS, job), (ADD, addition(out, total))])
    experts.table.leave(1, 2)
    try:
        assert calls.run() == 1
        assert torch.equal(total, x) and not out.any()
        assert calls.run(1) == 1 and calls.run(0, 1) is None
    finally:
        experts.table.enter(1, 2, experts.slots[1, 2], 0)
    total.copy_(x)
    assert calls.run(1) is None  # goes on where it stopped
    assert torch.equal(total, x + one_by_one(experts, own, 1, x, ids, topk_weights))


@every_level
def test_a_router_and_its_experts_are_one_sequence(experts: Experts, level: str, activations: str) -> None:
    own, layer_ops = NativeProducts(level, activations), NativeLayerOps(level)
    random = torch.Generator().manual_seed(9)
    router = RouterTensors(Router(E, K, over="all", normalize=True), torch.randn(E, H, generator=random).bfloat16())
    residual, weight = torch.randn(1, H, generator=random), torch.rand(H, generator=random)
    normed, ids, topk_weights = torch.empty(1, H), torch.empty(1, K, dtype=torch.int64), torch.empty(1, K)
    between, rows, out = torch.empty(K, F), torch.empty(1, K, H), torch.empty(1, H)
    before = residual.clone()
    assert CallSequence(level, own.code, 1, [
        (ROUTE, jobs.route(residual, weight, router, 1e-6, normed, ids, topk_weights)),
        (EXPERTS, experts.table.job(0, normed, ids, topk_weights, between, rows, out)),
        (ADD, addition(out, residual))]).run() is None
    want_ids, want_topk_weights = torch.empty_like(ids), torch.empty_like(topk_weights)
    layer_ops.route(before, weight, router, 1e-6, None, want_ids, want_topk_weights)
    assert torch.equal(ids, want_ids) and torch.equal(topk_weights, want_topk_weights)
    normed = layer_ops.norm(before, weight, 1e-6, torch.float32)
    assert torch.equal(residual, before + one_by_one(experts, own, 0, normed, ids, topk_weights))
    assert torch.allclose(out, TORCH.combine(rows, topk_weights), atol=1e-5)


def test_a_matrix_outside_its_slot_is_noticed(experts: Experts) -> None:
    with pytest.raises(AssertionError, match="elsewhere"):
        ExpertTable(L, E, [(experts.slots[0, 1], *experts.matrices[0, 0])])
