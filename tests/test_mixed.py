"""Mixed stores: records of several kinds beside each other, from the bytes on disk to slots sized by kind."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtrals import MIXTRAL_8X7B
from oracles import decode, numbers
from tokenizer_files import DEMO_TEMPLATE, spm_model
from torch import Tensor

from qmix import hardware
from qmix.checkpoint import Checkpoint
from qmix.config import ExpertKey, QuantConfig
from qmix.device import StandIn
from qmix.engine import Engine, Placement, load
from qmix.errors import ConfigError, DoesNotFit, Interrupted, StoreError, UsageError
from qmix.offload.cache import Cache, make_policy, warm_order
from qmix.offload.needs import Needs
from qmix.offload.plan import RESERVE, STAGING, plan
from qmix.quantize import quantize_checkpoint
from qmix.quantize.methods import quantize
from qmix.sizes import GIB, MIB
from qmix.store import Store, StoreLayout, describe

LAYERS, EXPERTS, TOP_K = 4, 8, 2
KINDS = (("int4g64", "int4g64"), ("int3g64", "int4g32"), ("int2g32", "int3g128"))
MIX = ("01201201", "22222222", "10000000", "02110210")
MIXED = QuantConfig(experts="mixed", method="rtn", kinds=KINDS, mix=MIX)
IDS = [(7 * i * i + 3) % 500 + 3 for i in range(60)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("mixed") / "tiny", vocab_size=512,
                                 num_hidden_layers=LAYERS, num_local_experts=EXPERTS)
    (path / "tokenizer.model").write_bytes(spm_model())
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": DEMO_TEMPLATE}))
    return path


def made(source: Path, out: Path, quant: QuantConfig) -> Path:
    with Checkpoint.open(source) as checkpoint:
        quantize_checkpoint(checkpoint, out, quant, threads=1)
    return out


@pytest.fixture(scope="module")
def mixed(source: Path) -> Path:
    return made(source, source.parent / "mixed", MIXED)


def run(engine: Engine) -> Tensor:
    session = engine.session()
    found = [session.prefill(IDS[:40])]
    for _ in range(12):
        found.append(session.decode(int(found[-1].argmax())))
    return torch.stack([*found, session.prefill(IDS[40:])])


def test_every_record_is_in_its_kind(source: Path, mixed: Path) -> None:
    with Store.open(mixed) as store, Checkpoint.open(source) as checkpoint:
        assert store.verify(deep=True) == []
        sizes = [kind.nbytes for kind in store.layout.kinds]
        assert len(set(sizes)) == 2  # two of them by the padding
        for key in store.model.expert_keys:
            kind = int(MIX[key.layer][key.expert])
            buffer = torch.empty(sizes[kind], dtype=torch.uint8)
            store.read_record(key, buffer)
            w1, w2, w3 = checkpoint.expert(key)
            for packed, weight, name in zip(store.expert(key, buffer), (torch.cat((w1, w3)), w2), KINDS[kind],
                                            strict=True):
                assert f"{packed.spec.format}g{packed.spec.group_size}" == name
                alone = quantize(weight, packed.spec, "rtn")
                assert all(torch.equal(packed[part], alone[part]) for part in alone.tensors)
                step = {"int4": 0.1, "int3": 0.25, "int2": 0.7}[packed.spec.format]
                off = decode(packed) - numbers(weight)
                assert (off**2).mean() < step**2 * (numbers(weight)**2).mean()


def test_a_mix_of_one_kind_is_the_plain_store(source: Path) -> None:
    plain = made(source, source.parent / "plain", QuantConfig("int3", method="rtn"))
    alike = made(source, source.parent / "alike", QuantConfig(
        "mixed", method="rtn", kinds=(("int3g64", "int3g64"),), mix=("0" * EXPERTS,) * LAYERS))
    for layer in range(LAYERS):
        name = f"experts-{layer:02}.safetensors"
        assert (plain / name).read_bytes() == (alike / name).read_bytes()
    with load(plain, threads=1, context=120) as engine:
        want = run(engine)
    with load(alike, threads=1, context=120) as engine:
        assert torch.equal(run(engine), want)


@pytest.mark.parametrize("prefetch", ["off", "both"])
@pytest.mark.parametrize("policy", ["lfu", "lru", "static"])
@pytest.mark.parametrize("more", [0, 1, 4, 11])
def test_same_bits_for_every_budget(mixed: Path, more: int, policy: str, prefetch: str,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    with load(mixed, threads=1, context=120) as engine:
        assert engine.plan.resident
        want = run(engine)
    monkeypatch.setattr(hardware, "resident_bytes", lambda: 0)
    with Store.open(mixed) as store:
        needs = Needs.of(store.model, store.quant, 120)
    room = sum(count * nbytes for count, (_, nbytes) in zip(needs.least, needs.kinds, strict=True))
    ram = RESERVE + needs.dense + needs.kv + needs.workspace + room + more * needs.record
    with load(mixed, threads=1, context=120, ram=ram, policy=policy, prefetch=prefetch) as engine:
        assert not engine.plan.resident
        assert torch.equal(run(engine), want)
        assert engine.stats()["offload"]["decode"]["misses"] > 0


@pytest.mark.parametrize("more", [0, 1, 6, 100])
def test_same_bits_on_a_device(mixed: Path, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of record has a slab of its own there, and slots of its own below."""
    with load(mixed, threads=1, context=120, activations="bf16", placement=Placement(StandIn())) as engine:
        want = run(engine)
    monkeypatch.setattr(hardware, "resident_bytes", lambda: 0)
    with Store.open(mixed) as store:
        needs = Needs.of(store.model, store.quant, 120)
    least = [sum(count * nbytes for count, (_, nbytes) in zip(counts, needs.kinds, strict=True))
             for counts in (needs.least, [STAGING] * len(KINDS))]
    there = needs.on_device
    vram = RESERVE + there.dense + there.kv + there.workspace + least[0] + more * needs.record
    ram = RESERVE + least[1] + more * needs.record
    with load(mixed, threads=1, context=120, activations="bf16", ram=ram, prefetch="ahead",
              placement=Placement(StandIn(), vram, exact=True)) as engine:
        assert engine.plan.resident == (more == 100)
        assert torch.equal(run(engine), want)


def test_a_broken_run_goes_on(source: Path, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(done: int, total: int, label: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with Checkpoint.open(source) as checkpoint:
        with pytest.raises(Interrupted):
            quantize_checkpoint(checkpoint, out, MIXED, threads=1, progress=stop)
        other = replace(MIXED, mix=(*MIX[:3], "02110212"))
        with pytest.raises(UsageError, match="mix"):
            quantize_checkpoint(checkpoint, out, other, threads=1)
        assert quantize_checkpoint(checkpoint, out, MIXED, threads=1).resumed > 10
    assert all(file.read_bytes() == (out / file.name).read_bytes() for file in mixed.iterdir())


def test_show_and_plan_say_what_is_mixed(mixed: Path) -> None:
    with Store.open(mixed) as store:
        about = describe(store)
    experts = about["classes"][0]
    assert "int4g64" in experts["format"] and "int2g32" in experts["format"]
    assert experts["bytes"] == sum(path.stat().st_size // 4096 * 4096 for path in mixed.glob("experts-*")) - sum(
        StoreLayout.of(store.model, store.quant).records[ExpertKey(layer, 0)].offset for layer in range(LAYERS))


@pytest.mark.parametrize(("change", "said"), [
    ({"mix": ["01201201"] * 3}, "mix"), ({"mix": ["0120120"] * 4}, "mix"), ({"mix": ["01201209"] * 4}, "letters"),
    ({"kinds": [["int4g64", "int5g64"]]}, "int5g64"), ({"kinds": []}, "kinds"), ({"kinds": [["int4g64"]]}, "kinds"),
    ({"mix": ["00000000"] * 4}, "each kind"), ({"mix": 3}, "list"), ({"kinds": [3]}, "list"),
    ({"kinds": [["int4g64", "int4g64"]] * 2}, "different"),
])
def test_a_damaged_manifest_is_refused_by_key(mixed: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    import shutil
    copy = shutil.copytree(mixed, tmp_path / "copy")
    manifest = json.loads((copy / "qmix.json").read_text())
    manifest["quantization"] |= change
    (copy / "qmix.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=said) as caught, Store.open(copy):
        pass
    assert "qmix.json" in caught.value.message


def test_what_does_not_make_a_mix_is_refused() -> None:
    with pytest.raises(ConfigError, match="mix"):
        QuantConfig(kinds=KINDS, mix=MIX)
    with pytest.raises(ConfigError, match="kinds"):
        QuantConfig("mixed")
    with pytest.raises(ConfigError, match="int3g65"):
        QuantConfig("mixed", kinds=(("int3g65", "int3g64"),), mix=("0",))
    assert MIXED.grouped == MIXED.expert_formats == {"int4", "int3", "int2"}
    assert "mix" not in QuantConfig().to_json() and MIXED.to_json()["mix"] == list(MIX)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 2**32), st.sampled_from(("lru", "lfu")))
def test_a_record_takes_only_a_slot_of_its_kind(slots: list[int], seed: int, policy: str) -> None:
    """Any sequence of requests: no kind has more records than slots, and who leaves is of the kind that comes."""
    dice = random.Random(seed)
    kinds = {ExpertKey(layer, e): dice.randrange(len(slots)) for layer in range(3) for e in range(6)}
    cache = Cache(slots, 3, make_policy(policy, {}), kind_of=kinds.__getitem__)
    keys = list(kinds)
    for _ in range(150):
        key = dice.choice(keys)
        if key.layer == 0 and dice.random() < 0.3:
            cache.begin_token()
        if key in cache:
            cache.use(key)
            continue
        full = sum(kinds[k] == kinds[key] for k in cache) == slots[kinds[key]]
        leaves = cache.admit(key, dice.choice(("demand", "speculative", "prefill", "warm")))
        if leaves is False:
            assert full and key not in cache
        else:
            assert (leaves is True) == (not full)
            assert leaves is True or (kinds[leaves] == kinds[key] and leaves not in cache)
        for kind, count in enumerate(slots):
            assert sum(kinds[k] == kind for k in cache) <= count


def test_warming_fills_the_slots_of_each_kind() -> None:
    kinds = {ExpertKey(layer, e): e % 2 for layer in range(3) for e in range(4)}
    prior = {key: float(key.expert) for key in kinds}
    order = warm_order(3, 4, [2, 4], prior, kinds.__getitem__)
    assert order == [(0, 3), (0, 2), (0, 1), (1, 3), (1, 2), (2, 3)]


MIXTRAL = MIXTRAL_8X7B
LARGE = replace(MIXED, mix=("01201201",) * 20 + ("22222222",) * 12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40 * GIB), st.none() | st.integers(0, 32 * GIB))
def test_no_plan_exceeds_its_budget(ram: int, vram: int | None) -> None:
    needs = Needs.of(MIXTRAL, LARGE, 4096)
    assert sum(count for count, _ in needs.kinds) == needs.records == 256
    try:
        found = plan(needs, ram, 300 * MIB, vram)
    except DoesNotFit as e:
        assert "short of" in e.message
        return
    assert all(tier.total <= tier.budget for tier in found.tiers)
    assert all(least <= held <= count for least, held, (count, _) in zip(needs.least, found.held, needs.kinds,
                                                                         strict=True))
    whole = sum(count * nbytes for count, nbytes in needs.kinds)
    if vram is None:
        assert found.resident == (found.ram.budget - found.ram.fixed >= whole)
        assert found.resident or found.ram.budget - found.ram.total < max(nbytes for _, nbytes in needs.kinds)
    assert found.on_disk == whole - sum(held * nbytes for held, (_, nbytes) in zip(found.held, needs.kinds,
                                                                                  strict=True))
