"""The experts of many tokens, many experts a launch: Triton's kernels against float64 and against what the CPU's
stand-in has, under the interpreter or on a GPU; how tokens fall into tiles; what the plan leaves room for."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import decode, product, relative
from test_cuda import DEVICE, HALF, NO_SHRINKING, SUMS, joined, matrix, needs_triton, operand, silu_product
from torch import Tensor

from qmix.config import QuantConfig
from qmix.errors import QmixError, UsageError
from qmix.formats.packed import Packed, view
from qmix.kernels import device_table, prompt_experts, prompt_tiles, reference
from qmix.kernels.configs import Matmul
from qmix.kernels.device_ops import ExpertSlots
from qmix.kernels.device_table import choose_device_kernels
from qmix.kernels.prompt_experts import PromptExperts, Tiles, TorchPromptExperts, tiles_by_expert
from qmix.kernels.prompt_tiles import INNER_BYTES, SIZES, most_tiles, tile_of, tiles_of_launch, workspace
from qmix.kernels.table import KernelTable, random_expert
from qmix.kernels.trials import MIXTRAL_8X7B
from qmix.models import read_model
from qmix.offload.needs import Needs
from qmix.sizes import SWIGLU, MatrixSpec, RecordLayout, pass_tokens
from qmix.spec import Activation

GROUPED = [("int4", 64, 64), ("int4", 32, 128), ("int3", 64, 32), ("int3", 32, 64), ("int2", 64, 128), ("int2", 32, 32),
           ("mxfp4", 64, 32)]
CLAMPED = Activation("swiglu_clamped", 1.3, 0.9)
SMALL = Matmul(64, 64, 4, 1)
REFERENCE = TorchPromptExperts(KernelTable(MappingProxyType({
    (name, block): reference.linear for name, block, _ in GROUPED}), MappingProxyType({})))


def triton(config: Matmul = SMALL) -> PromptExperts:
    from qmix.kernels.cuda_grouped import TritonPromptExperts

    return TritonPromptExperts(config)


def routing(tokens: int, top_k: int, experts: int, seed: int = 0) -> Tensor:
    """Skewed: some experts get many tokens, some one or none."""
    chances = torch.rand(experts, generator=torch.Generator().manual_seed(seed))**4 + 1e-4
    return torch.multinomial(chances.expand(tokens, -1), top_k, generator=torch.Generator().manual_seed(seed + 1))


def slab(name: str, block: int, group: int, count: int, hidden: int = 40, inner: int = 30, first: int = 0,
         bias: bool = False, activation: Activation = SWIGLU) -> tuple[ExpertSlots, list[tuple[np.ndarray, ...]]]:
    """Random experts in slots, and each in float64: w13, w2 and, where they have them, their biases."""
    record = RecordLayout(
        MatrixSpec(name, 2 * inner, hidden, 2, group, block, bias=bias, activation=activation),
        MatrixSpec(name, hidden, inner, 1, group, block, bias=bias))
    pool, exact = torch.full((count, record.nbytes), 0xA5, dtype=torch.uint8), []
    for slot in range(count):
        parts = {"w13": matrix(name, 2 * inner, hidden, group, block, 2, first + slot),
                 "w2": matrix(name, hidden, inner, group, block, 1, first + slot + 50)}
        biases = {which: operand(rows, 1, first + slot)[:, 0] for which, rows in (("w13", 2 * inner), ("w2", hidden))}
        for placed in record.placed:
            view(pool[slot], placed.offset, placed.tensor).copy_(
                biases[placed.matrix] if placed.tensor.name == "bias" else parts[placed.matrix][placed.tensor.name])
        exact.append((decode(parts["w13"]), decode(parts["w2"]),
                      *(b.double().numpy() for b in biases.values() if bias)))
    views = [tuple(Packed.of(spec, {p.tensor.name: view(one, p.offset, p.tensor) for p in record.placed
                                    if p.matrix == which})
                   for which, spec in (("w13", record.w13), ("w2", record.w2))) for one in pool]
    return ExpertSlots(pool.to(DEVICE), record, views, first), exact  # type: ignore[arg-type]


def rows_of(ops: PromptExperts, x: Tensor, ids: Tensor, slabs: Sequence[ExpertSlots], table: Tensor, size: int = 0,
            rows: Tensor | None = None) -> Tensor:
    tiles = ops.sort(ids.to(DEVICE), len(table), size)
    rows = torch.full((*ids.shape, x.shape[1]), 7.0, device=DEVICE) if rows is None else rows
    for slots in slabs:
        for part in tiles.launches(slots, x.itemsize):
            inner = ops.gate_up(x.to(DEVICE), slots, tiles, part, table.to(DEVICE))
            ops.down(inner, slots, tiles, part, table.to(DEVICE), rows)
    return rows


def error(got: Tensor, x: Tensor, ids: Tensor, table: Tensor, exact: Sequence[tuple[np.ndarray, ...]],
          activation: Activation = SWIGLU) -> float:
    """Of all rows at once, whose experts must be in slots."""
    want = np.empty(got.shape)
    for expert in ids.unique().tolist():
        w13, w2, *biases = exact[int(table[expert])]
        first, second = biases or (0.0, 0.0)
        token, rank = (ids == expert).nonzero(as_tuple=True)
        want[token, rank] = joined(product(x[token], w13) + first, activation) @ w2.T + second
    return relative(got.cpu(), want)


class TestTiles:
    @pytest.mark.parametrize(("tokens", "top_k", "experts", "size"), [
        (512, 8, 128, 64), (2048, 8, 128, 128), (64, 8, 128, 16), (9, 2, 8, 16), (512, 2, 8, 128), (200, 2, 8, 64),
        (512, 1, 1, 128)])
    def test_the_average_expert_decides(self, tokens: int, top_k: int, experts: int, size: int) -> None:
        assert tile_of(tokens * top_k, experts) == size and tile_of(tokens * top_k, experts, 32) == min(32, size)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, 70), min_size=1, max_size=12).filter(any), st.sampled_from([1, 16, 64]))
    def test_there_are_never_more(self, counts: list[int], size: int) -> None:
        tiles = tiles_by_expert(counts, size)
        assert [len(own) for own in tiles] == [-(-count // size) for count in counts]
        assert tiles[-1].stop <= most_tiles(sum(counts), len(counts), size)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 9), st.sampled_from([0, 16, 64]), st.integers(0, 9))
    def test_every_pair_is_in_a_tile_of_its_expert(self, tokens: int, top_k: int, more: int, size: int,
                                                   seed: int) -> None:
        experts = top_k + more
        ids = routing(tokens, top_k, experts, seed)
        tiles = REFERENCE.sort(ids, experts, size)
        check_sorted(tiles, ids, experts)

    def test_launches_have_room(self) -> None:
        slots, _ = slab("int4", 32, 32, 1)
        tiles = Tiles(torch.zeros(160, dtype=torch.int32), torch.zeros(10, dtype=torch.int32), 16, 1)
        assert list(tiles.launches(slots, 2)) == [range(10)] and list(tiles.launches(slots, 2, range(3, 5))) == [
            range(3, 5)]
        assert list(tiles.launches(slots, 2, range(3, 3))) == []
        assert tiles_of_launch(14336, 2, 128) * 128 * 14336 * 2 <= INNER_BYTES < 2 * INNER_BYTES
        assert tiles_of_launch(10**9, 2, 128) == 1


def check_sorted(tiles: Tiles, ids: Tensor, experts: int) -> None:
    counts = torch.bincount(ids.reshape(-1), minlength=experts).tolist()
    order, expert_of, flat = tiles.order.view(-1, tiles.size).tolist(), tiles.expert_of.tolist(), ids.reshape(-1)
    assert tiles.top_k == ids.shape[1] and tiles.count <= most_tiles(ids.numel(), experts, tiles.size)
    for expert, own in enumerate(tiles_by_expert(counts, tiles.size)):
        found = [pair for tile in own for pair in order[tile]]
        assert all(expert_of[tile] == expert for tile in own)
        assert found[:counts[expert]] == (flat == expert).nonzero()[:, 0].tolist()
        assert set(found[counts[expert]:]) <= {-1}
    assert set(expert_of[sum(-(-count // tiles.size) for count in counts):]) <= {-1}


@needs_triton
class TestTriton:
    @pytest.mark.parametrize(("tokens", "top_k", "experts", "size"), [
        (40, 8, 128, 0), (300, 8, 128, 0), (700, 2, 8, 0), (5, 2, 3, 0), (1, 8, 128, 0), (1100, 1, 1, 0),
        (33, 6, 60, 64)])
    def test_sorted(self, tokens: int, top_k: int, experts: int, size: int) -> None:
        ids = routing(tokens, top_k, experts, tokens)
        tiles = triton().sort(ids.to(DEVICE), experts, size)
        check_sorted(Tiles(tiles.order.cpu(), tiles.expert_of.cpu(), tiles.size, tiles.top_k), ids, experts)

    @pytest.mark.parametrize(("name", "block", "group"), GROUPED)
    @pytest.mark.parametrize(("tokens", "top_k", "experts"), [(50, 2, 8), (21, 8, 20)])
    def test_against_float64(self, name: str, block: int, group: int, tokens: int, top_k: int, experts: int) -> None:
        slots, exact = slab(name, block, group, experts)
        ids, x = routing(tokens, top_k, experts, group), operand(tokens, 40) / 30
        table = torch.randperm(experts, generator=torch.Generator().manual_seed(2)).int()
        got = rows_of(triton(), x, ids, [slots], table)
        assert error(got, x, ids, table, exact) < 5 * SUMS

    @pytest.mark.parametrize(("kind", "bias", "activation"), [
        (("mxfp4", 64, 32), True, CLAMPED), (("int4", 64, 64), True, CLAMPED), (("int3", 32, 64), True, SWIGLU),
        (("int4", 32, 32), False, Activation("geglu"))], ids=str)
    def test_biases_and_activations(self, kind: tuple[str, int, int], bias: bool, activation: Activation) -> None:
        """As gpt-oss's and Gemma 4's experts have them; and what the CPU's stand-in gives."""
        slots, exact = slab(*kind, 6, 70, 90, bias=bias, activation=activation)
        ids, x, table = routing(30, 2, 6), operand(30, 70) / 30, torch.arange(6).int()
        got = rows_of(triton(), x, ids, [slots], table)
        assert error(got, x, ids, table, exact, activation) < 5 * SUMS
        if DEVICE.type == "cpu":
            assert error(rows_of(REFERENCE, x, ids, [slots], table), x, ids, table, exact, activation) < 5 * SUMS

    @settings(max_examples=7, **NO_SHRINKING)
    @given(st.sampled_from(GROUPED), st.integers(17, 70), st.integers(9, 150), st.integers(1, 40),
           st.sampled_from([1, 2, 5]), st.sampled_from([16, 64]), st.sampled_from([64, 128]))
    def test_odd_sizes(self, kind: tuple[str, int, int], hidden: int, inner: int, tokens: int, top_k: int, size: int,
                       rows: int) -> None:
        slots, exact = slab(*kind, 6, hidden, inner)
        ids, x = routing(tokens, top_k, 6, tokens), operand(tokens, hidden) / 30
        got = rows_of(triton(Matmul(64, rows, 4, 1)), x, ids, [slots], torch.arange(6).int(), size)
        assert error(got, x, ids, torch.arange(6), exact) < 5 * SUMS

    def test_activations_are_rounded_twice_in_fp16(self) -> None:
        """And nothing else is: what lies between the products is fp16, codes are exact."""
        slots, exact = slab("int4", 64, 64, 8, 100, 90)
        ids, x = routing(40, 2, 8), (operand(40, 100) / 30).half()
        got = rows_of(triton(), x, ids, [slots], torch.arange(8).int())
        assert got.dtype == torch.float32 and error(got, x, ids, torch.arange(8), exact) < 2 * HALF
        wide = rows_of(triton(), x.float(), ids, [slots], torch.arange(8).int())
        assert error(wide, x, ids, torch.arange(8), exact) < 5 * SUMS

    def test_several_kinds_and_what_is_nowhere(self) -> None:
        """Two slabs of a tier; experts 2 and 6 are in no slot: their rows stay."""
        slabs = [slab("int4", 32, 32, 3), slab("int2", 64, 64, 2, first=3)]
        table, exact = torch.tensor([4, 0, -1, 1, 3, 2, -1], dtype=torch.int32), slabs[0][1] + slabs[1][1]
        ids, x = routing(40, 2, 7, 3), operand(40, 40) / 30
        got = rows_of(triton(), x, ids, [one for one, _ in slabs], table).cpu()
        same = rows_of(REFERENCE, x, ids, [ExpertSlots(one.slab.cpu(), one.record, one.views, one.first)
                                           for one, _ in slabs], table) if DEVICE.type == "cpu" else got
        missing = table[ids] < 0
        assert missing.any() and (got[missing] == 7).all() and (same[missing] == 7).all()
        torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-5)
        for token, rank in (~missing).nonzero().tolist():
            w13, w2 = exact[int(table[ids[token, rank]])]
            want = (silu_product(product(x[token:token + 1], w13)) @ w2.T)[0]
            assert relative(got[token, rank], want) < 1e-4

    @pytest.mark.parametrize("name", ["int4", "int3", "mxfp4"])
    def test_neither_slot_nor_time_decides_bits(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another slot, an expert that comes later, launches with less room."""
        more = {"bias": True, "activation": CLAMPED} if name == "mxfp4" else {}
        slots, _ = slab(name, 64 if name == "mxfp4" else 32, 32, 9, **more)  # type: ignore[arg-type]  # one to move to
        ids, x, ops = routing(45, 2, 8, 5), operand(45, 40) / 30, triton()
        table = torch.arange(8).int()
        want = rows_of(ops, x, ids, [slots], table, 16)
        busiest = int(ids.reshape(-1).mode().values)
        slots.slab[8] = slots.slab[busiest]
        slots.slab[busiest] = 0
        moved = table.clone()
        moved[busiest] = 8
        assert torch.equal(rows_of(ops, x, ids, [slots], moved, 16), want)
        tiles, rows = ops.sort(ids.to(DEVICE), 8, 16), torch.zeros_like(want)
        counts = torch.bincount(ids.reshape(-1), minlength=8).tolist()
        absent = torch.full((8,), -1, dtype=torch.int32, device=DEVICE)
        for expert, own in enumerate(tiles_by_expert(counts, 16)):
            for part in tiles.launches(slots, 4, own):
                inner = ops.gate_up(x.to(DEVICE), slots, tiles, part, absent, slot=int(moved[expert]))
                ops.down(inner, slots, tiles, part, absent, rows, slot=int(moved[expert]))
        assert torch.equal(rows, want)
        monkeypatch.setattr(prompt_experts, "tiles_of_launch", lambda *how: 2)
        assert len(list(tiles.launches(slots, 4))) > 1
        assert torch.equal(rows_of(ops, x, ids, [slots], moved, 16), want)

    def test_a_broken_token_stays_alone(self) -> None:
        slots, _ = slab("int4", 32, 32, 4)
        ids, x = routing(40, 2, 4), operand(40, 40) / 30
        want = rows_of(triton(), x, ids, [slots], torch.arange(4).int())
        x[0, 3] = float("nan")
        got = rows_of(triton(), x, ids, [slots], torch.arange(4).int())
        assert got[0].isnan().all() and torch.equal(got[1:], want[1:])

    @pytest.mark.parametrize(("top_k", "hidden"), [(1, 40), (2, 1500), (8, 70)])
    def test_the_sum_has_the_bits_of_torchs(self, top_k: int, hidden: int) -> None:
        rows, weights = operand(9, top_k * hidden).view(9, top_k, hidden), operand(9, top_k + 3)[:, :top_k]
        got = triton().combine(rows.to(DEVICE), weights.to(DEVICE))
        assert torch.equal(got.cpu(), REFERENCE.combine(rows, weights))
        assert triton().combine(rows[:0].to(DEVICE), weights[:0].to(DEVICE)).shape == (0, hidden)

    def test_offsets_beyond_two_gigabytes(self) -> None:
        """Slots are addressed in 64 bits. The pages between the records are never touched."""
        if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
            pytest.skip("needs 5 GiB of GPU memory")
        slots, exact = slab("int4", 32, 32, 1)
        far = torch.empty(2, 9 * 2**29 // 2, dtype=torch.uint8, device=DEVICE)
        far[1, :slots.record.nbytes] = slots.slab[0]
        x, ids = operand(12, 40) / 30, torch.zeros(12, 1, dtype=torch.int64)
        got = rows_of(triton(), x, ids, [ExpertSlots(far, slots.record, ())], torch.ones(1, dtype=torch.int32))
        assert error(got, x, ids, torch.zeros(1), exact) < 5 * SUMS

    def test_which_cards_have_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from qmix.kernels import cuda_grouped

        slots, ops = slab("int4", 32, 32, 1)[0], triton()
        plain = ExpertSlots(slots.slab, RecordLayout(MatrixSpec("int8", 60, 40, 2), MatrixSpec("int8", 40, 30)), ())
        for card, half, wide in (((7, 5), False, False), ((8, 0), True, False), ((9, 0), True, False),
                                 (None, True, True)):
            monkeypatch.setattr(cuda_grouped, "capability", lambda device, card=card: card)
            assert ops.handles(slots, torch.float16) == half and ops.handles(slots, torch.float32) == wide
            assert not ops.handles(plain, torch.float16)
        assert REFERENCE.handles(slots, torch.bfloat16) and not REFERENCE.handles(plain, torch.bfloat16)

    def test_refusals(self) -> None:
        slots, tiles = slab("int4", 32, 32, 1)[0], triton().sort(torch.zeros(9, 1, dtype=torch.int64, device=DEVICE), 1)
        with pytest.raises(UsageError, match=r"x: got .* want \[T, 40\]"):
            triton().gate_up(torch.zeros(9, 39, device=DEVICE), slots, tiles, range(1), tiles.expert_of)

    @pytest.mark.parametrize(("name", "block"), [*((n, b) for n in ("int4", "int3", "int2") for b in (64, 32)),
                                                 ("mxfp4", 64)])
    def test_the_check_at_the_start(self, name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Right kernels pass, wrong ones are named."""
        found = choose_device_kernels(DEVICE, torch.float16, [name], [block], REFERENCE._kernels, True)
        sample = random_expert(name, block)
        device_table._check_experts(DEVICE, torch.float16, *sample, found.experts)
        if block == 64:
            monkeypatch.setattr(type(found.experts), "down", lambda self, *how: how[5].zero_())
            with pytest.raises(QmixError, match=f"the GPU kernel for {name} experts gives wrong numbers here"):
                device_table._check_experts(DEVICE, torch.float16, *sample, found.experts)


class TestPlan:
    @pytest.mark.parametrize(("inner", "hidden", "experts", "top_k"), [(14336, 4096, 8, 2), (768, 2048, 128, 8)])
    def test_there_is_room_for_every_prompt(self, inner: int, hidden: int, experts: int, top_k: int) -> None:
        """What one pass allocates beside rows and x, of any number of tokens and any tile."""
        model = read_model({**MIXTRAL_8X7B, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2,
                            "num_local_experts": experts, "num_experts_per_tok": top_k})
        needs = Needs.of(model, QuantConfig(), 8192)
        assert needs.on_device.workspace == needs.workspace + needs.scratch + needs.tiles and needs.tiles >= 0
        most = pass_tokens(model)
        whole = workspace(most * top_k, experts, inner, 2)
        for tokens in (1, 9, 40, 512, 2048, most):
            for size in SIZES:
                tiles = most_tiles(tokens * top_k, experts, size)
                launch = min(tiles, tiles_of_launch(inner, 2, size))
                assert launch * size * inner * 2 + 4 * tiles * (size + 1) <= whole
        assert whole < INNER_BYTES + 2**20

    def test_it_is_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = read_model({**MIXTRAL_8X7B, "num_hidden_layers": 2})
        before = Needs.of(model, QuantConfig(), 8192)
        monkeypatch.setattr(prompt_tiles, "INNER_BYTES", 2 * INNER_BYTES)
        after = Needs.of(model, QuantConfig(), 8192)
        assert after.workspace == before.workspace and 50 * 2**20 < after.tiles - before.tiles < INNER_BYTES + 2**20
