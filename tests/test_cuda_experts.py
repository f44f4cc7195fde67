"""TritonOps' experts of decoding, in slots of a slab, against float64; on the GPU where there is one, else under
Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import decode, product, relative
from test_cuda import (
    CLAMPED,
    DEVICE,
    SUMS,
    H,
    biases,
    here,
    int4_matrix,
    joined,
    needs_triton,
    operand,
    silu_product,
    slab,
)
from torch import Tensor

from qmix.formats import pack
from qmix.formats.packed import Packed, view
from qmix.kernels.cuda import device_code
from qmix.kernels.cuda_ops import TritonOps
from qmix.kernels.device_ops import ExpertSlots
from qmix.kernels.device_scratch import power_of_two
from qmix.sizes import MatrixSpec, RecordLayout
from qmix.spec import Activation

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:(overflow encountered|All-NaN slice)")]


class TestExperts:
    """The slab of test_cuda.py, 5 slots: numbers 10 to 14 of a tier. -1 and others are elsewhere."""

    TABLE = (12, -1, 10, 14, 9, 15, 11)
    FIRST = 10

    def compute(self, x: Tensor, ids: list[list[int]], name: str = "int4",
                activation: Activation | None = None) -> tuple[Tensor, np.ndarray]:
        """Rows, 7 where nothing was written, and what they should be; with an activation also with biases."""
        pool, record, w13, w2 = slab(name, 64 if name == "mxfp4" else 32, activation=activation)
        rows = torch.full((len(ids), len(ids[0]), H), 7.0)
        got, want = rows.clone().to(DEVICE), rows.double().numpy()
        TritonOps().experts(x.to(DEVICE), ExpertSlots(pool, record, (), self.FIRST),
                            torch.tensor(ids, dtype=torch.int32, device=DEVICE),
                            torch.tensor(self.TABLE, dtype=torch.int32, device=DEVICE), got)
        for token, chosen in enumerate(ids):
            for rank, expert in enumerate(chosen):
                slot = self.TABLE[expert] - self.FIRST
                if not 0 <= slot < 5:
                    continue
                first = product(x[token:token + 1], w13[slot])
                if activation is None:
                    want[token, rank] = silu_product(first) @ w2[slot].T
                else:
                    inner = joined(first + biases("w13", slot).double().numpy(), activation)
                    want[token, rank] = inner @ w2[slot].T + biases("w2", slot).double().numpy()
        return got.cpu(), want

    def test_biases_and_a_clamped_activation(self) -> None:
        got, want = self.compute(operand(3, H), [[0, 6, 2], [2, 3, 1], [1, 2, 3]], "int3", CLAMPED)
        absent = want == 7
        assert np.array_equal(got.numpy() == 7, absent)
        assert relative(got[torch.from_numpy(~absent)], want[~absent]) < 5 * SUMS

    @pytest.mark.parametrize("name", ["int8", "fp32"])
    def test_an_expert_whose_format_has_no_kernel_for_many(self, name: str) -> None:
        """One at a time, by way of `linear`: what it adds and joins is the reference's."""
        w13 = MatrixSpec(name, 80, 64, 2, bias=True, activation=CLAMPED)
        parts = []
        for spec in (w13, MatrixSpec(name, 64, 40, bias=True)):
            alone = pack(operand(spec.rows, spec.cols), spec.without_bias)
            parts.append(Packed.of(spec, {**alone.tensors, "bias": operand(1, spec.rows, 4)[0]}, name))
        x = operand(3, 64) / 8
        got = TritonOps().expert(x.to(DEVICE), *map(here, parts)).cpu()
        inner = joined(product(x, decode(parts[0])) + parts[0]["bias"].double().numpy(), CLAMPED)
        assert relative(got, inner @ decode(parts[1]).T + parts[1]["bias"].double().numpy()) < 5 * SUMS

    @pytest.mark.parametrize(("name", "ids"), [
        ("int4", [[3, 0]]), ("int3", [[1, 2]]), ("int2", [[4, 5]]), ("int4", [[6]]), ("int4", [[0, 6, 2], [2, 3, 1]]),
        ("mxfp4", [[0, 6, 2], [2, 3, 1]]),
        ("int3", [[4], [2], [5], [2], [3]])], ids=str)
    def test_those_in_slots_are_computed_and_the_rest_stays(self, name: str, ids: list[list[int]]) -> None:
        got, want = self.compute(operand(len(ids), H) / 30, ids, name)
        absent = want == 7
        assert np.array_equal(got.numpy() == 7, absent)
        if not absent.all():
            assert relative(got[torch.from_numpy(~absent)], want[~absent]) < 5 * SUMS

    def test_a_token_has_the_bits_that_it_has_alone(self) -> None:
        x, ids = operand(3, H), [[0, 2], [2, 3], [3, 1]]
        whole, _ = self.compute(x, ids)
        for start, count in ((2, 1), (0, 2)):
            assert torch.equal(self.compute(x[start:start + count], ids[start:start + count])[0],
                               whole[start:start + count])

    def test_small_experts_of_which_there_are_many(self) -> None:
        """Records of Qwen3-30B-A3B's inner size, 12 groups of 64 columns where a program has room for 16; 8 of 128
        chosen, of which 2 are in slots."""
        record = RecordLayout(MatrixSpec("int4", 2 * 768, 64, 2, 64, 64), MatrixSpec("int4", 64, 768, 1, 64, 64))
        pool = torch.zeros(2, record.nbytes, dtype=torch.uint8)
        parts = [(int4_matrix(2 * 768, 64, 64, 64, 2, seed), int4_matrix(64, 768, 64, 64, 1, 9 + seed))
                 for seed in range(2)]
        for slot, (w13, w2) in zip(pool, parts, strict=True):
            for placed in record.placed:
                part = {"w13": w13, "w2": w2}[placed.matrix][placed.tensor.name]
                view(slot, placed.offset, placed.tensor).copy_(part)
        x, table = operand(1, 64) / 30, torch.full((128,), -1, dtype=torch.int32)
        table[127], table[3] = 0, 1
        ids = torch.tensor([[5, 127, 100, 3, 90, 64, 0, 77]], dtype=torch.int32)
        rows = torch.full((1, 8, 64), 7.0, device=DEVICE)
        TritonOps().experts(x.to(DEVICE), ExpertSlots(pool.to(DEVICE), record, ()), ids.to(DEVICE), table.to(DEVICE),
                            rows)
        for rank, expert in enumerate(ids[0].tolist()):
            slot = int(table[expert])
            if slot < 0:
                assert bool((rows[0, rank] == 7).all())
            else:
                w13, w2 = (decode(m) for m in parts[slot])
                assert relative(rows[:, rank].cpu(), silu_product(product(x, w13)) @ w2.T) < 5 * SUMS

    @pytest.mark.parametrize(("experts", "tokens", "k"), [(128, 1, 8), (128, 8, 8), (60, 8, 8), (60, 3, 4)])
    def test_jobs_of_many_experts(self, experts: int, tokens: int, k: int) -> None:
        """Each choice that is in a slot is in one job, that of its expert, by its token and its row."""
        pseudo = torch.Generator().manual_seed(experts + tokens)
        ids = torch.stack([torch.randperm(experts, generator=pseudo)[:k] for _ in range(tokens)]).int()
        table, pairs = (torch.randperm(experts, generator=pseudo) - 20).int(), tokens * k <= experts
        width, count = power_of_two(tokens), min(tokens * k, experts)
        slots, rows, places = (torch.full(shape, 9, dtype=torch.int32, device=DEVICE)
                               for shape in ((count,), (count, width), (count, width)))
        device_code("cuda_layer_jit").jobs[count,](ids.to(DEVICE), table.to(DEVICE), slots, rows, places, 5, 30, tokens,
                                                  k, k, M=width, PAIRS=pairs)
        found = {(int(slot), int(row), int(place)) for slot, own, there in zip(slots, rows, places, strict=True)
                 for row, place in zip(own, there, strict=True) if place >= 0}
        wanted = {(int(table[expert]) - 5, token, token * k + rank) for token, chosen in enumerate(ids.tolist())
                  for rank, expert in enumerate(chosen) if 0 <= table[expert] - 5 < 30}
        assert found == wanted and len(wanted) > 1
        used = [int(slot) for slot in slots if slot >= 0]
        assert len(set(used)) == len(used) == len({slot for slot, *_ in wanted})  # weights are read once

    def test_the_same_buffers_serve_again(self) -> None:
        pool, record, _, _ = slab("int4")
        ops, slots = TritonOps(), ExpertSlots(pool, record, ())
        x, table = operand(2, H).to(DEVICE), torch.tensor([1, -1, 4], dtype=torch.int32, device=DEVICE)
        ids = torch.tensor([[0, 2], [2, 1]], dtype=torch.int32, device=DEVICE)
        results = []
        for _ in range(2):
            rows = torch.zeros(2, 2, H, device=DEVICE)
            ops.experts(x, slots, ids, table, rows)
            ops.experts(x[1:], slots, ids[:1], table, rows[1:].clone())  # other numbers in the same buffers
            addresses = [[room.data_ptr() for room in rooms] for rooms in ops._rooms.values()]
            results.append((rows, addresses, slots.made["matrices"]))
        assert torch.equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]

    @pytest.mark.parametrize(("pairs", "slots", "rows", "places"), [
        (False, [-1, 2, 0], [[-1, -1], [0, -1], [0, 1]], [[-1, -1], [0, -1], [1, 2]]),
        (True, [2, 0, -1, -1], [[0, -1], [0, 1], [-1, -1], [-1, -1]], [[0, -1], [1, 2], [-1, -1], [-1, -1]])])
    def test_the_example_of_jobs(self, pairs: bool, slots: list[int], rows: list[list[int]],
                                 places: list[list[int]]) -> None:
        ids, table = (torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in ([[1, 2], [2, 0]], [-1, 7, 5]))
        made = [torch.full(shape, 9, dtype=torch.int32, device=DEVICE)
                for shape in ((len(slots),), (len(slots), 2), (len(slots), 2))]
        device_code("cuda_layer_jit").jobs[len(slots),](ids, table, *made, 5, 5, 2, 2, 2, M=2, PAIRS=pairs)
        assert [t.tolist() for t in made] == [slots, rows, places]
