"""The engine on small stores: sessions stay whole through errors, and the experts are computed right."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import bounds
import pytest
import torch
from helpers import UNQUANTIZED, resident_experts, write_tiny_stores
from torch import Tensor

import qmix
from qmix import hardware
from qmix.config import Cancel, ExpertKey, QuantConfig, SamplingParams, Step
from qmix.engine import Engine, load, select_kernels
from qmix.errors import DoesNotFit, Interrupted, StoreError, UsageError
from qmix.formats import unpack
from qmix.kernels import native
from qmix.offload import setup
from qmix.offload.pool import slot_pool
from qmix.sizes import RECORD_ALIGN
from qmix.store import Store
from qmix.tokenizer import Message

FORMATS = {"int4": QuantConfig(), "nf4": QuantConfig("nf4", "int8", "", 0, 0), "keep": UNQUANTIZED}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One fp32 checkpoint in several formats."""
    return write_tiny_stores(tmp_path_factory.mktemp("engine"), FORMATS)


@pytest.fixture
def engine(stores: dict[str, Path]) -> Engine:
    return load(stores["keep"], threads=1, context=40)


def test_public_api_loads_and_generates(stores: dict[str, Path]) -> None:
    with qmix.load(stores["int4"], threads=1, context=64) as engine:
        params = SamplingParams(temperature=0, max_tokens=5)
        raw = list(engine.generate("the fox", params))
        chat = list(engine.generate([Message("user", "the fox")], params))
    assert raw[-1].summary is not None and chat[-1].summary is not None
    assert raw[-1].summary.timings.prompt_tokens != chat[-1].summary.timings.prompt_tokens


def assert_near(got: Tensor, want: Tensor, engine: Engine) -> None:
    """Of a store in fp32."""
    assert (got - want).norm() <= bounds.fp32_model(engine.model) * want.norm()


def test_prefill_then_decode_is_prefill_of_all(engine: Engine) -> None:
    ids = [1, 40, 300, 77, 9, 250, 8]
    whole, parts = engine.session(), engine.session()
    want = whole.prefill(ids)
    parts.prefill(ids[:4])
    for token in ids[4:-1]:
        parts.decode(token)
    got = parts.decode(ids[-1])
    assert_near(got, want, engine)
    assert parts.ids == whole.ids == ids


def test_trim_forgets(engine: Engine) -> None:
    session, fresh = engine.session(), engine.session()
    session.prefill([1, 2, 3, 4, 5])
    session.trim(2)
    assert_near(session.prefill([9, 10]), fresh.prefill([1, 2, 9, 10]), engine)
    assert session.ids == [1, 2, 9, 10]


def test_sessions_step_together_as_alone(engine: Engine) -> None:
    a, b, alone_a, alone_b = (engine.session() for _ in range(4))
    for session, ids in ((a, [1, 2, 3]), (alone_a, [1, 2, 3]), (b, [1, 9]), (alone_b, [1, 9])):
        session.prefill(ids)
    together = engine.step([a, b], [[5], [6]], "decode")
    assert_near(together[0], alone_a.decode(5), engine)
    assert_near(together[1], alone_b.decode(6), engine)


def test_a_full_context_is_an_error_that_changes_nothing(engine: Engine) -> None:
    session = engine.session()
    session.prefill([1, 2, 3])
    with pytest.raises(UsageError, match=r"3 \+ 38 tokens do not fit a context of 40"):
        session.prefill([4] * 38)
    assert session.ids == [1, 2, 3]
    assert_near(session.decode(7), engine.session().prefill([1, 2, 3, 7]), engine)


@pytest.mark.parametrize("checks", range(6))
def test_cancel_anywhere_changes_nothing(engine: Engine, checks: int) -> None:
    """The token is checked between layers and experts; let it be set at any of those checks."""

    class Later(Cancel):
        left = checks

        def __bool__(self) -> bool:
            self.left -= 1
            return self.left < 0

    session = engine.session()
    session.prefill([1, 2, 3])
    with pytest.raises(Interrupted):
        session.prefill([4, 5, 6], Later())
    assert session.ids == [1, 2, 3]
    assert_near(session.decode(7), engine.session().prefill([1, 2, 3, 7]), engine)


@pytest.mark.skipif(not native.levels() or os.environ.get("QMIX_NATIVE") == "off", reason="without native kernels")
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_with_int8_activations_agree_with_what_they_see(stores: dict[str, Path], tokens: int) -> None:
    """Both products of an expert see their operand in 8 bits, and nothing else is rounded on the way."""
    with Store.open(stores["int4"]) as store:
        config, quant = store.model, store.quant
        experts = resident_experts(store, select_kernels(config, quant, lambda line: None, "int8"))
        buffer = torch.empty(store.layout.record_bytes, dtype=torch.uint8)
        x = torch.randn(tokens, config.hidden, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        ids = torch.stack([torch.randperm(config.num_experts)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2).softmax(1)
        want = torch.zeros(tokens, config.hidden, dtype=torch.float64)

        def seen(v: torch.Tensor) -> torch.Tensor:
            return native.as_seen(v[None].float(), "int8", quant.group_size)[0].double()

        for token in range(tokens):
            for rank in range(2):
                store.read_record(ExpertKey(1, int(ids[token, rank])), buffer)
                w13, w2 = (unpack(m).double() for m in store.expert(ExpertKey(1, int(ids[token, rank])), buffer))
                gate, up = (w13 @ seen(x[token])).chunk(2)
                want[token] += weights[token, rank] * (w2 @ seen(torch.nn.functional.silu(gate) * up))
        got = experts(1, x, ids, weights, Step("prefill"))
        assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_experts_agree_with_a_float64_sum(stores: dict[str, Path], name: str) -> None:
    with Store.open(stores[name]) as store:
        kernels = select_kernels(store.model, store.quant, lambda line: None, "bf16" if "int" in name else "auto")
        experts = resident_experts(store, kernels)
        config, buffer = store.model, torch.empty(store.layout.record_bytes, dtype=torch.uint8)
        x = torch.randn(9, config.hidden, generator=torch.Generator().manual_seed(3))
        x = x if name == "keep" else x.bfloat16()
        ids = torch.stack([torch.randperm(config.num_experts)[:2] for _ in range(9)])
        weights = torch.rand(9, 2).softmax(1)
        want = torch.zeros(9, config.hidden, dtype=torch.float64)
        for token in range(9):
            for rank in range(2):
                store.read_record(ExpertKey(1, int(ids[token, rank])), buffer)
                w13, w2 = (unpack(m).double() for m in store.expert(ExpertKey(1, int(ids[token, rank])), buffer))
                gate, up = (w13 @ x[token].double()).chunk(2)
                want[token] += weights[token, rank] * (w2 @ (torch.nn.functional.silu(gate) * up))
        got = experts(1, x, ids, weights, Step("prefill"))
        limit = 1e-5 if name == "keep" else 1e-2  # bf16 rounds the inner activations, 2^-8 each
        assert (got - want).norm() <= limit * want.norm()
        for token in range(9):
            alone = experts(1, x[token:token + 1], ids[token:token + 1], weights[token:token + 1], Step("decode"))
            assert (alone - want[token]).norm() <= limit * want[token].norm()


def test_damage_to_the_dense_part_ends_a_load_whose_experts_are_still_read(
        stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from qmix.engine import parts as engine_module

    def damaged(*how: object) -> None:
        raise StoreError("model.norm.weight: its bytes are not those that were written")

    monkeypatch.setattr(engine_module, "load_dense", damaged)
    seen: list[int] = []

    def slowly(done: int, total: int, label: str) -> None:
        seen.append(done)
        time.sleep(0.2)  # the dense part, which is read beside, has failed by the next record

    before = set(threading.enumerate())
    with pytest.raises(StoreError, match=r"model\.norm"):
        load(stores["int4"], threads=1, progress=slowly)
    assert len(seen) <= 1
    assert set(threading.enumerate()) <= before


def test_reads_into_memory_that_is_not_there_say_so(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """They fail as reads do, but the disk is not at fault."""
    from qmix.offload import setup
    from qmix.offload.pool import Touching

    def failing_read(*how: object) -> None:
        raise StoreError("experts-00.safetensors: Bad address")

    def refused(self: Touching) -> None:
        raise DoesNotFit("the system gave no 3 GiB for 12 expert slots")

    monkeypatch.setattr(setup, "fill", failing_read)
    with pytest.raises(StoreError, match="Bad address"):
        load(stores["int4"], threads=1)
    monkeypatch.setattr(Touching, "wait", refused)
    with pytest.raises(DoesNotFit, match="12 expert slots"):
        load(stores["int4"], threads=1)


@pytest.mark.parametrize("wanted", [[], [0], [8], [2, 5, 6]])
@pytest.mark.parametrize("name", ["int4", "keep"])
def test_wanted_rows_are_those_of_all(stores: dict[str, Path], name: str, wanted: list[int]) -> None:
    with Store.open(stores[name]) as store:
        experts = resident_experts(store, select_kernels(store.model, store.quant, lambda line: None))
        x = torch.randn(9, store.model.hidden, generator=torch.Generator().manual_seed(3))
        ids = torch.stack([torch.randperm(store.model.num_experts)[:2] for _ in range(9)])
        weights = torch.rand(9, 2).softmax(1)
        layers = range(store.model.num_layers)
        want = [experts(layer, x, ids, weights, Step("prefill")) for layer in layers][-1]
        rows = [None] * (len(layers) - 1) + [torch.tensor(wanted, dtype=torch.int64)]
        got = [experts(layer, x, ids, weights, Step("prefill"), None, rows[layer]) for layer in layers][-1]
        assert got.shape == (len(wanted), store.model.hidden)
        assert torch.allclose(got, want[wanted], rtol=1e-4, atol=1e-5)
        counts = experts._watch.stats.total("prefill")
        assert [sum(row) for row in counts.counts] == [2 * 9 * 2] * len(layers), "all that was routed counts"


def test_slots_are_aligned_for_direct_reads() -> None:
    pool = slot_pool(3, 2 * RECORD_ALIGN)
    assert pool.shape == (3, 2 * RECORD_ALIGN)
    assert pool.data_ptr() % RECORD_ALIGN == 0


def test_a_damaged_record_is_refused_and_no_thread_stays(stores: dict[str, Path], tmp_path: Path) -> None:
    import shutil
    import threading

    broken = shutil.copytree(stores["int4"], tmp_path / "broken")
    path = broken / "experts-02.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 4
    path.write_bytes(data)
    before = threading.active_count()
    with pytest.raises(StoreError, match=r"layers\.2\.experts\.3"):
        load(broken)
    assert threading.active_count() == before


def test_too_little_memory_is_refused_before_loading(stores: dict[str, Path],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.hardware.memory", lambda: hardware.Memory(10**6, 10**6))
    monkeypatch.setattr(setup, "begin_pool", lambda *a: pytest.fail("allocated before it was refused"))
    with pytest.raises(DoesNotFit, match="short of"):
        load(stores["int4"])


def test_context_beyond_the_model_is_refused(stores: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="ctx-size 100000"):
        load(stores["int4"], context=100000)
