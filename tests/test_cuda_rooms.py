"""What TritonOps keeps for its intermediate results, and a whole layer of its operations beside the reference's; on the
GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from oracles import relative
from test_cuda import (
    DEVICE,
    SUMS,
    H,
    needs_triton,
    slab,
)
from test_cuda_ops import EPS, dense, random, softmax_router
from torch import Tensor

from qmix.formats.packed import Packed, view
from qmix.kernels import cuda, cuda_ops, reference
from qmix.kernels.cuda_ops import TritonOps
from qmix.kernels.device_ops import DeviceOps, ExpertSlots, Later, TorchDeviceOps
from qmix.kernels.table import KernelTable

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:(overflow encountered|All-NaN slice)")]


class NoKernels:
    """Kernels of any name, over any grid, that do nothing."""

    def __getattr__(self, name: str) -> NoKernels:
        return self

    def __getitem__(self, grid: object) -> NoKernels:
        return self

    def __call__(self, *given: object, **constants: object) -> None:
        pass


class TestRooms:
    def test_what_one_token_made_serves_eight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Buffers are made before a launch, so none need be launched."""
        for module in (cuda, cuda_ops):
            monkeypatch.setattr(module, "device_code", lambda name: NoKernels())
        monkeypatch.setattr(cuda, "interpreted", lambda code: True)
        ops = TritonOps()
        for tokens in (1, 8, 3):
            layer = Layer(ops, DEVICE, tokens, "int4")
            layer.forward(torch.arange(tokens, device=DEVICE), torch.arange(tokens, device=DEVICE))
            # the pieces of qkv's products, then those of the experts', for which the first is too small: nobody has
            # said what the model needs
            assert {key[0]: len(made) for key, made in ops._rooms.items()} == \
                {"partial": 2, "attended": 1, "softmax": 1, "jobs": 1, "inner": 1, "logits": 1}

    def test_a_larger_one_leaves_the_smaller_one_alive(self) -> None:
        ops = TritonOps()
        small = ops._room("inner", (2, 3), (8, 3), DEVICE).fill_(5)
        large = ops._room("inner", (4, 9), (8, 9), DEVICE).fill_(6)
        assert bool((small == 5).all()) and ops._room("inner", (1,), (8, 3), DEVICE).data_ptr() == large.data_ptr()
        assert [made.numel() for made in ops._rooms["inner", DEVICE, torch.float32]] == [24, 72]


class Layer:
    """A layer of a small Mixtral, with buffers for `tokens`, on a device: 4 query heads on 2, all experts but number 3
    in slots; its rows stay 0."""

    def __init__(self, ops: DeviceOps, device: torch.device, tokens: int, dense_format: str):
        self.ops, self.tokens = ops, tokens
        pool, self.record, _, _ = slab("int4")
        self.pool = pool.to(device)
        views = [tuple(Packed.of(spec, {
            p.tensor.name: view(slot, p.offset, p.tensor) for p in self.record.placed if p.matrix == name})
            for name, spec in (("w13", self.record.w13), ("w2", self.record.w2))) for slot in self.pool]
        self.slots = ExpertSlots(self.pool, self.record, views, 3)  # type: ignore[arg-type]
        self.qkv, self.o = (Packed.of(m.spec, {name: t.to(device) for name, t in m.tensors.items()})
                            for m in (dense(dense_format, 128, H), dense(dense_format, H, 64, 1)))
        self.table = torch.tensor([7, 3, 5, -1, 6, 4], dtype=torch.int32, device=device)
        self.embedding, self.weights, self.routers, self.inverse = (t.to(device) for t in (
            random(20, H).half(), random(3, H) / 30, random(3, 6, H) / 9, 1 / 1000 ** (torch.arange(8) / 8)))
        self.cache = torch.zeros(2, 2, 200, 16, device=device)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(tokens, *shape, dtype=dtype, device=device)

        self.residual, self.normed, self.both, self.cos_sin, self.attended = \
            buffer(H), buffer(H), buffer(128), buffer(16), buffer(64)
        self.ids, self.gains, self.rows = buffer(2, dtype=torch.int32), buffer(2), buffer(2, H)
        self.guesses = buffer(2, 3, dtype=torch.int32)

    def forward(self, tokens: Tensor, positions: Tensor) -> list[Tensor]:
        self.rows.zero_()
        self.ops.embed(tokens, self.embedding, self.residual)
        self.ops.norm(self.residual, self.weights[0], EPS, self.normed)
        self.ops.linear(self.normed, self.qkv, self.both)
        self.ops.rope_cos_sin(positions, self.inverse, self.cos_sin)
        self.ops.rope_attend(self.both, self.cos_sin, *self.cache, positions, 50, self.attended)
        self.ops.linear(self.attended, self.o, self.residual, add=True)
        routers = [softmax_router(router, 2) for router in self.routers]
        self.ops.route(self.residual, self.weights[1], routers[0], EPS, self.normed, self.ids, self.gains,
                       Later(list(self.weights[1:]), routers[1:], self.guesses))
        self.ops.experts(self.normed, self.slots, self.ids, self.table, self.rows)
        self.ops.norm(self.residual, self.weights[2], EPS, self.normed, self.rows, self.gains)
        return [t.cpu().clone() for t in (self.residual, self.normed, self.cache, self.ids, self.gains, self.guesses)]


@pytest.mark.parametrize(("tokens", "dense_format", "steps"), [(1, "int8", 2), (2, "int4", 2), (3, "fp16", 1)])
def test_a_layer_gives_what_the_reference_gives(tokens: int, dense_format: str, steps: int) -> None:
    """Positions pass 64, where the cache's next block begins, in one step or in two."""
    exact = KernelTable({(dense_format, block): reference.linear for block in (0, 32)}
                        | {("int4", 32): reference.linear}, {})
    both = (Layer(TorchDeviceOps(exact), torch.device("cpu"), tokens, dense_format),
            Layer(TritonOps(), DEVICE, tokens, dense_format))
    for step in range(steps):
        which, positions = torch.arange(tokens) * 3 + step, torch.arange(tokens) + 65 - (steps - step) * tokens
        want, got = (layer.forward(which.to(layer.pool.device), positions.to(layer.pool.device)) for layer in both)
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs) if theirs.dtype == torch.int32 else \
                relative(mine, theirs.double().numpy()) < 5 * SUMS
