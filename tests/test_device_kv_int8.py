"""The int8 KV cache on a device, the CPU standing in for it: the same bits wherever an expert was, drafts and trimmed
sessions exact, the numbers of the CPU's own int8 cache, and what the plan counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from device_engines import ALL, CONTEXT, EXPERTS, IDS, LAYERS, bring_up, delays, run
from fast_interpreter import HAVE_TRITON
from helpers import UNQUANTIZED, write_tiny_stores
from torch import Tensor

from qmix.config import QuantConfig
from qmix.device import StandIn
from qmix.engine import Placement, load
from qmix.forward.kv_cache import SessionCache
from qmix.forward.kv_layers import Int8Layer, Query
from qmix.kernels.attend import softmax_attention
from qmix.offload.needs import Needs
from qmix.offload.plan import plan
from qmix.store import Store

FORMATS = {"int4": QuantConfig(), "keep": UNQUANTIZED}
WINDOW = 30  # shorter than the conversation

pytestmark = pytest.mark.usefixtures("no_thread_stays")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    shape = {"num_hidden_layers": LAYERS, "num_local_experts": EXPERTS}
    found = write_tiny_stores(tmp_path_factory.mktemp("device-int8"), FORMATS, **shape)
    windowed = write_tiny_stores(tmp_path_factory.mktemp("windowed-int8"), {"window": UNQUANTIZED}, **shape,
                                 sliding_window=WINDOW)
    small = write_tiny_stores(tmp_path_factory.mktemp("small-int8"), {"small": UNQUANTIZED}, num_hidden_layers=1,
                              sliding_window=4)
    return found | windowed | small


@pytest.fixture(scope="module")
def resident(stores: dict[str, Path]) -> dict[str, Tensor]:
    found = {}
    for name in ("int4", "keep", "window"):
        with load(stores[name], threads=1, context=CONTEXT, activations="bf16", kv="int8",
                  placement=Placement(StandIn())) as engine:
            assert engine.plan.tiers[0].slots == ALL
            assert all(isinstance(layer, Int8Layer) for layer in engine.session().cache.layers)
            found[name] = run(engine)
    return found


def apart(got: Tensor, want: Tensor) -> Tensor:
    return (got - want).norm(dim=1) / want.norm(dim=1)


@pytest.mark.parametrize("name", ["int4", "keep", "window"])
def test_the_numbers_of_the_cpus_int8_cache(stores: dict[str, Path], resident: dict[str, Tensor], name: str) -> None:
    """The last bit of a key may turn a code: so not to fp32 sums, but closer than 8 bits are to 16."""
    found = {}
    for kv in ("int8", "bf16"):
        with load(stores[name], threads=1, context=CONTEXT, activations="bf16", kv=kv) as engine:
            found[kv] = run(engine)
    assert apart(resident[name], found["int8"]).median() < (2e-2 if name == "int4" else 5e-3)
    assert not torch.equal(resident[name], found["bf16"]) and apart(resident[name], found["bf16"]).median() < 4e-2


@pytest.mark.parametrize(("name", "above", "below"), [
    ("int4", 20, 14), ("keep", 20, 14), ("window", 9, 25), ("int4", 9, 25), ("int4", 4, 2), ("keep", 4, 12),
    ("window", 4, 12)])
def test_same_bits_for_every_placement(stores: dict[str, Path], resident: dict[str, Tensor], name: str, above: int,
                                       below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = StandIn(delays(above * 100 + below))
    with bring_up(monkeypatch, stores[name], above, below, device, kv="int8", prefetch="ahead") as engine:
        assert torch.equal(run(engine), resident[name])
        assert torch.equal(run(engine), resident[name]), "in a cache that lies where another one lay"


@pytest.mark.parametrize("name", ["int4", "window"])
def test_drafts_and_trimmed_sessions_have_the_bits_of_single_tokens(stores: dict[str, Path], name: str,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    with bring_up(monkeypatch, stores[name], 9, 8, StandIn(delays(6)), kv="int8") as engine:
        session = engine.session()
        session.prefill(IDS[:32])
        alone = torch.stack([session.decode(token).clone() for token in IDS[32:40]])
        session.trim(32)
        for count in (2, 8, 3, 8):
            assert torch.equal(session.verify(IDS[32:32 + count]), alone[:count])
            session.trim(32)
        session.verify(IDS[32:36])
        session.trim(34)  # two drafts were right
        assert torch.equal(session.decode(IDS[34]), alone[2])


def test_sessions_that_decode_together(stores: dict[str, Path]) -> None:
    with load(stores["keep"], threads=1, context=CONTEXT, kv="int8", placement=Placement(StandIn(delays(7)))) as engine:
        a, b = engine.session(), engine.session()
        a.prefill(IDS[:20])
        b.prefill(IDS[5:33])
        alone = [a.decode(7).clone(), b.decode(9).clone()]
        a.trim(20)
        b.trim(28)
        together = engine.step([a, b], [[7], [9]], "decode")
        assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
def test_tritons_kernels_in_the_engine(stores: dict[str, Path]) -> None:
    """The numbers of the CPU's kernels, but for a code that the last bit of a key turns; the same bits with drafts."""
    found = []
    for triton in (False, True):
        with load(stores["small"], threads=1, context=16, activations="bf16", kv="int8",
                  placement=Placement(StandIn(triton=triton))) as engine:
            session = engine.session()
            logits = [session.prefill(IDS[:5]), session.decode(IDS[5]).clone()]
            session.trim(5)
            logits += list(session.verify(IDS[5:7]).clone())
            found.append(torch.stack(logits))
    assert apart(found[1], found[0]).max() < 5e-3
    assert torch.equal(found[1][1], found[1][2])


def test_what_it_takes_is_in_the_plan(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(stores["int4"]) as store:
        config, sixteen, eight = store.model, *(
            Needs.of(store.model, store.quant, CONTEXT, kv) for kv in ("bf16", "int8"))
    attention = config.layers[0].mixer
    assert eight.decoded == 2 * CONTEXT * attention.kv_heads * attention.head_dim * 2 and not sixteen.decoded
    there = plan(eight, 2**30, 0, 2**31).tiers[0]
    assert there.workspace == eight.workspace + eight.scratch + eight.decoded + eight.tiles
    assert there.kv == eight.kv < sixteen.kv
    with bring_up(monkeypatch, stores["int4"], 9, 8, kv="int8") as engine:
        assert engine.session().cache.nbytes == engine.plan.tiers[0].kv


def test_where_a_cache_lies_is_told_by_all_its_parts(stores: dict[str, Path]) -> None:
    """A graph has the addresses of the scales too: a cache whose codes lie where another's lay is not that other."""
    with Store.open(stores["int4"]) as store:
        cache, sixteen = (SessionCache(store.model, 9, torch.float32, kv) for kv in ("int8", "bf16"))
        layers = range(len(store.model.layers))
        addresses = [address for i in layers for address in cache.kv_layer(i).addresses]
        assert cache.identity == (*addresses, cache.side.data_ptr())
        assert len(set(cache.identity)) == 4 * len(layers) + 1
        assert len(set(sixteen.identity) - {0}) == 2 * len(layers) + 1


@pytest.mark.parametrize("window", [None, 7])
def test_a_prompt_attends_to_all_heads_at_once_as_to_one_after_the_other(stores: dict[str, Path],
                                                                         window: int | None) -> None:
    with Store.open(stores["keep"]) as store:
        config, a = store.model, replace(store.model.layers[0].mixer, window=window)
    random = torch.Generator().manual_seed(3)
    found = []
    parts = [[torch.randn(count, heads, a.head_dim, generator=random) for heads in (a.heads, a.kv_heads, a.kv_heads)]
             for count in (20, 12)]
    for there in (None, softmax_attention):
        cache, out = SessionCache(config, 40, torch.float32, "int8", attend=there), []
        layer = cache.layers[1]
        assert isinstance(layer, Int8Layer)
        for start, (q, keys, values) in zip((0, 20), parts, strict=True):
            out.append(layer.attend(a, None, Query(start, q, keys, values)))
        found.append(torch.cat(out))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
