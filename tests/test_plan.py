"""The plan's integers, on Mixtral 8x7B's own shape, and what is forecast from them."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import fmean, stdev

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mixtrals import MIXTRAL_8X7B

from qmix.config import ExpertKey, QuantConfig
from qmix.errors import DoesNotFit
from qmix.kernels.kv_size import kv_bytes
from qmix.offload.forecast import Forecast, Speeds, divided, forecast, known_shares
from qmix.offload.needs import Needs, choose_context, resident_dense_bytes
from qmix.offload.plan import CUDA_CONTEXT, RESERVE, STAGING, plan
from qmix.offload.router_stats import RouterStats
from qmix.offload.split import Split
from qmix.sizes import GIB, MIB, dense_bytes, format_bytes, record_layout

MIXTRAL = MIXTRAL_8X7B
RECORD = 99_090_432
NEEDS = Needs.of(MIXTRAL, QuantConfig(), 8192)


def test_mixtral_known_sizes() -> None:
    assert record_layout(MIXTRAL, QuantConfig()).nbytes == NEEDS.record == RECORD
    assert kv_bytes(MIXTRAL, 1) == 128 * 1024
    assert NEEDS.kv == GIB
    assert NEEDS.records == 256 and NEEDS.least_slots == 4
    assert choose_context(MIXTRAL, 0) == 8192
    assert choose_context(MIXTRAL, 100) == 100


def test_dense_weights_count_as_they_lie_in_memory() -> None:

    stored = sum(dense_bytes(MIXTRAL, QuantConfig(), t) for t in MIXTRAL.tensors())
    norms = 65 * 4096
    assert resident_dense_bytes(MIXTRAL, QuantConfig()) == stored + norms * (4 - 2)
    needs = Needs.of(MIXTRAL, QuantConfig(), 128)
    there = plan(needs, 32 * GIB, 0, 24 * GIB).tiers[0]
    assert there.dense == needs.dense  # a GPU too has routers as they are stored, and widens them in registers


def test_everything_fits_or_the_slots_are_what_is_left() -> None:
    whole = plan(NEEDS, 32 * GIB, 300 * MIB)
    assert whole.resident and whole.slots == 256 and whole.on_disk == 0
    half = plan(NEEDS, 16 * GIB, 300 * MIB)
    fixed = 300 * MIB + NEEDS.dense + NEEDS.kv + NEEDS.workspace + 16 * GIB // 50
    assert half.slots == (16 * GIB - fixed) // RECORD
    assert not half.resident
    assert half.on_disk == (256 - half.slots) * RECORD
    assert half.ram.total <= 16 * GIB < half.ram.total + RECORD
    assert sum(nbytes for _, nbytes in half.ram.parts()) == half.ram.total


@given(st.integers(0, 64 * GIB), st.integers(0, GIB), st.sampled_from([128, 4096, 32768]),
       st.none() | st.integers(0, 48 * GIB))
def test_no_plan_exceeds_its_budget(ram: int, base: int, context: int, vram: int | None) -> None:
    needs = Needs.of(MIXTRAL, QuantConfig(), context)
    try:
        found = plan(needs, ram, base, vram)
    except DoesNotFit as e:
        assert "short of" in e.message
        return
    for tier in found.tiers:
        assert tier.total <= tier.budget
        assert tier.reserve >= max(RESERVE, tier.budget // 50)
    assert needs.least_slots <= found.slots <= needs.records
    assert found.resident == (found.on_disk == 0)


def test_what_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(DoesNotFit) as error:
        plan(NEEDS, 2 * GIB, 300 * MIB)
    assert error.value.exit_code == 3
    fixed = 300 * MIB + NEEDS.dense + NEEDS.kv + NEEDS.workspace + RESERVE + 4 * RECORD
    assert f"short of {format_bytes(fixed - 2 * GIB)}" in error.value.message
    exact = plan(NEEDS, fixed, 300 * MIB)
    assert exact.slots == 4
    with pytest.raises(DoesNotFit):
        plan(NEEDS, fixed - 1, 300 * MIB)


def test_with_a_gpu_the_tiers_hold_different_records() -> None:
    found = plan(NEEDS, 16 * GIB, 400 * MIB, vram=24 * GIB)
    vram, ram = found.tiers
    assert (vram.name, ram.name) == ("VRAM", "RAM")
    assert vram.base == CUDA_CONTEXT and vram.dense == NEEDS.on_device.dense and ram.dense == ram.kv == 0
    assert found.resident, "16 GB RAM and 24 GB VRAM hold all of Mixtral"
    assert ram.slots == 256 - vram.slots + STAGING
    assert not found.inclusive and found.lines()[-1] == "experts: all 256 resident"
    with pytest.raises(DoesNotFit, match="VRAM"):
        plan(NEEDS, 16 * GIB, 0, vram=2 * GIB)


def test_where_ram_has_room_for_all_records_it_holds_those_of_vram_too() -> None:
    fixed, whole = 400 * MIB + 32 * GIB // 50, 256 * RECORD
    found = plan(NEEDS, 32 * GIB, 400 * MIB, vram=24 * GIB)
    assert found.inclusive and found.ram.slots == found.slots == 256 and found.ram.total == fixed + whole <= 32 * GIB
    assert found.lines()[-1] == "experts: all 256 resident, all of them in RAM"
    assert plan(NEEDS, 32 * GIB, 400 * MIB, vram=24 * GIB, pin=whole).inclusive
    few = plan(NEEDS, 32 * GIB, 400 * MIB, vram=24 * GIB, pin=whole - 1)
    assert not few.inclusive and few.resident and few.ram.slots == 256 - few.tiers[0].slots + STAGING
    in_vram = plan(NEEDS, 64 * GIB, 400 * MIB, vram=48 * GIB)
    assert in_vram.resident and in_vram.ram.slots == STAGING and not in_vram.inclusive, "nothing ever leaves VRAM"


@given(st.integers(8 * GIB, 40 * GIB), st.integers(8 * GIB, 40 * GIB), st.booleans())
def test_a_tier_of_ram_holds_all_or_what_vram_lacks(ram: int, vram: int, mixed: bool) -> None:
    needs = replace(NEEDS, kinds=((100, RECORD), (156, RECORD // 2))) if mixed else NEEDS
    found = plan(needs, ram, 400 * MIB, vram)
    room = ram - 400 * MIB - found.ram.reserve
    fast = [slots for slots, _ in found.tiers[0].kinds]
    whole = [count if slots < count else STAGING for slots, (count, _) in zip(fast, needs.by_kind, strict=True)]
    fits = sum(slots * nbytes for slots, (_, nbytes) in zip(whole, needs.by_kind, strict=True)) <= room
    for i, (slots, nbytes) in enumerate(found.ram.kinds):
        count = needs.by_kind[i][0]
        assert slots == whole[i] if fits else slots <= count - fast[i] + STAGING
        assert found.held[i] == min(count, max(slots, fast[i] + slots - STAGING)) and nbytes == needs.by_kind[i][1]
    assert found.inclusive or not fits or list(fast) == [count for count, _ in needs.by_kind]
    assert found.ram.total <= ram


def test_few_slots_are_warned_of() -> None:
    lines = plan(NEEDS, 8 * GIB, 300 * MIB).lines()
    assert any("warning: fewer than 4 slots a layer" in line for line in lines)
    assert not any("warning" in line for line in plan(NEEDS, 24 * GIB, 300 * MIB).lines())


def test_forecast_is_between_sum_and_longest_part() -> None:
    found = plan(NEEDS, 16 * GIB, 300 * MIB)
    guess = forecast(found, Speeds(ram=40, disk=2.5))
    missed = 64 * RECORD * (1 - found.slots / 256)
    disk, memory = missed / 2.5e9, (NEEDS.dense - NEEDS.embedding + 64 * RECORD) / 40e9
    assert guess.disk_bytes == pytest.approx(missed, rel=1e-6)
    assert guess.most == pytest.approx(1 / max(disk, memory), rel=1e-6)
    assert guess.least == pytest.approx(1 / (disk + memory), rel=1e-6)
    assert guess.bottleneck == "disk"
    assert forecast(plan(NEEDS, 64 * GIB, 0), Speeds(40, 2.5)).bottleneck == "memory"


def test_forecast_knows_uneven_routing() -> None:
    found = plan(NEEDS, 16 * GIB, 300 * MIB)
    uneven = {ExpertKey(layer, e): 0.9 if e < 2 else 0.2 / 6 for layer in range(32) for e in range(8)}
    even = {ExpertKey(layer, e): 0.25 for layer in range(32) for e in range(8)}
    plain = forecast(found, Speeds(40, 2.5))
    assert forecast(found, Speeds(40, 2.5), even).hit == pytest.approx(plain.hit)
    assert forecast(found, Speeds(40, 2.5), uneven).hit > plain.hit + 0.2


def test_a_few_tokens_are_no_statistics() -> None:
    stats = RouterStats(2, 4)
    for token in range(300):
        assert known_shares(stats) == {} if token < 256 else known_shares(stats)[ExpertKey(1, 3)] == 1.0
        stats.add_token("decode", [[0, 1], [2, 3]])


def on_gpu(vram: int, speeds: Speeds, ram: int = 32 * GIB, exact: bool = False) -> Forecast:
    return forecast(plan(NEEDS, ram, 300 * MIB, vram=vram), speeds, exact=exact)


def test_forecast_on_a_gpu_by_hand() -> None:
    """Two experts a layer. Alone, a missing one is computed by the CPU, which is faster than the bus; of two, each side
    has one. At worst all are read from RAM one after another."""
    miss = 1 - plan(NEEDS, 32 * GIB, 300 * MIB, vram=16 * GIB).tiers[0].slots / 256
    guess = on_gpu(16 * GIB, Speeds(ram=40, disk=3, pcie=25, vram=900))
    waited = 32 * (2 * miss * (1 - miss) / 40 + miss**2 / 25) * RECORD / 1e9
    gpu = (NEEDS.dense - NEEDS.embedding + 64 * RECORD * (1 - miss)) / 900e9
    assert guess.most == pytest.approx(1 / waited, rel=1e-9)
    assert guess.least == pytest.approx(1 / (gpu + 64 * RECORD * miss / 40e9), rel=1e-9)
    assert guess.bottleneck == "RAM" and guess.disk_bytes == 0
    assert on_gpu(16 * GIB, Speeds(ram=20, disk=3, pcie=18, vram=900)).bottleneck == "RAM"
    assert on_gpu(16 * GIB, Speeds(ram=20, disk=3, pcie=20, vram=900)).bottleneck == "PCIe"


def test_forecast_of_exact_runs_counts_all_misses_on_the_bus() -> None:
    miss = 1 - plan(NEEDS, 32 * GIB, 300 * MIB, vram=16 * GIB).tiers[0].slots / 256
    for pcie, bus in ((25, 25), (64, 40)):  # a bus that is faster than the RAM waits for the RAM
        guess = on_gpu(16 * GIB, Speeds(ram=40, disk=3, pcie=pcie, vram=900), exact=True)
        assert guess.bottleneck == "PCIe"
        assert guess.most == pytest.approx(bus * 1e9 / (64 * RECORD * miss), rel=1e-9)
        assert guess.least == pytest.approx(
            1 / (64 * RECORD * miss / bus / 1e9 + (NEEDS.dense - NEEDS.embedding + 64 * RECORD) / 900e9), rel=1e-9)


speed = st.floats(5, 80)
sizes = st.integers(8, 40).map(lambda gib: gib * GIB)
SLACK = 1 + 1e-12  # sums in another order


@given(sizes, sizes, speed, speed, st.floats(0.5, 10), st.floats(80, 2000))
@example(12 * GIB, 28 * GIB, 40, 25, 3, 360)
def test_a_card_never_makes_the_forecast_slower(vram: int, ram: int, memory: float, pcie: float, disk: float,
                                                fast: float) -> None:
    """Than that of the CPU alone with the same RAM, where the card's memory is as fast as RAM or faster."""
    alone = forecast(plan(NEEDS, ram, 300 * MIB), Speeds(memory, disk))
    guess = on_gpu(vram, Speeds(memory, disk, pcie, fast), ram)
    assert alone.least <= guess.least * SLACK and alone.most <= guess.most * SLACK
    assert guess.least <= guess.most and guess.disk_bytes <= alone.disk_bytes


def test_a_range_is_a_range_where_vram_is_slower_than_ram() -> None:
    guess = on_gpu(16 * GIB, Speeds(ram=40, disk=3, pcie=25, vram=10))
    assert guess.least <= guess.most


@given(sizes, sizes, speed, speed, st.floats(0.5, 10), st.floats(80, 2000),
       st.sampled_from(["vram", "ram", "pcie", "disk", "fast", "memory"]), st.floats(1, 3), st.booleans())
def test_more_of_anything_never_makes_the_forecast_slower(
        vram: int, ram: int, memory: float, pcie: float, disk: float, fast: float, what: str, factor: float,
        exact: bool) -> None:
    def guess(of: dict[str, float]) -> Forecast:
        return on_gpu(int(of["vram"]), Speeds(of["memory"], of["disk"], of["pcie"], of["fast"]), int(of["ram"]), exact)

    less = {"vram": vram, "ram": ram, "memory": memory, "pcie": pcie, "disk": disk, "fast": fast}
    assert factor == 1 or less[what] * factor > less[what]
    before = guess(less)
    after = guess(less | {what: less[what] * factor})
    assert before.least <= after.least * SLACK and before.most <= after.most * SLACK


@pytest.mark.parametrize(("top_k", "miss", "bus", "host"), [(2, 0.45, 25, 40), (2, 0.9, 25, 12), (8, 0.5, 13, 30),
                                                            (1, 0.3, 25, 10)])
def test_missing_experts_are_divided_as_the_engine_divides_them(top_k: int, miss: float, bus: float,
                                                                host: float) -> None:
    """Against layers whose missing experts are drawn and given to Split, within five standard errors of the mean."""
    dice, split, record = Random(1), Split(bus, host), 99_090_432
    layers = []
    for _ in range(4000):
        lacking = [(record, record)] * sum(dice.random() < miss for _ in range(top_k))
        computed = split.on_host(lacking)
        sides = (len(lacking) - computed) / bus, computed / host
        layers.append((max(sides), *sides))
    for found, drawn in zip(divided(top_k, miss, bus, host), zip(*layers, strict=True), strict=True):
        assert abs(found - fmean(drawn)) <= 5 * stdev(drawn) / len(drawn)**0.5
