"""One token as a few calls of the native library, against the same token step by step: the same bits, always."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_tiny_checkpoint
from tokenizer_files import spm_model
from torch import Tensor

from qmix.checkpoint import Checkpoint
from qmix.config import Cancel, QuantConfig, Step
from qmix.engine import Engine, load
from qmix.errors import Interrupted, UsageError
from qmix.forward import joined
from qmix.forward.run_native import NativeToken, unsupported
from qmix.forward.runner import Runner
from qmix.kernels import native
from qmix.offload.resident import ResidentExperts
from qmix.quantize import quantize_checkpoint
from qmix.sizes import MIB

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native kernels were not built: no C compiler")

IDS = [(7 * i * i + 3 * i) % 500 for i in range(120)]


@pytest.fixture(autouse=True)
def level_of_this_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever level the environment forces: at "portable" torch attends to keys in bf16, and a layer is not one call.
    test_at_every_level goes through all of them."""
    monkeypatch.delenv("QMIX_NATIVE", raising=False)
    if "level" not in request.fixturenames and next(iter(native.levels())) == "portable":
        pytest.skip("torch attends here: a layer is not one call")


@pytest.fixture(scope="module", params=["g64", "window, int8 dense, g32"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    plain = request.param == "g64"
    source = write_tiny_checkpoint(folder / "source", vocab_size=512, **({} if plain else {"sliding_window": 40}))
    (source / "tokenizer.model").write_bytes(spm_model())
    quant = QuantConfig(dense="int4") if plain else QuantConfig(group_size=32)
    with Checkpoint.open(source) as opened:
        quantize_checkpoint(opened, folder / "store", quant, threads=1)
    return folder / "store"


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What computed single tokens."""
    calls: list[str] = []
    for kind, method, name in ((NativeToken, "logits", "layers"), (ResidentExperts, "__call__", "experts")):
        call = getattr(kind, method)

        def counted(self: Any, *args: Any, _name: str = name, _call: Any = call) -> Tensor:
            calls.append(_name)
            return _call(self, *args)

        monkeypatch.setattr(kind, method, counted)
    yield calls


def decoded(engine: Engine, first: int = 30, count: int = 60) -> Tensor:
    session = engine.session()
    session.prefill(IDS[:first])
    return torch.stack([session.decode(token) for token in IDS[first:first + count]])


def step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "_native_for", lambda self, cache: None)
    monkeypatch.setattr("qmix.offload.experts.ResidentExperts", lambda *_: None)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("activations", ["auto", "bf16"])
def test_the_same_bits(store: Path, kv: str, activations: str, used: list[str],
                       monkeypatch: pytest.MonkeyPatch) -> None:
    with load(store, threads=1, kv=kv, activations=activations) as engine:
        got = decoded(engine)
    dense_is_native = engine.store.quant.dense == "int4" or activations == "auto"
    assert used.count("layers") == (60 if dense_is_native else 0)
    # Where the layers are calls, so are their experts.
    assert used.count("experts") == (0 if dense_is_native else 60 * engine.model.num_layers)
    del used[:]
    step_by_step(monkeypatch)
    with load(store, threads=1, kv=kv, activations=activations) as engine:
        want = decoded(engine)
    assert used == []
    assert torch.equal(got, want)


@pytest.mark.parametrize("level", list(native.levels()))
def test_at_every_level(store: Path, level: str, used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMIX_NATIVE", level)
    kv = "int8" if level == "portable" else "bf16"  # where torch attends, layers are not one call
    with load(store, threads=1, kv=kv) as engine:
        got = decoded(engine, count=10)
    assert "layers" in used
    step_by_step(monkeypatch)
    with load(store, threads=1, kv=kv) as engine:
        assert torch.equal(got, decoded(engine, count=10))


def test_guesses_are_traced(store: Path, used: list[str], tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace wants guesses for the layers ahead; it has the same ones."""
    texts, logits = [], []
    for name in ("fused", "steps"):
        with load(store, threads=1, trace=tmp_path / name) as engine:
            logits.append(decoded(engine, count=20))
        texts.append((tmp_path / name).read_bytes())
        step_by_step(monkeypatch)
    assert used.count("layers") == 20
    assert torch.equal(*logits)
    assert texts[0] == texts[1] and b"ahead" in texts[0]


def test_paged_experts(store: Path, used: list[str]) -> None:
    """Beside experts that come from the disk, guesses included, the layers are one call all the same; so are the
    experts of a layer whose records are all in memory."""
    with load(store, threads=1) as engine:
        want = decoded(engine, count=20)
        ram, base = engine.plan.ram, engine.plan.ram.base
        tight = ram.fixed - ram.reserve + 256 * MIB + 5 * engine.plan.needs.record
    del used[:]
    with load(store, threads=1, ram=tight, base=base, prefetch="ahead") as engine:
        assert not engine.plan.resident
        assert torch.equal(decoded(engine, count=20), want)
        assert engine.stats()["offload"]["prefetcher"]["issued"] > 0
    assert used.count("layers") == 20
    assert 0 < used.count("experts") < 20 * engine.model.num_layers


def test_what_is_no_token_is_refused(store: Path) -> None:
    with load(store, threads=1) as engine:
        session = engine.session()
        session.prefill(IDS[:4])
        for token in (-1, 512):
            with pytest.raises(UsageError, match=f"token {token}: want 0 to 511"):
                session.decode(token)
        assert session.length == session.cache.length == 4


def test_a_dropped_engine_frees_its_memory_at_once(store: Path) -> None:
    """No cycle holds the slots: the next load may need their memory."""
    gc.collect()
    gc.disable()
    try:
        with load(store, threads=1) as engine:
            decoded(engine, count=3)
            model = engine._model
            held = [weakref.ref(engine._offload.experts), weakref.ref(model), weakref.ref(model._native)]
            del model
        del engine
        assert [ref() for ref in held] == [None, None, None]
    finally:
        gc.enable()


def test_sessions_in_turns(store: Path) -> None:
    """One set of buffers, many caches: a token reads its own session's alone."""
    with load(store, threads=1, context=128) as engine:
        want = decoded(engine, 30, 12)
    with load(store, threads=1, context=128) as engine:
        one, other = engine.session(), engine.session()
        one.prefill(IDS[:30])
        other.prefill(IDS[40:80])
        got = []
        for token in IDS[30:42]:
            got.append(one.decode(token))
            other.decode(token + 1)
        assert torch.equal(torch.stack(got), want)


@pytest.mark.parametrize("resident", [True, False])
def test_cancelled_or_failed_it_leaves_the_cache(store: Path, resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second layer, with experts as calls and as a callable."""
    monkeypatch.setattr(joined, "AT_ONCE", 1)
    with load(store, threads=1) as engine:
        if not resident:
            engine._model._resident = None
        session = engine.session()
        session.prefill(IDS[:20])
        want = session.decode(5)
        session.trim(20)
        cancel = Cancel()
        cancel.set()
        with pytest.raises(Interrupted):
            session.decode(5, cancel)
        assert session.length == session.cache.length == 20
        token = engine._model._native
        assert (token._joined is not None) == resident
        sequence, at = (token._joined._sequence, 2) if resident else (token.runs[1].sequence, 1)
        run, runs = sequence.run, []

        def failing(*calls: int) -> int | None:
            runs.append(calls)
            if len(runs) == at:
                raise MemoryError("none left")
            return run(*calls)

        monkeypatch.setattr(sequence, "run", failing)
        with pytest.raises(MemoryError):
            session.decode(5)
        assert len(runs) == at and session.length == session.cache.length == 20
        monkeypatch.undo()
        assert torch.equal(session.decode(5), want)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_statistics_and_figures_are_those_of_the_steps(store: Path, at_once: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers are one call."""
    found = []
    monkeypatch.setattr(joined, "AT_ONCE", at_once)
    for steps in (False, True):
        if steps:
            step_by_step(monkeypatch)
        with load(store, threads=1) as engine:
            decoded(engine, count=10)
            stats, figures = engine._offload.stats, engine.stats()["offload"]["decode"]
            found.append((stats.share("decode"), [figures[name] for name in ("chosen", "hits", "misses", "tokens")]))
    assert found[0] == found[1] and found[0][1][0] == 10 * engine.model.chosen


def test_logits_stay_the_callers(store: Path) -> None:
    """They are not a buffer that the next token overwrites."""
    with load(store, threads=1) as engine:
        session = engine.session()
        session.prefill(IDS[:20])
        first = session.decode(1)
        kept = first.clone()
        session.decode(2)
        assert torch.equal(first, kept)


def test_it_wants_everything_native_at_one_level(store: Path) -> None:
    with load(store, threads=1) as engine:
        model = engine._model
        cache = model.new_cache(8)
        assert unsupported(model._eager, model._weights, cache) is None
        for layer in cache.layers:
            layer.native = None
        assert unsupported(model._eager, model._weights, cache) == "torch attends"
        for layer in cache.layers:
            layer.native = native.Attention("portable")
        reason = unsupported(model._eager, model._weights, cache)
        assert reason == "products and attention are not computed at one level"
        single = Step("decode")
        assert model.forward(torch.tensor([1]), torch.tensor([0]), [cache], single).shape == (1, 512)


def test_drafts_are_the_experts_of_one_call(store: Path, used: list[str]) -> None:
    """Several tokens of a decode pass through the same table, each as alone."""
    with load(store, threads=1) as engine:
        model, count = engine._model, 6
        hidden, k = engine.model.hidden, engine.model.top_k
        x = torch.randn(count, hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
        ids = torch.tensor([[0, 1], [1, 0], [2, 3], [1, 3], [3, 2], [1, 2]])
        topk_weights = torch.rand(count, k, generator=torch.Generator().manual_seed(2))
        together = model._eager.experts(1, x, ids, topk_weights, Step("decode"), None, None)
        wanted = torch.tensor([4, 1])
        some = model._eager.experts(1, x, ids, topk_weights, Step("decode"), None, wanted)
        alone = torch.cat([model._eager.experts(1, *rows, Step("decode"), None, None) for rows in zip(
            x.split(1), ids.split(1), topk_weights.split(1), strict=True)])
        assert used == ["experts"] * (2 + count)
        assert torch.equal(together, alone) and torch.equal(some, alone[wanted])


def test_a_failing_call_is_an_error() -> None:
    bad = native.CallSequence(next(iter(native.levels())), 0, 1, [(99, b"\0" * 8)])
    with pytest.raises(MemoryError):
        bad.run()
